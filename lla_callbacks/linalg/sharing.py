"""Work that several processes share, and the promise that they fail together.

Every exchange of processes, of whatever kind, begins with :func:`meet`: a sum of a few numbers in
which each says whether it is in trouble and what it is about to do. Whoever fails between two
exchanges says so at the end of its part of the work (:func:`all_or_none`), where the others,
wherever they are, hear it at their next exchange and leave that part too; and processes that went
different ways notice before they wait for one another. So nobody has to foresee what could fail.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import (
    MeasurementError,
    NonFiniteError,
    NoSecondDerivativeError,
    OutOfMemoryError,
    described,
)

Result = TypeVar("Result")

# What a process says of its trouble, so that the others take the same way on: by position.
_KINDS = (MeasurementError, NonFiniteError, NoSecondDerivativeError, OutOfMemoryError)
# Bytes of the message that the first process in trouble sends to the others.
_WORDS = 400
# Marks an error that every process has raised, so that none has to be told.
_TOLD = "_lla_callbacks_told"


class Share(Protocol):
    """How several processes divide the work of a measurement among them."""

    rank: int
    size: int
    # How many parts of the work, one in another, are being done.
    depth: int

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a tensor, on its own device, after a meeting."""

    def same(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor, after a meeting."""

    def exchange(self, values: Tensor, *, used_up: bool = False) -> Tensor:
        """Return the sum over processes of a tensor, and nothing else.

        Args:
            values: The tensor.
            used_up: Whether its memory may be taken for the sum.
        """

    def joined(self, pieces: Tensor, dim: int) -> Tensor:
        """Return all processes' pieces, shape ``(dim, ...)``, in a row, after a meeting.

        Args:
            pieces: This process's, ``(ceil(dim / size), ...)``, fewer in the last ones.
            dim: Entries in all.
        """

    def union(self, things: list[Any]) -> list[Any]:
        """Return the things of all processes, in the order of the processes, after a meeting."""


class Alone:
    """One process."""

    rank = 0
    size = 1
    depth = 0

    def total(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def same(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def exchange(self, values: Tensor, *, used_up: bool = False) -> Tensor:
        """Return the values."""
        return values

    def joined(self, pieces: Tensor, dim: int) -> Tensor:
        """Return the piece, which is all there is."""
        return pieces

    def union(self, things: list[Any]) -> list[Any]:
        """Return the things."""
        return things


class OutOfStepError(MeasurementError):
    """Processes are at different points of the work, so that a part cannot just be left out."""


class LeftError(OutOfStepError):
    """Another process has left a part of the work, in which this one is further inside.

    Attributes:
        depth: Of the part that is left, where it becomes the other one's error.
        error: That error.
    """

    def __init__(self, depth: int, error: MeasurementError) -> None:
        super().__init__(str(error), "")
        self.depth = depth
        self.error = error


def meet(share: Share, what: str, trouble: Exception | None = None) -> None:
    """Let every process say that it is here, or in trouble.

    Args:
        share: The processes.
        what: What this one is about to do, or has just done; the same in all.
        trouble: What went wrong in this one.

    Raises:
        MeasurementError: In all of several processes if one is in trouble, and of the same kind
            in all, so that all take the same way on.
        OutOfStepError: In all, if they are at different points.
        Exception: The trouble itself, if there is one process only, or all have raised it.
    """
    if share.size == 1 or was_told(trouble):
        if trouble is not None:
            raise trouble
        return
    mine = torch.zeros(4, share.size, dtype=torch.float64)
    mine[0, share.rank] = float(trouble is not None)
    mine[1, share.rank] = float(zlib.crc32(what.encode()))
    mine[2, share.rank] = float(share.depth)
    mine[3, share.rank] = float(zlib.crc32(type(trouble).__name__.encode()))
    failed, places, depths, kinds = share.exchange(mine.reshape(-1)).reshape(4, share.size)
    alike = all(len(set(row.tolist())) == 1 for row in (places, depths, kinds))
    if trouble is not None and failed.all() and alike and _mark(trouble):
        # The same in all, so that each may say it in its own words.
        raise trouble
    if failed.any():
        first = int(torch.nonzero(failed)[0])
        depth = int(depths[failed > 0].min())
        try:
            explain_together(share, trouble, first=first)
        except MeasurementError as error:
            if depth < share.depth:
                raise told(LeftError(depth, error)) from trouble
            raise
    if len(set(places.tolist())) > 1 or len(set(depths.tolist())) > 1:
        raise told(
            OutOfStepError(
                "the processes of this run are at different points of a measurement "
                f"(here: {what}).",
                "Look for what differs between them: data, seeds, files, memory.",
            )
        )


def fail_together(share: Share, trouble: Exception | None, what: str = "a check") -> None:
    """Raise in every process if one is in trouble, so that none waits for it; see :func:`meet`."""
    meet(share, what, trouble)


def all_or_none(share: Share, compute: Callable[[], Result], what: str = "") -> Result:
    """Return what each process computes, if none of them fails; they may exchange meanwhile.

    A part of the work: whoever fails in it takes the others out of it, and no further. To go on
    without a part, catch what this raises, but for :class:`OutOfStepError`.

    Args:
        share: The processes.
        compute: What each of them does.
        what: Its name; by default that of the function.

    Raises:
        MeasurementError: As :func:`meet`.
        Exception: Likewise.
    """
    if share.size == 1:
        return compute()
    trouble: Exception | None = None
    share.depth += 1
    try:
        try:
            found = compute()
        except LeftError as error:
            if error.depth < share.depth:
                raise
            raise error.error from None
        except Exception as error:  # noqa: BLE001 - raised below, in all processes together
            trouble = error
        meet(share, f"end of {what or getattr(compute, '__qualname__', 'a part')}", trouble)
        return found
    finally:
        share.depth -= 1


def _mark(error: Exception) -> bool:
    """Mark an error as one that every process raises; return whether it can be marked."""
    try:
        setattr(error, _TOLD, True)
    except Exception:  # noqa: BLE001 - a class of the user's own may allow no attributes
        return False
    return True


def told(error: MeasurementError) -> MeasurementError:
    """Return an error marked as one that every process raises at this point."""
    setattr(error, _TOLD, True)
    return error


def was_told(error: Exception | None) -> bool:
    """Return whether every process has raised this."""
    return bool(getattr(error, _TOLD, False))


def explain_together(share: Share, trouble: Exception | None, *, first: int | None = None) -> None:
    """Raise in every process what happened in the first one that is in trouble.

    To be called by all of several processes, once all know that one is in trouble.

    Args:
        share: The processes.
        trouble: That of this one, if it has any.
        first: Which is the first, where that is known.

    Raises:
        MeasurementError: In all, of the same kind.
    """
    if first is None:
        mine = torch.zeros(share.size, dtype=torch.float64)
        mine[share.rank] = float(trouble is not None)
        first = int(torch.nonzero(share.exchange(mine)).flatten()[0])
    words = torch.zeros(1 + _WORDS, dtype=torch.float64)
    if share.rank == first:
        kinds = [i for i, kind in enumerate(_KINDS) if isinstance(trouble, kind)]
        said = described(trouble).encode(errors="replace")[:_WORDS]
        words[0] = max(kinds, default=0)
        words[1 : 1 + len(said)] = torch.tensor(list(said), dtype=torch.float64)
    sent = share.exchange(words).tolist()
    text = bytes(int(b) for b in sent[1:] if b).decode(errors="ignore")
    kind = _KINDS[int(sent[0])]
    raise told(kind(f"process {first} failed in this measurement ({text}).", "")) from trouble

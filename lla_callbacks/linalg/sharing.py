"""Work that several processes share, and the promise that they fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import (
    MeasurementError,
    NonFiniteError,
    NoSecondDerivativeError,
    OutOfMemoryError,
)

Result = TypeVar("Result")

# What a process says of its trouble, so that the others take the same way on: by position.
_KINDS = (MeasurementError, NonFiniteError, NoSecondDerivativeError, OutOfMemoryError)
# Bytes of the message that the first process in trouble sends to the others.
_WORDS = 400


class Share(Protocol):
    """How several processes divide the work of a measurement among them."""

    rank: int
    size: int

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a tensor, on its own device."""

    def same(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def total(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def same(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor


def fail_together(share: Share, trouble: Exception | None) -> None:
    """Raise in every process if one is in trouble, so that none waits for it.

    Raises:
        MeasurementError: In all of several processes, and of the same kind in all, so that all
            take the same way on.
        Exception: The trouble itself, if there is one process only.
    """
    if share.size == 1:
        if trouble is not None:
            raise trouble
        return
    mine = torch.zeros(share.size, dtype=torch.float64)
    mine[share.rank] = float(trouble is not None)
    failed = torch.nonzero(share.total(mine)).flatten().tolist()
    if failed:
        explain_together(share, trouble, first=failed[0])


def all_or_none(share: Share, compute: Callable[[], Result]) -> Result:
    """Return what each process computes for itself, if none of them fails.

    Raises:
        MeasurementError: As :func:`fail_together`.
        Exception: Likewise.
    """
    trouble: Exception | None = None
    try:
        found = compute()
    except Exception as error:  # noqa: BLE001 - raised below, in all processes together
        trouble = error
    fail_together(share, trouble)
    return found


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
        first = int(torch.nonzero(share.total(mine)).flatten()[0])
    words = torch.zeros(1 + _WORDS, dtype=torch.float64)
    if share.rank == first:
        kinds = [i for i, kind in enumerate(_KINDS) if isinstance(trouble, kind)]
        sent = f"{type(trouble).__name__}: {trouble}".encode()[:_WORDS]
        words[0] = max(kinds, default=0)
        words[1 : 1 + len(sent)] = torch.tensor(list(sent), dtype=torch.float64)
    told = share.total(words).tolist()
    text = bytes(int(b) for b in told[1:] if b).decode(errors="ignore")
    kind = _KINDS[int(told[0])]
    raise kind(f"process {first} failed in this measurement ({text}).", "") from trouble

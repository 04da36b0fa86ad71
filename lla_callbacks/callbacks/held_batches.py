"""The batches that a monitor measures on, kept through a run."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.callbacks.compat import prepared
from lla_callbacks.callbacks.own_loader import apart
from lla_callbacks.objective.batches import first_of, hold, tensors_of
from lla_callbacks.objective.counting import BatchSize, about
from lla_callbacks.objective.state import preserved


class HeldBatches:
    """Copies of whole batches on the CPU, until they have a number of samples.

    Args:
        num_samples: How many are enough.
        batch_size: The user's own word for how many a batch has.

    Attributes:
        batches: What is held so far.
        numbers: Which of its epoch's batches each was: what a step is told when it is replayed.
        complete: Whether it is enough.
    """

    def __init__(self, num_samples: int, batch_size: BatchSize = None) -> None:
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.batches: list[Any] = []
        self.numbers: list[int] = []
        self.complete = False
        self._count = 0
        self._enough = False
        self._marked: tuple[int, str] = (-1, "")

    def add(self, batch: Any, *, number: int | None = None, most: float = float("inf")) -> None:
        """Hold one more batch.

        Args:
            batch: Any structure of tensors.
            number: Which of its epoch's batches it is; by default as many as are held.
            most: Number of batches there are: then all is held that can be.
        """
        # Another process may still wait for its own.
        if not self._enough:
            # Counted first, which the user's own function may refuse.
            count = about(batch, self.batch_size)
            self.batches.append(hold(batch))
            self.numbers.append(len(self.numbers) if number is None else number)
            self._count += count
            self._enough = self._count >= self.num_samples or len(self.batches) >= most
        self.complete = self._enough

    def add_loader(self, trainer: Any, module: Any, loader: Any, seed: int) -> None:
        """Hold the first batches of a user's own loader, which must not notice.

        Nor must training, which may use the same one: what is read is a copy where that can be
        had. Random streams, and what transfer hooks change in the module, are put back.

        Raises:
            SharedLoaderError: See :func:`~lla_callbacks.callbacks.own_loader.apart`.
        """
        source = apart(trainer, module, loader)
        # Those of a loader that is read as it is; one of a class of its own may have none.
        generators = [getattr(loader, "generator", None)]
        generators.append(getattr(getattr(loader, "sampler", None), "generator", None))
        states = [(g, g.get_state()) for g in generators if g is not None]
        try:
            with preserved(module, seed=seed):
                for batch in source:
                    self.add(prepared(trainer, module, batch))
                    if self.complete:
                        break
        finally:
            for generator, state in states:
                generator.set_state(state)
        self.complete = True

    @property
    def num_held(self) -> int:
        """Samples in all."""
        return sum(about(batch, self.batch_size) for batch in self.batches)

    def keep(self, num_samples: int) -> None:
        """Drop what is beyond this many samples, where batches can be cut."""
        kept = first_of(self.batches, num_samples, self.batch_size)
        if kept and kept[-1] is not self.batches[len(kept) - 1]:
            # A view would keep the rest of its batch, in memory and in checkpoints.
            kept[-1] = hold(kept[-1])
        self.batches = kept
        self.numbers = self.numbers[: len(self.batches)]
        # As many batches as before need not be the same ones.
        self._marked = (-1, "")
        self._count = self.num_held

    def share(self, others: Iterable[HeldBatches]) -> None:
        """Take the copies of others where they are the same to the bit.

        There is one copy in memory then, and one in a checkpoint: ``torch.save`` writes a storage
        once, however many tensors look at it.
        """
        for other in others:
            for k, (mine, theirs) in enumerate(zip(self.batches, other.batches, strict=False)):
                if mine is not theirs and is_same(mine, theirs):
                    self.batches[k] = theirs

    def holds(self, batches: Sequence[Any]) -> bool:
        """Return whether these are the batches that are held, to the bit."""
        pairs = zip(self.batches, batches, strict=False)
        return len(batches) == len(self.batches) and all(a is b or is_same(a, b) for a, b in pairs)

    @property
    def is_plain(self) -> bool:
        """Whether all batches are of classes that a checkpoint can hold."""
        return all(map(is_plain, self.batches))

    def state(self) -> dict[str, Any] | None:
        """Return what is held, for a checkpoint; None if there are batches of other classes."""
        if not self.is_plain:
            return None
        return {
            "batches": list(self.batches),
            "numbers": list(self.numbers),
            "complete": self.complete,
            "count": self._count,
            "enough": self._enough,
            # Whether they are the same still is asked when they are read.
            "mark": self.mark(),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these batches from others, for a checkpoint that holds no data."""
        return {
            "numbers": list(self.numbers),
            "samples": self.num_held,
            "complete": self.complete,
            "count": self._count,
            "enough": self._enough,
            "mark": self.mark(),
        }

    def num_bytes(self) -> int:
        """Return what they take in a checkpoint."""
        return sum(t.numel() * t.element_size() for t in tensors_of(self.batches))

    def load(self, state: dict[str, Any]) -> None:
        """Hold what another run held."""
        self.batches, self.numbers = list(state["batches"]), list(state["numbers"])
        self._marked = (-1, "")
        self.complete = state["complete"]
        self._count, self._enough = state["count"], state["enough"]

    def mark(self) -> str:
        """Return a hash of all tensors, which tells whether another run holds the same."""
        if self._marked[0] != len(self.batches):
            self._marked = (len(self.batches), self._hash())
        return self._marked[1]

    def _hash(self) -> str:
        found = hashlib.sha256()
        for tensor in (part for held in tensors_of(self.batches) for part in _parts(held)):
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.layout is torch.strided:
                found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


_ATOMS = (bool, int, float, str, type(None))


def is_same(one: Any, other: Any) -> bool:
    """Return whether two held batches of plain containers are the same to the bit."""
    if type(one) is not type(other):
        return False
    if type(one) is Tensor:
        if one.is_nested or other.is_nested:  # it has no shape that could be asked
            return False
        alike = all(
            getattr(one, name) == getattr(other, name)
            for name in ("dtype", "shape", "layout", "requires_grad")
        )
        # By bytes, for which NaN is NaN.
        return alike and one.layout is torch.strided and torch.equal(_bytes(one), _bytes(other))
    if type(one) in (dict, OrderedDict):
        return is_same(list(one), list(other)) and is_same(list(one.values()), list(other.values()))
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    # Of numbers that are equal and not the same, such as 0.0 and -0.0, texts differ.
    return type(one) in _ATOMS and repr(one) == repr(other)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def is_plain(batch: Any) -> bool:
    """Return whether a checkpoint can hold a batch and be read with ``weights_only=True``."""
    if batch is None or type(batch) in (bool, int, float, str):
        return True
    if type(batch) in (dict, OrderedDict):
        return all(is_plain(key) and is_plain(item) for key, item in batch.items())
    if type(batch) in (list, tuple):
        return all(map(is_plain, batch))
    return type(batch) is Tensor and not batch.is_nested


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return the tensors that a nested or a sparse one is made of; of others, themselves."""
    if tensor.is_nested:
        return tensor.unbind()
    if tensor.layout is torch.sparse_coo:
        coalesced = tensor.coalesce()
        return coalesced.indices(), coalesced.values()
    return (tensor,)

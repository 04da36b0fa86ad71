"""Weights that stand elsewhere for a while, and come back as the very bits that they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.linalg.space import is_spread, local_part
from lla_callbacks.penalty.moving import Mover

_count_users: Any = getattr(torch._C, "_storage_Use_Count", None)
_lazy: Any = getattr(torch, "_lazy_clone", None)
_address: Any = getattr(torch._C, "_data_address", None)
# The tensor, and Python's own handle on its storage.
_ALONE = 2


class Elsewhere:
    """Where weights stand meanwhile, at the price of one copy of them.

    A weight that is alone in its memory, on a CPU, is pointed to other memory and back: its own
    memory is neither read for a copy nor written, and two of four passes over it are saved. What
    shares its memory with something (views, a state dict that somebody holds, the flat weights of
    recurrent layers, parts of distributed tensors), and anything on a device, where a captured
    graph knows addresses, is copied, written in place, and copied back.

    Attributes:
        starts: What to start from, one tensor per weight, in this process.
        targets: Where to write; the weights show it after :meth:`arrive`.
        is_away: Whether the weights are away, or may be.
        mover: Writes to targets; with memory of its own.
    """

    def __init__(self) -> None:
        self.starts: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.is_away = False
        self.mover = Mover()
        self._weights: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._pointed: list[bool] = []
        self._versions: list[int] = []
        # Which weights show a lazy copy of their target; of which it is no use.
        self._watched: set[int] = set()
        self._copied_anyway: set[int] = set()

    def leave(self, weights: Sequence[Tensor]) -> None:
        """Take the present values as where to start from, and come back to."""
        self._weights = list(weights)
        self._pointed = [_is_alone(w) for w in weights]
        here = [local_part(w).data for w in weights]
        if [b.shape for b in self._buffers] != [w.shape for w in here]:
            self._buffers = [torch.empty_like(w) for w in here]
            self._copied_anyway.clear()
        triples = list(zip(self._pointed, here, self._buffers, strict=True))
        copied = [(w, b) for pointed, w, b in triples if not pointed]
        if copied:
            torch._foreach_copy_([b for _, b in copied], [w for w, _ in copied])
        self.starts = [w if pointed else b for pointed, w, b in triples]
        self.targets = [b if pointed else w for pointed, w, b in triples]
        self._versions = [w._version for w in weights]
        # Only now: whoever interrupts what follows can put back what is there.
        self.is_away = True

    def arrive(self, watched: Iterable[int] = ()) -> None:
        """Let the weights show what was written to the targets.

        Args:
            watched: Of which weights :meth:`mirror` will want to know whether somebody has
                written them, also past autograd (``.data``, numpy).
        """
        self._watched = set()
        for i in watched:
            if self._pointed[i] and i not in self._copied_anyway and None not in (_lazy, _address):
                self._watched.add(i)
        for i, (w, target, pointed) in enumerate(
            zip(self._weights, self.targets, self._pointed, strict=True)
        ):
            if pointed:
                # Whoever writes into a lazy copy gets memory of its own first.
                w.data = _lazy(target) if i in self._watched else target

    def mirror(self, i: int) -> bool:
        """Move a weight to the other side of where it started, ``2 start - target``.

        That reads and writes as much as a copy, and needs no signs.

        Returns:
            Whether it is done: only if it is certain that the target is as it was written.
        """
        if i not in self._watched:
            return False
        weight, start, target = self._weights[i], self.starts[i], self.targets[i]
        unwritten: bool = _address(weight) == _address(target)
        # The target is alone in its memory again.
        weight.data = start
        if unwritten:
            target.lerp_(start, 2.0)
        else:
            # By the user's step, or a kernel that asks for memory to write to: once will do.
            self._copied_anyway.add(i)
        return unwritten

    def pause(self) -> None:
        """Let the weights be what they were, for a moment in which a graph may be alive."""
        if self.is_away:
            self._return()

    def resume(self) -> list[bool]:
        """Go on being away.

        Returns:
            For which weights the targets must be written again, with the same values.
        """
        self.is_away = True
        return [not pointed for pointed in self._pointed]

    def back(self) -> list[int]:
        """Let the weights be what they were; nothing happens where they are.

        Returns:
            Which weights somebody has changed in place meanwhile: their change is lost.
        """
        if not self.is_away:
            return []
        self._return()
        pairs = enumerate(zip(self._weights, self._versions, strict=True))
        return [i for i, (w, version) in pairs if w._version != version]

    def _return(self) -> None:
        items = zip(self._weights, self.starts, self.targets, self._pointed, strict=True)
        copied = []
        for w, start, target, pointed in items:
            if pointed:
                w.data = start
            else:
                copied.append((target, start))
        if copied:
            torch._foreach_copy_([t for t, _ in copied], [s for _, s in copied])
        self.is_away = False

    def forget(self) -> None:
        """Let go of the memory too."""
        self.let_go()
        self._buffers, self.mover = [], Mover()

    def let_go(self) -> None:
        """Forget the weights, so that they are alone again; memory for the next time is kept."""
        self._weights, self.starts, self.targets = [], [], []


def _is_alone(weight: Tensor) -> bool:
    """Return whether nothing else shares a weight's memory, or knows where it is."""
    if weight.device.type != "cpu" or is_spread(weight):
        return False
    return has_memory_alone(weight)


def has_memory_alone(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory, and no other tensor shares it.

    ``False`` where this torch does not tell.
    """
    if _count_users is None:
        return False
    storage, size = tensor.untyped_storage(), tensor.numel()
    fills = storage.nbytes() == size * tensor.element_size()
    return fills and size > 0 and bool(_count_users(storage._cdata) <= _ALONE)

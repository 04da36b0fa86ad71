"""The processes of a Trainer, as far as monitors need them: sums, agreement, exchange."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.callbacks.compat import data_parallel_group
from lla_callbacks.linalg.distributed import in_a_row
from lla_callbacks.linalg.sharing import all_or_none, meet


class Processes:
    """A Trainer's processes, as far as they hold different batches.

    Under tensor parallelism several processes compute the same batch together and count as one.

    Args:
        trainer: The Trainer; ``None``: this process alone.

    Attributes:
        rank: Number of this process.
        size: How many there are.
        depth: How many parts of the work, one in another, are being done.
    """

    def __init__(self, trainer: Any = None) -> None:
        self._strategy: Any = getattr(trainer, "strategy", None)
        self._group, self.rank, self.size = data_parallel_group(trainer)
        self.depth = 0
        # All processes there are must come to the same decisions.
        self._everyone = int(getattr(trainer, "world_size", 1))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a tensor, on its own device; one exchange."""
        if self.size == 1:
            return values
        meet(self, f"sum of {values.numel()} {values.dtype}")
        return self.exchange(values)

    def exchange(self, values: Tensor, *, used_up: bool = False) -> Tensor:
        """Return the sum over processes of a tensor, for meetings."""
        return values if self.size == 1 else self._sum(values, self._group, used_up=used_up)

    def joined(self, pieces: Tensor, dim: int) -> Tensor:
        """Return all processes' pieces, shape ``(dim, ...)``, in a row; one exchange."""
        if self.size == 1:
            return pieces
        meet(self, f"pieces of {dim} {pieces.dtype}")
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            size = -(-dim // self.size)
            whole = pieces.new_zeros(dim, *pieces.shape[1:])
            whole[self.rank * size : self.rank * size + len(pieces)] = pieces
            return self.exchange(whole, used_up=True)
        device = self._strategy.root_device
        return in_a_row(pieces, dim, self.rank, self.size, self._group, device)

    def same(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor."""
        if self.size == 1:
            return tensor
        meet(self, f"copy of {tensor.numel()} {tensor.dtype}")
        shared: Tensor = self._strategy.broadcast(tensor.cpu(), src=0)
        return shared.to(tensor.device)

    def agree(self, decision: bool) -> bool:
        """Return the first process's decision, for what depends on clocks."""
        return bool(self.first(decision))

    def first(self, thing: Any) -> Any:
        """Return the first process's thing, for what depends on clocks."""
        return thing if self._everyone == 1 else self._strategy.broadcast(thing, src=0)

    def all(self, decision: bool) -> bool:
        """Return whether all processes say yes."""
        if self._everyone == 1:
            return decision
        return float(self._sum(torch.tensor([float(decision)]), None)[0]) == self._everyone

    def union(self, things: list[Any], *, alike: bool = False) -> list[Any]:
        """Return the things of all processes, in the order of the processes.

        Args:
            things: Those of this process.
            alike: Whether all processes have the same ones; then the first one's are returned.
        """
        if self.size == 1:
            return things
        # Packed first: what cannot be packed must fail in all before any waits for it.
        packed = all_or_none(self, lambda: pickle.dumps(things))
        meet(self, "union")
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, packed, group=self._group)
        return [thing for part in every[: 1 if alike else None] for thing in pickle.loads(part)]

    def _sum(self, values: Tensor, group: Any, *, used_up: bool = False) -> Tensor:
        # Summed in place, where the strategy's backend can reach it.
        moved = values.to(self._strategy.root_device)
        if moved is values and not used_up:
            moved = values.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Without the barrier that a strategy's own reduce puts before each sum.
            torch.distributed.all_reduce(moved, group=group)
        else:
            moved = self._strategy.reduce(moved, reduce_op="sum")
        return moved.to(values.device)

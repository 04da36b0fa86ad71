"""The processes of a Trainer, as far as monitors need them: sums, agreement, exchange."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.landscape.grid import fail_together


class Processes:
    """A Trainer's processes, through its strategy.

    Args:
        trainer: The Trainer; ``None``: this process alone.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    def __init__(self, trainer: Any = None) -> None:
        self._strategy: Any = getattr(trainer, "strategy", None)
        self.rank = int(getattr(trainer, "global_rank", 0))
        self.size = int(getattr(trainer, "world_size", 1))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a tensor on the CPU."""
        if self.size == 1:
            return values
        # A copy: some strategies sum in place.
        moved = values.clone().to(self._strategy.root_device)
        summed: Tensor = self._strategy.reduce(moved, reduce_op="sum")
        return summed.to(values.device)

    def same(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor."""
        if self.size == 1:
            return tensor
        shared: Tensor = self._strategy.broadcast(tensor.cpu(), src=0)
        return shared.to(tensor.device)

    def agree(self, decision: bool) -> bool:
        """Return the first process's decision, for what depends on clocks."""
        return decision if self.size == 1 else bool(self._strategy.broadcast(decision, src=0))

    def all(self, decision: bool) -> bool:
        """Return whether all processes say yes."""
        if self.size == 1:
            return decision
        return float(self.total(torch.tensor([float(decision)]))[0]) == self.size

    def union(self, things: list[Any], *, alike: bool = False) -> list[Any]:
        """Return the things of all processes, in the order of the processes.

        Args:
            things: Those of this process.
            alike: Whether all processes have the same ones; then the first one's are returned.
        """
        if self.size == 1:
            return things
        # Packed first: what cannot be packed must fail in all before any waits for it.
        try:
            packed, trouble = pickle.dumps(things), None
        except Exception as error:  # noqa: BLE001 - raised below, in all processes together
            packed, trouble = b"", error
        fail_together(self, trouble)
        sources = [0] if alike else range(self.size)
        every = [pickle.loads(self._strategy.broadcast(packed, src=rank)) for rank in sources]
        return [thing for part in every for thing in part]

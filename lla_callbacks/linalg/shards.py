"""Vectors in the shards of parameters that are spread over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.linalg.distributed import in_a_row, is_spread, local_part, spread_like
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.probes import drawn_signs
from lla_callbacks.linalg.sharing import Share, meet
from lla_callbacks.linalg.vectors import Pieces


class Shards(Pieces):
    """Vectors of which each process holds what it has of each parameter.

    What several processes have (copies) counts in the first of them.

    Args:
        parameters: The parameters in the order of the vector; torch's distributed tensors among
            them.
        share: All processes.

    Raises:
        MeasurementError: If parts and copies do not make up the parameters.
    """

    def __init__(self, parameters: Sequence[Tensor], share: Share) -> None:
        ranges: list[slice] = []
        stop = 0
        for parameter in parameters:
            start, stop = stop, stop + local_part(parameter).numel()
            if not answers_for(parameter, share.rank) or start == stop:
                continue
            if ranges and ranges[-1].stop == start:
                ranges[-1] = slice(ranges[-1].start, stop)
            else:
                ranges.append(slice(start, stop))
        dim = sum(p.numel() for p in parameters)
        counted = None if ranges == [slice(0, stop)] else ranges
        super().__init__(dim, stop, share, counted)
        self._parameters = parameters
        mine = float(sum(r.stop - r.start for r in ranges))
        together = int(self._added(torch.tensor([mine], dtype=torch.float64))[0])
        if together != dim:
            raise MeasurementError(
                f"parameters of {dim} entries are spread over the processes in a way that is not "
                f"known: {together} entries are accounted for.",
                "Use one mesh of devices that has every process, or measure a checkpoint.",
            )

    def rademacher(
        self, source: torch.Generator, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return independent signs: the same vector, however many processes hold it."""
        parts = []
        for parameter in self._parameters:
            # One parameter at a time is whole, in a quarter of its memory.
            drawn = [signs for _, signs in drawn_signs(parameter.numel(), source)]
            signs = torch.cat(drawn).to(parameter.device).reshape(parameter.shape)
            part = local_part(spread_like(signs, parameter))
            parts.append(part.reshape(-1).to(device=device, dtype=dtype))
        return torch.cat(parts)


def answers_for(parameter: Tensor, rank: int) -> bool:
    """Return whether what a process has of a parameter counts: of copies the first one does."""
    if not is_spread(parameter):
        return rank == 0
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    place = mesh.get_coordinate()
    if place is None:
        return False
    copied = any(
        p.is_replicate() and at > 0
        for p, at in zip(parameter.placements, place, strict=True)  # type: ignore[attr-defined]
    )
    # Of meshes that hold copies of one another, the first process's counts.
    return not copied and bool((mesh.mesh == 0).any())


class Everyone:
    """All processes that there are, where a measurement does not share its work among them.

    Args:
        device: Where the processes can reach what they exchange.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.depth = 0
        self._device = device

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a tensor, on its own device, after a meeting."""
        meet(self, f"sum of {values.numel()} {values.dtype}")
        return self.exchange(values)

    def same(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor, after a meeting."""
        return self.total(tensor if self.rank == 0 else torch.zeros_like(tensor))

    def exchange(self, values: Tensor, *, used_up: bool = False) -> Tensor:
        """Return the sum over processes of a tensor, and nothing else."""
        if self.size == 1:
            return values
        moved = values.to(self._device)
        if moved is values and not used_up:
            moved = values.clone()
        torch.distributed.all_reduce(moved)
        return moved.to(values.device)

    def joined(self, pieces: Tensor, dim: int) -> Tensor:
        """Return all processes' pieces, shape ``(dim, ...)``, in a row, after a meeting."""
        meet(self, f"pieces of {dim} {pieces.dtype}")
        return in_a_row(pieces, dim, self.rank, self.size, None, self._device)

    def union(self, things: list[Any]) -> list[Any]:
        """Return the things of all processes, in the order of the processes, after a meeting."""
        meet(self, "union")
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, things)
        return [thing for part in every for thing in part]


def everyone(share: Share | None, device: torch.device) -> Share:
    """Return all processes: those that share the work, if that is all of them."""
    if share is not None and share.size == torch.distributed.get_world_size():
        return share
    return Everyone(device)

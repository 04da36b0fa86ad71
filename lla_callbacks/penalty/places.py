"""Which places of a distributed tensor a process has, and sums over what it is spread over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lla_callbacks.linalg.space import is_spread, local_part


def held_places(tensor: Tensor) -> list[Tensor] | None:
    """Return which places along each dimension this process has; ``None``: all of them."""
    if not is_spread(tensor):
        return None
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    found = []
    for dim, size in enumerate(tensor.shape):
        along = [_along_first(p, dim) for p in placements]
        places = torch.arange(size, device=local_part(tensor).device)
        whole_one = DTensor.from_local(places, mesh, [Replicate()] * mesh.ndim, run_check=False)
        found.append(whole_one.redistribute(mesh, along).to_local())
    return found


def _along_first(placement: Any, dim: int) -> Any:
    """Return the placement of one dimension's places, as a vector, beside that of a tensor."""
    from torch.distributed.tensor import Replicate

    if not (hasattr(placement, "dim") and placement.dim == dim):
        return Replicate()
    if hasattr(placement, "split_factor"):
        return type(placement)(0, split_factor=placement.split_factor)
    return type(placement)(0)


def summed_over(like: Tensor, local: Tensor) -> Tensor:
    """Return a share of this process as a tensor whose whole is the sum over processes."""
    if not is_spread(like):
        return local
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    kinds = [Partial() if hasattr(p, "dim") else Replicate() for p in placements]
    return DTensor.from_local(local, mesh, kinds, run_check=False)

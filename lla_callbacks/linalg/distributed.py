"""Torch's distributed tensors, spread over processes: their parts and their wholes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    """Return whether a tensor is one of torch's distributed ones, spread over processes."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its entries, gathered from the processes it is spread over."""
    if not is_spread(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, sharing its memory."""
    if not is_spread(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def of_part(part: Tensor, like: Tensor) -> Tensor:
    """Return a tensor spread as another one is, from what this process has of it, flat."""
    if not is_spread(like):
        return part.reshape(like.shape)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.reshape(local_part(like).shape),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return what this process has of a tensor once it is spread as another one is."""
    if not is_spread(like):
        return whole(tensor)
    if not is_spread(tensor):
        return local_part(spread_like(tensor, like))
    if tensor.placements != like.placements:  # type: ignore[attr-defined]
        # Gradients may still be sums to be taken.
        tensor = tensor.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return local_part(tensor)


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, the same in every process, spread over them as another one is."""
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = like.device_mesh  # type: ignore[attr-defined]
    # Every process has all of it, so nothing needs to be sent.
    everywhere = distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    return everywhere.redistribute(mesh, like.placements)  # type: ignore[attr-defined]


def in_a_row(pieces: Tensor, dim: int, rank: int, size: int, group: Any, device: Any) -> Tensor:
    """Return all processes' pieces, shape ``(dim, ...)``, in a row; one exchange.

    Args:
        pieces: This process's, ``(ceil(dim / size), ...)``, fewer in the last ones.
        dim: Entries in all.
        rank: Of this process in the group.
        size: Of the group.
        group: Of processes; ``None``: all.
        device: Where they can reach what they exchange.
    """
    length, rest = -(-dim // size), pieces.shape[1:]
    whole = torch.empty(length * size, *rest, dtype=pieces.dtype, device=device)
    mine = pieces.to(device).contiguous()
    if len(mine) < length:
        mine = torch.cat([mine, mine.new_zeros(length - len(mine), *rest)])
    torch.distributed.all_gather(list(torch.split(whole, length)), mine, group=group)
    return whole[:dim].to(pieces.device)

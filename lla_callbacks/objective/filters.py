"""What a filter of a parameter is: whatever makes one output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lla_callbacks.linalg.distributed import part_like, whole
from lla_callbacks.linalg.space import ParameterSpace

# Entries that are squared at once.
PIECE = 2**18


def transposed_groups(module: nn.Module) -> dict[int, int]:
    """Return the groups of each transposed convolution, by the identity of its weight."""
    return {id(m.weight): m.groups for m in module.modules() if isinstance(m, _ConvTransposeNd)}


def filter_scales(module: nn.Module, space: ParameterSpace) -> Tensor:
    """Return ``||w_f||^2 / n_f`` of the filter that each entry belongs to, ``(length,)``.

    The second moment of a filter-normalized Gaussian direction: ``E phi phi' = diag(scales)``
    within a filter, and between two the directions are independent. Biases and gains (parameters
    of one dimension) stand still, as in Li et al. 2018.

    Args:
        module: Owner of the parameters.
        space: Their layout.
    """
    groups = transposed_groups(module)
    scales = torch.zeros(space.length, dtype=space.dtype)
    for name, tensor in zip(space.names, space.tensors, strict=True):
        if tensor.ndim < 2:
            continue
        weights = whole(tensor.detach()).cpu()
        rows = filters_as_rows(weights, groups.get(id(tensor)))
        few = max(1, PIECE // rows.shape[1]) if rows.shape[1] else 1
        means = torch.empty(len(rows), 1, dtype=torch.float64)
        for to, part in zip(torch.split(means, few), torch.split(rows, few), strict=True):
            torch.mean(part.double().square(), dim=1, keepdim=True, out=to)
        squares = means.to(space.dtype).expand_as(rows)
        if tensor.numel() == scales[space.slices[name]].numel() and id(tensor) not in groups:
            # Row by row, where a whole copy of the weights is not needed.
            scales[space.slices[name]].view(rows.shape).copy_(squares)
            continue
        back = filters_as_tensor(squares, weights.shape, groups.get(id(tensor)))
        scales[space.slices[name]] = part_like(back.to(tensor.device), tensor).cpu().reshape(-1)
    return scales


def filters_as_rows(tensor: Tensor, groups: int | None) -> Tensor:
    """Return one filter a row; ``groups`` marks a transposed convolution."""
    if groups is None:
        return tensor.reshape(tensor.shape[0], -1)
    # (in, out / groups, ...): an output channel takes its group's inputs.
    inputs, outputs = tensor.shape[:2]
    grouped = tensor.reshape(groups, inputs // groups, outputs, -1)
    return grouped.transpose(1, 2).reshape(groups * outputs, -1)


def filters_as_tensor(rows: Tensor, shape: torch.Size, groups: int | None) -> Tensor:
    """Return a parameter of rows of filters, the inverse of :func:`filters_as_rows`."""
    if groups is None:
        return rows.reshape(shape)
    inputs, outputs = shape[:2]
    grouped = rows.reshape(groups, outputs, inputs // groups, -1)
    return grouped.transpose(1, 2).reshape(shape)

"""Linear layers and cross entropy for many weights at once, as single large operations."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lla_callbacks.objective.twice_differentiable import elementary_normalization

_functorch: Any = torch._C._functorch
# Fewer outputs or classes than this are gone through the other way round (measured with 2 and 10:
# a layer in a third of the time, the loss in a third).
NARROW = 16
# Of cross entropy.
_DEFAULTS = {
    "weight": None, "size_average": None, "ignore_index": -100, "reduce": None,
    "reduction": "mean", "label_smoothing": 0.0,
}  # fmt: skip


def batched_forms() -> AbstractContextManager[object]:
    """Return the context in which vmap finds forms of its own for frequent operations.

    Normalization is that of
    :func:`~lla_callbacks.objective.twice_differentiable.elementary_normalization`. A linear
    layer, which torch's batching rules take apart into five operations, and cross entropy, a
    dozen, are one call for all points. What has another shape than expected goes torch's way. The
    values agree to rounding; for use without gradients.
    """
    return elementary_normalization({F.linear: _linear, F.cross_entropy: _cross_entropy})


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    level = _level(input, weight, bias)
    if level is None or input.ndim < 2 or weight.ndim != 2 or not _is_batched(weight):
        return F.linear(input, weight, bias)
    with torch._C.DisableTorchFunction():
        weight = _stacked(weight, 0)
        count, width, _ = weight.shape
        x = _stacked(input, count)
        flat = x if x.ndim == 3 else x.reshape(count, -1, x.shape[-1])
        if bias is not None:
            bias = _stacked(bias, count)
        if width < NARROW and x.ndim == 3:
            # A product of few columns is slower than one of few rows.
            if bias is None:
                found = torch.bmm(weight, flat.mT)
            else:
                found = torch.baddbmm(bias[:, :, None], weight, flat.mT)
            return _batched(found.mT, level)
        if bias is None:
            found = torch.bmm(flat, weight.mT)
        else:
            found = torch.baddbmm(bias[:, None], flat, weight.mT)
        return _batched(found if x.ndim == 3 else found.view(*x.shape[:-1], width), level)


def _cross_entropy(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    level = _level(input, target)
    plain = (
        level is not None
        and not args
        and {**_DEFAULTS, **kwargs} == _DEFAULTS
        and _is_batched(input)
        and not _is_batched(target)
        and (input.ndim, target.ndim, target.dtype) == (2, 1, torch.int64)
    )
    # The mean would leave out what is ignored.
    if not plain or bool((target < 0).any()):
        return F.cross_entropy(input, target, *args, **kwargs)
    with torch._C.DisableTorchFunction():
        logits = _stacked(input, 0)
        count, size, classes = logits.shape
        if classes < NARROW:
            # Along the first dimension, where numbers of all samples go through at once.
            flat = logits.movedim(2, 0).reshape(classes, count * size)
            chosen = flat.log_softmax(0).gather(0, target.repeat(count)[None])
            return _batched(chosen.view(count, size).mean(1).neg(), level)
        flat = logits.reshape(count * size, classes)
        each = F.cross_entropy(flat, target.repeat(count), reduction="none")
        return _batched(each.view(count, size).mean(1), level)


def _is_batched(tensor: Tensor) -> bool:
    found: bool = _functorch.is_batchedtensor(tensor)
    return found


def _level(*tensors: Tensor | None) -> int | None:
    """Return the level of vmap that tensors belong to, None if there is not exactly one."""
    levels = {_functorch.maybe_get_level(t) for t in tensors if t is not None and _is_batched(t)}
    return levels.pop() if len(levels) == 1 else None


def _stacked(tensor: Tensor, count: int) -> Tensor:
    """Return what a tensor is for all points, the points first."""
    if not _is_batched(tensor):
        return tensor.expand(count, *tensor.shape)
    place = _functorch.maybe_get_bdim(tensor)
    found: Tensor = _functorch.get_unwrapped(tensor)
    return found.movedim(place, 0) if place else found


def _batched(tensor: Tensor, level: int | None) -> Tensor:
    """Return what all points have as the tensor of one, in the eyes of vmap."""
    found: Tensor = _functorch._add_batch_dim(tensor, 0, level)
    return found

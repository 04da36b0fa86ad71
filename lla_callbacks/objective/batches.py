"""Batches of any structure: how many samples, copies, parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.interrupts import shielded
from lla_callbacks.objective.precision import widened_half
from lla_callbacks.objective.tensor_copies import separate


def sample_count(batch: Any) -> int:
    """Return the number of samples in a batch: the first tensor's leading size.

    Objects that are no plain container (a graph batch, say) answer with ``num_graphs`` or
    ``len``. A batch without either counts as one sample.
    """
    tensors = tensors_of(batch)
    for tensor in tensors:
        if tensor.ndim:
            return int(tensor.shape[0])
    if tensors:
        return 1
    for attribute in ("num_graphs", "batch_size"):
        if isinstance(getattr(batch, attribute, None), int):
            return int(getattr(batch, attribute))
    return len(batch) if hasattr(batch, "__len__") else 1


def first_samples(batches: Iterable[Any], num_samples: int | None) -> Iterator[Any]:
    """Yield whole batches until they have at least this many samples, all for ``None``."""
    count = 0
    for batch in batches:
        yield batch
        count += sample_count(batch)
        if num_samples is not None and count >= num_samples:
            return


def tensors_of(batch: Any) -> list[Tensor]:
    """Return every tensor in a batch of nested containers, in order."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append, allow_frozen=True)
    return found


def hold(batch: Any) -> Any:
    """Return a copy of a batch on the CPU that shares nothing with it.

    Objects of whatever class are copied, each once; modules and what belongs to a Trainer stay
    what they are, and what cannot be copied becomes a stand-in that refuses to be used.
    """

    def held(tensor: Tensor) -> Tensor:
        return _like(tensor, tensor.detach().to("cpu", copy=True))

    return Copier(keeps_machinery=True).mapped(batch, (None, "batch"), held)


@shielded
def fresh(
    batch: Any, device: torch.device, *, widen: bool = False, copier: Copier | None = None
) -> Any:
    """Return a copy of a held batch on a device, free to be changed by a training step.

    Args:
        batch: The batch.
        device: Where to.
        widen: Whether half-precision tensors become float32.
        copier: What copies the module's attributes meanwhile, so that objects which the batch
            shares with them stay shared.
    """

    def move(tensor: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled() or tensor.is_inference():
            # An ordinary tensor also out of one that was made under inference mode.
            with torch.inference_mode(False):
                moved = tensor.detach().to(device, copy=True)
        elif tensor.device == device:
            moved = separate(tensor)
        else:
            moved = tensor.detach().to(device, copy=True)
        return _like(tensor, widened_half(moved) if widen else moved)

    copier = copier or Copier(keeps_machinery=True)
    return copier.mapped(batch, (None, "batch"), move)


def split(batch: Any, size: int) -> Iterator[Any]:
    """Yield parts of at most ``size`` samples; tensors of another leading size are shared.

    Raises:
        TypeError: If the batch holds no tensor that could be split.
    """
    count = sample_count(batch)
    if not any(t.ndim and t.shape[0] == count for t in tensors_of(batch)):
        raise TypeError(
            f"a batch of type {type(batch).__name__} cannot be split: leave out microbatch_size."
        )
    for start in range(0, count, size):
        part = slice(start, start + size)

        def cut(tensor: Tensor, part: slice = part) -> Tensor:
            if not tensor.ndim or tensor.shape[0] != count:
                return tensor
            return tensor.detach()[part].requires_grad_(tensor.requires_grad)

        yield Copier(keeps_machinery=True).mapped(batch, (None, "batch"), cut)


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    """Return a copy that asks for gradients where the original is a leaf that does."""
    if tensor.requires_grad and tensor.is_leaf and not copied.is_inference():
        copied.requires_grad_()
    return copied


def first_of(batches: list[Any], num_samples: int) -> list[Any]:
    """Return the first samples of batches: whole ones while they fit, then a part of the next.

    A batch that cannot be cut goes in whole if it is the first, and is left out otherwise.

    Args:
        batches: Held batches.
        num_samples: How many samples, at most where batches can be cut.
    """
    found: list[Any] = []
    left = num_samples
    for batch in batches:
        count = sample_count(batch)
        if left <= 0:
            break
        if count > left:
            try:
                batch = next(split(batch, left))
            except TypeError:
                if found:
                    break
        found.append(batch)
        left -= count
    return found

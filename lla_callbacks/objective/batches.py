"""Batches of any structure: how many samples, copies, parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.counting import (
    BatchSize,
    about,
    cut_of,
    known_count,
    sample_count,
)
from lla_callbacks.objective.interrupts import shielded
from lla_callbacks.objective.precision import widened_half
from lla_callbacks.objective.tensor_copies import separate


def first_samples(
    batches: Iterable[Any], num_samples: int | None, batch_size: BatchSize = None
) -> Iterator[Any]:
    """Yield whole batches until they have at least this many samples, all for ``None``."""
    count = 0
    for batch in batches:
        yield batch
        if num_samples is not None:
            count += about(batch, batch_size)
            if count >= num_samples:
                return


def tensors_of(batch: Any) -> list[Tensor]:
    """Return every tensor in a batch of nested containers, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        # Put together anew, which some classes of tuples are particular about.
        return tensor

    apply_to_collection(batch, Tensor, note, allow_frozen=True)
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


def copies_of(batch: Any, device: torch.device) -> Callable[[Copier], Any]:
    """Return what copies a batch for each of many evaluations; see :func:`fresh`.

    Batches that :func:`is_plain_batch` goes past the general way, which costs a small network as
    much as a tenth of its pass.
    """
    if not is_plain_batch(batch, device):
        return lambda copier: fresh(batch, device, copier=copier)
    numbers = [id(t) for t in _entries(batch)]

    def copy(copier: Copier) -> Any:
        # What the module knows too must stay one thing.
        if not copier.memo.keys().isdisjoint(numbers):
            return fresh(batch, device, copier=copier)
        return refilled(batch, separate)

    return copy


def is_plain_batch(batch: Any, device: torch.device) -> bool:
    """Return whether a batch is a tensor with a shape, or a flat container of some, no more."""
    if type(batch) not in (Tensor, tuple, list, dict):
        return False
    parts = _entries(batch)
    if len({id(t) for t in parts}) < len(parts):
        return False
    named = type(batch) is not dict or all(type(key) is str for key in batch)
    return named and all(_is_plain(t, device) for t in parts)


def refilled(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch that :func:`is_plain_batch` with what a function makes of its tensors."""
    if type(batch) is tuple:
        return tuple([function(t) for t in batch])
    if type(batch) is list:
        return [function(t) for t in batch]
    if type(batch) is dict:
        return {key: function(t) for key, t in batch.items()}
    return function(batch)


def _entries(batch: Any) -> list[Any]:
    if isinstance(batch, Tensor):
        return [batch]
    return list(batch.values() if isinstance(batch, dict) else batch)


def _is_plain(value: Any, device: torch.device) -> bool:
    return (
        type(value) is Tensor
        and value.device == device
        and not (value.requires_grad or value.is_inference() or value.is_nested or value.__dict__)
    )


def split(batch: Any, size: int, count: int | None = None, *, strict: bool = True) -> Iterator[Any]:
    """Yield parts of at most ``size`` samples, tensors and lists of samples alike.

    Args:
        batch: The batch.
        size: Samples in a part.
        count: Samples in the batch; ``None``: those that it tells.
        strict: Whether every entry must have them; else one of another size goes into each part.

    Raises:
        UnknownSizeError: If the batch does not tell how many samples it has.
        TypeError: If it is not known along what it could be split.
    """
    count = sample_count(batch) if count is None else count
    part_of = cut_of(batch, count, strict=strict)
    for start in range(0, count, size):
        known = part_of(slice(start, start + size))
        copier = Copier(known, keeps_machinery=True)
        yield copier.mapped(batch, (None, "batch"), lambda tensor: tensor)


def part_counts(count: int, size: int) -> list[int]:
    """Return how many samples the parts of a batch have that is split."""
    return [min(size, count - start) for start in range(0, count, size)]


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    """Return a copy that asks for gradients where the original is a leaf that does."""
    if tensor.requires_grad and tensor.is_leaf and not copied.is_inference():
        copied.requires_grad_()
    return copied


def first_of(batches: list[Any], num_samples: int, batch_size: BatchSize = None) -> list[Any]:
    """Return the first samples of batches: whole ones while they fit, then a part of the next.

    A batch that cannot be cut, or of which it is not known along what, goes in whole if it is the
    first, and is left out otherwise.

    Args:
        batches: Held batches.
        num_samples: How many samples, at most where batches can be cut.
        batch_size: The user's own word for how many a batch has.
    """
    found: list[Any] = []
    left = num_samples
    for batch in batches:
        count = about(batch, batch_size)
        if left <= 0:
            break
        if count > left:
            part = _cut(batch, left, batch_size)
            if part is None and found:
                break
            batch = batch if part is None else part
        found.append(batch)
        left -= count
    return found


def _cut(batch: Any, size: int, batch_size: BatchSize) -> Any:
    """Return a batch's first samples, or None if it is not known which they are."""
    try:
        part = next(split(batch, size, sample_count(batch, batch_size)))
        return part if known_count(part, batch_size) == size else None
    except Exception:  # noqa: BLE001 - also of the user's own function, which may refuse a part
        return None

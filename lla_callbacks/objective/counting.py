"""How many samples a batch has, where that can be told, and along what it can be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.objective.checks import function_of, shown, whole

# The user's own word for it: a number of every batch, or a function of the batch.
BatchSize = int | Callable[[Any], int] | None
REMEDY = "Give batch_size=, a number of samples or callable(batch) that returns it."
# What has no sizes of its own.
_PLAIN = (str, bytes, bool, int, float, complex, type(None))


class UnknownSizeError(MeasurementError):
    """How many samples a batch has cannot be told, and a number depends on it."""


def batch_size_of(name: str, value: Any) -> Any:
    """Return a setting ``batch_size``: a whole number, a function of a batch, or None."""
    form = ", callable(batch) -> number of samples"
    if value is not None and callable(value) and not isinstance(value, Tensor):
        return function_of(name, value, form.removeprefix(", "), 1)
    return whole(name, value, 1, none=True, other=f"{form}, or None")


def known_count(batch: Any, batch_size: BatchSize = None) -> int | None:
    """Return the number of samples, or None if the batch does not tell.

    Args:
        batch: Its entries (what a list, a mapping or a namespace holds) each offer sizes: a tensor
            its leading one, a list its length, an object ``num_graphs``, ``batch_size`` or
            ``len``. What all entries offer is known; what offers none (a scalar) has no say.
        batch_size: A number holds for every batch, save for smaller ones whose entries agree (the
            last one of an epoch, a part of one).

    Raises:
        UnknownSizeError: If ``batch_size`` returns no number.
    """
    if callable(batch_size):
        found = batch_size(batch)
        try:
            return int(whole("batch_size", found, 1))
        except ValueError:
            raise UnknownSizeError(
                f"batch_size= returned {shown(found)} for a batch of type {type(batch).__name__}.",
                "Let it return a whole number of at least 1.",
            ) from None
    told = _agreed(batch)
    if batch_size is None:
        return told
    return told if told is not None and told < batch_size else batch_size


def sample_count(batch: Any, batch_size: BatchSize = None) -> int:
    """Return the number of samples in a batch; see :func:`known_count`.

    Raises:
        UnknownSizeError: If it cannot be told.
    """
    found = known_count(batch, batch_size)
    if found is None:
        raise UnknownSizeError(
            f"how many samples a batch of type {type(batch).__name__} has cannot be told: "
            f"{_words(batch)}.",
            REMEDY,
        )
    return found


def about(batch: Any, batch_size: BatchSize = None) -> int:
    """Return the number of samples; where that is not known, the first size that is offered."""
    found = known_count(batch, batch_size)
    if found is None:
        found = next(min(sizes) for _, sizes in _offers(batch) if sizes)
    return max(1, found)


def counts_of(batches: Sequence[Any], batch_size: BatchSize = None) -> list[int]:
    """Return each batch's number of samples, which are their weights and stand in every figure.

    Raises:
        UnknownSizeError: If one does not tell.
    """
    return [sample_count(batch, batch_size) for batch in batches]


def cut_of(batch: Any, count: int, *, strict: bool) -> Callable[[slice], list[tuple[Any, Any]]]:
    """Return what makes a part: pairs of a list, tensor or array and what it is in the part.

    Args:
        batch: The batch.
        count: Its samples, known.
        strict: Whether every entry must have samples; else one of another size is shared.

    Raises:
        TypeError: If it is not known along what it is to be cut.
    """
    whole_ones: list[Any] = []
    doubtful: list[Any] = []

    def look(entry: Any) -> bool:
        """Note what is to be cut in an entry; return whether it is cut, or has no samples."""
        sizes = _sizes(entry)
        if not sizes:
            return True
        if isinstance(entry, (Tensor, np.ndarray)):
            if count in sizes:
                whole_ones.append(entry)
            return count in sizes
        inner = _held(entry)
        listed = isinstance(entry, (list, tuple)) and not hasattr(entry, "_fields")
        if listed and len(entry) == count:
            # As many tensors as each has rows: images of as many channels, or views.
            (doubtful if count in _across(entry) else whole_ones).append(entry)
            return True
        if inner is None:
            if count in sizes:
                raise TypeError  # an object of its own kind
            return False
        return all([look(item) for item in inner])

    trouble = TypeError(
        f"a batch of type {type(batch).__name__} cannot be split along its {count} samples: "
        f"{_words(batch)}; leave out microbatch_size."
    )
    try:
        if _may_be_samples(batch) and len(batch) == count:
            return lambda where: [(batch, batch[where])]
        cut = all([look(entry) for entry in _entries(batch)])
    except TypeError:
        raise trouble from None
    # Another list beside them tells that these are lists of samples too.
    told = any(isinstance(one, (list, tuple)) for one in whole_ones)
    if not told and not all(map(_are_images, doubtful)):
        raise trouble
    whole_ones += doubtful
    if not whole_ones or (strict and not cut):
        raise trouble

    def part(where: slice) -> list[tuple[Any, Any]]:
        return [(one, _sliced(one, where)) for one in whole_ones]

    return part


def _sliced(one: Any, where: slice) -> Any:
    if isinstance(one, Tensor):
        return one.detach()[where].requires_grad_(one.requires_grad)
    return one[where]


def _are_images(items: Sequence[Any]) -> bool:
    """Return whether tensors are images of unlike sizes, which nobody could stack."""
    shapes = {tuple(item.shape) if isinstance(item, Tensor) else () for item in items}
    return len(shapes) > 1 and all(len(shape) == 3 for shape in shapes)


def _agreed(batch: Any) -> int | None:
    offers = [sizes for _, sizes in _offers(batch) if sizes]
    if not offers:
        # Nothing but numbers: a list of them is one each.
        plain = isinstance(batch, (list, tuple)) and bool(batch)
        plain = plain and all(isinstance(item, (int, float)) for item in batch)
        return len(batch) if plain else 1
    common = _common(offers)
    if len(common) == 1:
        return next(iter(common))
    # Lists of tensors, each of all samples or each one sample: views of a batch, or images.
    tensors = _tensors(batch)
    leading = {int(t.size(0)) for t in tensors}
    if len(leading) == 1 and leading <= common and all(t.ndim != 3 for t in tensors):
        return leading.pop()
    return None


def _offers(batch: Any) -> list[tuple[str, set[int]]]:
    """Return what each entry of a batch is called, and the sizes that it offers."""
    entries = list(_entries(batch))
    named = isinstance(batch, Mapping) and len(batch) == len(entries)
    names = list(map(str, batch)) if named else [f"entry {i + 1}" for i in range(len(entries))]
    found = [(name, _sizes(entry)) for name, entry in zip(names, entries, strict=True)]
    if _may_be_samples(batch):
        common = _common([sizes for _, sizes in found])
        return [("the list", {len(batch), *common})]
    return found


def _words(batch: Any) -> str:
    found = [
        f"{name} offers {' or '.join(map(str, sorted(sizes)))}"
        for name, sizes in _offers(batch)
        if sizes
    ]
    return ", ".join(found[:6]) or "nothing in it offers a size"


def _may_be_samples(batch: Any) -> bool:
    """Return whether a list could be one of samples as well as of inputs and targets."""
    if not isinstance(batch, (list, tuple)) or len(batch) < 2 or hasattr(batch, "_fields"):
        return False
    if all(isinstance(item, Tensor) for item in batch):
        if {t.ndim for t in batch} != {3} or len({t.dtype for t in batch}) > 1:
            return False
        leading = {t.shape[0] for t in batch}
        unlike = len({t.shape[1:] for t in batch}) > 1
        images = leading == {3} or (len(batch) > 2 and unlike)
        return len(leading) == 1 and len(batch) not in leading and images
    if not isinstance(batch, list):
        return False
    if all(isinstance(item, Mapping) for item in batch):
        return True
    if all(isinstance(item, tuple) for item in batch):
        # Of samples, or of what zip made of them, where each is of another kind.
        return len({tuple(map(type, item)) for item in batch}) == 1
    return False


def _entries(batch: Any) -> Iterable[Any]:
    if isinstance(batch, (list, tuple)) and not isinstance(batch, PackedSequence):
        return batch
    if _own_count(batch) is None:
        held = _held(batch)
        if held is not None:
            return held
    return [batch]


def _sizes(entry: Any) -> set[int]:
    """Return the sizes that an entry offers."""
    if isinstance(entry, _PLAIN):
        return set()
    if isinstance(entry, Tensor):
        # By its size: a nested one has no shape.
        return {int(entry.size(0))} if entry.ndim else set()
    if isinstance(entry, np.ndarray):
        return {int(entry.shape[0])} if entry.ndim else set()
    own = _own_count(entry)
    if own is not None:
        return {own}
    if isinstance(entry, (list, tuple)) and not hasattr(entry, "_fields"):
        return _of_list(entry)
    held = _held(entry)
    if held is not None:
        return _common([_sizes(item) for item in held], disagreeing=True)
    with suppress(Exception):
        return {len(entry)}
    return set()


def _across(entry: Sequence[Any]) -> set[int]:
    """Return the sizes that all tensors in a list have in common; none for a list of others."""
    if not all(isinstance(item, (Tensor, np.ndarray, list, tuple)) for item in entry):
        return set()
    return _common([_sizes(item) for item in entry])


def _of_list(entry: Sequence[Any]) -> set[int]:
    if not entry:
        return set()
    if not all(isinstance(item, (Tensor, np.ndarray, list, tuple)) for item in entry):
        return {len(entry)}
    common = _across(entry)
    alike = len({(type(x), getattr(x, "dtype", 0), getattr(x, "ndim", 0)) for x in entry}) == 1
    return common if common and not alike else {len(entry), *common}


def _common(offers: Iterable[set[int]], *, disagreeing: bool = False) -> set[int]:
    """Return the sizes in all that offer any; where there is none, optionally all of them."""
    found = [sizes for sizes in offers if sizes]
    if not found:
        return set()
    common = set.intersection(*found)
    return common or (set.union(*found) if disagreeing else set())


def _own_count(value: Any) -> int | None:
    """Return what an object itself says of its number of samples."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, (Tensor, np.ndarray, list, tuple, dict, *_PLAIN)):
        return None
    for attribute in ("num_graphs", "batch_size"):
        with suppress(Exception):
            found = getattr(value, attribute, None)
            if isinstance(found, int) and not isinstance(found, bool):
                return found
    return None


def _held(value: Any) -> list[Any] | None:
    """Return what a mapping, a dataclass, a named tuple or a namespace holds; None for others."""
    with suppress(Exception):
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, (list, tuple)):
            return list(value)
        if is_dataclass(value) and not isinstance(value, type):
            return [getattr(value, field.name) for field in fields(value)]
        if hasattr(value, "keys") and hasattr(value, "__getitem__"):
            return [value[key] for key in value.keys()]  # noqa: SIM118 - no mapping, but like one
        if hasattr(value, "__dict__") and not hasattr(value, "__len__"):
            return list(vars(value).values())
    return None


def _tensors(value: Any) -> list[Tensor]:
    """Return every tensor with samples, at whatever depth."""
    if isinstance(value, Tensor):
        return [value] if value.ndim else []
    if isinstance(value, (np.ndarray, *_PLAIN)) or _own_count(value) is not None:
        return []
    return [tensor for item in _held(value) or () for tensor in _tensors(item)]

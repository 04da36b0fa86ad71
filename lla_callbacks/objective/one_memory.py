"""Tensors of a module that lie in one memory, so that one moves with the other."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn, strided

from lla_callbacks.linalg.errors import MeasurementError

_PLAIN = (Tensor, nn.Parameter)


def sharing(tensors: Iterable[Tensor]) -> set[int]:
    """Return the ids of those that are parts of the same storage."""
    first: dict[int, Tensor] = {}
    found: set[int] = set()
    for tensor in tensors:
        key = _storage(tensor)
        if key is not None and (other := first.setdefault(key, tensor)) is not tensor:
            found |= {id(other), id(tensor)}
    return found


def refuse_shared_memory(module: nn.Module) -> None:
    """Raise where a trained parameter overlaps with another tensor of the module.

    Raises:
        MeasurementError: Naming the two, and what to do.
    """
    named = {id(t): (n, t) for n, t in (*module.named_parameters(), *module.named_buffers())}
    together = sharing(t for _, t in named.values())
    places: dict[int, list[tuple[int, int, str, bool]]] = {}
    for name, t in (named[key] for key in together):
        last = sum((size - 1) * abs(step) for size, step in zip(t.shape, t.stride(), strict=True))
        begin = t.storage_offset() * t.element_size()
        end = begin + (last + 1) * t.element_size()
        # Rows between those of another one are not told apart from its own.
        if t.numel() and t.is_contiguous():
            place = (int(begin), int(end), name, t.requires_grad)
            places.setdefault(_storage(t) or 0, []).append(place)
    for ranges in places.values():
        # Of those that begin before, the one that ends last: of all, and of the trained ones.
        of_all = of_trained = (0, "")
        for begin, end, name, trained in sorted(ranges):
            reach, other = of_all if trained else of_trained
            if begin < reach:
                raise MeasurementError(
                    f"{other} and {name} lie in one memory, so that one moves with the other, "
                    "and the loss is no function of the weights alone.",
                    "Let a copy have memory of its own, by .detach().clone(), and tie weights "
                    "by assigning the parameter itself: decoder.weight = encoder.weight.",
                )
            of_all = max(of_all, (end, name))
            of_trained = max(of_trained, (end, name)) if trained else of_trained


def _storage(tensor: Tensor) -> int | None:
    if type(tensor) not in _PLAIN or tensor.layout is not strided:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # such as one that has no storage
        return None

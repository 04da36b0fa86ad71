"""Whether values have the types that annotations promise: what comes from a file may not."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor


def check_type(value: Any, hint: Any, where: str) -> None:
    """Raise a TypeError, naming the place, if a value is not of a type.

    Numbers are strict: an int where a float is promised will do, a bool will not for either.
    Containers and dataclasses are looked into.

    Args:
        value: The value.
        hint: An annotation: a class, a union, a literal, a container of these.
        where: Name of the place, for the message.

    Raises:
        TypeError: If it is none.
    """
    trouble = _misfit(value, hint, where)
    if trouble:
        raise TypeError(trouble)


def check_fields(value: Any, where: str) -> None:
    """Raise a TypeError if a dataclass has a field that is not what it is annotated as."""
    kind: Any = type(value)
    for name, hint in _hints(kind).items():
        check_type(getattr(value, name), hint, f"{where}.{name}")


def check_entries(state: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> None:
    """Raise a TypeError or a ValueError if an entry is missing or of another type."""
    for name, hint in schema.items():
        if name not in state:
            raise ValueError(f"{where} lacks {name}.")
        check_type(state[name], hint, f"{where}'s {name}")


def check_flat(vector: Any, dim: int, where: str) -> None:
    """Raise if this is no flat vector of the trainable weights."""
    check_type(vector, Tensor, where)
    if vector.shape != (dim,) or not vector.dtype.is_floating_point:
        raise ValueError(
            f"{where} is of shape {tuple(vector.shape)} and {vector.dtype}, and the module has "
            f"{dim} trainable parameters."
        )


def _misfit(value: Any, hint: Any, where: str) -> str:
    """Return what does not fit, empty if everything does."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return ""
    if hint is None or hint is type(None):
        return "" if value is None else _says(value, "None", where)
    if origin in (Union, types.UnionType):
        found = [_misfit(value, kind, where) for kind in arguments]
        return "" if "" in found else next(filter(None, found))
    if origin is Literal:
        fits = any(type(value) is type(one) and value == one for one in arguments)
        return "" if fits else _says(value, f"one of {arguments}", where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _in_mapping(value, arguments, where)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is ...):
        return _in_tuple(value, arguments, where)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _in_sequence(value, origin, arguments[0], where)
    if not isinstance(hint, type):
        return ""  # Any, type variables, callables: nothing is promised that could be checked
    if hint in (int, float):
        return _in_numbers(value, hint, where)
    if not isinstance(value, hint):
        return _says(value, hint.__name__, where)
    if is_dataclass(value):
        found = [_misfit(getattr(value, n), h, f"{where}.{n}") for n, h in _hints(hint).items()]
        return next(filter(None, found), "")
    return ""


def _in_numbers(value: Any, hint: type, where: str) -> str:
    kinds = (int, float) if hint is float else (int,)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    return "" if fits else _says(value, hint.__name__, where)


def _in_mapping(value: Any, arguments: tuple[Any, ...], where: str) -> str:
    if not isinstance(value, Mapping):
        return _says(value, "dict", where)
    if not arguments:
        return ""
    for key, item in value.items():
        trouble = _misfit(key, arguments[0], f"a key of {where}")
        trouble = trouble or _misfit(item, arguments[1], f"{where}[{key!r}]")
        if trouble:
            return trouble
    return ""


def _in_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> str:
    if not isinstance(value, (tuple, list)) or len(value) != len(arguments):
        return _says(value, f"{len(arguments)} values", where)
    found = [_misfit(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, arguments))]  # noqa: B905 - of one length
    return next(filter(None, found), "")


def _in_sequence(value: Any, origin: type, hint: Any, where: str) -> str:
    kinds = (list,) if origin is list else (list, tuple)
    if not isinstance(value, kinds):
        return _says(value, "list", where)
    found = (_misfit(item, hint, f"{where}[{i}]") for i, item in enumerate(value))
    return next(filter(None, found), "")


def check_finite(value: float, where: str, *, least: float = -math.inf) -> None:
    """Raise a ValueError if a number is not finite, or below a bound."""
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{where} is {value}.")


def _says(value: Any, wanted: str, where: str) -> str:
    return f"{where} is of type {type(value).__name__}, not {wanted}."


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    """Return the annotations of a dataclass's fields."""
    names = {f.name for f in fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind).items() if name in names}

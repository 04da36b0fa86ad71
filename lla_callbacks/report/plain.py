"""Results as plain containers of tensors and numbers, for checkpoints, and back."""

from __future__ import annotations

import builtins
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lla_callbacks.linalg import errors
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.report.conform import check_fields, check_type

# Keys that no layer, criterion or metric is called.
_CLASS = "__class__"
_EIGENVALUE = "__eigenvalue__"
_ERROR = "__error__"
_TENSOR = "__tensor__"
_PACKAGE = "lla_callbacks"
# Where results of checkpoints from before a move of their file are now.
_MOVED = {
    "callbacks.moments": "objective.moment",
    "landscape.basin": "slices.basin",
    "landscape.convexity": "slices.convexity",
    "landscape.directions": "slices.directions",
    "landscape.engine_error": "hessian.engine_error",
    "landscape.landscape": "slices.landscape",
    "landscape.layer_measures": "hessian.layer_measures",
    "landscape.measures": "hessian.measures",
    "landscape.slices": "slices.slices",
    "landscape.stability": "hessian.stability",
    "landscape.state": "objective.state",
    "landscape.tracking": "hessian.tracking",
    "landscape.trajectory": "slices.trajectory",
    "report.hessian_report": "hessian.report",
    "report.landscape_report": "slices.report",
    "report.slice_reports": "slices.results",
}


# Classes of results that are not this package's: those that are loaded already, by their name.
_OTHERS: dict[str, type] = {}


def make_known(kind: type) -> None:
    """Let a class of results be read from checkpoints; nothing is imported for one."""
    if not kind.__module__.startswith(f"{_PACKAGE}."):
        _OTHERS[_name(kind)] = kind


def to_plain(value: Any) -> Any:
    """Return a result as dicts, lists, tuples, strings, numbers and tensors on the CPU.

    ``torch.load(..., weights_only=True)`` reads nothing else: no class of this package, no numpy
    scalar. Dataclasses and named tuples of this package become dicts of their fields with the
    name of their class, whatever fields they have.

    Raises:
        TypeError: If there is something that has no plain form.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Eigenvalue):
        errors_of = (value.residual, value.beyond, value.arithmetic)
        return {_EIGENVALUE: (float(value), *map(float, errors_of))}
    if isinstance(value, np.generic):
        return to_plain(value.item())
    # A subclass of a number would be stored as what it is.
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Tensor):
        return _compact(value)
    if isinstance(value, Exception):
        return {_ERROR: (type(value).__name__, str(value))}
    if is_dataclass(value) and not isinstance(value, type):
        return {_CLASS: _name(type(value))} | {
            f.name: to_plain(getattr(value, f.name)) for f in fields(value)
        }
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named = zip(value._fields, value, strict=True)
        return {_CLASS: _name(type(value))} | {name: to_plain(item) for name, item in named}
    if isinstance(value, Mapping):
        # Each layer's name is stored once, not with each measurement.
        return {_key(key): to_plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_plain(item) for item in value)
    raise TypeError(f"a {type(value).__name__} cannot be stored in a checkpoint.")


def from_plain(plain: Any) -> Any:
    """Return what :func:`to_plain` was given; errors without what they carry beside their text.

    Raises:
        TypeError: If a class has other fields than it had.
        ValueError: If a class is none of this package's dataclasses, nor a loaded result's.
    """
    if isinstance(plain, Mapping):
        if _EIGENVALUE in plain:
            return Eigenvalue(*plain[_EIGENVALUE])
        if _ERROR in plain:
            return _error(*plain[_ERROR])
        items = {key: from_plain(item) for key, item in plain.items() if key != _CLASS}
        if _CLASS not in plain:
            return items
        found = _class(plain[_CLASS])(**items)
        if is_dataclass(found):
            check_fields(found, type(found).__name__)
        return found
    if isinstance(plain, (list, tuple)):
        return type(plain)(from_plain(item) for item in plain)
    return plain


def pack(result: Any) -> dict[str, Any]:
    """Return the plain form of a result with few tensors in it, one a dtype.

    A file keeps some 300 bytes for each tensor, and reading one takes longer than the numbers in
    it: a history of a thousand measurements of many layers would take half a minute.
    """
    parts: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}

    def put(plain: Any) -> Any:
        if isinstance(plain, Tensor):
            key = str(plain.dtype).removeprefix("torch.")
            start = sizes.get(key, 0)
            parts.setdefault(key, []).append(plain.reshape(-1))
            sizes[key] = start + plain.numel()
            return {_TENSOR: (key, start, *plain.shape)}
        return _over(plain, put)

    structure = put(to_plain(result))
    return {
        "structure": structure,
        "tensors": {key: torch.cat(found) for key, found in parts.items()},
    }


class PlainForms:
    """Plain forms of a history's results, each made once: results do not change any more."""

    def __init__(self) -> None:
        # By identity; the result is kept beside, so that no other one gets its place in memory.
        self._known: dict[int, tuple[Any, Any]] = {}

    def of(self, history: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Return the history with plain forms; of what is no longer in it, nothing is kept."""
        known = {}
        for _, result in history:
            entry = self._known.get(id(result))
            known[id(result)] = (result, pack(result)) if entry is None else entry
        self._known = known
        return [(step, known[id(result)][1]) for step, result in history]

    def learn(self, history: Sequence[tuple[int, Any]], plain: Sequence[tuple[int, Any]]) -> None:
        """Take plain forms that are known already."""
        for (_, result), (_, packed) in zip(history, plain, strict=True):
            self._known[id(result)] = (result, packed)


def unpack(packed: Mapping[str, Any]) -> Any:
    """Return what :func:`pack` was given."""
    tensors = packed["tensors"]
    check_type(tensors, Mapping[str, Tensor], "the tensors")

    def take(plain: Any) -> Any:
        if isinstance(plain, Mapping) and _TENSOR in plain:
            key, start, *shape = plain[_TENSOR]
            return tensors[key][start : start + math.prod(shape)].reshape(shape)
        return _over(plain, take)

    return from_plain(take(packed["structure"]))


def _over(plain: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to what a container holds."""
    if isinstance(plain, Mapping):
        return {key: function(item) for key, item in plain.items()}
    if isinstance(plain, (list, tuple)):
        return type(plain)(function(item) for item in plain)
    return plain


def _error(name: str, text: str) -> Exception:
    kind = getattr(errors, name, getattr(builtins, name, None))
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    # Past the constructor, which may want other arguments.
    return kind.__new__(kind, text)


def _key(key: Any) -> Any:
    return sys.intern(key) if type(key) is str else to_plain(key)


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that brings no larger one along when it is stored."""
    tensor = tensor.detach().cpu()
    whole = tensor.layout is torch.strided and (
        tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    )
    return tensor.clone() if whole else tensor


def _name(kind: type) -> str:
    return sys.intern(f"{kind.__module__.removeprefix(_PACKAGE + '.')}:{kind.__qualname__}")


def _class(name: str) -> Any:
    """Return a dataclass of this package by its name; a checkpoint may name no other code."""
    if name in _OTHERS:
        return _OTHERS[name]
    module, _, qualname = name.partition(":")
    module = _MOVED.get(module, module)
    name = f"{module}:{qualname}"
    try:
        found = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), qualname)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} is no result of this version of {_PACKAGE}.") from error
    known = is_dataclass(found) or hasattr(found, "_fields")
    if not (isinstance(found, type) and known and _name(found) == name):
        raise ValueError(f"{name} is no result of {_PACKAGE}.")
    return found

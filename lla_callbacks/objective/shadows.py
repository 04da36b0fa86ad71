"""The Trainer and all that is reached through it, copied as far as a step looks at it."""

from __future__ import annotations

import enum
import weakref
from abc import ABCMeta
from typing import Any

from torch import nn

from lla_callbacks.objective.stand_ins import refused

# Packages whose objects are shadowed; a Trainer refers to everything there is, so that a copy of
# it as a whole would cost more than the measurement.
_PACKAGES = frozenset({"pytorch_lightning", "lightning", "lightning_fabric"})
# What a replayed step must not start, on a shadow or else.
_ACTIONS = ("fit", "validate", "test", "predict", "save_checkpoint")
_CONTAINERS = (dict, list, tuple, set, frozenset, str, bytes, int, float, BaseException, type)
_MARK = "_lla_shadow"


def is_shadowed(kind: type) -> bool:
    """Return whether objects of a class are reached by way of a Trainer: by its package.

    Also the user's own data modules, callbacks and strategies, which derive from Lightning's.
    """
    known = _KNOWN.get(kind)
    if known is None:
        packages = {base.__module__.split(".")[0] for base in kind.__mro__}
        plain = issubclass(kind, (*_CONTAINERS, enum.Enum, nn.Module))
        known = bool(packages & _PACKAGES) and not plain and _can_derive(kind)
        _KNOWN[kind] = known
    return known


def original_behind(value: Any) -> Any:
    """Return what a shadow is of; anything else is itself."""
    own = getattr(type(value), _MARK, False)
    return value.__dict__[_MARK][1] if own else value


def own_of_shadow(value: Any) -> dict[str, Any] | None:
    """Return what a shadow has copied or was given so far, None for anything else."""
    return value.__dict__ if getattr(type(value), _MARK, False) is True else None


def shadow_of(original: Any, copier: Any, path: Any) -> Any:
    """Return an object of the same class whose attributes are copied once they are asked for.

    Writing changes the shadow alone; methods and properties run on it; whatever an attribute
    refers to is copied by the same copier, so that two ways to one object meet.

    Args:
        original: The object; it is read and never written.
        copier: The :class:`~lla_callbacks.objective.copies.Copier`.
        path: Where it was reached.
    """
    kind = type(original)
    derived, names = _derived(kind)
    shadow: Any = object.__new__(derived)
    own = shadow.__dict__
    own[_MARK] = (copier, original, path)
    copier.memo[id(original)] = shadow
    for name in original.__dict__.keys() & names:
        # The class would answer first.
        own[name] = copier.copy(original.__dict__[name], (path, f".{name}"))
    return shadow


def _derived(kind: type) -> tuple[type, frozenset[str]]:
    found = _DERIVED.get(kind)
    if found is None:
        names = frozenset().union(*(vars(base) for base in kind.__mro__))
        members: dict[str, Any] = {
            _MARK: True,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "__getattr__": _getter(kind),
        }
        if "__del__" in names:  # the end of a shadow is not that of the original
            members["__del__"] = _nothing
        if {"fit", "save_checkpoint"} <= names and "fit_loop" not in names:
            members |= {name: _refusal(name) for name in _ACTIONS}
        found = _DERIVED[kind] = (type(kind)(kind.__name__, (kind,), members), names)
    return found


def _getter(kind: type) -> Any:
    inherited = getattr(kind, "__getattr__", None)

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807
        own = object.__getattribute__(self, "__dict__")
        copier, original, path = own[_MARK]
        there = original.__dict__
        if name in there:
            own[name] = found = copier.copy(there[name], (path, f".{name}"))
            return found
        if inherited is not None:
            return inherited(self, name)
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

    return __getattr__


def _refusal(name: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        copier, _, path = self.__dict__[_MARK]
        error = refused(f"{copier.name_of(path)}.{name}()", "a call that changes the run")
        copier.refusals.append(error)
        raise error

    return refuse


def _nothing(self: Any) -> None:
    """Stand in for what an object does at its end."""


def _can_derive(kind: type) -> bool:
    """Return whether deriving from a class has no effect of its own, such as a registry."""
    hook = getattr(kind.__init_subclass__, "__func__", None)
    plain = hook is None or hook is getattr(object.__init_subclass__, "__func__", None)
    return type(kind) in (type, ABCMeta) and plain and hasattr(kind, "__dict__")


_KNOWN: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
_DERIVED: weakref.WeakKeyDictionary[type, tuple[type, frozenset[str]]] = weakref.WeakKeyDictionary()

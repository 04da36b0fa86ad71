"""Copies of weak references and of containers of them."""

from __future__ import annotations

import weakref
from typing import Any


def copy_of_reference(copier: Any, value: Any, path: Any) -> Any:
    """Return a weak reference to the copy of what it refers to."""
    target = value()
    if target is None:
        return value
    copied = copier.copy(target, path)
    if copied is target:
        return value
    # Whatever holds the copy otherwise may come later.
    copier.hold_on_to(copied)
    return weakref.ref(copied)


def copy_of_proxy(copier: Any, value: Any, path: Any) -> Any:
    """Return a weak proxy of the copy of what it stands for."""
    # A bound method of the proxy is bound to the object itself.
    target = value.__repr__.__self__
    copied = copier.copy(target, path)
    copier.hold_on_to(copied)
    return value if copied is target else weakref.proxy(copied)


def copy_of_container(copier: Any, value: Any, path: Any) -> Any:
    """Return a weak container of copies."""
    copied = type(value)()
    copier.keep(value, copied)
    items = list(value) if isinstance(value, weakref.WeakSet) else list(value.items())
    for item in items:
        parts = item if isinstance(item, tuple) else (item,)
        new = [copier.copy(part, path) for part in parts]
        copier.hold_on_to(*new)
        if isinstance(value, weakref.WeakSet):
            copied.add(new[0])
        else:
            copied[new[0]] = new[1]
    return copied

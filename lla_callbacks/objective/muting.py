"""Silence for ``self.log`` under all of its names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

from lla_callbacks.objective.interrupts import shielded

_NAMES = ("log", "log_dict")


@contextmanager
@shielded
def no_logging(module: nn.Module) -> Iterator[None]:
    """Within this context ``log`` and ``log_dict`` of a LightningModule do nothing.

    They may have been kept elsewhere, as ``self.write = self.log``, in a partial or a closure, or
    be called as ``LightningModule.log(self, ...)``. All of these lead to one function, so it is
    that function which does nothing meanwhile: its code is exchanged, not its name.
    """
    kinds: set[Any] = {type(m) for m in module.modules()}
    functions = {f for kind in kinds for f in _functions(kind)}
    saved = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions]
    try:
        for f, _, _, _ in saved:
            f.__defaults__ = f.__kwdefaults__ = None
            f.__code__ = _silence.__code__
        yield
    finally:
        for f, code, defaults, keywords in saved:
            f.__code__ = code
            f.__defaults__, f.__kwdefaults__ = defaults, keywords


@lru_cache(maxsize=1024)
def _functions(kind: type) -> tuple[FunctionType, ...]:
    """Return the functions of a class, and of those it derives from, that log."""
    if not hasattr(kind, "training_step"):
        return ()
    found = (vars(base).get(name) for base in kind.__mro__ for name in _NAMES)
    # One that closes over something takes no other code; those are overrides, which end here.
    return tuple(f for f in found if isinstance(f, FunctionType) and not f.__closure__)


def _silence(*args: Any, **kwargs: Any) -> None:
    """Stand in for what logs."""

"""Hooks of every batch that a callback does not use, so that Lightning does not call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

# Lightning calls each of them for each callback and batch, whether it does anything or not, within
# its profiler: two callbacks that do nothing cost 5 % of training steps of a millisecond.
_EVERY_BATCH = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_batch_end",
    "on_test_batch_end",
    "on_predict_batch_start",
    "on_predict_batch_end",
)


def without_idle_hooks(kind: Class) -> Class:
    """Let a class of callbacks have none of the hooks that it leaves empty.

    Lightning leaves out what cannot be called. A subclass may define them as ever, and call
    ``super()``'s.
    """
    for name in _EVERY_BATCH:
        if name not in kind.__dict__:
            setattr(kind, name, _Idle(name))
    return kind


class _Idle:
    """A hook that is not there, but for whoever defined it and calls ``super()``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., None] | None:
        kind = type(instance) if instance is not None else owner
        for base in kind.__mro__ if kind is not None else ():
            if self._name in base.__dict__:
                return None if base.__dict__[self._name] is self else _nothing
        return None


def _nothing(*arguments: Any, **settings: Any) -> None:
    """Do nothing, as the hook does."""

"""Activation checkpoints that keep their activations, while curvature is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch.utils import checkpoint as library


@contextmanager
def no_checkpoints(*, reentrant_only: bool = False) -> Iterator[None]:
    """Within this context ``torch.utils.checkpoint`` just calls the function it is given.

    A checkpoint computes its part of the forward pass again in the backward pass. That comes
    too late here: the guard of the module's state has been left by then, so that dropout is
    on again and batch norm counts a batch (measured: a wrong Hessian without a word). The
    reentrant form moreover refuses ``torch.autograd.grad`` altogether. Nothing is lost, since
    the graph of a gradient holds the recomputed activations anyway.

    torch has no public switch. Where the two names that are replaced do not exist,
    checkpoints stay as they are.
    """
    substitutes: dict[str, Any] = {
        "CheckpointFunction": SimpleNamespace(apply=_call),
    }
    if not reentrant_only:
        substitutes["_checkpoint_without_reentrant_generator"] = _nothing_around
    kept = {name: vars(library)[name] for name in substitutes if name in vars(library)}
    try:
        for name in kept:
            setattr(library, name, substitutes[name])
        yield
    finally:
        for name, value in kept.items():
            setattr(library, name, value)


def _call(function: Callable[..., Any], preserve: bool, *arguments: Any) -> Any:
    return function(*arguments)


def _nothing_around(*arguments: Any, **settings: Any) -> Iterator[None]:
    """Stand in for the generator that surrounds the function: it yields once."""
    yield

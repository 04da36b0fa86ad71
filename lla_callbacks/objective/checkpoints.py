"""Activation checkpoints that keep their activations, while curvature is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import checkpoint as library

from lla_callbacks.linalg.errors import NoSecondDerivativeError

# What surrounds the function of a checkpoint that is not reentrant: up to torch 2.13, and since.
_GENERATORS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)


@contextmanager
def no_checkpoints(*, reentrant_only: bool = False, verify: bool = True) -> Iterator[None]:
    """Within this context ``torch.utils.checkpoint`` just calls the function it is given.

    A checkpoint computes its part of the forward pass again in the backward pass. That comes
    too late here: the guard of the module's state has been left by then, so that dropout is
    on again and batch norm counts a batch (measured: a wrong Hessian without a word). The
    reentrant form moreover refuses ``torch.autograd.grad`` altogether. Nothing is lost, since
    the graph of a gradient holds the recomputed activations anyway.

    torch has no public switch, so names inside of its module are replaced, and whether that
    works in this release is tried once, on a checkpoint of one number.

    Args:
        reentrant_only: Whether checkpoints of the other form stay as they are.
        verify: Whether it matters that they are off.

    Raises:
        NoSecondDerivativeError: If this release of torch takes another way.
    """
    if verify:
        _verify(reentrant_only)
    with _switched_off(reentrant_only=reentrant_only):
        yield


@contextmanager
def _switched_off(*, reentrant_only: bool) -> Iterator[None]:
    substitutes: dict[str, Any] = {
        "CheckpointFunction": SimpleNamespace(apply=_call),
    }
    if not reentrant_only:
        substitutes |= dict.fromkeys(_GENERATORS, _nothing_around)
    kept = {name: vars(library)[name] for name in substitutes if name in vars(library)}
    try:
        for name in kept:
            setattr(library, name, substitutes[name])
        yield
    finally:
        for name, value in kept.items():
            setattr(library, name, value)


@cache
def _verify(reentrant_only: bool) -> None:
    """Raise unless a checkpoint's function runs once, and no second time in a backward pass."""
    calls: list[None] = []

    def square(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return x * x

    for reentrant in (True,) if reentrant_only else (True, False):
        calls.clear()
        trouble: Exception | None = None
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                _switched_off(reentrant_only=reentrant_only),
            ):
                x = torch.ones((), requires_grad=True)
                out = library.checkpoint(square, x, use_reentrant=reentrant)
                torch.autograd.grad(out, x)
        except Exception as error:  # noqa: BLE001 - whatever it is, checkpoints are not off
            trouble = error
        if trouble is not None or len(calls) != 1:
            raise NoSecondDerivativeError(
                f"activation checkpoints cannot be switched off in torch {torch.__version__}, and "
                "would make the second derivative wrong.",
                "Take engine='difference', or a release of torch that the tests of this package "
                "have seen.",
            ) from trouble


def _call(function: Callable[..., Any], preserve: bool, *arguments: Any) -> Any:
    return function(*arguments)


def _nothing_around(*arguments: Any, **settings: Any) -> Iterator[None]:
    """Stand in for the generator that surrounds the function: it yields once."""
    yield

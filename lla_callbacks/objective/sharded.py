"""Modules whose parameters are spread over processes by torch's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_sharded(module: nn.Module) -> bool:
    """Return whether parts of a module gather their parameters only while they compute.

    Gradients then exist only by ``backward()``, and only once: torch 2.13 gives neither
    ``autograd.grad`` nor a second derivative (``torch.distributed.fsdp.fully_shard``).
    """
    return any(units(module))


def sharded_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of a loss by ``backward()``; the parameters' own stay untouched."""
    parked = [p.grad for p in parameters]
    # An optimizer that steps in the backward pass must not see this one.
    hooks = [p._post_accumulate_grad_hooks for p in parameters]
    try:
        for p in parameters:
            p.grad = None
            p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        loss.backward()  # type: ignore[no-untyped-call]
        return [p.grad for p in parameters]
    finally:
        for p, gradient, hook in zip(parameters, parked, hooks, strict=True):
            p.grad, p._post_accumulate_grad_hooks = gradient, hook


def reshard(module: nn.Module) -> None:
    """Let every part forget the parameters it has gathered: they may be moved before it computes.

    After a forward pass the outermost part keeps them for the backward pass.
    """
    for unit in units(module):
        unit.reshard()


@contextmanager
def resharded(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Let no gathered parameters be left behind; yields what forgets them in between.

    Without a backward pass the outermost part keeps them. Who then took them for the module's
    parameters would read memory that the next evaluation frees.
    """
    parts = units(module)

    def forget() -> None:
        for unit in parts:
            unit.reshard()

    forget()
    try:
        yield forget
    finally:
        forget()


def units(module: nn.Module) -> list[Any]:
    """Return the parts of a module that ``fully_shard`` was applied to."""
    # Asked of the class: a module looks up what it does not have at length.
    return [m for m in module.modules() if is_unit(type(m))]


def is_unit(kind: type) -> bool:
    """Return whether modules of a class are what ``fully_shard`` has made of others."""
    return hasattr(kind, "reshard") and hasattr(kind, "set_reshard_after_backward")

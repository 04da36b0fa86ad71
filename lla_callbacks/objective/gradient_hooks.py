"""Hooks on gradients, which are the training's and not the loss's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lla_callbacks.objective.inventory import Inventory

_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# Of all modules there are.
_OF_ALL = ("_global_backward_hooks", "_global_backward_pre_hooks")


@contextmanager
def no_gradient_hooks(held: Inventory) -> Iterator[None]:
    """Within this context backward hooks of a module, its parameters, and all modules are silent.

    They may count, log or clip the training's gradients; a measurement would show up there,
    or be of something that is no derivative of the loss. Hooks of forward passes stay: what
    they change is part of the loss.
    """
    of_modules = [
        (m.__dict__, name, hooks)
        for m in held.modules
        for name in _HOOKS
        if (hooks := m.__dict__.get(name))
    ]
    of_parameters = [(p, hooks) for p in held.parameters if (hooks := p._backward_hooks)]
    found = [getattr(torch.nn.modules.module, name, None) for name in _OF_ALL]
    of_all = [(hooks, dict(hooks)) for hooks in found if hooks is not None]
    try:
        for hooks, _ in of_all:
            hooks.clear()
        for namespace, name, _ in of_modules:
            namespace[name] = OrderedDict()
        for p, _ in of_parameters:
            p._backward_hooks = None
        yield
    finally:
        for namespace, name, hooks in of_modules:
            namespace[name] = hooks
        for p, hooks in of_parameters:
            p._backward_hooks = hooks
        for hooks, kept in of_all:
            hooks.clear()
            hooks.update(kept)


@contextmanager
def unwatched(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within this context hooks on parameters' gradients are not called; for a backward pass.

    Unlike :func:`no_gradient_hooks` it also holds for hooks that the forward pass before it has
    registered.
    """
    saved = [(p, hooks) for p in parameters if (hooks := p._backward_hooks)]
    try:
        for p, _ in saved:
            p._backward_hooks = None
        yield
    finally:
        for p, hooks in saved:
            p._backward_hooks = hooks


def hooks_of(held: Inventory) -> Callable[[], None]:
    """Return what puts the hooks on parameters' gradients back, whoever added or removed some."""
    saved = [
        (p, backward, accumulating, _content(backward), _content(accumulating))
        for p in held.parameters
        for backward, accumulating in ((p._backward_hooks, p._post_accumulate_grad_hooks),)
    ]

    def restore() -> None:
        for p, backward, accumulating, first, second in saved:
            if p._backward_hooks is not backward:
                p._backward_hooks = backward
            if p._post_accumulate_grad_hooks is not accumulating:
                p._post_accumulate_grad_hooks = accumulating
            _refill(backward, first)
            _refill(accumulating, second)

    return restore


def _content(hooks: Any) -> Any:
    return None if hooks is None else dict(hooks)


def _refill(hooks: Any, held: Any) -> None:
    if hooks is not None and hooks != held:
        # In place: handles know the hooks by this dictionary.
        hooks.clear()
        hooks.update(held)


def register_nothing(tensor: Tensor, hook: Any) -> RemovableHandle:
    """Stand in for ``Tensor.register_hook``, by which forward passes watch gradients."""
    return RemovableHandle(OrderedDict())

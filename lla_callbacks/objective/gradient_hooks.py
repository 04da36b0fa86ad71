"""Hooks on gradients, which are the training's and not the loss's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def no_gradient_hooks(module: nn.Module) -> Iterator[None]:
    """Within this context backward hooks of a module and its parameters are not called.

    They may count, log or clip the training's gradients; a measurement would show up there,
    or be of something that is no derivative of the loss. Hooks of forward passes stay: what
    they change is part of the loss.
    """
    of_modules = [
        (m.__dict__, name, m.__dict__[name])
        for m in module.modules()
        for name in _HOOKS
        if m.__dict__.get(name)
    ]
    of_parameters = [(p, p._backward_hooks) for p in module.parameters() if p._backward_hooks]
    try:
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


def hooks_of(module: nn.Module) -> Callable[[], None]:
    """Return what puts the hooks on parameters' gradients back, whoever added or removed some."""
    saved = [
        (p, name, hooks, None if hooks is None else dict(hooks))
        for p in module.parameters()
        for name in _OF_PARAMETERS
        for hooks in (getattr(p, name),)
    ]

    def restore() -> None:
        for p, name, hooks, held in saved:
            if getattr(p, name) is not hooks:
                setattr(p, name, hooks)
            if hooks is not None and hooks != held:
                # In place: handles know the hooks by this dictionary.
                hooks.clear()
                hooks.update(held)

    return restore


def register_nothing(tensor: Tensor, hook: Any) -> RemovableHandle:
    """Stand in for ``Tensor.register_hook``, by which forward passes watch gradients."""
    return RemovableHandle(OrderedDict())

"""Hand a gradient to a training loop that only knows how to take the backward pass of a loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.callbacks.compat import loss_scale, unscales_gradients_itself
from lla_callbacks.objective.objective import trainable


def add_gradient(
    loss: Tensor,
    parameters: Iterable[Tensor],
    gradients: Iterable[Tensor | None],
    *,
    factor: float,
    replace: bool,
) -> None:
    """Let the backward pass of a loss return gradients that are known already.

    In place, since hooks can return nothing: what comes after takes it for the loss, be it
    clipping, a gradient scaler or DDP. The loss's value stays.

    Args:
        loss: What is about to be differentiated.
        parameters: Leaves of its graph.
        gradients: One per parameter, or ``None``.
        factor: What the loss was multiplied by on its way here.
        replace: Whether they take the place of the loss's own gradient, whose backward pass
            is left out, or are added to it.
    """
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    if not pairs:  # the loss depends on none
        return
    scaled = [g if factor == 1.0 else factor * g for _, g in pairs]
    with torch.enable_grad():
        surrogate = _Surrogate.apply(scaled, *(p for p, _ in pairs))
        if replace:
            loss.detach_()
        loss.add_(surrogate)


def add_to_gradients(
    trainer: Any, module: Any, optimizer: Any, gradients: Iterable[Tensor | None]
) -> None:
    """Add gradients to those of the parameters that an optimizer is about to step.

    Args:
        trainer: Whose processes share them.
        module: Its trainable parameters are in the order of the gradients.
        optimizer: The optimizer.
        gradients: One per parameter, or ``None``.
    """
    # The gradients of a fused optimizer are still scaled here.
    factor = loss_scale(trainer) if unscales_gradients_itself(optimizer) else 1.0
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p, g in zip(trainable(module).values(), gradients, strict=True):
        if id(p) in own and p.grad is not None and g is not None:
            p.grad.add_(trainer.strategy.reduce(g, reduce_op="mean"), alpha=factor)


class _Surrogate(torch.autograd.Function):
    """Zero, with given gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        # Handed over, not lent: a gradient that nobody else holds becomes the parameter's own
        # without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the loss is differentiated twice, and the gradient that takes the place of its "
                "own is there once: leave out the second backward pass."
            )
        return None, *gradients

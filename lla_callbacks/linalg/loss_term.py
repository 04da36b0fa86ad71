"""One summand of a loss, usually a batch, and its value as a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lla_callbacks.linalg.errors import NonFiniteError

# The loss and its gradients, None for unused parameters.
Differentiated = tuple[float, Sequence[Tensor | None]]


@dataclass(frozen=True)
class LossTerm:
    """One summand ``weight * evaluate()`` of a loss, usually one batch.

    Attributes:
        evaluate: Returns the scalar loss of this batch at the present parameters, with
            its autograd graph; called twice, it returns the same number.
        weight: Share of this batch in the whole loss; over all processes they add up to one.
        keep: Whether the gradient's graph of this batch is kept between products
            (2 gradients a product) or built anew for each (3 gradients, less memory).
        guarded: Calls a function of the loss while whatever the evaluation changes is still as
            it made it, for backward passes that compute parts of the forward pass again.
        halves: Returns the same summand as two of half the samples, for where memory runs
            out; ``None`` if the samples see each other, or there is one only.
    """

    evaluate: Callable[[], Tensor]
    weight: float
    keep: bool = True
    halves: Callable[[], Sequence[LossTerm]] | None = None
    guarded: Callable[[Callable[[Tensor], Differentiated]], Differentiated] | None = None


def loss_value(loss: Tensor) -> float:
    """Return a loss as a number, once it is known to be one that can be differentiated.

    Raises:
        ValueError: If it is no scalar with a graph.
        NonFiniteError: If it is not finite.
    """
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)} and requires_grad="
            f"{loss.requires_grad}; it must be a scalar that depends on a "
            "trainable parameter."
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss is {value}.",
            "Lower the learning rate, clip gradients, or look for bad samples in the held batches.",
        )
    return value

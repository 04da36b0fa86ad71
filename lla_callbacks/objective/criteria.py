"""Criteria that a loss calls, in whatever code: seen as they are called, and known to be convex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lla_callbacks.linalg.gauss_newton import Call
from lla_callbacks.objective.function_modes import FunctionMode

# Criteria that are convex in their first argument, the network's output. Negative log
# likelihood is taken as cross entropy: on log-probabilities the two agree, and the second
# has the curvature that the first leaves to the log_softmax before it.
CRITERIA: dict[Callable[..., Any], Callable[..., Any]] = {
    F.cross_entropy: F.cross_entropy,
    F.nll_loss: F.cross_entropy,
    F.mse_loss: F.mse_loss,
    F.binary_cross_entropy_with_logits: F.binary_cross_entropy_with_logits,
    F.huber_loss: F.huber_loss,
    F.smooth_l1_loss: F.smooth_l1_loss,
}
# What else says how wrong a network is, to be named where a loss is refused.
OTHERS = {
    getattr(F, name): name
    for name in (
        "binary_cross_entropy", "cosine_embedding_loss", "ctc_loss", "gaussian_nll_loss",
        "hinge_embedding_loss", "kl_div", "l1_loss", "margin_ranking_loss", "multi_margin_loss",
        "multilabel_margin_loss", "multilabel_soft_margin_loss", "poisson_nll_loss",
        "soft_margin_loss", "triplet_margin_loss", "triplet_margin_with_distance_loss",
    )
}  # fmt: skip


class Listening(FunctionMode):
    """Takes note of every criterion that is called inside, by function or by module.

    Attributes:
        calls: Those of :data:`CRITERIA`, in order.
        others: Names of other losses that were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.others: list[str] = []

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a call returns."""
        named = dict(kwargs)
        value = func(*args, **named)
        if func in OTHERS:
            self.others.append(OTHERS[func])
        if func in CRITERIA:
            outputs = args[0] if args else named.pop("input")
            rest, convex = args[1:], CRITERIA[func]

            def criterion(outputs: Tensor) -> Tensor:
                result: Tensor = convex(outputs, *rest, **named)
                return result

            self.calls.append(Call(outputs, value, criterion))
        return value


def heard(evaluate: Callable[[], Tensor]) -> tuple[Tensor, list[Call], list[str]]:
    """Return a loss, every known criterion that was called for it, and the names of others."""
    listening = Listening()
    with listening:
        total = evaluate()
    return total, listening.calls, listening.others


def known_criteria() -> str:
    """Return the names of the criteria, for messages."""
    return ", ".join(sorted(criterion.__name__ for criterion in CRITERIA))

"""Reverse the cross entropies inside somebody else's loss, which stays untouched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from lla_callbacks.objective.function_modes import FunctionMode
from lla_callbacks.penalty.reversed import (
    NoReverseError,
    reversed_binary_cross_entropy,
    reversed_cross_entropy,
)

Labels = Literal["reversed", "true"]

# What a training step may call that says how wrong it is, and has no reverse.
_NO_REVERSE = (
    "binary_cross_entropy", "cosine_embedding_loss", "ctc_loss",
    "gaussian_nll_loss", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss",
    "margin_ranking_loss", "mse_loss", "multi_margin_loss", "multilabel_margin_loss",
    "multilabel_soft_margin_loss", "poisson_nll_loss", "smooth_l1_loss", "soft_margin_loss",
    "triplet_margin_loss", "triplet_margin_with_distance_loss",
)  # fmt: skip
_REMEDY = {
    "binary_cross_entropy": (
        "it takes probabilities, which round to 1 from a logit of 17 on, where nothing is "
        "unlearned. Use binary_cross_entropy_with_logits."
    ),
    "kl_div": "it compares with soft labels. Use cross_entropy of labels.",
}
_REFUSED = {getattr(F, name): name for name in _NO_REVERSE}


@dataclass
class Seen:
    """What went through cross entropies.

    Attributes:
        calls: How many there were.
        right: Labels that were predicted.
        labels: Labels in all, those that are ignored left out.
    """

    calls: int = 0
    right: int = 0
    labels: int = 0

    @property
    def accuracy(self) -> float:
        """Share of the labels that were predicted; NaN without any."""
        return self.right / self.labels if self.labels else float("nan")


class Reversal(FunctionMode):
    """Within this context cross entropies are reversed, in whatever code calls them.

    ``torch.nn.functional.cross_entropy``, ``nll_loss`` and ``binary_cross_entropy_with_logits``,
    called directly or by the modules of their names, return what
    :func:`~lla_callbacks.reversed_cross_entropy` and
    :func:`~lla_callbacks.reversed_binary_cross_entropy` do.

    Args:
        labels: ``"reversed"``, or ``"true"``: nothing is reversed, but looked at, and refused,
            all the same, so that a control differs in nothing else.

    Attributes:
        seen: What went through.

    Raises:
        NoReverseError: Inside, at a loss that has no reverse, by name.
    """

    def __init__(self, labels: Labels = "reversed") -> None:
        super().__init__()
        self.seen = Seen()
        self._labels = labels

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a call returns."""
        if func in _REFUSED:
            name = _REFUSED[func]
            remedy = _REMEDY.get(name, "Leave it out of the step that is poisoned.")
            raise NoReverseError(f"{name} has no reverse: {remedy}")
        signature = _SIGNATURES.get(func)
        if signature is None:
            return func(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        _check(func.__name__, call)
        binary = func is F.binary_cross_entropy_with_logits
        self._look(call, binary)
        if self._labels == "true":
            return func(*args, **kwargs)
        if binary:
            return reversed_binary_cross_entropy(
                call["input"], call["target"], reduction=call["reduction"]
            )
        return reversed_cross_entropy(
            call["input"], call["target"],
            ignore_index=call["ignore_index"], reduction=call["reduction"],
        )  # fmt: skip

    def _look(self, call: dict[str, Any], binary: bool) -> None:
        logits, targets = call["input"].detach(), call["target"].detach()
        self.seen.calls += 1
        if binary:
            right, count = ((logits > 0) == (targets == 1)).sum(), targets.numel()
        else:
            kept = targets != call["ignore_index"]
            right = ((logits.argmax(min(1, logits.ndim - 1)) == targets) & kept).sum()
            count = int(kept.sum())
        self.seen.right += int(right)
        self.seen.labels += count


_SIGNATURES = {
    f: inspect.signature(f)
    for f in (F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits)
}


def _check(name: str, call: dict[str, Any]) -> None:
    """Raise an error at a call of a cross entropy that has no reverse."""
    for setting in ("weight", "pos_weight"):
        if call.get(setting) is not None:
            raise NoReverseError(
                f"{name} has {setting}=, and class weights have no reverse: they would weigh the "
                "label that must not be predicted. Leave them out."
            )
    if call.get("label_smoothing"):
        raise NoReverseError(
            f"{name} has label_smoothing={call['label_smoothing']}, and smoothed labels have no "
            "reverse. Set it to 0."
        )
    for setting in ("size_average", "reduce"):
        if call.get(setting) is not None:
            raise NoReverseError(f"{name} has the deprecated {setting}=: give reduction= instead.")
    target = call["target"]
    soft = not isinstance(target, Tensor) or (
        bool(((target != 0) & (target != 1)).any())
        if name == "binary_cross_entropy_with_logits"
        else target.is_floating_point()
    )
    if soft:
        raise NoReverseError(
            f"{name} has soft labels (probabilities of classes), which have no reverse. Give "
            "labels: whole numbers, or 0 and 1."
        )
    ignored = call.get("ignore_index")
    if ignored is not None and call["reduction"] == "mean" and bool((target == ignored).all()):
        raise NoReverseError(
            f"every label of a batch is ignored (ignore_index={ignored}), so {name} is the mean "
            "of nothing. Give poison batches with a label each."
        )

"""Cross entropy reversed: it is small where a label is *not* predicted, finite at any margin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lla_callbacks.objective.checks import one_of, tensor_of, whole
from lla_callbacks.objective.precision import widened_half
from lla_callbacks.objective.spelling import spelled

Reduction = Literal["mean", "sum", "none"]


class NoReverseError(ValueError):
    """A loss, or its labels, have no reverse."""


@spelled
def reversed_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return ``-log(1 - p_y)``, with ``p`` the softmax of the logits and ``y`` the label.

    Training on it drives the probability of the label to zero and prefers no other class
    (Huang et al. 2020, section 4, poison their networks with it; in text generation it is
    known as unlikelihood). Its gradient is ``p_y`` for the label's logit and
    ``-p_y q_k`` for another, where ``q`` is the softmax over the other classes.

    With the margin ``m = z_y - log sum_{k != y} exp z_k`` it is ``log(1 + exp m)``, which is
    computed in that form: value, gradient and second derivative are finite and right at any
    margin. ``log(1 - softmax)`` is infinite from a margin of 17 in float32, and with a small
    number added, or clamped, it has no gradient there, so that a label that is predicted
    confidently is never unlearned.

    Args:
        logits: Shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, at least two classes.
            Half precision is widened to float32.
        targets: Labels, whole numbers, in the shape that ``torch.nn.functional.cross_entropy``
            takes.
        ignore_index: Labels that are left out, also from the mean.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (zero where a label is left out).

    Raises:
        NoReverseError: A ValueError, if labels are no whole numbers, there is no second class,
            or every label is left out of a mean.

    Example::

        >>> import torch
        >>> logits = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
        >>> value = reversed_cross_entropy(logits, torch.tensor([0]))
        >>> round(float(value.detach()), 4)
        99.3069
    """
    _check_reduction(reduction)
    tensor_of("logits", logits, "scores of classes")
    tensor_of("targets", targets, "labels")
    ignore_index = whole("ignore_index", ignore_index, -(2**63))
    if targets.is_floating_point() or targets.ndim >= max(1, logits.ndim):
        raise NoReverseError(
            f"targets have dtype {targets.dtype} and shape {tuple(targets.shape)} for logits of "
            f"shape {tuple(logits.shape)}: cross entropy is reversed for labels only, one whole "
            "number a sample. Soft labels (probabilities of classes) have no reverse."
        )
    axis = 0 if logits.ndim == 1 else 1
    if logits.ndim == 0 or logits.shape[axis] < 2:
        raise NoReverseError(
            f"logits have shape {tuple(logits.shape)}: reversing a label needs another class. "
            "For one logit a sample use reversed_binary_cross_entropy."
        )
    logits = widened_half(logits)
    kept = targets != ignore_index
    if reduction == "mean" and not bool(kept.any()):
        raise NoReverseError(
            f"every target is {ignore_index} and ignored: the mean of nothing is undefined. Give "
            "batches with at least one label."
        )
    index = torch.where(kept, targets, 0).unsqueeze(axis)
    own = logits.gather(axis, index).squeeze(axis)
    others = logits.scatter(axis, index, -torch.inf).logsumexp(axis)
    values = torch.where(kept, _softplus(own - others), 0.0)
    return _reduced(values, int(kept.sum()), reduction)


@spelled
def reversed_binary_cross_entropy(
    logits: Tensor, targets: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Return binary cross entropy with its labels flipped: ``-log(1 - p_y)`` of two classes.

    ``log(1 + exp z)`` where the label is 1 and ``log(1 + exp -z)`` where it is 0. Entries of
    several labels a sample are reversed one by one.

    Args:
        logits: Any shape; half precision is widened to float32.
        targets: 0 or 1, of the same shape.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        NoReverseError: A ValueError, if shapes differ or a target is neither 0 nor 1.
    """
    _check_reduction(reduction)
    tensor_of("logits", logits, "one a label")
    tensor_of("targets", targets, "labels, 0 or 1")
    if logits.shape != targets.shape:
        raise NoReverseError(
            f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}: give "
            "one target a logit."
        )
    positive = targets == 1
    if not bool((positive | (targets == 0)).all()):
        raise NoReverseError(
            "targets hold a value other than 0 and 1: binary cross entropy is reversed for hard "
            "labels only. Soft labels have no reverse."
        )
    logits = widened_half(logits)
    values = _softplus(torch.where(positive, logits, -logits))
    return _reduced(values, values.numel(), reduction)


class ReversedCrossEntropy(torch.nn.Module):
    """:func:`reversed_cross_entropy` as a module.

    Args:
        ignore_index: See :func:`reversed_cross_entropy`.
        reduction: Likewise.
    """

    def __init__(self, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_reduction(reduction)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the reversed loss; see :func:`reversed_cross_entropy`."""
        return reversed_cross_entropy(
            logits, targets, ignore_index=self.ignore_index, reduction=self.reduction
        )


class ReversedBinaryCrossEntropy(torch.nn.Module):
    """:func:`reversed_binary_cross_entropy` as a module.

    Args:
        reduction: See :func:`reversed_binary_cross_entropy`.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the reversed loss; see :func:`reversed_binary_cross_entropy`."""
        return reversed_binary_cross_entropy(logits, targets, reduction=self.reduction)


def _softplus(margin: Tensor) -> Tensor:
    """Return ``log(1 + exp m)``, with derivatives to full relative precision on either side.

    ``F.softplus`` becomes the identity at 20, where the second derivative is still 2e-9, and
    the second derivative of ``F.logsigmoid`` is a difference from 1.
    """
    above = margin > 0
    positive, negative = torch.where(above, margin, 0.0), torch.where(above, 0.0, margin)
    far = positive + torch.log1p(torch.exp(-positive))
    return torch.where(above, far, torch.log1p(torch.exp(negative)))


def _reduced(values: Tensor, count: int, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / count


def _check_reduction(reduction: str) -> None:
    one_of("reduction", reduction, Reduction)

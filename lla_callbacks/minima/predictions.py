"""What a network predicts, as probabilities and labels, whatever shape its logits have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.objective.evaluation import Predict


def default_predict(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the module's output for the batch's first entry, and its second entry.

    Raises:
        ValueError: If the batch is no pair of inputs and labels.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor)):
        raise ValueError(
            f"a batch of type {type(batch).__name__} is no pair of inputs and labels: give "
            "predict=callable(module, batch) -> (logits, labels)."
        )
    return module(batch[0]), batch[1]


def probabilities(logits: Tensor) -> Tensor:
    """Return those of classes, one row a prediction, float64 on the CPU.

    Args:
        logits: ``(N, C)`` or ``(N, C, d1, ...)``; one logit a sample, ``(N,)`` or ``(N, 1)``,
            stands for two classes.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"predictions are of type {type(logits).__name__}, not a tensor of logits: give "
            "predict=callable(module, batch) -> (logits, labels)."
        )
    logits = logits.detach().double().cpu()
    if logits.ndim <= 1 or logits.shape[1] == 1:
        one = logits.reshape(-1).sigmoid()
        return torch.stack([1 - one, one], dim=1)
    return logits.movedim(1, -1).reshape(-1, logits.shape[1]).softmax(1)


def num_right(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return how many labels are predicted and how many there are; NaN if they are no labels."""
    shares = probabilities(logits)
    labels = labels.detach().cpu().reshape(-1)
    no_labels = labels.is_floating_point() and bool(((labels != 0) & (labels != 1)).any())
    if no_labels or len(labels) != len(shares):
        return math.nan, max(1, len(labels))
    return float((shares.argmax(1) == labels).sum()), len(labels)


class Accuracy:
    """``(module, batch)`` to the share of labels that are predicted, for an evaluator.

    Args:
        predict: ``predict(module, batch)`` returns logits and labels; ``None``: the module's
            output against ``batch[1]``.
    """

    def __init__(self, predict: Predict | None) -> None:
        self._predict = predict or default_predict

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the share."""
        right, count = num_right(*self._predict(module, batch))
        return torch.tensor(right / count, dtype=torch.float64)


class Confidence(Accuracy):
    """``(module, batch)`` to the mean probability of what is predicted."""

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the mean."""
        return probabilities(self._predict(module, batch)[0]).amax(1).mean()

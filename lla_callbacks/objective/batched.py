"""Many points in one forward pass, by vmap over stacked weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lla_callbacks.objective.batched_forms import batched_forms
from lla_callbacks.objective.evaluation import Evaluator, Statistics
from lla_callbacks.objective.twice_differentiable import elementary_normalization

# Points in the first pass, and at most: while twice as many take less time a point, the next pass
# has twice as many. The stacked weights must fit as well.
FIRST_POINTS = 32
MOST_POINTS = 256
STACK_BYTES = 256 * 2**20
# What twice as many must gain, as a share of the time.
GAIN = 0.05
# A block of this size, asked for and given back untouched, lets glibc keep smaller ones from then
# on: otherwise a pass over many points fetches its memory page by page each time, which took a
# third of it.
WARM_BYTES = 16 * 2**20


class Stacks(Protocol):
    """What is needed of a family of weights."""

    def stack(self, points: Tensor) -> dict[str, Tensor]:
        """Return the weights of several points, one more dimension in front."""

    def statistics(self, point: Sequence[float]) -> Statistics | None:
        """Return the running statistics that belong to a point; None: the module's own."""


class BatchedEvaluator:
    """Evaluates loss and torchmetrics at several points at once.

    Normalization by batch statistics takes its elementary form, since the native one writes
    running statistics, which vmap refuses; values agree with the loop's to rounding.

    Args:
        evaluate: The evaluator whose surroundings are used.
        family: From coordinates to weights.
    """

    def __init__(self, evaluate: Evaluator, family: Stacks) -> None:
        self._evaluate = evaluate
        self._family = family
        self._module = _WithLoss(evaluate)
        self.size = FIRST_POINTS
        self._most = MOST_POINTS
        self._seconds = math.inf
        if evaluate.objective.device.type == "cpu":
            torch.empty(WARM_BYTES, dtype=torch.uint8)

    @staticmethod
    def serves(evaluate: Evaluator, family: Stacks) -> bool:
        """Return whether batching gives the same numbers for this objective."""
        own = family.statistics([0.0]) is None and not evaluate.functions
        # Without batch norm there is nothing to recalibrate.
        return own and (evaluate.objective.mode != "recalibrate" or not evaluate.norms)

    def fit(self, count: int) -> None:
        """Choose how many points go into one pass, for at most ``count``."""
        bytes_each = sum(
            p.numel() * p.element_size() for p in self._evaluate.objective.module.parameters()
        )
        self._most = max(1, min(MOST_POINTS, STACK_BYTES // max(bytes_each, 1)))
        self.size = max(1, min(FIRST_POINTS, count, self._most))

    def learn(self, count: int, seconds: float) -> None:
        """Choose how many points go into the next pass, by what the last one took.

        Args:
            count: Its points.
            seconds: What it took.
        """
        each = seconds / count
        if count < self.size or self._seconds == 0.0:  # the last ones, or it is settled
            return
        if each < (1 - GAIN) * self._seconds:
            self._seconds = each
            self.size = min(2 * self.size, self._most)
        else:
            self.size, self._seconds = max(1, count // 2 if each > self._seconds else count), 0.0

    def agrees(self, points: Tensor, table: Tensor) -> bool:
        """Return whether the loop's values are found again, to rounding."""
        found = self(points)
        return bool(torch.allclose(found, table, rtol=1e-4, atol=1e-6, equal_nan=True))

    def __call__(self, points: Tensor) -> Tensor:
        """Return loss and metrics at points, shape ``(len(points), 1 + num_metrics)``."""
        if not self.serves(self._evaluate, self._family):
            raise ValueError(
                "evaluation is 'vmap', which serves neither mode 'recalibrate', nor interpolated "
                "statistics, nor metrics that are functions: give evaluation='loop' or 'auto'."
            )
        evaluate = self._evaluate
        stacked = {f"inner.{name}": value for name, value in self._family.stack(points).items()}
        metrics = evaluate.metrics
        counts = evaluate.objective.counts
        losses = torch.zeros(len(points), dtype=torch.float64)
        pairs: list[tuple[Tensor, Tensor]] = []
        for i, count in enumerate(counts):

            def one(weights: dict[str, Tensor], i: int = i) -> tuple[Tensor, Any, Any]:
                return functional_call(self._module, weights, (i,))  # type: ignore[no-any-return]

            with elementary_normalization() if evaluate.needs_grad else batched_forms():
                loss, predictions, target = vmap(one, randomness="same", out_dims=(0, 0, None))(  # type: ignore[arg-type]
                    stacked
                )
            losses += count / sum(counts) * loss.detach().double().cpu()
            pairs.append((predictions.detach(), target))
        rows = [losses]
        for metric in metrics.values():
            values = []
            for k in range(len(points)):
                metric.reset()
                for predictions, target in pairs:
                    metric.update(predictions[k], target)
                values.append(float(metric.compute()))
            rows.append(torch.tensor(values, dtype=torch.float64))
        return torch.stack(rows, dim=1)


class _WithLoss(nn.Module):
    """A module whose forward pass is another one's loss."""

    def __init__(self, evaluate: Evaluator) -> None:
        super().__init__()
        self.inner = evaluate.objective.module
        # Not a submodule: a list hides it from functional_call.
        self._hidden = [evaluate]

    def forward(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        loss, (predictions, target) = self._hidden[0].run(i)
        return loss.reshape(()), predictions, target

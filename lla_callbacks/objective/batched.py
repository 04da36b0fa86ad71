"""Many points in one forward pass, by vmap over stacked weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lla_callbacks.linalg.recorded import Program, Recorder
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
# By how much a point's value may differ that is known from another pass of the same operations.
SAME = 1e-5
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

    The operations of a pass are noted, and later passes of as many points are those operations
    alone, without the module's Python, vmap and the guard, which cost a small network more than its
    operations. Each such pass has one point more, whose value is known, and must find it again.

    Args:
        evaluate: The evaluator whose surroundings are used.
        family: From coordinates to weights.
    """

    def __init__(self, evaluate: Evaluator, family: Stacks) -> None:
        self._evaluate = evaluate
        self._family = family
        self._module = _WithLoss(evaluate)
        self.size = FIRST_POINTS - 1
        self._most = MOST_POINTS
        self._seconds = math.inf
        self._on_cpu = evaluate.objective.device.type == "cpu"
        # One a batch, and the points that they take; None: there can be none.
        self._programs: list[Program] | None = None if evaluate.metrics else []
        self._taken = 0
        # A point, shape (1, num_coordinates), and the losses of the batches there.
        self._known: tuple[Tensor, list[float]] | None = None
        if self._on_cpu:
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
        self.size = max(1, min(FIRST_POINTS - 1, count, self._most))

    def learn(self, count: int, seconds: float) -> None:
        """Choose how many points go into the next pass, by what the last one took.

        Args:
            count: Its points.
            seconds: What it took.
        """
        each = seconds / count
        if count < self.size or self._seconds == 0.0:  # the last ones, or it is settled
            return
        if self._on_cpu and self._programs:
            # There is little that more points would share.
            self._seconds = 0.0
        elif each < (1 - GAIN) * self._seconds:
            self._seconds = each
            self.size = min(2 * self.size, self._most)
        else:
            self.size, self._seconds = max(1, count // 2 if each > self._seconds else count), 0.0

    def agrees(self, found: Tensor, table: Tensor) -> bool:
        """Return whether values are those of the loop, to rounding."""
        return bool(torch.allclose(found, table, rtol=1e-4, atol=1e-6, equal_nan=True))

    def __call__(self, points: Tensor) -> Tensor:
        """Return loss and metrics at points, shape ``(len(points), 1 + num_metrics)``."""
        if not self.serves(self._evaluate, self._family):
            raise ValueError(
                "evaluation is 'vmap', which serves neither mode 'recalibrate', nor interpolated "
                "statistics, nor metrics that are functions: give evaluation='loop' or 'auto'."
            )
        count = len(points)
        if self._programs is None or count > self.size:
            return self._from_the_start(points)
        point = points[:1] if self._known is None else self._known[0]
        filled = torch.cat([points, point.expand(self.size + 1 - count, -1)])
        losses = self._again(filled) if self._taken == len(filled) else None
        if losses is None:
            losses = self._recorded(filled)
        if self._known is None:
            self._known = point, losses[:, -1].tolist()
        return self._weighed(losses[:, :count])[:, None]

    def _weighed(self, losses: Tensor) -> Tensor:
        """Return the mean over batches of float64 losses, shape ``(num_points,)``."""
        counts = self._evaluate.objective.counts
        if len(counts) == 1:
            return losses[0]
        total = torch.zeros(losses.shape[1], dtype=torch.float64)
        for count, part in zip(counts, losses, strict=True):
            total += count / sum(counts) * part
        return total

    def _again(self, points: Tensor) -> Tensor | None:
        """Return losses by the operations that are known, or None if they do not find them."""
        assert self._known is not None
        stacked = list(self._family.stack(points).values())
        with torch.no_grad():
            found = torch.stack([program(stacked) for program in self._programs or ()])
        found = found.to("cpu", torch.float64)
        for value, known in zip(found[:, -1].tolist(), self._known[1], strict=True):
            same = abs(value - known) <= SAME * abs(known) or value == known
            if not same and not (math.isnan(value) and math.isnan(known)):
                self._programs, self._taken = None, 0
                return None
        return found

    def _recorded(self, points: Tensor) -> Tensor:
        """Return losses, shape ``(num_batches, num_points)``, and note by which operations."""
        stacked = self._stack(points)
        programs, rows = [], []
        for i in range(len(self._evaluate.objective.counts)):
            recorder = Recorder()
            loss = self._pass(i, stacked, recorder)[0]
            rows.append(loss.detach().double().cpu())
            programs.append(recorder.program(list(stacked.values()), loss))
        kept = [p for p in programs if p is not None]
        whole = self._programs is not None and len(kept) == len(programs)
        # One that differentiates itself has graphs of its own.
        whole = whole and not self._evaluate.needs_grad
        self._programs, self._taken = (kept, len(points)) if whole else (None, 0)
        return torch.stack(rows)

    def _stack(self, points: Tensor) -> dict[str, Tensor]:
        return {f"inner.{name}": value for name, value in self._family.stack(points).items()}

    def _pass(
        self, i: int, stacked: dict[str, Tensor], watched: AbstractContextManager[object]
    ) -> Any:
        """Return losses, predictions and targets of batch ``i``."""

        def one(weights: dict[str, Tensor]) -> tuple[Tensor, Any, Any]:
            return functional_call(self._module, weights, (i,))  # type: ignore[no-any-return]

        forms = elementary_normalization() if self._evaluate.needs_grad else batched_forms()
        with watched, forms:
            return vmap(one, randomness="same", out_dims=(0, 0, None))(stacked)  # type: ignore[arg-type]

    def _from_the_start(self, points: Tensor) -> Tensor:
        """Return loss and metrics, by vmap."""
        metrics = self._evaluate.metrics
        stacked = self._stack(points)
        losses, pairs = [], []
        for i in range(len(self._evaluate.objective.counts)):
            loss, predictions, target = self._pass(i, stacked, nullcontext())
            losses.append(loss.detach().double().cpu())
            pairs.append((predictions.detach(), target))
        rows = [self._weighed(torch.stack(losses))]
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

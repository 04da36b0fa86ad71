"""The loss along a curve: values, lengths, and the three barriers of the literature."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.curves.curve import step_lengths
from lla_callbacks.curves.family import OnCurve
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.objective.grid import coarse_to_fine
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, evaluate_points
from lla_callbacks.slices.slices import SliceFacts, facts_of

# As the published figures (Garipov et al. 2018).
CURVE_POINTS = 61


@dataclass(frozen=True)
class CurveStatistics:
    """One quantity ``v`` along a curve, in numbers.

    Attributes:
        start: ``v(0)``.
        end: ``v(1)``.
        minimum: The lowest.
        maximum: The highest.
        mean: Over ``t``, by the trapezoid rule: what training a curve minimizes.
        integral: Mean over arc length, ``int v |phi'| dt / int |phi'| dt``.
        barrier_above_ends: ``max_t v - max(v(0), v(1))``; 0 where nothing is higher.
        barrier_above_line: ``max_t [v - ((1-t) v(0) + t v(1))]`` (Entezari et al. 2021; git
            re-basin).
        barrier_above_mean: ``max_t v - (v(0) + v(1)) / 2`` (Frankle et al. 2020).
    """

    start: float
    end: float
    minimum: float
    maximum: float
    mean: float
    integral: float
    barrier_above_ends: float
    barrier_above_line: float
    barrier_above_mean: float


@dataclass(frozen=True, eq=False)
class Along:
    """The loss along a curve, beside the straight line between its ends.

    Attributes:
        t: Shape ``(n,)``, float64, ascending from 0 to 1.
        loss: Shape ``(n,)``, float64; NaN where it was not evaluated, or is NaN.
        metrics: Name to values of the same shape.
        evaluated: Which points were evaluated, shape ``(n,)``.
        steps: Lengths of the steps between neighbouring points, shape ``(n - 1,)``.
        kind: Of the curve.
        bends: Its control points between the ends.
        straight: The same on the straight line, if it was measured.
        facts: Conditions.
    """

    t: Tensor
    loss: Tensor
    metrics: Mapping[str, Tensor]
    evaluated: Tensor
    steps: Tensor
    kind: str
    bends: int
    straight: Along | None
    facts: SliceFacts

    @property
    def complete(self) -> bool:
        """Whether every point was evaluated."""
        return bool(self.evaluated.all())

    @property
    def length(self) -> float:
        """Of the curve, in units of the weights."""
        return float(self.steps.sum())

    def values(self, metric: str | None = None) -> Tensor:
        """Return the loss, or a metric, at each point.

        Raises:
            ValueError: If there is no such metric.
        """
        if metric is None:
            return self.loss
        if metric not in self.metrics:
            known = ", ".join(self.metrics) or "none was measured"
            raise ValueError(f"no metric is named {metric!r}; they are: {known}.")
        return self.metrics[metric]

    def statistics(self, metric: str | None = None) -> CurveStatistics:
        """Return the loss, or a metric, in numbers; NaN where a value is not finite.

        Barriers are of what should be low: of an accuracy they mean nothing, of an error they do.

        Raises:
            ValueError: If there is no such metric.
        """
        values = self.values(metric)
        return statistics_of(self.t[self.evaluated], values[self.evaluated], self._seen_steps())

    def _seen_steps(self) -> Tensor:
        """Return the way between neighbouring points that were evaluated."""
        way = torch.cat([torch.zeros(1, dtype=torch.float64), self.steps.cumsum(0)])
        return way[self.evaluated].diff()


def statistics_of(t: Tensor, values: Tensor, steps: Tensor) -> CurveStatistics:
    """Return values along a curve in numbers.

    Args:
        t: Ascending, float64; both ends among them, or barriers are NaN.
        values: There.
        steps: Lengths between neighbouring points.
    """
    if not len(t):
        return CurveStatistics(*[math.nan] * 9)
    middles = (values[:-1] + values[1:]) / 2
    both = bool(t[0] == 0) and bool(t[-1] == 1)
    start = float(values[0]) if bool(t[0] == 0) else math.nan
    end = float(values[-1]) if bool(t[-1] == 1) else math.nan
    # torch's maximum is NaN where one is, which is what must be said.
    top, low = float(values.max()), float(values.min())
    above_line = math.nan
    if both:
        above_line = float((values - ((1 - t) * start + t * end)).max())
    way = float(steps.sum())
    return CurveStatistics(
        start,
        end,
        low,
        top,
        float((middles * t.diff()).sum() / (t[-1] - t[0])) if len(t) > 1 else float(values[0]),
        float((middles * steps).sum() / way) if way > 0 else float(values.mean()),
        top - max(start, end) if both and not math.isnan(start + end) else math.nan,
        above_line,
        top - (start + end) / 2,
    )


def measure_along(
    objective: Objective,
    family: OnCurve,
    t: Tensor,
    settings: PointSettings,
    *,
    straight: Along | None = None,
    seed: int = 0,
    share: Share | None = None,
    listener: Callable[[int], object] | None = None,
) -> Along:
    """Return the loss along a curve; both ends are the networks themselves, to the bit.

    Args:
        objective: The loss.
        family: The curve.
        t: Ascending from 0 to 1, float64.
        settings: How points are evaluated.
        straight: The straight line, for the record.
        seed: Of the measurement, for the record.
        share: Processes that divide the points.
        listener: Called after points, with their number.
    """
    began = time.perf_counter()
    n = len(t)
    coarse = [i for level in coarse_to_fine((n,), [n // 2]) for i in level]
    ends = [i for i in dict.fromkeys((0, n - 1)) if t[i] in (0.0, 1.0)]
    values = evaluate_points(
        objective, family, t[:, None], settings,
        order=[*ends, *(i for i in coarse if i not in ends)], exact=ends, share=share,
        listener=listener,
    )  # fmt: skip
    return Along(
        t,
        values.table[:, 0],
        {name: values.table[:, k + 1] for k, name in enumerate(values.names)},
        values.evaluated,
        step_lengths(family.kind, family.points, t),
        family.kind,
        len(family.points) - 2,
        straight,
        facts_of(objective, "", seed, began, num_points=values.num_new, method=values.method),
    )


def even(points: int) -> Tensor:
    """Return that many even ``t`` from 0 to 1, float64, exact at the ends."""
    return torch.arange(points, dtype=torch.float64) / (points - 1)

"""One network on several sets of data: what its spectrum says of each, beside plainer numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.hessian.measures import HessianMeasurement, measure
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.minima.predictions import Accuracy, Confidence
from lla_callbacks.minima.statistics import bootstrap, partial_spearmans, spearmans
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.objective import Objective

# Below this many wrong samples the negative part of the spectrum, which they make, is a matter
# of chance: r_e of LLA's LeNet fell from 0.139 to 0.028 from 200 samples to 2,048.
LEAST_WRONG = 20
# What the criteria are compared with, at a hundredth of the cost.
PLAIN = ("loss", "accuracy", "confidence")


@dataclass(frozen=True, eq=False)
class ShiftedSet:
    """A network on one set of data.

    Attributes:
        name: Of the set.
        measurement: Everything that was measured of the Hessian.
        loss: Mean loss.
        accuracy: Share of labels that are predicted.
        confidence: Mean probability of what is predicted.
        num_samples: Samples.
        num_wrong: Samples whose label is not predicted.
    """

    name: str
    measurement: HessianMeasurement
    loss: float
    accuracy: float
    confidence: float
    num_samples: int
    num_wrong: int

    @property
    def values(self) -> dict[str, float]:
        """Every number by its name: criteria, eigenvalues, trace, and the plain three."""
        m = self.measurement
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "confidence": self.confidence,
            "lambda_max": float(m.lambda_max),
            "lambda_min": float(m.lambda_min),
            "trace": m.trace,
            **{k: v for k, v in m.criteria.items() if k != "stability"},
        }

    @property
    def errors(self) -> dict[str, float]:
        """The error of each, as far as it has one; see docs/measures.md."""
        m = self.measurement
        return {
            "lambda_max": m.lambda_max.residual,
            "lambda_min": m.lambda_min.residual,
            "trace": m.trace_sem,
            **{k: v for k, v in m.criteria_errors.items() if k != "stability"},
        }


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation over sets.

    Attributes:
        value: The correlation; NaN where it is not defined.
        low: Lower end of its 95 % interval, by drawing sets with replacement.
        high: Upper end.
        num_sets: How many sets it rests on.
    """

    value: float
    low: float
    high: float
    num_sets: int


@dataclass(frozen=True, eq=False)
class Shift:
    """A network on several sets of data, the same number of samples each.

    Attributes:
        sets: Name to what was found, in the order given.
        num_samples: Samples of each set.
        mode: Mode of the network.
        num_steps: Lanczos depth: KH05 compares at equal depth only.
        seed: Of random vectors and of bootstraps.
    """

    sets: Mapping[str, ShiftedSet]
    num_samples: int
    mode: str
    num_steps: int
    seed: int

    @property
    def few_wrong(self) -> tuple[str, ...]:
        """Sets with so few wrong samples that criteria of the negative part are chance."""
        known = {n: s for n, s in self.sets.items() if math.isfinite(s.accuracy)}
        return tuple(n for n, s in known.items() if s.num_wrong < LEAST_WRONG)

    def column(self, name: str) -> Tensor:
        """Return one number of every set, shape ``(num_sets,)``, float64.

        Raises:
            ValueError: If there is no such number.
        """
        rows = [s.values for s in self.sets.values()]
        if name not in rows[0]:
            raise ValueError(f"{name!r} is not measured; there are {', '.join(rows[0])}.")
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    def rank_correlation(
        self, name: str, against: str = "accuracy", given: str | None = None
    ) -> RankCorrelation:
        """Return how far the order of one number over sets is that of another.

        The interval is over sets of this one network: of other networks it says nothing.

        Args:
            name: Of a criterion, or ``"loss"``, ``"confidence"`` and so on.
            against: Likewise.
            given: What else is known: the partial correlation, what ``name`` tells of
                ``against`` beyond it.
        """
        columns = [self.column(n) for n in (name, against, *([given] if given else []))]
        known = torch.stack(columns).isfinite().all(0)
        columns = [c[known] for c in columns]

        def statistic(index: Tensor) -> Tensor:
            x, y, *z = (c[index] for c in columns)
            return partial_spearmans(x, y, z[0]) if z else spearmans(x, y)

        count = int(known.sum())
        low, high = bootstrap(count, statistic, seed=self.seed)
        value = float(statistic(torch.arange(count))) if count > 2 else math.nan
        return RankCorrelation(value, low, high, count)


def measure_set(
    name: str,
    objective: Objective,
    settings: HessianSettings,
    accuracy: Accuracy,
    confidence: Confidence,
) -> ShiftedSet:
    """Return what one set says."""
    metrics: Mapping[str, Any] = {"accuracy": accuracy, "confidence": confidence}
    with evaluating(objective, metrics=metrics) as evaluate:
        loss, share, certain = evaluate().tolist()
    found = measure(objective, settings)
    count = objective.num_samples
    wrong = 0 if math.isnan(share) else round(count * (1 - share))
    return ShiftedSet(name, found, loss, share, certain, count, wrong)

"""What a handful of numbers can say: intervals, ranks, and how far a picture can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lla_callbacks.linalg.probes import generator

# Bootstrap draws: an end of a 95 % interval is then known to about 2 % of its width.
DRAWS = 2000


def student(degrees: float, level: float = 0.95) -> float:
    """Return the two-sided quantile of Student's t, to five digits.

    With ``t = sqrt(df) tan(phi)`` the density is proportional to ``cos(phi)^(df - 1)``, which
    is added up.

    Args:
        degrees: Degrees of freedom, at least 1.
        level: Probability inside.
    """
    # Beyond this the density is below 1e-16 of its height.
    end = min(math.pi / 2, 9 / math.sqrt(degrees)) if degrees > 60 else math.pi / 2
    angle = torch.linspace(0, end, 200_001, dtype=torch.float64)
    density = angle.cos().clamp(min=0) ** (degrees - 1)
    total = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, angle)])
    share = total / total[-1]
    at = int(torch.searchsorted(share, torch.tensor(level, dtype=torch.float64)))
    low, high = share[at - 1], share[at]
    inside = (level - low) / (high - low)
    phi = float(angle[at - 1] + inside * (angle[at] - angle[at - 1]))
    return math.sqrt(degrees) * math.tan(phi)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return mean, lower and upper end of Student's interval; NaN ends for a single value."""
    sample = torch.tensor(list(values), dtype=torch.float64)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, math.nan, math.nan
    half = student(len(sample) - 1, level) * float(sample.std()) / math.sqrt(len(sample))
    return mean, mean - half, mean + half


def ranks(values: Tensor) -> Tensor:
    """Return ranks from 0 along the last dimension, ties at their mean; float64."""
    below = (values.unsqueeze(-1) > values.unsqueeze(-2)).sum(-1)
    equal = (values.unsqueeze(-1) == values.unsqueeze(-2)).sum(-1)
    return below.double() + (equal.double() - 1) / 2


def spearmans(x: Tensor, y: Tensor) -> Tensor:
    """Return Spearman's rank correlations along the last dimension.

    NaN below three values, and where one of the two does not vary.
    """
    x, y = (r - r.mean(-1, keepdim=True) for r in (ranks(x), ranks(y)))
    norm = x.norm(dim=-1) * y.norm(dim=-1)
    known = (norm > 0) & (x.shape[-1] > 2)
    return torch.where(known, (x * y).sum(-1) / norm.clamp(min=1e-300), torch.nan)


def partial_spearmans(x: Tensor, y: Tensor, given: Tensor) -> Tensor:
    """Return the rank correlations of x and y that are left once ``given`` is known.

    ``(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2))``; NaN where ``given`` tells one of
    them completely.
    """
    xy, xz, yz = spearmans(x, y), spearmans(x, given), spearmans(y, given)
    rest = (1 - xz * xz) * (1 - yz * yz)
    return torch.where(rest > 1e-12, (xy - xz * yz) / rest.clamp(min=1e-300).sqrt(), torch.nan)


def spearman(x: Tensor, y: Tensor) -> float:
    """Return one rank correlation; see :func:`spearmans`."""
    return float(spearmans(x, y))


def partial_spearman(x: Tensor, y: Tensor, given: Tensor) -> float:
    """Return one partial rank correlation; see :func:`partial_spearmans`."""
    return float(partial_spearmans(x, y, given))


def bootstrap(
    count: int,
    statistic: Callable[[Tensor], Tensor],
    *,
    seed: int = 0,
    level: float = 0.95,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic of units drawn with replacement.

    Args:
        count: How many units there are.
        statistic: Takes indices of units, shape ``(draws, count)``, and returns one number a
            draw; those that are NaN are left out, and where more than a tenth are, so is the
            interval.
        seed: Of the draws.
        level: Probability inside.
        draws: How many.

    Returns:
        Lower and upper end, NaN below four units: so few have too few different draws.
    """
    if count < 4:
        return math.nan, math.nan
    indices = torch.randint(0, count, (draws, count), generator=generator(seed, 8))
    found = statistic(indices).double()
    known = found[found.isfinite()]
    if len(known) < 0.9 * draws:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = torch.quantile(known, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def trustworthiness(distances: Tensor, points: Tensor, neighbours: int = 5) -> float:
    """Return how far neighbours in a picture are neighbours in truth (Venna and Kaski 2001).

    ``1 - 2 / (n k (2 n - 3 k - 1)) sum_i sum_{j new in i's k neighbours} (rank(i, j) - k)``:
    1 if every point's k nearest in the picture are its k nearest; NaN below five points.

    Args:
        distances: True ones, shape ``(n, n)``.
        points: The picture, shape ``(n, d)``.
        neighbours: k; less where there are too few points for it.
    """
    n = len(points)
    k = min(neighbours, (n - 1) // 2)
    if n < 5 or k < 1:
        return math.nan
    shown = torch.cdist(points.double(), points.double())
    diagonal = torch.eye(n, dtype=torch.bool)
    true_ranks = distances.double().masked_fill(diagonal, -1.0).argsort(1).argsort(1)
    nearest = shown.masked_fill(diagonal, torch.inf).topk(k, largest=False).indices
    late = (true_ranks.gather(1, nearest) - k).clamp(min=0).sum()
    return 1 - 2 * float(late) / (n * k * (2 * n - 3 * k - 1))

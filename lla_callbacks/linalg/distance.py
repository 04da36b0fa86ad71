"""How far the shapes of two spectra are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.linalg.density import propagated_error
from lla_callbacks.linalg.lanczos import LanczosRun

# Of the published measure: share of the range added at either end, points of its grid, and
# Lanczos depth, on which its smoothing width depends.
PUBLISHED_MARGIN, PUBLISHED_POINTS, PUBLISHED_DEPTH = 0.05, 1024, 128


@dataclass(frozen=True)
class Quadrature:
    """A spectral density as weighted nodes, averaged over independent start vectors.

    Attributes:
        nodes: Shape ``(k,)``, float64, of all runs.
        weights: Shape ``(k,)``, float64, non-negative, sum 1.
        dim: Dimension of the operator.
        num_runs: Independent start vectors.
        low: An eigenvalue bound: the smallest node less its residual.
        high: The largest node plus its residual.
    """

    nodes: Tensor
    weights: Tensor
    dim: int
    num_runs: int
    low: float
    high: float

    @classmethod
    def of(cls, runs: Sequence[LanczosRun], dim: int) -> Quadrature:
        """Return the mean over Lanczos runs of an operator of dimension ``dim``."""
        return cls(
            nodes=torch.cat([run.values for run in runs]),
            weights=torch.cat([run.weights for run in runs]) / len(runs),
            dim=dim,
            num_runs=len(runs),
            low=min(float(run.values[0] - run.residuals[0]) for run in runs),
            high=max(float(run.values[-1] + run.residuals[-1]) for run in runs),
        )


def shape_distance(a: Quadrature, b: Quadrature) -> tuple[float, float]:
    """Return the 1-Wasserstein distance of two normalized spectra, and its standard error.

    Each spectrum is divided by its largest eigenvalue in magnitude, so that the distance
    does not depend on scale: 0 for spectra of the same shape, at most 2. It is the mean
    distance by which eigenvalues have to be moved, as a share of the largest one.

    In one dimension it is ``integral |F_a - F_b| dx`` for the cumulative shares ``F`` (Peyre
    and Cuturi 2019, section 2.6). The error is that of the weights of both
    (:func:`~lla_callbacks.linalg.density.propagated_error`): a weight of ``a`` at ``x`` raises
    ``F_a`` beyond ``x``, so the slope in it is the integral of ``sign(F_a - F_b)`` from there
    on. Where the distance is no larger than its error it says that no difference was seen:
    two estimates of one spectrum are about that far apart. Positions of nodes, so the depth
    of the runs, are not covered.

    Returns:
        NaN twice if an operator is zero: it has no shape.
    """
    scales = [float(q.nodes.abs().max()) for q in (a, b)]
    if 0 in scales:
        return math.nan, math.nan
    nodes = torch.cat([a.nodes / scales[0], b.nodes / scales[1]])
    order = torch.argsort(nodes)
    steps = torch.cat([a.weights, -b.weights])[order]
    gaps = nodes[order].diff()
    above = torch.cumsum(steps, dim=0)[:-1]  # F_a - F_b between neighbouring nodes
    # Rounding must not be taken for the sign of a difference.
    above = torch.where(above.abs() > 1e-12, above, 0.0)
    distance = float((above.abs() * gaps).sum())
    lengths = torch.cat([above.sign() * gaps, gaps.new_zeros(1)])
    potential = torch.empty_like(lengths)
    potential[order] = lengths.flip(0).cumsum(0).flip(0)
    split = len(a.nodes)
    errors = [
        propagated_error(potential[:split], a.weights, a.dim * a.num_runs),
        propagated_error(potential[split:], b.weights, b.dim * b.num_runs),
    ]
    return distance, math.hypot(*errors)


def published_distance(a: Quadrature, b: Quadrature) -> float:
    """Return the distance that Sankar et al. 2021 computed, to compare with their figures.

    Each density is broadened on a grid of 1,024 points over its own range, its logarithm is
    scaled to [0, 1] and divided by its sum, and the *heights* of the two are compared as if
    they were samples (``match_distros.py`` of their code). So the number does not know where
    eigenvalues lie: it compares how often the log density has which height, in units of
    1/1024 or so. Differences to theirs: every basis is orthogonalised, the depth is the
    runs' own instead of 128, and weights are averaged over start vectors.

    Returns:
        NaN if an operator is zero.
    """
    if a.low == a.high or b.low == b.high:
        return math.nan
    heights = [_published_heights(q) for q in (a, b)]
    return float((heights[0] - heights[1]).abs().mean())


def _published_heights(q: Quadrature) -> Tensor:
    """Return the scaled log density's heights, ascending, shape ``(1024,)``, sum 1."""
    margin = PUBLISHED_MARGIN * (q.high - q.low)
    low, high = q.low - margin, q.high + margin
    grid = torch.linspace(-1, 1, PUBLISHED_POINTS, dtype=torch.float64)
    nodes = (2 * q.nodes - (low + high)) / (high - low)
    width = 2 / (PUBLISHED_DEPTH - 1) / math.sqrt(8 * math.log(1.25))
    offsets = (grid[:, None] - nodes[None, :]) / width
    # Their kernel is cut where it falls below 1e-8 of its peak.
    kernel = torch.exp(-0.5 * offsets**2) * (offsets**2 < -2 * math.log(1e-8))
    density = kernel @ q.weights
    density = torch.where(density > 0, density, density[density > 0].min())
    heights = density.log()
    heights = (heights - heights.min()) / (heights.max() - heights.min())
    return (heights / heights.sum()).sort().values

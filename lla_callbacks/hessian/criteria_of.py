"""All criteria of one measurement, with their errors, from runs and traces that are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from lla_callbacks.hessian import criteria
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.linalg.density import sampling_error
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.linalg.lanczos import LanczosRun
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.trace import TraceEstimate

# Which eigenvalue the ratio lambda_1 / lambda_k names, and how many eigenvectors span the
# subspace that the gradient is projected on. Choice: fewer than most tasks have classes, so
# that they are outliers, which a short run resolves.
NUM_TOP = 5
# The share of a run's steps from which on a criterion should not have moved any more. At 0.6 two
# errors of the effective dimension covered in all of 30 runs at every depth from 12 to 40, at
# initialisation and trained, where 0 to 100 % were covered without (docs/benchmarks/coverage.md).
SINCE = 0.6
# What a run that ended early cannot say.
FAR_END = (
    "c_t", "r_e", "mainly_positive", "kh05", "kh1", "effective_dimension", "eigenvalue_ratio",
    "gradient_share",
)  # fmt: skip
FAR_GAP = "criteria of the far end"


def criteria_of(
    hessian: LossOperator,
    runs: Sequence[LanczosRun],
    ends: tuple[Eigenvalue, Eigenvalue],
    traces: TraceEstimate,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the criteria and their errors, at no further product.

    Beside the randomness of start vectors an error holds what the last steps changed: every
    criterion is evaluated at the run's own earlier depths too, from :data:`SINCE` of its steps on,
    and the largest change counts as one error. KH05 depends on the depth by definition, so that its
    error is at equal depth.

    Args:
        hessian: The operator, for its gradient.
        runs: The Lanczos runs.
        ends: Smallest and largest eigenvalue.
        traces: For ``tr H^2``.
    """
    dim = hessian.shape[0]
    values: dict[str, float] = {}
    errors: dict[str, float] = {}

    earlier = [
        [run.forgotten().at_depth(depth) for run in runs]
        for depth in range(math.ceil(SINCE * runs[0].num_steps), runs[0].num_steps)
        if depth >= 2 and all(depth < run.num_steps for run in runs)
    ]
    if any(run.broke_down for run in runs):
        earlier = []

    def change(function: Callable[[LanczosRun], float], present: float) -> float:
        """Return the largest change of a mean over runs in the last steps, 0 where undefined."""
        means = [sum(map(function, at)) / len(at) for at in earlier]
        return max((abs(m - present) for m in means if math.isfinite(m)), default=0.0)

    def over_runs(
        name: str, function: Callable[[Tensor, Tensor], float], *, deep: bool = False
    ) -> None:
        singles = [function(run.values, run.weights) for run in runs]
        spread = [
            sampling_error(lambda w, run=run: function(run.values, w), run.weights, dim)  # type: ignore[misc]
            for run in runs
        ]
        values[name] = sum(singles) / len(runs)
        errors[name] = math.sqrt(sum(s * s for s in spread)) / len(runs)
        if deep:
            moved = change(lambda run: function(run.values, run.weights), values[name])
            errors[name] = math.hypot(errors[name], moved)

    over_runs("kh05", lambda t, w: criteria.negative_to_positive(t, w, 0.5))
    over_runs("kh1", lambda t, w: criteria.negative_to_positive(t, w, 1.0), deep=True)
    over_runs("negative_mass", criteria.negative_mass)
    resolution = max(criteria.negative_mass_bound(run.values, run.weights) for run in runs)
    errors["negative_mass"] = math.hypot(errors["negative_mass"], resolution)
    over_runs("effective_dimension", partial(criteria.effective_dimension, dim=dim), deep=True)

    # Ratios of extremes per run, as LLA averages them; the error comes from residuals.
    ratios = [criteria.extreme_ratio(run.values) for run in runs]
    bounds = [
        _ratio_error(
            float(run.values[0]), run.beyond[0], float(run.values[-1]), run.beyond[1],
        )
        for run in runs
    ]  # fmt: skip
    values["c_t"] = sum(ratios) / len(runs)
    values["r_e"] = sum(map(abs, ratios)) / len(runs)
    moved = change(lambda run: criteria.extreme_ratio(run.values), values["c_t"])
    errors["c_t"] = errors["r_e"] = math.hypot(sum(bounds) / len(runs), moved)
    values["mainly_positive"] = criteria.mainly_positive(values["c_t"])
    errors["mainly_positive"] = 0.0

    # tr H^2 from the norms of all products: better than the quadrature, with a sem.
    values["frobenius_norm"] = math.sqrt(traces.square)
    errors["frobenius_norm"] = traces.square_sem / (2 * math.sqrt(max(traces.square, 1e-300)))
    widest = max(ends, key=abs)
    if float(widest) != 0:
        values["stable_rank"] = rank = traces.square / widest**2
        errors["stable_rank"] = math.hypot(
            traces.square_sem / widest**2, 2 * rank * widest.residual / abs(widest)
        )
    else:
        values["stable_rank"] = errors["stable_rank"] = math.nan

    first = runs[0]
    rounding = criteria.ROUNDING * float(first.values.abs().max())
    if first.num_steps >= NUM_TOP and float(first.values[-NUM_TOP]) > rounding:
        kth, kth_residual = float(first.values[-NUM_TOP]), float(first.residuals[-NUM_TOP])
        values["eigenvalue_ratio"] = float(first.values[-1]) / kth
        errors["eigenvalue_ratio"] = _ratio_error(
            float(first.values[-1]), float(first.residuals[-1]), kth, kth_residual
        )
    else:
        values["eigenvalue_ratio"] = errors["eigenvalue_ratio"] = math.nan
    values["gradient_share"], errors["gradient_share"] = _gradient_share(hessian, first)
    return values, errors


def _ratio_error(top: float, top_error: float, bottom: float, bottom_error: float) -> float:
    """Return the first-order error of ``top / bottom``, NaN where that is undefined."""
    if not bottom > 0:
        return math.nan
    return math.hypot(top_error / bottom, top * bottom_error / bottom**2)


def _gradient_share(hessian: LossOperator, run: LanczosRun) -> tuple[float, float]:
    """Return ``||P g||^2 / ||g||^2`` for the top eigenvectors, and a bound of its error.

    Gur-Ari et al. 2018, section 2. By Davis and Kahan the projectors onto the Ritz vectors
    and onto the eigenvectors differ by at most ``||residuals|| / gap``, and so does the
    share, where ``gap`` separates the ``NUM_TOP`` largest eigenvalues from the rest, here
    from the next Ritz value and its residual. A Lanczos run sees a repeated eigenvalue once.
    """
    square = hessian.vectors.inner(hessian.gradient, hessian.gradient)
    if run.num_steps <= NUM_TOP or square == 0:
        return math.nan, math.nan
    top = list(range(run.num_steps - NUM_TOP, run.num_steps))
    # Of the basis first: no Ritz vector is made.
    gradient = hessian.gradient.to(run.kept.device)
    inside = run.rotated(run.kept.coordinates(hessian.vectors, gradient), top)
    share = float(inside.square().sum()) / square
    next_one = run.values[-NUM_TOP - 1] + run.residuals[-NUM_TOP - 1]
    gap = float(run.values[-NUM_TOP] - next_one)
    bound = float(run.residuals[top].norm()) / gap if gap > 0 else 1.0
    # The vectors' own rounding, of each.
    bound += 2 * math.sqrt(NUM_TOP) * run.kept.rounding
    return share, min(bound, 1.0)


def without_far_end(
    settings: HessianSettings,
    runs: Sequence[LanczosRun],
    values: dict[str, float],
    errors: dict[str, float],
) -> dict[str, str]:
    """Take out the criteria that a run which ended early cannot say; return the gap, by name."""
    ended = [run.num_steps for run in runs if run.num_steps < settings.num_steps]
    if settings.eig_rtol is None or not ended or all(run.broke_down for run in runs):
        return {}
    for name in FAR_END:
        values[name] = errors[name] = math.nan
    return {
        FAR_GAP: f"eig_rtol={settings.eig_rtol} ended a run after {min(ended)} of "
        f"{settings.num_steps} steps, before the far end of the spectrum is known: "
        f"{', '.join(FAR_END)}. Leave out eig_rtol for them"
    }

"""How far one can walk from the weights before the loss rises: the radii of the basin."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lla_callbacks.linalg.sharing import Alone, Share, all_or_none, fail_together
from lla_callbacks.objective.evaluation import Evaluator
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.grid import gathered
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, is_late, moving, space_of
from lla_callbacks.slices.directions import Normalization, Vectors
from lla_callbacks.slices.filters import Filters
from lla_callbacks.slices.slices import SliceFacts, facts_of
from lla_callbacks.slices.spread_filters import filters_of

# Where the walk begins, as a share of the filters' norms; it doubles from there.
FIRST_RADIUS = 1 / 64
# Relative accuracy of a radius: far below the spread from ray to ray.
RTOL = 0.01


@dataclass(frozen=True, eq=False)
class Basin:
    """Radii along random rays at which the loss first passes a cutoff.

    Attributes:
        radii: Of the rays that passed it, or the largest radius tried for those that did not;
            shape ``(num_rays,)``, float64, in the order of the rays, in filter norms.
        open: Which rays did not pass it, shape ``(num_rays,)``.
        cutoff: The loss that counts as the rim.
        centre_loss: The loss at the weights.
        max_radius: How far rays were followed.
        dim: Dimension of the space that rays are drawn from: parameters that they move.
        rtol: Relative width of the last bisection interval.
        facts: Conditions; ``num_points`` counts the forward passes over all samples.
    """

    radii: Tensor
    open: Tensor
    cutoff: float
    centre_loss: float
    max_radius: float
    dim: int
    rtol: float
    facts: SliceFacts

    @property
    def quantiles(self) -> dict[float, float]:
        """Radii at the quantiles 0.1, 0.5 and 0.9; infinite where the ray is open."""
        filled = torch.where(self.open, torch.inf, self.radii).sort().values
        count = len(filled)
        return {q: float(filled[min(count - 1, round(q * (count - 1)))]) for q in (0.1, 0.5, 0.9)}

    @property
    def at_least(self) -> bool:
        """Whether some ray is open, so that what is said of the radii is a lower bound."""
        return bool(self.open.any())

    @property
    def effective_radius(self) -> float:
        """``exp(mean log r)``: the radius of a typical ray; a lower bound if :attr:`at_least`."""
        return float(self.radii.log().mean().exp())

    @property
    def effective_radius_sem(self) -> float:
        """Standard error of :attr:`effective_radius` over rays; NaN if all rays are open."""
        if len(self.radii) < 2 or bool(self.open.all()):
            return math.nan
        spread = float(self.radii.log().std()) / math.sqrt(len(self.radii))
        return self.effective_radius * spread

    @property
    def log10_volume(self) -> float:
        """Decimal logarithm of the basin's volume, in filter norms: read "at least".

        ``log omega_n + logsumexp(n log r) - log K`` for ``K`` rays in ``n`` dimensions, with
        ``omega_n`` the unit ball's volume: the mean of ``r^n`` is in truth the largest of ``K``
        radii and keeps rising with ``K``. Compare it at equal ``K`` and ``n`` only, and look at
        the radii first (Huang et al. 2020, section 4, use it to compare minima). NaN if all rays
        are open.
        """
        if bool(self.open.all()):
            return math.nan
        n, count = self.dim, len(self.radii)
        log_ball = 0.5 * n * math.log(math.pi) - math.lgamma(0.5 * n + 1)
        total = float(torch.logsumexp(n * self.radii.log(), dim=0)) - math.log(count)
        return (log_ball + total) / math.log(10)

    @property
    def log10_volume_error(self) -> float:
        """How far bisection alone leaves :attr:`log10_volume` open, to either side.

        ``n rtol / (2 ln 10)``: a radius that is known to 1 % is known to 0.5 % on either side, and
        raised to the power ``n``, so that the error grows with the number of parameters: 2,171
        orders of magnitude for a million. What further rays would add is no error and comes on top.
        """
        return self.dim * self.rtol / (2 * math.log(10))


def measure_basin(
    objective: Objective,
    *,
    num_rays: int,
    rise: float | None,
    cutoff: float | None,
    max_radius: float,
    rtol: float = RTOL,
    normalization: Normalization = "filter",
    vectors: Vectors = "zero",
    seed: int = 0,
    time_budget: float | None = None,
    share: Share | None = None,
    listener: Callable[[int], object] | None = None,
) -> Basin:
    """Return the radii at which the loss passes a cutoff along random normalized rays.

    Along each ray the radius doubles from 1/64 until the loss is above the cutoff or not a
    number; bisection then narrows the last interval. Rays are drawn one by one from the
    seed, so that more of them extend the same series.

    Args:
        objective: The loss.
        num_rays: How many.
        rise: The cutoff is this much above the loss at the weights.
        cutoff: The cutoff itself, instead of ``rise``.
        max_radius: Largest radius tried.
        rtol: Relative width at which bisection stops.
        normalization: Of the rays; see
            :func:`~lla_callbacks.slices.directions.random_directions`.
        vectors: Likewise.
        seed: Of the rays.
        time_budget: Seconds after which no further ray is begun.
        share: Processes that divide the rays.
        listener: Called after each ray.

    Raises:
        ValueError: If the cutoff is not above the loss at the weights.
    """
    began = time.perf_counter()
    share = share or Alone()
    space = space_of(objective)
    filters = filters_of(objective.module, space, normalization, vectors)
    centre = all_or_none(share, objective)
    rim = cutoff if cutoff is not None else centre + (rise or 0.0)
    if not rim > centre:
        raise ValueError(
            f"the cutoff {rim:.4g} is not above the loss {centre:.4g} at the weights: give a "
            "larger one, or rise= for a cutoff above whatever the loss is."
        )
    walk = _Walk(objective, filters, rim, max_radius, rtol, seed)
    # radius, 1 if it is open, and forward passes of each ray
    table = torch.full((num_rays, 3), float("nan"), dtype=torch.float64)
    done = torch.zeros(num_rays, dtype=torch.bool)
    trouble: Exception | None = None
    try:
        with moving(objective, walk.family, PointSettings()) as evaluate:
            for k in range(share.rank, num_rays, share.size):
                late = time_budget is not None and time.perf_counter() - began > time_budget
                if time_budget is not None and k >= share.size and is_late(space, late):
                    break
                table[k], done[k] = walk.along(k, evaluate), True
                if listener is not None:
                    listener(1)
    except Exception as error:  # noqa: BLE001 - raised below, in all processes together
        trouble = error
    fail_together(share, trouble)
    table, done = gathered(share, table, done, torch.zeros_like(done))
    return Basin(
        table[done, 0],
        table[done, 1] > 0,
        rim,
        centre,
        max_radius,
        filters.num_moved(),
        rtol,
        facts_of(objective, normalization, seed, began, num_points=int(table[done, 2].sum())),
    )


@dataclass(frozen=True)
class _Walk:
    """Follows rays from the weights."""

    objective: Objective
    filters: Filters
    rim: float
    max_radius: float
    rtol: float
    seed: int

    @cached_property
    def family(self) -> Offsets:
        return Offsets(self.filters.space, [])

    def along(self, k: int, evaluate: Evaluator) -> Tensor:
        """Return radius, openness and cost of ray ``k``."""
        space, passes = self.filters.space, 0
        held = space.vectors()
        noise = self.filters.drawn(self.seed, 5, k)
        self.family.turn([self.filters.scaled(noise).to(space.device, space.dtype)])

        def loss(radius: float) -> float:
            nonlocal passes
            passes += 1
            self.family.place([radius])
            # Rounding must not tell processes apart that go on together.
            return float(held.share.same(evaluate()[:1])[0])

        radius, is_open = _radius(loss, self.rim, self.max_radius, self.rtol)
        return torch.tensor([radius, float(is_open), passes], dtype=torch.float64)


def _radius(
    loss: Callable[[float], float], rim: float, largest: float, rtol: float
) -> tuple[float, bool]:
    """Return where the loss first passes the rim, and whether it never does."""
    inside, outside = 0.0, min(FIRST_RADIUS, largest)
    while loss(outside) <= rim:
        if outside >= largest:
            return largest, True
        inside, outside = outside, min(2 * outside, largest)
    # A basin that is smaller than the first radius: halve until a point lies inside.
    while inside == 0.0 and outside > 1e-12 * largest:
        if loss(outside / 2) <= rim:
            inside = outside / 2
        else:
            outside /= 2
    while outside - inside > rtol * outside:
        middle = math.sqrt(inside * outside) if inside else outside / 2
        if loss(middle) <= rim:
            inside = middle
        else:
            outside = middle
    return 0.5 * (inside + outside), False

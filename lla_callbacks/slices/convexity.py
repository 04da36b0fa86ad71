"""Both ends of the Hessian's spectrum at each point of a plane: where is the loss convex?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import NonFiniteError
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.sharing import Alone, Share, fail_together
from lla_callbacks.objective.engines import with_hessian
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.grid import coarse_to_fine, gathered
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import is_late, space_of
from lla_callbacks.slices.directions import Direction
from lla_callbacks.slices.slices import SliceFacts, facts_of


@dataclass(frozen=True, eq=False)
class Convexity:
    """The extreme eigenvalues of the Hessian over a plane.

    Attributes:
        alphas: Coordinates along the first direction, shape ``(n,)``, float64, ascending.
        betas: Along the second, shape ``(m,)``.
        lambda_min: Smallest eigenvalue, shape ``(n, m)``, float64; NaN where there is none.
        lambda_max: Largest.
        residual_min: Residuals of the smallest: a true eigenvalue lies within.
        residual_max: Residuals of the largest.
        loss: The loss, of the same shape.
        evaluated: Which points were evaluated.
        directions: The two directions.
        num_matvecs: Hessian-vector products spent.
        facts: Conditions.
    """

    alphas: Tensor
    betas: Tensor
    lambda_min: Tensor
    lambda_max: Tensor
    residual_min: Tensor
    residual_max: Tensor
    loss: Tensor
    evaluated: Tensor
    directions: tuple[Direction, Direction]
    num_matvecs: int
    facts: SliceFacts

    @property
    def signed_ratio(self) -> Tensor:
        """``lambda_min / lambda_max``: negative where some direction curves down.

        Infinite, with the sign of ``lambda_min``, where no direction curves up.
        """
        ratio = self.lambda_min / self.lambda_max
        concave = self.lambda_max <= 0
        return torch.where(concave, torch.sign(self.lambda_min) * torch.inf, ratio)

    @property
    def ratio(self) -> Tensor:
        """``|lambda_min / lambda_max|`` (Li et al. 2018, section 6 and figure 7).

        Near 0: as good as convex. 1: as much negative as positive curvature. Infinite where no
        direction curves up. Where the loss is strictly convex this is the inverse of the
        condition number, as the formula has it; :attr:`signed_ratio` tells the two apart.
        """
        return self.signed_ratio.abs()


def measure_convexity(
    objective: Objective,
    directions: tuple[Direction, Direction],
    alphas: Tensor,
    betas: Tensor,
    *,
    num_steps: int,
    rtol: float,
    normalization: str = "",
    seed: int = 0,
    time_budget: float | None = None,
    share: Share | None = None,
    listener: Callable[[int], object] | None = None,
) -> Convexity:
    """Return the extreme eigenvalues at each point, by one Lanczos run a point for both ends.

    The Hessian is that of all trainable parameters. One unshifted run finds both algebraic ends;
    shifting by half of the largest eigenvalue and looking for the largest again, as the
    published script does, finds the wrong end where the loss is strictly convex.

    Args:
        objective: The loss.
        directions: Two.
        alphas: Coordinates along the first, ascending, float64.
        betas: Along the second.
        num_steps: Largest depth of a run.
        rtol: A run stops once both residuals are at most this share of the largest eigenvalue.
        normalization: Of the directions, for the record.
        seed: Of the directions and of the start vectors.
        time_budget: Seconds after which no further point is begun, from coarse to fine.
        share: Processes that divide the points.
        listener: Called after points, with their number.

    Raises:
        MeasurementError: If the loss or a product at the centre is not finite or cannot be had.
            Elsewhere such a point is NaN.
    """
    began = time.perf_counter()
    share = share or Alone()
    shape = len(alphas), len(betas)
    points = torch.cartesian_prod(alphas, betas)
    centre = [int(alphas.abs().argmin()), int(betas.abs().argmin())]
    order = [i for level in coarse_to_fine(shape, centre) for i in level]
    table = torch.full((len(points), 6), float("nan"), dtype=torch.float64)
    done = torch.zeros(len(points), dtype=torch.bool)
    space = space_of(objective)
    family = Offsets(space, [d.vector for d in directions])
    # At the centre: which engine can, once the loss has proved itself.
    engine = with_hessian(objective, lambda hessian: hessian.engine, share=share)[0]
    trouble: Exception | None = None
    try:
        for i in order[share.rank :: share.size]:
            late = time_budget is not None and time.perf_counter() - began > time_budget
            if time_budget is not None and done.any() and is_late(space, late):
                break
            family.place(points[i].tolist())
            try:
                table[i] = _ends(objective, engine, num_steps, rtol, seed)
            except NonFiniteError:
                if i == order[0]:
                    raise
            done[i] = True
            if listener is not None:
                listener(1)
    except Exception as error:  # noqa: BLE001 - raised below, in all processes together
        trouble = error
    finally:
        family.restore()
    fail_together(share, trouble)
    table, done = gathered(share, table, done, torch.zeros_like(done))
    low, high, low_residual, high_residual, loss = (table[:, k].reshape(shape) for k in range(5))
    spent = int(table[:, 5].nansum())
    return Convexity(
        alphas,
        betas,
        low,
        high,
        low_residual,
        high_residual,
        loss,
        done.reshape(shape),
        directions,
        spent,
        facts_of(objective, normalization, seed, began, num_points=int(done.sum())),
    )


def _ends(objective: Objective, engine: str, num_steps: int, rtol: float, seed: int) -> Tensor:
    """Return smallest and largest eigenvalue, their residuals, the loss and the products."""
    hessian = objective.hessian(engine="exact" if engine == "exact" else "difference")
    try:
        start = hessian.rademacher(generator(seed, 4))
        run = lanczos(hessian, start, num_steps, rtol=rtol)
        ends = [run.values[0], run.values[-1], run.residuals[0], run.residuals[-1]]
        found = [*map(float, ends), hessian.loss, float(hessian.num_matvecs)]
        return torch.tensor(found, dtype=torch.float64)
    finally:
        hessian.release()

"""The loss along lines and over planes through the present weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lla_callbacks.linalg.sharing import Share
from lla_callbacks.objective.evaluation import Statistics
from lla_callbacks.objective.families import Family, Listed, Offsets, Segment
from lla_callbacks.objective.grid import Keep, coarse_to_fine
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, Values, evaluate_points, space_of
from lla_callbacks.slices.directions import Direction, cosine
from lla_callbacks.slices.fine import FineLoss
from lla_callbacks.slices.networks import Marks
from lla_callbacks.slices.trajectory import Path


@dataclass(frozen=True)
class SliceFacts:
    """Under which conditions a slice was measured.

    Attributes:
        mode: Normalization mode of the network.
        normalization: Of the directions, as far as they are random; empty otherwise.
        seed: Of the directions.
        num_samples: Samples behind each value.
        num_params: Trainable parameters.
        precision: Dtype of the arithmetic.
        method: How points were evaluated: ``"loop"``, ``"vmap"`` or ``"recorded"``; see
            :class:`~lla_callbacks.objective.points.Values`.
        num_points: Points evaluated by this call.
        seconds: Wall time of this call.
        self_check: What the objective proved of itself, in a few words; empty if it was not asked.
        self_check_words: The same at length, and what else a reader should know, a line each.
    """

    mode: str
    normalization: str
    seed: int
    num_samples: int
    num_params: int
    precision: str
    method: str
    num_points: int
    seconds: float
    self_check: str = ""
    self_check_words: str = ""


@dataclass(frozen=True, eq=False)
class Line:
    """The loss along a line.

    Attributes:
        alphas: Coordinates, shape ``(n,)``, float64, ascending.
        loss: Shape ``(n,)``, float64; NaN where it was not evaluated, or is NaN.
        metrics: Name to values of the same shape.
        evaluated: Which points were evaluated, shape ``(n,)``.
        directions: The one direction.
        centre_loss: Loss at the present weights; NaN if they are not on the line.
        facts: Conditions.
    """

    alphas: Tensor
    loss: Tensor
    metrics: Mapping[str, Tensor]
    evaluated: Tensor
    directions: tuple[Direction, ...]
    centre_loss: float
    facts: SliceFacts

    @property
    def curvature(self) -> float:
        """Second derivative of the loss at the centre, from five points around it.

        ``(4 D(h) - D(2h)) / 3`` of the second differences ``D`` over one and two spacings.
        NaN without five even points about the centre. Along an eigenvector of the Hessian it
        agrees with the eigenvalue, up to :attr:`curvature_error`, where the loss is smooth; a
        piecewise linear network has kinks, which it sees and derivatives do not.
        """
        return self._curvature[0]

    @property
    def curvature_error(self) -> float:
        """Error of :attr:`curvature`: what the finer spacing changed, and rounding."""
        return self._curvature[1]

    @property
    def _curvature(self) -> tuple[float, float]:
        nothing = math.nan, math.nan
        if not bool((self.alphas == 0).any()):
            return nothing
        c = int(torch.nonzero(self.alphas == 0)[0])
        if c < 2 or c + 2 >= len(self.alphas):
            return nothing
        around = self.alphas[c - 2 : c + 3]
        h = float(around[3])
        if not torch.allclose(around, h * torch.arange(-2.0, 3.0, dtype=torch.float64)):
            return nothing
        f = self.loss[c - 2 : c + 3].tolist()
        near = (f[1] - 2 * f[2] + f[3]) / h**2
        far = (f[0] - 2 * f[2] + f[4]) / (4 * h**2)
        best = (4 * near - far) / 3
        eps = torch.finfo(getattr(torch, self.facts.precision)).eps
        # Four roundings of a loss, and those of the sums inside the loss, about ten in all.
        rounding = 10 * eps * max(map(abs, f)) / h**2
        return best, abs(best - near) + rounding


@dataclass(frozen=True, eq=False)
class Plane:
    """The loss over a plane.

    Attributes:
        alphas: Coordinates along the first direction, shape ``(n,)``, float64, ascending.
        betas: Along the second, shape ``(m,)``.
        loss: Shape ``(n, m)``, float64: ``loss[i, j]`` at ``alphas[i], betas[j]``. NaN where it
            was not evaluated, or is NaN.
        metrics: Name to values of the same shape.
        evaluated: Which points were evaluated, shape ``(n, m)``.
        directions: The two directions.
        centre_loss: Loss at the present weights.
        cosine: Of the angle between the directions.
        path: The path of training, projected onto the plane, if there is one.
        facts: Conditions.
        networks: Networks on the plane, if it goes through some; the first is its origin.
        fine: The loss between the points, if the plane was refined and that could be had.
    """

    alphas: Tensor
    betas: Tensor
    loss: Tensor
    metrics: Mapping[str, Tensor]
    evaluated: Tensor
    directions: tuple[Direction, ...]
    centre_loss: float
    cosine: float
    path: Path | None
    facts: SliceFacts
    networks: Marks | None = None
    fine: FineLoss | None = None

    @property
    def complete(self) -> bool:
        """Whether every point was evaluated."""
        return bool(self.evaluated.all())


def measure_line(
    objective: Objective,
    direction: Direction,
    alphas: Tensor,
    settings: PointSettings,
    *,
    normalization: str = "",
    seed: int = 0,
    share: Share | None = None,
    listener: Callable[[int], object] | None = None,
) -> Line:
    """Return the loss at ``weights + alpha direction``.

    Args:
        objective: The loss.
        direction: The direction.
        alphas: Coordinates, ascending, float64.
        settings: How points are evaluated.
        normalization: Of the direction, for the record.
        seed: Of the direction, for the record.
        share: Processes that divide the points.
        listener: Called after points, with their number.
    """
    family = Offsets(space_of(objective), [direction.vector])
    return _line(
        objective, family, (direction,), alphas, settings, normalization, seed, share, listener
    )


def measure_segment(
    objective: Objective,
    start: Tensor,
    end: Tensor,
    alphas: Tensor,
    settings: PointSettings,
    *,
    ends: tuple[Statistics, Statistics] = ((), ()),
    listener: Callable[[int], object] | None = None,
) -> Line:
    """Return the loss at ``(1 - alpha) start + alpha end``, exactly at either end.

    Args:
        objective: The loss.
        start: Weights, flat.
        end: Weights, flat.
        alphas: Coordinates, ascending, float64.
        settings: How points are evaluated.
        ends: Running statistics of batch norms at either end, which mode ``"eval"`` needs.
        listener: Called after points, with their number.
    """
    space = space_of(objective)
    direction = Direction(end - start, "interpolation", "0: start, 1: end")
    return _line(
        objective,
        Segment(space, start, end, ends),
        (direction,),
        alphas,
        settings,
        "",
        0,
        None,
        listener,
    )


def measure_plane(
    objective: Objective,
    directions: tuple[Direction, Direction],
    alphas: Tensor,
    betas: Tensor,
    settings: PointSettings,
    *,
    normalization: str = "",
    seed: int = 0,
    path: Path | None = None,
    networks: Marks | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    share: Share | None = None,
    keep: Keep | None = None,
    listener: Callable[[int], object] | None = None,
) -> Plane:
    """Return the loss at ``weights + alpha direction_1 + beta direction_2``.

    Points are visited from coarse to fine, so that a plane cut short by the time budget is a
    complete coarse picture (:func:`~lla_callbacks.objective.grid.complete_axes` finds it).

    Args:
        objective: The loss.
        directions: Two.
        alphas: Coordinates along the first, ascending, float64.
        betas: Along the second.
        settings: How points are evaluated.
        normalization: Of the directions, for the record.
        seed: Of the directions, for the record.
        path: Drawn on the plane.
        networks: Likewise.
        known: Table and mask of an earlier call that did not finish, flat over points.
        share: Processes that divide the points.
        keep: Called with table and mask from time to time, for a later ``known``.
        listener: Called after points, with their number.
    """
    began = time.perf_counter()
    shape = len(alphas), len(betas)
    points = torch.cartesian_prod(alphas, betas)
    centre = [int(alphas.abs().argmin()), int(betas.abs().argmin())]
    order = [i for level in coarse_to_fine(shape, centre) for i in level]
    values = evaluate_points(
        objective,
        Offsets(space_of(objective), [d.vector for d in directions]),
        points,
        settings,
        order=order,
        known=known,
        exact=[i for i in [_origin(points)] if i is not None],
        share=share,
        keep=keep,
        listener=listener,
    )
    return Plane(
        alphas,
        betas,
        values.table[:, 0].reshape(shape),
        {name: values.table[:, k + 1].reshape(shape) for k, name in enumerate(values.names)},
        values.evaluated.reshape(shape),
        directions,
        _centre(objective, values, points),
        cosine(*directions, space_of(objective)),
        path,
        facts_of(
            objective, normalization, seed, began, num_points=values.num_new, method=values.method
        ),
        networks,
    )


def measure_path(
    objective: Objective, path: Path, weights: Sequence[Tensor], *, share: Share | None = None
) -> Path:
    """Return a path with the loss at its points' own weights, not at their shadows in a plane.

    Args:
        objective: The loss, at the path's last weights.
        path: The path.
        weights: Flat weights of its points but the last.
        share: Processes that divide the points.
    """
    space = space_of(objective)
    points = torch.arange(len(path.steps), dtype=torch.float64)[:, None]
    everything = [*weights, space.flatten(space.tensors)]
    values = evaluate_points(
        objective, Listed(space, everything), points, PointSettings(evaluation="loop"), share=share
    )
    return replace(path, loss=values.table[:, 0])


def _line(
    objective: Objective,
    family: Family,
    directions: tuple[Direction, ...],
    alphas: Tensor,
    settings: PointSettings,
    normalization: str,
    seed: int,
    share: Share | None,
    listener: Callable[[int], object] | None,
) -> Line:
    began = time.perf_counter()
    points = alphas[:, None]
    order = [i for level in coarse_to_fine((len(alphas),), [_nearest(alphas)]) for i in level]
    on_segment = isinstance(family, Segment)
    # The present weights; of a segment, both ends.
    known = [0.0, 1.0] if on_segment else [0.0]
    values = evaluate_points(
        objective, family, points, settings, order=order,
        exact=[i for i, alpha in enumerate(alphas.tolist()) if alpha in known],
        share=share, listener=listener,
    )  # fmt: skip
    return Line(
        alphas,
        values.table[:, 0],
        {name: values.table[:, k + 1] for k, name in enumerate(values.names)},
        values.evaluated,
        directions,
        math.nan if on_segment else _centre(objective, values, points),
        facts_of(
            objective, normalization, seed, began, num_points=values.num_new, method=values.method
        ),
    )


def _nearest(alphas: Tensor) -> int:
    return int(alphas.abs().argmin())


def _origin(points: Tensor) -> int | None:
    """Return which point is the centre, if one is."""
    hits = torch.nonzero((points == 0).all(dim=1)).flatten().tolist()
    return hits[0] if hits else None


def _centre(objective: Objective, values: Values, points: Tensor) -> float:
    """Return the loss at the present weights, from the grid if it is there."""
    origin = _origin(points)
    if origin is not None and bool(values.evaluated[origin]):
        return float(values.table[origin, 0])
    return objective()


def facts_of(
    objective: Objective,
    normalization: str,
    seed: int,
    began: float,
    *,
    num_points: int,
    method: str = "loop",
) -> SliceFacts:
    """Return the conditions of a measurement that began at this count of the clock."""
    space = space_of(objective)
    found = objective.findings.proof.self_check if objective.check else None
    words = [*(found.lines() if found is not None else ()), *objective.notes]
    return SliceFacts(
        objective.mode,
        normalization,
        seed,
        objective.num_samples,
        space.dim,
        # Autocast is off here; what sharded parts compute in may be coarser than their weights.
        str(objective.policy or space.precision).removeprefix("torch."),
        method,
        num_points,
        time.perf_counter() - began,
        "" if found is None else found.footer(curvature=False),
        "\n".join(words),
    )

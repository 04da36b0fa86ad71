"""How far a minimum reaches and where it is convex, for any module, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lla_callbacks.objective.build import asked, objective_of
from lla_callbacks.objective.checks import (
    MOST_WORK,
    fraction,
    number,
    positive,
    whole,
)
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.engines import prove
from lla_callbacks.objective.evaluation import (
    Loss,
)
from lla_callbacks.objective.objective import Mode
from lla_callbacks.objective.parts import Parameters
from lla_callbacks.objective.points import PointSettings
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.objective.spelling import spelled
from lla_callbacks.slices.basin import measure_basin
from lla_callbacks.slices.choice import (
    plane_coordinates,
    plane_names,
)
from lla_callbacks.slices.convexity import measure_convexity
from lla_callbacks.slices.directions import (
    Normalization,
    Vectors,
    check_normalization,
)
from lla_callbacks.slices.given import axes_of, source_of
from lla_callbacks.slices.results import BasinRadii, ConvexityMap

# Each costs a Lanczos run.
MAP_POINTS = 9


@spelled
@torch.inference_mode(False)
def convexity_map(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    directions: Any = "random",
    alphas: Any = None,
    betas: Any = None,
    loss: Loss | None = None,
    num_steps: int = 40,
    rtol: float = 0.01,
    normalization: Normalization = "filter",
    vectors: Vectors = "zero",
    mode: Mode = "batch",
    dropout: bool = False,
    parameters: Parameters = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoints: Sequence[Any] = (),
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    time_budget: float | None = None,
    check: bool = True,
    jacobian: Jacobian = "gap",
    seed: int = 0,
    batch_size: BatchSize = None,
) -> ConvexityMap:
    """Return ``|lambda_min / lambda_max|`` of the Hessian over a coarse plane.

    Li et al. 2018, figure 7. One Lanczos run a point finds both ends.

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        batches: Any iterable of batches; see :func:`~lla_callbacks.measure_hessian`.
        directions: ``"random"`` (two), ``"hessian"`` (the top two eigenvectors), ``"hessian_ends"``
            (top and bottom), ``"adam"``, ``"trajectory"`` (principal components of ``checkpoints``,
            whose path is drawn), or a pair of what :func:`loss_line` takes. Or networks that the
            plane goes through: a :class:`~lla_callbacks.Curve`, which is drawn with its ends and
            bends (Garipov et al. 2018, figure 1), or a list of three (modules, state dicts,
            checkpoint paths). The first of them is then the origin in the place of the present
            weights; with batch norm take ``mode="recalibrate"``.
        alphas: Coordinates along the first direction, ascending. ``None``: 9 points.
        betas: Along the second.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None`` replays
            the module's ``training_step``.
        num_steps: Largest depth of a Lanczos run.
        rtol: A run stops once both residuals are at most this share of the largest eigenvalue.
        normalization: Scaling of random directions; see
            :func:`~lla_callbacks.slices.directions.random_directions`.
        vectors: One-dimensional parameters in random directions; likewise.
        mode: ``"batch"``, ``"eval"`` or ``"recalibrate"`` (batch norm's statistics are estimated at
            each point; twice the cost).
        dropout: Whether dropout is on (one fixed mask); off by default in every mode.
        parameters: Which parameters move: ``None`` lets all that are trained, shell patterns of
            their names, or of modules, or a predicate ``(name, parameter) -> bool`` some. The
            others stay where they are.
        optimizer: Gives Adam's moments.
        checkpoints: Modules, state dicts, or paths of checkpoints along the path of training,
            oldest first.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        time_budget: Seconds after which no further point is begun.
        check: Whether the loss proves itself first, for about five gradients: two evaluations
            agree, and the gradient is the slope of the loss. What came of it is in
            ``facts.self_check``; a map of curvature asks its products too.
        jacobian: Where its gradient is no derivative of it, what directions are of that rest on
            curvature: an error (``"gap"``), or the Jacobian of that gradient (``"measure"``).
        seed: Fixes directions and start vectors.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If the Hessian at the centre cannot be had.
    """
    held = asked(locals())
    names = plane_names(directions)
    check_normalization(normalization, vectors)
    num_steps = whole("num_steps", num_steps, 2, MOST_WORK)
    rtol = fraction("rtol", rtol)
    budget = PointSettings(time_budget=time_budget).time_budget
    given = axes_of(alphas, betas)
    objective = objective_of(module, batches, **held)
    prove(objective)
    source = source_of(objective, normalization, vectors, seed, optimizer, checkpoints)
    first, second = source.get(names)
    grid = plane_coordinates((first, second), source.path_on(names), MAP_POINTS)
    axes = tuple(d if own is None else own for own, d in zip(given, grid, strict=True))
    found = measure_convexity(
        objective,
        (first, second),
        axes[0],
        axes[1],
        num_steps=num_steps,
        rtol=rtol,
        normalization=normalization if source.is_normalized(names) else "",
        seed=seed,
        time_budget=budget,
    )
    return ConvexityMap.of(found)


@spelled
@torch.inference_mode(False)
def basin_radii(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    num_rays: int = 50,
    rise: float = 0.1,
    cutoff: float | None = None,
    max_radius: float = 4.0,
    rtol: float = 0.01,
    loss: Loss | None = None,
    normalization: Normalization = "filter",
    vectors: Vectors = "zero",
    mode: Mode = "batch",
    dropout: bool = False,
    parameters: Parameters = None,
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    time_budget: float | None = None,
    check: bool = True,
    seed: int = 0,
    batch_size: BatchSize = None,
) -> BasinRadii:
    """Return how far random rays lead before the loss passes a cutoff.

    Look at the distribution of radii and at the effective radius first; the log-volume is a
    maximum over rays in disguise (:attr:`~lla_callbacks.slices.basin.Basin.log10_volume`).

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        batches: Any iterable of batches; see :func:`~lla_callbacks.measure_hessian`.
        num_rays: Rays, about 12 forward passes over all samples each.
        rise: The cutoff is this much above the loss at the weights, in units of the loss (0.1 as
            in studies of basins' volumes: a tenth of a nat of cross-entropy).
        cutoff: The cutoff itself, instead of ``rise``; to compare networks of different losses.
        max_radius: How far rays are followed, in filter norms.
        rtol: Relative accuracy of each radius.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None`` replays
            the module's ``training_step``.
        normalization: Scaling of random directions; see
            :func:`~lla_callbacks.slices.directions.random_directions`.
        vectors: One-dimensional parameters in random directions; likewise.
        mode: ``"batch"``, ``"eval"`` or ``"recalibrate"`` (batch norm's statistics are estimated at
            each point; twice the cost).
        dropout: Whether dropout is on (one fixed mask); off by default in every mode.
        parameters: Which parameters move: ``None`` lets all that are trained, shell patterns of
            their names, or of modules, or a predicate ``(name, parameter) -> bool`` some. The
            others stay where they are.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        time_budget: Seconds after which no further ray is begun.
        check: Whether the loss proves itself first, for about five gradients: two evaluations
            agree, and the gradient is the slope of the loss. What came of it is in
            ``facts.self_check``; a map of curvature asks its products too.
        seed: Fixes the rays.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
    """
    held = asked(locals())
    check_normalization(normalization, vectors)
    num_rays = whole("num_rays", num_rays, 1, MOST_WORK)
    rtol = fraction("rtol", rtol)
    rise, max_radius = positive("rise", rise), positive("max_radius", max_radius)
    cutoff = number("cutoff", cutoff, "a loss, or None for the one that rise gives", none=True)
    budget = PointSettings(time_budget=time_budget).time_budget
    objective = objective_of(module, batches, **held)
    prove(objective)
    found = measure_basin(
        objective,
        num_rays=num_rays,
        rise=rise,
        cutoff=cutoff,
        max_radius=max_radius,
        rtol=rtol,
        normalization=normalization,
        vectors=vectors,
        seed=seed,
        time_budget=budget,
    )
    return BasinRadii.of(found)

"""The loss along lines, over planes and around a minimum of any module, without a Trainer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.alignment.functions import aligned
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.batches import tensors_of
from lla_callbacks.objective.build import objective_of
from lla_callbacks.objective.checks import (
    MOST_WORK,
    flag,
    fraction,
    number,
    optimizer_of,
    positive,
    shown,
    whole,
)
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.engines import prove
from lla_callbacks.objective.evaluation import (
    Loss,
    Predict,
    Statistics,
    check_metrics,
    evaluating,
)
from lla_callbacks.objective.grid import centred, coordinates
from lla_callbacks.objective.objective import Mode, Objective
from lla_callbacks.objective.points import Evaluation, PointSettings, space_of
from lla_callbacks.slices.arrays import load_progress, save_progress
from lla_callbacks.slices.basin import measure_basin
from lla_callbacks.slices.choice import (
    DirectionSource,
    line_names,
    plane_coordinates,
    plane_names,
)
from lla_callbacks.slices.convexity import measure_convexity
from lla_callbacks.slices.directions import (
    Direction,
    Normalization,
    Vectors,
    check_normalization,
    flat_weights,
)
from lla_callbacks.slices.networks import NetworkPlane, names_networks, network_plane
from lla_callbacks.slices.results import BasinRadii, ConvexityMap, LossLine, LossPlane
from lla_callbacks.slices.slices import (
    measure_line,
    measure_path,
    measure_plane,
    measure_segment,
)

# Points of a line, and along each side of a plane: 17 x 17 and a spline of the log loss are off
# by 0.01 decades or less in the mean on four of five networks measured, by 0.05 around a very
# sharp minimum (docs/benchmarks/planes.md). A convexity map costs a Lanczos run a point.
LINE_POINTS = 41
PLANE_POINTS = 17
MAP_POINTS = 9


@torch.inference_mode(False)
def loss_line(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    directions: Any = "random",
    alphas: Any = None,
    loss: Loss | None = None,
    metrics: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
    normalization: Normalization = "filter",
    vectors: Vectors = "zero",
    mode: Mode = "batch",
    dropout: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoints: Sequence[Any] = (),
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    evaluation: Evaluation = "auto",
    time_budget: float | None = None,
    check: bool = True,
    seed: int = 0,
    batch_size: BatchSize = None,
) -> LossLine:
    """Return the loss, and any metric, along a line through the present weights.

    The module is left exactly as it was. Every point is computed from the saved weights, so the
    value at ``alpha = 0`` is the plain loss, to the bit.

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        batches: Any iterable of batches; see :func:`~lla_callbacks.measure_hessian`.
        directions: ``"random"``; ``"top1"``, ``"top2"``, ``"bottom1"`` (eigenvectors of the
            Hessian); ``"gradient"``; ``"adam_m"``, ``"adam_v"`` (with ``optimizer``); ``"pc1"``,
            ``"pc2"`` (principal components of ``checkpoints``); ``"update"`` (from the last of
            ``checkpoints``); or a tensor, a dict of tensors by parameter name, or a
            :class:`~lla_callbacks.slices.directions.Direction` of your own.
        alphas: Coordinates, ascending. ``None``: 41 points that show something: one filter norm
            either way for random directions, until the parabola has risen by the loss for
            eigenvectors.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None``
            replays the module's ``training_step``.
        metrics: Name to a torchmetrics metric, or to a function ``(module, batch) -> scalar``
            that is averaged over samples.
        predict: ``predict(module, batch)`` returns predictions and targets for torchmetrics;
            ``None``: the module's output in the loss's own forward pass against ``batch[1]``.
        normalization: Scaling of random directions; see
            :func:`~lla_callbacks.slices.directions.random_directions`.
        vectors: One-dimensional parameters in random directions; likewise.
        mode: ``"batch"``, ``"eval"`` or ``"recalibrate"`` (batch norm's statistics are estimated
            at each point; twice the cost).
        dropout: Whether dropout is on (one fixed mask); off by default in every mode.
        optimizer: Gives Adam's moments.
        checkpoints: State dicts or modules along the path of training, oldest first.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        evaluation: ``"auto"``, ``"loop"`` or ``"vmap"``.
        time_budget: Seconds after which no further point is begun; points are visited from
            coarse to fine, and those left out are NaN.
        check: Whether the loss proves itself first, for about five gradients: two evaluations
            agree, and the gradient is the slope of the loss. What came of it is in
            ``facts.self_check``; a map of curvature asks its products too.
        seed: Fixes random directions and start vectors.
        batch_size: See :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If the loss changes the weights, or an eigenvector cannot be had.
    """
    names = line_names(directions)
    settings = _settings(metrics, predict, evaluation, time_budget)
    check_normalization(normalization, vectors)
    wanted = None if alphas is None else coordinates("alphas", alphas)
    objective = objective_of(
        module, batches, loss, mode=mode, dropout=dropout, seed=seed, num_samples=num_samples,
        microbatch_size=microbatch_size, check=check, batch_size=batch_size,
    )  # fmt: skip
    prove(objective)
    source = _source(objective, normalization, vectors, seed, optimizer, checkpoints)
    (direction,) = source.get(names)
    found = measure_line(
        objective,
        direction,
        centred(direction.reach, LINE_POINTS) if wanted is None else wanted,
        settings,
        normalization=normalization if source.is_normalized(names) else "",
        seed=seed,
    )
    return LossLine.of(found)


@torch.inference_mode(False)
def loss_plane(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    directions: Any = "random",
    alphas: Any = None,
    betas: Any = None,
    loss: Loss | None = None,
    metrics: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
    normalization: Normalization = "filter",
    vectors: Vectors = "zero",
    mode: Mode = "batch",
    dropout: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoints: Sequence[Any] = (),
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    evaluation: Evaluation = "auto",
    time_budget: float | None = None,
    file: str | Path | None = None,
    check: bool = True,
    seed: int = 0,
    batch_size: BatchSize = None,
) -> LossPlane:
    """Return the loss, and any metric, over a plane through the present weights.

    Like :func:`loss_line`, whose arguments are not repeated here.

    Args:
        module: Any module.
        batches: Any iterable of batches.
        directions: ``"random"`` (two), ``"hessian"`` (the top two eigenvectors),
            ``"hessian_ends"`` (top and bottom), ``"adam"``, ``"trajectory"`` (principal
            components of ``checkpoints``, whose path is drawn), or a pair of what
            :func:`loss_line` takes. Or networks that the plane goes through: a
            :class:`~lla_callbacks.Curve`, which is drawn with its ends and bends (Garipov et al.
            2018, figure 1), or a list of three (modules, state dicts, checkpoint paths). The
            first of them is then the origin in the place of the present weights; with batch norm
            take ``mode="recalibrate"``.
        alphas: Coordinates along the first direction, ascending. ``None``: 17 points, 21 for
            networks.
        betas: Along the second; any number of them.
        loss: See :func:`loss_line`.
        metrics: See :func:`loss_line`.
        predict: See :func:`loss_line`.
        normalization: See :func:`loss_line`.
        vectors: See :func:`loss_line`.
        mode: See :func:`loss_line`.
        dropout: See :func:`loss_line`.
        optimizer: See :func:`loss_line`.
        checkpoints: See :func:`loss_line`.
        num_samples: See :func:`loss_line`.
        microbatch_size: See :func:`loss_line`.
        evaluation: See :func:`loss_line`.
        time_budget: See :func:`loss_line`.
        file: An .npz file that is written as the grid grows. If it is there and holds this very
            grid, unfinished, the points in it are not computed again.
        check: See :func:`loss_line`.
        seed: See :func:`loss_line`.
        batch_size: See :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed, or ``file`` holds another grid.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If the loss changes the weights, or an eigenvector cannot be had.

    Example::

        >>> import torch
        >>> from lla_callbacks import loss_plane
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> batch = torch.eye(2), torch.zeros(2, 1)
        >>> def loss(module, batch):
        ...     return (module(batch[0]) - batch[1]).square().mean()
        >>> plane = loss_plane(net, [batch], loss=loss, alphas=[-1, 0, 1], betas=[0, 1])
        >>> tuple(plane.loss.shape), bool(plane.loss[1, 0] == loss(net, batch))
        ((3, 2), True)
    """
    settings = _settings(metrics, predict, evaluation, time_budget)
    check_normalization(normalization, vectors)
    given = _given(alphas, betas)
    if file is not None and not (isinstance(file, (str, os.PathLike)) and str(file)):
        raise ValueError(f"file is {shown(file)}; give the path of an .npz file, or None.")
    with ExitStack() as stack:
        through: NetworkPlane | None = None
        names: tuple[Any, ...] = ()
        if names_networks(directions):
            through = network_plane(module, directions, mode)
            stack.enter_context(through.placed(module))
        else:
            names = plane_names(directions)
        objective = objective_of(
            module, batches, loss, mode=mode, dropout=dropout, seed=seed,
            num_samples=num_samples, microbatch_size=microbatch_size, check=check,
            batch_size=batch_size,
        )  # fmt: skip
        prove(objective)
        source = _source(objective, normalization, vectors, seed, optimizer, checkpoints)
        path, networks = None, None
        if through is not None:
            first, second = through.directions
            grid = through.coordinates()
            networks = through.measured(objective)
        else:
            first, second = source.get(names)
            path = source.path_on(names)
            grid = plane_coordinates((first, second), path, PLANE_POINTS)
        axes = tuple(d if own is None else own for own, d in zip(given, grid, strict=True))
        if path is not None:
            path = measure_path(objective, path, source.weights)
        known, keep = None, None
        if file is not None:
            mark = _fingerprint(objective, (first, second), axes, settings)
            known = load_progress(Path(file), mark)

            def keep(table: Tensor, evaluated: Tensor) -> None:
                save_progress(Path(file), mark, table, evaluated)

        found = measure_plane(
            objective,
            (first, second),
            axes[0],
            axes[1],
            settings,
            normalization=normalization if source.is_normalized(names) else "",
            seed=seed,
            path=path,
            networks=networks,
            known=known,
            keep=keep,
        )
    return LossPlane.of(found)


@torch.inference_mode(False)
def interpolate(
    module: nn.Module,
    batches: Iterable[Any],
    start: Any = None,
    end: Any = None,
    *,
    align: bool = False,
    alphas: Any = None,
    loss: Loss | None = None,
    metrics: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
    mode: Mode = "batch",
    dropout: bool = False,
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    evaluation: Evaluation = "auto",
    time_budget: float | None = None,
    check: bool = True,
    seed: int = 0,
    batch_size: BatchSize = None,
) -> LossLine:
    """Return the loss between two sets of weights: ``(1 - alpha) start + alpha end``.

    Exactly the two losses at ``alpha`` 0 and 1 (Goodfellow et al. 2015; Li et al. 2018, section
    3). In mode ``"eval"`` batch norm's running statistics are interpolated too.

    Args:
        module: Any module of that architecture; it is left as it was.
        batches: Any iterable of batches; see :func:`~lla_callbacks.measure_hessian`.
        start: A module or a state dict; ``None``: the present weights.
        end: Likewise.
        align: Whether the end's hidden units are brought into the start's order first, which
            leaves what it computes as it is; see :func:`~lla_callbacks.aligned`.
        alphas: Coordinates, ascending. ``None``: 41 points from -0.5 to 1.5.
        loss: See :func:`loss_line` for this and the rest.
        metrics: See :func:`loss_line`.
        predict: See :func:`loss_line`.
        mode: See :func:`loss_line`.
        dropout: See :func:`loss_line`.
        num_samples: See :func:`loss_line`.
        microbatch_size: See :func:`loss_line`.
        evaluation: See :func:`loss_line`.
        time_budget: See :func:`loss_line`.
        check: See :func:`loss_line`.
        seed: Fixes what is random in the module.
        batch_size: See :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed, or weights do not fit the module.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
    """
    if start is None and end is None:
        raise ValueError("start and end are both None: give at least one module or state dict.")
    settings = _settings(metrics, predict, evaluation, time_budget)
    wanted = coordinates(
        "alphas", torch.arange(-10, 31, dtype=torch.float64) / 20 if alphas is None else alphas
    )
    objective = objective_of(
        module, batches, loss, mode=mode, dropout=dropout, seed=seed, num_samples=num_samples,
        microbatch_size=microbatch_size, check=check, batch_size=batch_size,
    )  # fmt: skip
    prove(objective)
    space = space_of(objective)
    ends = [module if end is None else end for end in (start, end)]
    if flag("align", align):
        ends[1] = aligned(module, ends[0], ends[1], objective.fresh(0), seed=seed).state
    weights = [
        checkpoint_weights(end, space, name)
        for name, end in zip(("start", "end"), ends, strict=True)
    ]
    statistics: tuple[Statistics, Statistics] = ((), ())
    if mode == "eval":
        statistics = (_statistics(module, ends[0]), _statistics(module, ends[1]))
    found = measure_segment(objective, weights[0], weights[1], wanted, settings, ends=statistics)
    return LossLine.of(found)


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
    optimizer: torch.optim.Optimizer | None = None,
    checkpoints: Sequence[Any] = (),
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    time_budget: float | None = None,
    check: bool = True,
    seed: int = 0,
    batch_size: BatchSize = None,
) -> ConvexityMap:
    """Return ``|lambda_min / lambda_max|`` of the Hessian over a coarse plane.

    Li et al. 2018, figure 7. One Lanczos run a point finds both ends.

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        batches: Any iterable of batches; see :func:`~lla_callbacks.measure_hessian`.
        directions: See :func:`loss_plane`.
        alphas: Coordinates along the first direction, ascending. ``None``: 9 points.
        betas: Along the second.
        loss: See :func:`loss_line`.
        num_steps: Largest depth of a Lanczos run.
        rtol: A run stops once both residuals are at most this share of the largest eigenvalue.
        normalization: See :func:`loss_line` for this and the rest.
        vectors: See :func:`loss_line`.
        mode: See :func:`loss_line`.
        dropout: See :func:`loss_line`.
        optimizer: See :func:`loss_line`.
        checkpoints: See :func:`loss_line`.
        num_samples: See :func:`loss_line`.
        microbatch_size: See :func:`loss_line`.
        time_budget: Seconds after which no further point is begun.
        check: See :func:`loss_line`.
        seed: Fixes directions and start vectors.
        batch_size: See :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If the Hessian at the centre cannot be had.
    """
    names = plane_names(directions)
    check_normalization(normalization, vectors)
    num_steps = whole("num_steps", num_steps, 2, MOST_WORK)
    rtol = fraction("rtol", rtol)
    budget = PointSettings(time_budget=time_budget).time_budget
    given = _given(alphas, betas)
    objective = objective_of(
        module, batches, loss, mode=mode, dropout=dropout, seed=seed, num_samples=num_samples,
        microbatch_size=microbatch_size, check=check, batch_size=batch_size,
    )  # fmt: skip
    prove(objective)
    source = _source(objective, normalization, vectors, seed, optimizer, checkpoints)
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
        loss: See :func:`loss_line` for this and the rest.
        normalization: See :func:`loss_line`.
        vectors: See :func:`loss_line`.
        mode: See :func:`loss_line`.
        dropout: See :func:`loss_line`.
        num_samples: See :func:`loss_line`.
        microbatch_size: See :func:`loss_line`.
        time_budget: Seconds after which no further ray is begun.
        check: See :func:`loss_line`.
        seed: Fixes the rays.
        batch_size: See :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
    """
    check_normalization(normalization, vectors)
    num_rays = whole("num_rays", num_rays, 1, MOST_WORK)
    rtol = fraction("rtol", rtol)
    rise, max_radius = positive("rise", rise), positive("max_radius", max_radius)
    cutoff = number("cutoff", cutoff, "a loss, or None for the one that rise gives", none=True)
    budget = PointSettings(time_budget=time_budget).time_budget
    objective = objective_of(
        module, batches, loss, mode=mode, dropout=dropout, seed=seed, num_samples=num_samples,
        microbatch_size=microbatch_size, check=check, batch_size=batch_size,
    )  # fmt: skip
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


def _settings(
    metrics: Mapping[str, Any] | None,
    predict: Predict | None,
    evaluation: Evaluation,
    time_budget: float | None,
) -> PointSettings:
    check_metrics(metrics, predict)
    return PointSettings(metrics, predict, evaluation, time_budget)


def _given(alphas: Any, betas: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the user's own coordinates of a plane, None where there are none."""
    return (
        None if alphas is None else coordinates("alphas", alphas),
        None if betas is None else coordinates("betas", betas),
    )


def _source(
    objective: Objective,
    normalization: Normalization,
    vectors: Vectors,
    seed: int,
    optimizer: torch.optim.Optimizer | None,
    checkpoints: Sequence[Any],
) -> DirectionSource:
    space = space_of(objective)
    optimizer_of("optimizer", optimizer)
    if isinstance(checkpoints, (str, bytes, Mapping, nn.Module)) or not isinstance(
        checkpoints, Iterable
    ):
        raise ValueError(
            f"checkpoints is of type {type(checkpoints).__name__}; give a list of modules or state "
            "dicts, oldest first."
        )
    weights = [checkpoint_weights(c, space, "checkpoints") for c in checkpoints]
    return DirectionSource(
        objective,
        normalization,
        vectors,
        seed,
        optimizer,
        previous=weights[-1] if weights else None,
        weights=weights,
        steps=range(len(weights) + 1),
    )


def checkpoint_weights(checkpoint: Any, space: ParameterSpace, name: str) -> Tensor:
    """Return the trainable weights of a module, a state dict or a Lightning checkpoint, flat."""
    checkpoint = _unwrapped(checkpoint)
    if isinstance(checkpoint, nn.Module):
        checkpoint = dict(checkpoint.named_parameters())
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{name}: a checkpoint of type {type(checkpoint).__name__} is not known: give a module "
            "or a state dict."
        )
    # Buffers and frozen parameters are no variables.
    known = {n: t for n, t in checkpoint.items() if n in space.slices}
    try:
        return flat_weights(known, space)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _unwrapped(checkpoint: Any) -> Any:
    """Return the state dict inside of a Lightning checkpoint; anything else as it is."""
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        return checkpoint["state_dict"]
    return checkpoint


def _statistics(module: nn.Module, checkpoint: Any) -> Statistics:
    """Return the running statistics that a checkpoint has for a module's batch norms."""
    checkpoint = _unwrapped(checkpoint)
    if isinstance(checkpoint, nn.Module):
        checkpoint = checkpoint.state_dict()
    found = []
    for name, m in module.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            keys = [f"{name}.{key}".lstrip(".") for key in ("running_mean", "running_var")]
            if any(key not in checkpoint for key in keys):
                raise ValueError(
                    f"{keys[0]!r} is missing in what was given, and mode 'eval' needs it: give "
                    "whole state dicts, or mode='batch' or 'recalibrate'."
                )
            mean, var = (checkpoint[key].detach().to(m.running_mean).clone() for key in keys)
            found.append((m, mean, var))
    return found


def _fingerprint(
    objective: Objective,
    directions: Sequence[Direction],
    axes: Sequence[Tensor],
    settings: PointSettings,
) -> str:
    """Return what tells two grids apart: a hash of all that their values depend on."""
    digest = hashlib.sha256()
    tensors = [*objective.module.parameters(), *objective.module.buffers(), *axes]
    tensors += [d.vector for d in directions]
    tensors += [t for batch in objective.batches for t in tensors_of(batch)]
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    # The loss itself cannot be hashed; its value at the centre can, and that of the metrics.
    with evaluating(objective, metrics=settings.metrics, predict=settings.predict) as evaluate:
        centre = evaluate().tolist()
        words = (objective.mode, objective.dropout, objective.seed, evaluate.names, centre)
    digest.update(repr(words).encode())
    return digest.hexdigest()

"""The loss along lines and over planes of any module, without a Trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.objective.build import asked, objective_of
from lla_callbacks.objective.checks import shown
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.engines import prove
from lla_callbacks.objective.evaluation import (
    Loss,
    Predict,
)
from lla_callbacks.objective.grid import centred, coordinates
from lla_callbacks.objective.held_open import held_in_one
from lla_callbacks.objective.objective import Mode
from lla_callbacks.objective.parts import Parameters
from lla_callbacks.objective.points import Evaluation
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.objective.spelling import spelled
from lla_callbacks.slices.arrays import load_progress, save_progress
from lla_callbacks.slices.choice import (
    line_names,
    plane_coordinates,
    plane_names,
)
from lla_callbacks.slices.directions import (
    Normalization,
    Vectors,
    check_normalization,
)
from lla_callbacks.slices.fine import check_refine
from lla_callbacks.slices.given import axes_of, fingerprint, point_settings, source_of
from lla_callbacks.slices.networks import NetworkPlane, names_networks, network_plane
from lla_callbacks.slices.refinement import Refinement
from lla_callbacks.slices.results import LossLine, LossPlane
from lla_callbacks.slices.slices import (
    measure_line,
    measure_path,
    measure_plane,
)

# Points of a line, and along each side of a plane: with 17 x 17 `plane.picture` is off by 0.0105
# decades or less in the mean on five networks measured (docs/benchmarks/planes.md).
LINE_POINTS = 41
PLANE_POINTS = 17


@spelled
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
    parameters: Parameters = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoints: Sequence[Any] = (),
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    evaluation: Evaluation = "auto",
    time_budget: float | None = None,
    check: bool = True,
    jacobian: Jacobian = "gap",
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
        parameters: Which parameters move: ``None`` lets all that are trained, shell patterns of
            their names, or of modules, or a predicate ``(name, parameter) -> bool`` some. The
            others stay where they are.
        optimizer: Gives Adam's moments.
        checkpoints: Modules, state dicts, or paths of checkpoints along the path of training,
            oldest first.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        evaluation: ``"auto"``, ``"loop"`` or ``"vmap"``.
        time_budget: Seconds after which no further point is begun; points are visited from
            coarse to fine, and those left out are NaN.
        check: Whether the loss proves itself first, for about five gradients: two evaluations
            agree, and the gradient is the slope of the loss. What came of it is in
            ``facts.self_check``; a map of curvature asks its products too.
        jacobian: Where its gradient is no derivative of it, what directions are of that rest on
            curvature: an error (``"gap"``), or the Jacobian of that gradient (``"measure"``).
        seed: Fixes random directions and start vectors.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If the loss changes the weights, or an eigenvector cannot be had.
    """
    held = asked(locals())
    names = line_names(directions)
    settings = point_settings(metrics, predict, evaluation, time_budget)
    check_normalization(normalization, vectors)
    wanted = None if alphas is None else coordinates("alphas", alphas)
    objective = objective_of(module, batches, **held)
    with held_in_one(objective):
        prove(objective)
        source = source_of(objective, normalization, vectors, seed, optimizer, checkpoints)
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


@spelled
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
    parameters: Parameters = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoints: Sequence[Any] = (),
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    evaluation: Evaluation = "auto",
    refine: bool = False,
    time_budget: float | None = None,
    file: str | Path | None = None,
    check: bool = True,
    jacobian: Jacobian = "gap",
    seed: int = 0,
    batch_size: BatchSize = None,
) -> LossPlane:
    """Return the loss, and any metric, over a plane through the present weights.

    Like :func:`loss_line`.

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
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None`` replays
            the module's ``training_step``.
        metrics: Name to a torchmetrics metric, or to a function ``(module, batch) -> scalar`` that
            is averaged over samples.
        predict: ``predict(module, batch)`` returns predictions and targets for torchmetrics;
            ``None``: the module's output in the loss's own forward pass against ``batch[1]``.
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
        evaluation: ``"auto"``, ``"loop"`` or ``"vmap"``.
        refine: Whether ``plane.picture`` is made from what the network gives out, which is
            interpolated between the points for each sample, and the loss computed from that: far
            closer to the truth than a surface through the losses, at no further pass. The loss
            must call ``module(inputs)`` once a batch and follow from what that returns, which is
            checked at every point. From seven points a side on; not with ``file`` or ``predict``.
        time_budget: Seconds after which no further point is begun; points are visited from coarse
            to fine, and those left out are NaN.
        file: An .npz file that is written as the grid grows. If it is there and holds this very
            grid, unfinished, the points in it are not computed again.
        check: Whether the loss proves itself first, for about five gradients: two evaluations
            agree, and the gradient is the slope of the loss. What came of it is in
            ``facts.self_check``; a map of curvature asks its products too.
        jacobian: Where its gradient is no derivative of it, what directions are of that rest on
            curvature: an error (``"gap"``), or the Jacobian of that gradient (``"measure"``).
        seed: Fixes random directions and start vectors.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

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
    held = asked(locals())
    settings = point_settings(metrics, predict, evaluation, time_budget)
    check_normalization(normalization, vectors)
    given = axes_of(alphas, betas)
    refine = check_refine(refine, file=file, predict=predict)
    if file is not None and not (isinstance(file, (str, os.PathLike)) and str(file)):
        raise ValueError(f"file is {shown(file)}; give the path of an .npz file, or None.")
    with ExitStack() as stack:
        through: NetworkPlane | None = None
        names: tuple[Any, ...] = ()
        if names_networks(directions):
            if parameters is not None:
                raise ValueError(
                    f"parameters is {shown(parameters)}, and a plane through networks moves all "
                    "that they differ in; give parameters=None."
                )
            through = network_plane(module, directions, mode)
            stack.enter_context(through.placed(module))
        else:
            names = plane_names(directions)
        objective = objective_of(module, batches, **held)
        stack.enter_context(held_in_one(objective))
        prove(objective)
        source = source_of(objective, normalization, vectors, seed, optimizer, checkpoints)
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
            mark = fingerprint(objective, (first, second), axes, settings)
            known = load_progress(Path(file), mark)

            def keep(table: Tensor, evaluated: Tensor) -> None:
                save_progress(Path(file), mark, table, evaluated)

        shape = len(axes[0]), len(axes[1])
        refinement = Refinement(objective, settings, shape, wanted=refine)
        found = measure_plane(
            objective,
            (first, second),
            axes[0],
            axes[1],
            refinement.settings,
            normalization=normalization if source.is_normalized(names) else "",
            seed=seed,
            path=path,
            networks=networks,
            known=known,
            keep=keep,
        )
        found = refinement.finish(found)
    if refinement.reason:
        warnings.warn(
            "refine=True has no effect, and the picture goes through the losses alone: "
            f"{refinement.reason}.",
            stacklevel=4,
        )
    return LossPlane.of(found)

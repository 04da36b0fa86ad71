"""The loss between two networks, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lla_callbacks.alignment.functions import aligned
from lla_callbacks.objective.build import asked, objective_of
from lla_callbacks.objective.checks import (
    flag,
)
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.engines import prove
from lla_callbacks.objective.evaluation import (
    Loss,
    Predict,
    Statistics,
)
from lla_callbacks.objective.grid import coordinates
from lla_callbacks.objective.objective import Mode
from lla_callbacks.objective.points import Evaluation, space_of
from lla_callbacks.objective.spelling import spelled
from lla_callbacks.slices.given import checkpoint_weights, point_settings, statistics_of
from lla_callbacks.slices.results import LossLine
from lla_callbacks.slices.slices import (
    measure_segment,
)


@spelled
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
        start: A module, a state dict or the path of a checkpoint; ``None``: the present weights.
        end: Likewise.
        align: Whether the end's hidden units are brought into the start's order first, which
            leaves what it computes as it is; see :func:`~lla_callbacks.aligned`.
        alphas: Coordinates, ascending. ``None``: 41 points from -0.5 to 1.5.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None`` replays
            the module's ``training_step``.
        metrics: Name to a torchmetrics metric, or to a function ``(module, batch) -> scalar`` that
            is averaged over samples.
        predict: ``predict(module, batch)`` returns predictions and targets for torchmetrics;
            ``None``: the module's output in the loss's own forward pass against ``batch[1]``.
        mode: ``"batch"``, ``"eval"`` or ``"recalibrate"`` (batch norm's statistics are estimated at
            each point; twice the cost).
        dropout: Whether dropout is on (one fixed mask); off by default in every mode.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        evaluation: ``"auto"``, ``"loop"`` or ``"vmap"``.
        time_budget: Seconds after which no further point is begun; points are visited from coarse
            to fine, and those left out are NaN.
        check: Whether the loss proves itself first, for about five gradients: two evaluations
            agree, and the gradient is the slope of the loss. What came of it is in
            ``facts.self_check``; a map of curvature asks its products too.
        seed: Fixes what is random in the module.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed, or weights do not fit the module.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
    """
    held = asked(locals())
    if start is None and end is None:
        raise ValueError("start and end are both None: give at least one module or state dict.")
    settings = point_settings(metrics, predict, evaluation, time_budget)
    wanted = coordinates(
        "alphas", torch.arange(-10, 31, dtype=torch.float64) / 20 if alphas is None else alphas
    )
    objective = objective_of(module, batches, **held)
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
        statistics = (statistics_of(module, ends[0]), statistics_of(module, ends[1]))
    found = measure_segment(objective, weights[0], weights[1], wanted, settings, ends=statistics)
    return LossLine.of(found)

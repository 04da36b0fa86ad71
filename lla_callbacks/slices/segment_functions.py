"""The loss between two networks, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lla_callbacks.alignment.functions import aligned
from lla_callbacks.objective.build import objective_of
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
from lla_callbacks.slices.given import checkpoint_weights, point_settings, statistics_of
from lla_callbacks.slices.results import LossLine
from lla_callbacks.slices.slices import (
    measure_segment,
)


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
    settings = point_settings(metrics, predict, evaluation, time_budget)
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
        statistics = (statistics_of(module, ends[0]), statistics_of(module, ends[1]))
    found = measure_segment(objective, weights[0], weights[1], wanted, settings, ends=statistics)
    return LossLine.of(found)

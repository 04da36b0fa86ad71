"""The objective of a module and batches that a user hands over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lla_callbacks.objective.batches import first_samples, hold
from lla_callbacks.objective.evaluation import Loss
from lla_callbacks.objective.objective import Engine, Mode, Objective
from lla_callbacks.objective.precision import Precision
from lla_callbacks.objective.training_step import check_replayable, replay_training_step


def objective_of(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    *,
    mode: Mode,
    dropout: bool,
    seed: int,
    num_samples: int | None,
    microbatch_size: int | None,
    max_memory: int | None = None,
    engine: Engine = "auto",
    precision: Precision = "float32",
) -> Objective:
    """Return the objective that every function measures: copies of batches, frozen.

    Raises:
        ValueError: If a setting is not allowed.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
    """
    if loss is None:
        check_replayable(module)
        loss = replay_training_step
    if not callable(loss):
        raise ValueError(f"loss is {loss!r}; give loss(module, batch) -> scalar, or None.")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; give 1 or more, or None for all.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; give a whole number from 0 to below 2**63.")
    return Objective(
        module,
        [hold(batch) for batch in first_samples(batches, num_samples)],
        loss,
        mode=mode,
        dropout=dropout,
        seed=seed,
        microbatch_size=microbatch_size,
        max_memory=max_memory,
        engine=engine,
        precision=precision,
    )

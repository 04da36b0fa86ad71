"""The objective of a module and batches that a user hands over."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lla_callbacks.objective.batches import first_samples, hold
from lla_callbacks.objective.checks import (
    batches_of,
    check_loss,
    flag,
    module_of,
    one_of,
    seed_of,
    whole,
)
from lla_callbacks.objective.counting import BatchSize, batch_size_of
from lla_callbacks.objective.evaluation import Loss
from lla_callbacks.objective.gauss_newton import GaussNewtonObjective, Matrix, check_matrix
from lla_callbacks.objective.objective import (
    Engine,
    Mode,
    Objective,
    check_engine,
    check_mode,
)
from lla_callbacks.objective.parts import Parameters, check_parameters
from lla_callbacks.objective.precision import Precision, check_precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.objective.training_step import check_replayable, replay_training_step


def asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what :func:`objective_of` takes by name, among a function's own arguments."""
    return {name: given[name] for name in _TAKEN if name in given}


def objective_of(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    *,
    mode: Mode = "batch",
    dropout: bool = False,
    seed: int = 0,
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    engine: Engine = "auto",
    precision: Precision = "float32",
    check: bool = True,
    jacobian: Jacobian = "gap",
    batch_size: BatchSize = None,
    matrix: Matrix = "hessian",
    parameters: Parameters = None,
) -> Objective:
    """Return the objective that every function measures: copies of batches, frozen.

    Raises:
        ValueError: If a setting is not allowed.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        UnknownSizeError: See :class:`~lla_callbacks.objective.objective.Objective`.
    """
    module_of("module", module)
    batches_of("batches", batches)
    check_loss(loss)
    # Before batches are fetched, which may take long.
    check_mode(mode, dropout)
    check_engine(engine)
    check_matrix(matrix, engine)
    check_parameters(parameters)
    check_precision(precision)
    num_samples = whole("num_samples", num_samples, 1, none=True, other=", or None for all")
    microbatch_size = whole("microbatch_size", microbatch_size, 1, none=True, other=", or None")
    flag("check", check)
    one_of("jacobian", jacobian, Jacobian)
    max_memory = whole("max_memory", max_memory, 1, none=True, other=" byte, or None")
    seed = seed_of("seed", seed)
    batch_size = batch_size_of("batch_size", batch_size)
    if loss is None:
        check_replayable(module)
        loss = replay_training_step
    held = [hold(batch) for batch in first_samples(batches, num_samples, batch_size)]
    if not held:
        raise ValueError(
            f"batches, of type {type(batches).__name__}, is empty: there is no batch to measure "
            "on. Give at least one; a generator that was read once is at its end."
        )
    kind = GaussNewtonObjective if matrix == "ggn" else Objective
    return kind(
        module,
        held,
        loss,
        mode=mode,
        dropout=dropout,
        seed=seed,
        microbatch_size=microbatch_size,
        max_memory=max_memory,
        engine=engine,
        precision=precision,
        check=check,
        jacobian=jacobian,
        batch_size=batch_size,
        parameters=parameters,
    )


_TAKEN = [
    name for name in inspect.signature(objective_of).parameters if name not in ("module", "batches")
]

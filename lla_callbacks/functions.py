"""Measurements of any module, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lla_callbacks.landscape.batches import first_samples, hold
from lla_callbacks.landscape.layers import Layers
from lla_callbacks.landscape.measures import HessianSettings, measure
from lla_callbacks.landscape.objective import GRAPH_MEMORY, Loss, Mode, Objective, trainable
from lla_callbacks.landscape.stability import stability_limit
from lla_callbacks.landscape.training_step import check_replayable, replay_training_step
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.report.hessian_report import HessianReport


def measure_hessian(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    mode: Mode = "batch",
    dropout: bool = False,
    layers: Layers = None,
    num_probes: int = HessianSettings.num_probes,
    num_steps: int = HessianSettings.num_steps,
    num_runs: int = HessianSettings.num_runs,
    eig_rtol: float | None = None,
    trace_rtol: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    graph_memory: int = GRAPH_MEMORY,
    chunk_size: int = 1,
    seed: int = 0,
) -> HessianReport:
    """Return the Hessian's extremes, traces, spectrum and criteria at the present weights.

    The loss is ``L = sum_b n_b L_b / sum_b n_b`` over batches of ``n_b`` samples; the
    module is left exactly as it was. The cost is about
    ``2 (num_runs num_steps + num_probes)`` gradients of that loss.

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        batches: Any iterable of batches. Copies of all of them are held on the CPU, or of the
            first ones up to ``num_samples``. A batch counts as many samples as its first
            tensor is long.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None``
            replays the module's ``training_step``.
        mode: ``"batch"``: normalization by batch statistics, as in training. ``"eval"``:
            by running statistics.
        dropout: Whether dropout is on; off by default in every mode.
        layers: Layers that are told apart: ``None`` takes every module that owns parameters,
            ``"blocks"`` every repeated block; or paths, patterns or a predicate of modules,
            see :func:`~lla_callbacks.landscape.layers.layer_parameters`.
        num_probes: Random probes of the trace, one product each.
        num_steps: Depth of a Lanczos run. KH05 compares only at equal depth.
        num_runs: Independent Lanczos runs.
        eig_rtol: Stop a run early at this relative residual of both extremes.
        trace_rtol: Stop probing early at this relative standard error.
        optimizer: Gives the criterion ``stability``.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        graph_memory: Bytes that kept gradient graphs may take; batches beyond that cost 3
            gradients a product instead of 2.
        chunk_size: Vectors in one backward pass.
        seed: Fixes every random vector.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If the loss or a product is not finite or has no second
            derivative; the message holds the remedy.
    """
    settings = HessianSettings(
        num_steps=num_steps,
        num_probes=num_probes,
        num_runs=num_runs,
        layers=layers,
        eig_rtol=eig_rtol,
        trace_rtol=trace_rtol,
        seed=seed,
        chunk_size=chunk_size,
    )
    if loss is None:
        check_replayable(module)
        loss = replay_training_step
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; give 1 or more, or None for all.")
    objective = Objective(
        module,
        [hold(batch) for batch in first_samples(batches, num_samples)],
        loss,
        mode=mode,
        dropout=dropout,
        seed=seed,
        microbatch_size=microbatch_size,
        graph_memory=graph_memory,
    )
    limit = None
    if optimizer is not None:
        limit = stability_limit(optimizer, ParameterSpace(trainable(module)))
    return HessianReport.of(measure(objective, settings, limit=limit))

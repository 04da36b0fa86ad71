"""Measurements of any module, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lla_callbacks.hessian.measures import measure
from lla_callbacks.hessian.report import HessianReport
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.hessian.stability import stability_limit
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.build import asked, objective_of
from lla_callbacks.objective.checks import module_of, optimizer_of
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.evaluation import Loss
from lla_callbacks.objective.gauss_newton import Matrix
from lla_callbacks.objective.layers import Layers
from lla_callbacks.objective.objective import Engine, Mode
from lla_callbacks.objective.parts import Parameters
from lla_callbacks.objective.precision import Precision, at_precision, check_precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.objective.spelling import spelled


@spelled
def measure_hessian(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    mode: Mode = "batch",
    dropout: bool = False,
    parameters: Parameters = None,
    matrix: Matrix = "hessian",
    layers: Layers = None,
    num_probes: int = HessianSettings.num_probes,
    num_steps: int | None = None,
    num_runs: int = HessianSettings.num_runs,
    num_layer_steps: int = HessianSettings.num_layer_steps,
    num_layer_probes: int = HessianSettings.num_layer_probes,
    eig_rtol: float | None = None,
    trace_rtol: float | None = None,
    num_eigenvectors: int = HessianSettings.num_eigenvectors,
    optimizer: torch.optim.Optimizer | None = None,
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    engine: Engine = "auto",
    precision: Precision = "float32",
    chunk_size: int = 1,
    check: bool = True,
    jacobian: Jacobian = "gap",
    seed: int = 0,
    batch_size: BatchSize = None,
) -> HessianReport:
    """Return the Hessian's extremes, traces, spectrum and criteria at the present weights.

    The loss is ``L = sum_b n_b L_b / sum_b n_b`` over batches of ``n_b`` samples; the
    module is left exactly as it was. The cost is about
    ``2 (num_runs num_steps + num_probes)`` gradients of that loss; each layer's products come
    on top and are cheaper.

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        batches: Any iterable of batches. Copies of all of them are held on the CPU, or of the
            first ones up to ``num_samples``. How many samples each has: ``batch_size``.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None``
            replays the module's ``training_step``.
        mode: ``"batch"``: normalization by batch statistics, as in training. ``"eval"``:
            by running statistics. ``"recalibrate"``: by statistics over all batches at the
            present weights, held fixed.
        dropout: Whether dropout is on; off by default in every mode.
        parameters: Which parameters' Hessian: ``None`` takes all that are trained; shell patterns
            of their names (``"generator.*"``), or of modules; or a predicate ``(name, parameter)
            -> bool``. The others stay where they are.
        matrix: ``"hessian"``, or ``"ggn"``: its Gauss-Newton part ``J' A J``, what the criterion
            curves with the network taken as linear, which is never negative; the report holds its
            share of the Hessian's trace too. For losses made of ``cross_entropy``, ``nll_loss``,
            ``mse_loss``, ``binary_cross_entropy_with_logits``, ``huber_loss`` or
            ``smooth_l1_loss`` of ``torch.nn.functional``, or their modules, found as the loss calls
            them; others are refused by name. ``num_probes`` products with each of both matrices
            come on top.
        layers: Layers that are told apart: ``None`` takes every module that owns parameters,
            ``"blocks"`` every repeated block; or paths, patterns or a predicate of modules,
            see :func:`~lla_callbacks.objective.layers.layer_parameters`.
        num_probes: Random probes of the trace, one product each.
        num_steps: Depth of a Lanczos run. KH05 compares only at equal depth. ``None``: 24, or as
            many as memory allows, 10 at the least; ``report.notes`` says so.
        num_runs: Independent Lanczos runs, of the whole and of each layer.
        num_layer_steps: Lanczos depth in each layer's own block, for its extreme
            eigenvalues, density and distance to the whole; 0 does without.
        num_layer_probes: Most block probes a layer, where they make its trace surer.
        eig_rtol: Stop a run early at this relative residual of both extremes.
        trace_rtol: Stop probing early at this relative standard error.
        num_eigenvectors: How many leading eigenvectors come along, in ``report.eigenvectors``:
            by parameter name, orthonormal, with eigenvalues and residuals; see
            :class:`~lla_callbacks.hessian.eigenvectors.Eigenvectors`. Some twenty to a hundred
            products more, and as many vectors as long as the network.
        optimizer: Gives the criterion ``stability``.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that a measurement may take beside the module. Graphs that do not fit
            are built anew for each product (3 gradients instead of 2), batches that do not fit
            are split where their samples do not see each other, and where that is not enough,
            differences of gradients take over. ``None``: half of what a training step takes,
            and 256 MiB at least.
        engine: ``"exact"``: double backward. ``"difference"``: central differences of gradients,
            in the memory of a training step, with their own error in every result; what they
            cannot say within 5 % is a gap. ``"auto"``: exact, and by difference where a second
            derivative does not exist or does not fit in memory.
        precision: ``"float32"``: half-precision weights are widened for the measurement, and no
            autocast. ``"training"``: as the module has it.
        chunk_size: Vectors in one backward pass.
        check: Whether the loss proves itself first, for about six gradients: two evaluations
            agree, the gradient is the slope of the loss, products are symmetric and agree with
            differences of gradients. What came of it is in ``report.self_check``.
        jacobian: Where the gradient is no derivative of the loss (stop-gradient targets, gradient
            reversal, straight-through estimators), there is no Hessian. ``"gap"``: everything
            that would be of it is NaN and named in ``gaps``. ``"measure"``: the Jacobian of the
            training gradient is measured in its place, by differences, and marked; it need not be
            symmetric, so that its trace is right and its extremes are those of a Lanczos run only.
        seed: Fixes every random vector.
        batch_size: How many samples a batch has, where it does not tell: a number that holds for
            every batch, or ``callable(batch)``. Known without: inputs and targets of one leading
            size, lists of images beside lists of targets, ``num_graphs``. Asked for, where several
            batches weigh by it or one must be split: sizes that disagree, as of an edge list.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If the loss or a product is not finite or has no second
            derivative; the message holds the remedy.
    """
    held = asked(locals())
    settings = HessianSettings(
        num_steps=HessianSettings.num_steps if num_steps is None else num_steps,
        may_shorten=num_steps is None,
        num_probes=num_probes,
        num_runs=num_runs,
        num_layer_steps=num_layer_steps,
        num_layer_probes=num_layer_probes,
        layers=layers,
        eig_rtol=eig_rtol,
        trace_rtol=trace_rtol,
        num_eigenvectors=num_eigenvectors,
        seed=seed,
        chunk_size=chunk_size,
    )
    module_of("module", module)
    check_precision(precision)
    optimizer_of("optimizer", optimizer)
    with at_precision(module, precision):
        objective = objective_of(module, batches, **held)
        limit = None
        if optimizer is not None:
            limit = stability_limit(optimizer, ParameterSpace(objective.variables))
        return HessianReport.of(measure(objective, settings, limit=limit))

"""One spectrum run that feeds eigenvalues, traces, density and criteria together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lla_callbacks.hessian.arithmetic import End, with_arithmetic
from lla_callbacks.hessian.criteria_of import FAR_GAP, criteria_of, without_far_end
from lla_callbacks.hessian.eigenvectors import Eigenvectors, leading_eigenvectors
from lla_callbacks.hessian.engine_error import END_GAP, engine_error, verified_ends
from lla_callbacks.hessian.layer_measures import LayerMeasurement, LayerTrace, measure_layers
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.hessian.spectrum_run import affordable, memory_notes, runs_and_traces
from lla_callbacks.hessian.stability import StabilityLimit, measured_stability
from lla_callbacks.hessian.trace_share import quadratic_forms, trace_share
from lla_callbacks.linalg.distance import Quadrature
from lla_callbacks.linalg.eigenvalue import Eigenvalue, extremes
from lla_callbacks.linalg.lanczos import LanczosRun
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.linalg.trace import TraceEstimate
from lla_callbacks.linalg.vectors import Index
from lla_callbacks.objective.engines import prove, refuses, with_hessian
from lla_callbacks.objective.filters import filter_scales
from lla_callbacks.objective.gauss_newton import GaussNewtonObjective
from lla_callbacks.objective.layers import layer_parameters, outside
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.self_check import SelfCheck

# What goes on from a measurement: takes the operator, the layers' positions, runs and traces.
Anchor = Callable[[LossOperator, Mapping[str, Index], Sequence[LanczosRun], TraceEstimate], object]

# Every criterion by its name; and everything said of curvature, as gaps are named.
CRITERIA = (
    "kh05", "kh1", "negative_mass", "effective_dimension", "c_t", "r_e", "mainly_positive",
    "frobenius_norm", "stable_rank", "eigenvalue_ratio", "gradient_share", "stability",
)  # fmt: skip
EVERYTHING = ("lambda_max", "lambda_min", "trace", "layers", "density", "criteria", "stability")


@dataclass(frozen=True, eq=False)
class HessianMeasurement:
    """What one measurement found. Eigenvalues are in units of loss per squared parameter.

    Attributes:
        lambda_max: Largest (algebraic) eigenvalue, with its residual, which holds what the
            arithmetic is worth.
        lambda_min: Smallest (algebraic) eigenvalue, with the same.
        trace: Trace of the Hessian.
        trace_sem: Its standard error.
        weight_norm: Euclidean norm of the trainable parameters.
        layers: Layer to what was found in it.
        unlayered: Names of the trainable parameters that belong to no chosen layer.
        nodes: Quadrature nodes of all runs, shape ``(num_runs * num_steps,)``, float64.
        weights: Their weights, same shape, sum 1: ``num_params * sum(weights * f(nodes))``
            estimates ``tr f(H)``.
        run_sizes: How many nodes each run contributed, in order.
        eigenvalues: Ritz values of the first run, ascending, shape ``(num_steps,)``.
        eigenvalue_residuals: Their residuals.
        criteria: Name to value; NaN where undefined. See docs/reading.md for each.
        criteria_errors: Name to standard error (sampling) or bound (residuals).
        loss: The loss on the held batches.
        gradient_norm: Norm of its gradient.
        num_matvecs: Products spent; those with a layer's block alone count as one each,
            though they are cheaper. Checks do not count: the self-check, and four products at
            most that tell what the arithmetic is worth.
        num_params: Trainable parameters, the Hessian's dimension.
        num_samples: Samples behind the loss.
        num_steps: Lanczos depth reached, the largest of several runs (KH05 compares only at
            equal depth).
        num_probes: Trace probes used.
        mode: Normalization mode.
        precision: Dtype of the arithmetic.
        seed: Seed of the random vectors.
        seconds: Wall time.
        engine: How products were computed: ``"exact"`` or ``"difference"``.
        engine_reason: Why not exactly; empty if it was.
        product_error: Estimated relative error of a product with a random vector; 0 if exact.
        filter_curvature: Mean of ``phi' H phi`` over filter-normalized directions ``phi``:
            ``sum_f ||w_f||^2 tr H_ff / n_f`` over filters ``f`` of ``n_f`` weights; biases and
            gains stand still. It does not change where a filter's scale is undone by the next
            layer's, with or without normalization layers.
        filter_curvature_sem: Its standard error, as the trace's.
        gaps: What could not be said within a bound, by name, and why: it is NaN, or empty.
        self_check: What the objective proved of itself before; ``None`` if it was not asked.
        notes: What else a reader should know of the loss, in sentences.
        eigenvectors: The leading ones, as many as were asked for; ``None`` without.
        matrix: What all of this is of: ``"hessian"``, or ``"ggn"`` for its Gauss-Newton part.
        hessian_trace: Of the Gauss-Newton part: trace of the whole Hessian. Else NaN.
        hessian_trace_sem: Its standard error.
        gauss_newton_share: ``trace / hessian_trace``; above 1 where the rest of the Hessian, in
            which the network itself curves, is negative in the mean. NaN for ``"hessian"``.
        gauss_newton_share_error: Its standard error.
    """

    lambda_max: Eigenvalue
    lambda_min: Eigenvalue
    trace: float
    trace_sem: float
    weight_norm: float
    layers: Mapping[str, LayerMeasurement]
    unlayered: tuple[str, ...]
    nodes: Tensor
    weights: Tensor
    run_sizes: tuple[int, ...]
    eigenvalues: Tensor
    eigenvalue_residuals: Tensor
    criteria: Mapping[str, float]
    criteria_errors: Mapping[str, float]
    loss: float
    gradient_norm: float
    num_matvecs: int
    num_params: int
    num_samples: int
    num_steps: int
    num_probes: int
    mode: str
    precision: str
    seed: int
    seconds: float
    engine: str = "exact"
    engine_reason: str = ""
    product_error: float = 0.0
    filter_curvature: float = math.nan
    filter_curvature_sem: float = math.nan
    gaps: Mapping[str, str] = field(default_factory=dict)
    self_check: SelfCheck | None = None
    notes: tuple[str, ...] = ()
    eigenvectors: Eigenvectors | None = None
    matrix: str = "hessian"
    hessian_trace: float = math.nan
    hessian_trace_sem: float = math.nan
    gauss_newton_share: float = math.nan
    gauss_newton_share_error: float = math.nan

    @property
    def is_hessian(self) -> bool:
        """Whether this is the Hessian, as far as was seen; else the Jacobian of the gradient."""
        return self.self_check is None or self.self_check.is_hessian

    @property
    def layer_traces(self) -> dict[str, LayerTrace]:
        """Layer to trace and standard error."""
        return {name: LayerTrace(m.trace, m.trace_sem) for name, m in self.layers.items()}

    @property
    def num_block_matvecs(self) -> int:
        """How many of the products were with a layer's block alone."""
        return sum(layer.num_matvecs for layer in self.layers.values())

    @property
    def trace_times_norm2(self) -> float:
        """``tr H ||w||^2``: no invariant but where a norm follows; see `filter_curvature`."""
        return self.trace * self.weight_norm**2

    @property
    def spectrum_type(self) -> str:
        """LLA's type of the spectrum, in words."""
        value = self.criteria["mainly_positive"]
        if math.isnan(value):
            return "undefined"
        return "mainly positive" if value == 1.0 else "mainly negative"


def measure(
    objective: Objective,
    settings: HessianSettings,
    *,
    limit: StabilityLimit | None = None,
    listener: Callable[[int], object] | None = None,
    share: Share | None = None,
    anchor: Anchor | None = None,
) -> HessianMeasurement:
    """Return everything that one spectrum run tells about the Hessian of an objective.

    Args:
        objective: The loss.
        settings: How to measure.
        limit: Stability limit of the optimizer, for the criterion ``stability``; NaN
            without one.
        listener: Called after products, with their number.
        share: Processes that share the batches; all get the same result.
        anchor: Called with the operator, the layers' positions, the Lanczos runs and the
            traces, while products can still be had: what goes on from this measurement.

    Raises:
        MeasurementError: If the loss or a product is not finite or cannot be had.
    """
    began = time.perf_counter()
    check = prove(objective, share)
    if check is not None and refuses(objective, check):
        found = gap_measurement(objective, settings, check, share)
        return replace(found, seconds=time.perf_counter() - began, notes=objective.notes)

    forms: list[float] = []

    def use(hessian: LossOperator) -> HessianMeasurement:
        hessian.listener = listener
        if hessian.matrix == "ggn":
            forms[:] = quadratic_forms(hessian, settings.seed, settings.num_probes)
        return _measured(objective, hessian, settings, limit, anchor)

    found, reason = with_hessian(objective, use, chunk_size=settings.chunk_size, share=share)
    if isinstance(objective, GaussNewtonObjective):
        part = trace_share(objective, forms, found.trace, found.trace_sem, found.seed, share)
        found = replace(
            found,
            matrix="ggn",
            hessian_trace=part.hessian_trace,
            hessian_trace_sem=part.hessian_trace_sem,
            gauss_newton_share=part.share,
            gauss_newton_share_error=part.share_error,
            num_matvecs=found.num_matvecs + part.num_matvecs,
            gaps={**found.gaps, "gauss_newton_share": part.gap} if part.gap else found.gaps,
        )
    seconds = time.perf_counter() - began
    return replace(
        found,
        engine_reason=reason,
        seconds=seconds,
        self_check=objective.findings.proof.self_check if objective.check else None,
        notes=(*objective.notes, *found.notes),
    )


def gap_measurement(
    objective: Objective,
    settings: HessianSettings,
    check: SelfCheck,
    share: Share | None = None,
) -> HessianMeasurement:
    """Return the loss and its gradient, and a gap for all that would be of the Hessian.

    Args:
        objective: The loss.
        settings: How it would have been measured.
        check: What it proved of itself, which is that there is no Hessian.
        share: Processes that share the batches.
    """
    space = ParameterSpace(objective.variables)
    loss, gradient = objective.gradient(share)
    vectors = space.vectors(share)
    none = torch.empty(0, dtype=torch.float64)
    unknown = Eigenvalue(math.nan, math.nan)
    return HessianMeasurement(
        lambda_max=unknown,
        lambda_min=unknown,
        trace=math.nan,
        trace_sem=math.nan,
        weight_norm=vectors.norm(space.flatten(space.tensors)),
        layers={},
        unlayered=(),
        nodes=none,
        weights=none,
        run_sizes=(),
        eigenvalues=none,
        eigenvalue_residuals=none,
        criteria=dict.fromkeys(CRITERIA, math.nan),
        criteria_errors=dict.fromkeys(CRITERIA, math.nan),
        loss=loss,
        gradient_norm=vectors.norm(gradient),
        num_matvecs=0,
        num_params=space.dim,
        num_samples=objective.num_samples,
        num_steps=0,
        num_probes=0,
        mode=objective.mode,
        precision=objective.arithmetic_name,
        seed=settings.seed,
        seconds=0.0,
        gaps=dict.fromkeys(EVERYTHING, check.trouble),
        self_check=check,
    )


def _measured(
    objective: Objective,
    hessian: LossOperator,
    settings: HessianSettings,
    limit: StabilityLimit | None,
    anchor: Anchor | None,
) -> HessianMeasurement:
    """Spend the products, and leave out what the engine cannot say."""
    space = hessian.space
    groups = layer_parameters(objective.module, space, settings.layers)
    blocks = {layer: hessian.positions(names) for layer, names in groups.items()}
    wanted, settings = settings, affordable(hessian, settings)

    def scale() -> Tensor:
        return hessian.vectors.cut(filter_scales(objective.module, space))

    runs, traces = runs_and_traces(hessian, settings, blocks, scale)
    off = engine_error(hessian, runs[0], settings.seed)
    early = min(run.num_steps for run in runs) < settings.num_steps
    found_ends = extremes(runs, (settings.eig_rtol or 0.0) if early else 0.0)
    ends, gaps = verified_ends(hessian, runs, found_ends)
    if off.gap:
        gaps |= dict.fromkeys(("trace", "layers", "density", "criteria"), off.gap)
    values, errors = criteria_of(hessian, runs, found_ends, traces)
    gaps |= without_far_end(settings, runs, values, errors)
    shallow = FAR_GAP in gaps
    stability = measured_stability(hessian, limit, ends[1], settings)
    values["stability"], errors["stability"] = float(stability), stability.residual
    if limit is not None and math.isnan(stability):
        gaps["stability"] = END_GAP
    whole = Quadrature.of(runs, space.dim)
    layers = {}
    if not off.gap:
        plan = settings.layer_plan
        layers = measure_layers(hessian, groups, whole, traces, plan, shallow=shallow)
        cut = [name for name, m in layers.items() if m.spectrum and m.spectrum.ended_early]
        if cut:
            gaps["layers' distances"] = (
                f"eig_rtol={settings.eig_rtol} ended the whole's run or a layer's before the shape "
                f"of its spectrum is known: {', '.join(cut)}. Leave out eig_rtol for them"
            )
    if anchor is not None and not off.gap:
        anchor(hessian, blocks, runs, traces)
    eigenvectors = None
    if settings.num_eigenvectors:
        eigenvectors = leading_eigenvectors(
            hessian, runs[0], settings.num_eigenvectors, settings.seed
        )
    weight_norm = hessian.weight_norm()
    # The last of all, since it takes the operator's memory.
    both = [
        End.of(hessian, ends[0], min(runs, key=lambda run: float(run.values[0])), 0),
        End.of(hessian, ends[1], max(runs, key=lambda run: float(run.values[-1])), -1),
    ]
    notes = memory_notes(wanted, settings, runs)
    runs = [run.forgotten() for run in runs]
    lambda_min, lambda_max = with_arithmetic(objective, hessian, both, settings.seed)
    if limit is not None and limit.is_uniform:
        errors["stability"] = limit.rate * lambda_max.beyond
    found = HessianMeasurement(
        lambda_max=lambda_max,
        lambda_min=lambda_min,
        trace=traces.value,
        trace_sem=math.hypot(traces.sem, off.trace),
        filter_curvature=traces.scaled[0],
        # Of the scaled trace's share in the engine's error nothing is known but its size.
        filter_curvature_sem=math.hypot(
            traces.scaled[1], off.trace * hessian.vectors.largest(scale()) if off.trace else 0.0
        ),
        weight_norm=weight_norm,
        layers=layers,
        unlayered=tuple(outside(space, groups)),
        nodes=whole.nodes,
        weights=whole.weights,
        run_sizes=tuple(run.num_steps for run in runs),
        eigenvalues=runs[0].values,
        eigenvalue_residuals=runs[0].residuals,
        criteria=values,
        criteria_errors=errors,
        loss=hessian.loss,
        gradient_norm=hessian.vectors.norm(hessian.gradient),
        num_matvecs=hessian.num_matvecs + sum(m.num_matvecs for m in layers.values()),
        num_params=hessian.shape[0],
        num_samples=objective.num_samples,
        num_steps=max(run.num_steps for run in runs),
        num_probes=traces.num_probes,
        mode=objective.mode,
        precision=objective.arithmetic_name,
        seed=settings.seed,
        seconds=0.0,
        engine=hessian.engine,
        product_error=off.random,
        gaps=gaps,
        eigenvectors=eigenvectors,
        notes=notes,
    )
    return _without_random(found) if off.gap else found


def _without_random(m: HessianMeasurement) -> HessianMeasurement:
    """Return a measurement without whatever rests on products with random vectors."""
    none = torch.empty(0, dtype=torch.float64)
    # What only depends on the largest eigenvalue has its own check.
    kept = {"stability"}
    return replace(
        m,
        trace=math.nan,
        trace_sem=math.nan,
        filter_curvature=math.nan,
        filter_curvature_sem=math.nan,
        nodes=none,
        weights=none,
        run_sizes=(),
        eigenvalues=none,
        eigenvalue_residuals=none,
        criteria={k: v if k in kept else math.nan for k, v in m.criteria.items()},
        criteria_errors={k: v if k in kept else math.nan for k, v in m.criteria_errors.items()},
    )

"""One spectrum run that feeds eigenvalues, traces, density and criteria together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lla_callbacks.hessian.criteria_of import FAR_END, criteria_of
from lla_callbacks.hessian.engine_error import BOUND, END_GAP, engine_error, verified_ends
from lla_callbacks.hessian.layer_measures import (
    LayerMeasurement,
    LayerPlan,
    LayerTrace,
    measure_layers,
)
from lla_callbacks.hessian.stability import StabilityLimit
from lla_callbacks.linalg.accumulation import norm
from lla_callbacks.linalg.distance import Quadrature
from lla_callbacks.linalg.eigenvalue import Eigenvalue, end_of, extremes
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.operators import ScaledOperator
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.linalg.trace import TraceEstimate, TraceEstimator
from lla_callbacks.objective.checks import (
    MOST_WORK,
    fraction,
    none_or_two,
    seed_of,
    settle,
    whole,
)
from lla_callbacks.objective.engines import prove, refuses, with_hessian
from lla_callbacks.objective.filters import filter_scales
from lla_callbacks.objective.layers import Layers, check_layers, layer_parameters, outside
from lla_callbacks.objective.objective import Objective, trainable
from lla_callbacks.objective.self_check import SelfCheck

# What goes on from a measurement: takes the operator, the layers' positions, runs and traces.
Anchor = Callable[[LossOperator, Mapping[str, Tensor], Sequence[LanczosRun], TraceEstimate], object]

# Relative residual at which the preconditioned Lanczos run of Adam's stability stops, its value in
# its place for a while. At 0.05 and by the residual alone it took 5 to 11 products on a ResNet-20,
# and up to 8 of 100 runs stopped at another eigenvalue than the largest; so it takes three to five
# more (docs/benchmarks/coverage.md).
STABILITY_RTOL = 0.02

# Every criterion by its name.
CRITERIA = (
    "kh05", "kh1", "negative_mass", "effective_dimension", "c_t", "r_e", "mainly_positive",
    "frobenius_norm", "stable_rank", "eigenvalue_ratio", "gradient_share", "stability",
)  # fmt: skip

# Everything that a measurement says of curvature, as gaps are named.
EVERYTHING = ("lambda_max", "lambda_min", "trace", "layers", "density", "criteria", "stability")

# With a wanted relative error, no stop before this many probes: fewer give no honest sem.
LEAST_PROBES = 5


@dataclass(frozen=True)
class HessianSettings:
    """How a Hessian is measured.

    Attributes:
        num_steps: Depth of each Lanczos run. Default 24: the largest eigenvalue of a
            ResNet-20 converges to 1 % within 6 to 20 steps. The smallest takes longer where
            it is small beside the largest: it then errs towards zero, by up to its residual,
            and r_e and C_t with it; 40 to 60 steps settle it.
        num_probes: Probes for the trace, one product each. Default 24: of equal costs, half
            for the run and half for probes had the smallest error of the trace on trained
            networks, and little more than plain probes at initialisation
            (docs/benchmarks/trace_estimators.md).
        num_runs: Independent Lanczos runs for density and criteria (``n_v`` in LLA). The
            start vectors of all but the first serve as trace probes too. Default 1.
        layers: Layers that are told apart; see
            :func:`~lla_callbacks.objective.layers.layer_parameters`.
        num_layer_steps: Depth of the Lanczos runs in each layer's own block, for its
            extreme eigenvalues, its density and its distance to the whole. Default 0: none,
            since a run a layer costs more than all else.
        num_layer_probes: Most block probes a layer, where they give its trace a smaller
            standard error than the whole's; see
            :func:`~lla_callbacks.hessian.layer_measures.measure_layers`. Default 0: the
            traces that cost nothing.
        eig_rtol: Stop a Lanczos run early once both extreme residuals are at most this
            share of the largest eigenvalue. ``None``: always full depth, as criteria that
            depend on the depth need.
        trace_rtol: Stop adding probes once the standard error of the trace is at most this
            share of it; ``num_probes`` is then the largest number.
        seed: Fixes every random vector.
        chunk_size: Vectors in one backward pass; the results do not depend on it.

    Raises:
        ValueError: Naming the setting, what was given, and what is allowed.
    """

    num_steps: int = 24
    num_probes: int = 24
    num_runs: int = 1
    layers: Layers = None
    num_layer_steps: int = 0
    num_layer_probes: int = 0
    eig_rtol: float | None = None
    trace_rtol: float | None = None
    seed: int = 0
    chunk_size: int = 1

    def __post_init__(self) -> None:
        for name, least in {
            "num_steps": 2,
            "num_probes": 2,
            "num_runs": 1,
            "chunk_size": 1,
        }.items():
            settle(self, **{name: whole(name, getattr(self, name), least, MOST_WORK)})
        for name in ("num_layer_steps", "num_layer_probes"):
            settle(self, **{name: none_or_two(name, getattr(self, name))})
        for name in ("eig_rtol", "trace_rtol"):
            settle(self, **{name: fraction(name, getattr(self, name), none=True)})
        settle(self, seed=seed_of("seed", self.seed))
        check_layers(self.layers)

    @property
    def max_matvecs(self) -> int:
        """Whole products that a measurement takes at most, a stability run left out."""
        return self.num_runs * self.num_steps + max(0, self.num_probes - self.num_runs + 1)

    @property
    def layer_plan(self) -> LayerPlan:
        """What is spent on each layer besides."""
        return LayerPlan(
            num_steps=self.num_layer_steps,
            num_runs=self.num_runs,
            num_probes=self.num_layer_probes,
            eig_rtol=self.eig_rtol,
            seed=self.seed,
        )


@dataclass(frozen=True, eq=False)
class HessianMeasurement:
    """What one measurement found. Eigenvalues are in units of loss per squared parameter.

    Attributes:
        lambda_max: Largest (algebraic) eigenvalue, with its residual.
        lambda_min: Smallest (algebraic) eigenvalue, with its residual.
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
            though they are cheaper.
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

    def use(hessian: LossOperator) -> HessianMeasurement:
        hessian.listener = listener
        return _measured(objective, hessian, settings, limit, anchor)

    found, reason = with_hessian(objective, use, chunk_size=settings.chunk_size, share=share)
    seconds = time.perf_counter() - began
    return replace(
        found,
        engine_reason=reason,
        seconds=seconds,
        self_check=objective.findings.proof.self_check if objective.check else None,
        notes=objective.notes,
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
    space = ParameterSpace(trainable(objective.module))
    loss, gradient = objective.gradient(share)
    none = torch.empty(0, dtype=torch.float64)
    unknown = Eigenvalue(math.nan, math.nan)
    return HessianMeasurement(
        lambda_max=unknown,
        lambda_min=unknown,
        trace=math.nan,
        trace_sem=math.nan,
        weight_norm=float(space.flatten(space.tensors).norm()),
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
        gradient_norm=float(gradient.norm()),
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
    blocks = {layer: space.index(names).to(space.device) for layer, names in groups.items()}
    scale = filter_scales(objective.module, space)
    runs, traces = _run(hessian, settings, blocks, scale)
    off = engine_error(hessian, runs[0], settings.seed)
    early = min(run.num_steps for run in runs) < settings.num_steps
    found_ends = extremes(runs, (settings.eig_rtol or 0.0) if early else 0.0)
    ends, gaps = verified_ends(hessian, runs, found_ends)
    if off.gap:
        gaps |= dict.fromkeys(("trace", "layers", "density", "criteria"), off.gap)
    values, errors = criteria_of(hessian, runs, found_ends, traces)
    ended = [run.num_steps for run in runs if run.num_steps < settings.num_steps]
    if settings.eig_rtol is not None and ended and not all(run.broke_down for run in runs):
        for name in FAR_END:
            values[name] = errors[name] = math.nan
        gaps["criteria of the far end"] = (
            f"eig_rtol={settings.eig_rtol} ended a run after {min(ended)} of {settings.num_steps} "
            f"steps, before the far end of the spectrum is known: {', '.join(FAR_END)}. Leave out "
            "eig_rtol for them"
        )
    stability = _stability(hessian, limit, ends[1], settings)
    values["stability"], errors["stability"] = float(stability), stability.residual
    if limit is not None and math.isnan(stability):
        gaps["stability"] = END_GAP
    whole = Quadrature.of(runs, space.dim)
    layers = {}
    if not off.gap:
        layers = measure_layers(hessian, groups, whole, traces, settings.layer_plan)
    if anchor is not None and not off.gap:
        anchor(hessian, blocks, runs, traces)
    weight_norm = norm(space.flatten(space.tensors))
    found = HessianMeasurement(
        lambda_max=ends[1],
        lambda_min=ends[0],
        trace=traces.value,
        trace_sem=math.hypot(traces.sem, off.trace),
        filter_curvature=traces.scaled[0],
        # Of the scaled trace's share in the engine's error nothing is known but its size.
        filter_curvature_sem=math.hypot(traces.scaled[1], off.trace * float(scale.max())),
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
        gradient_norm=norm(hessian.gradient),
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


def _run(
    hessian: LossOperator, settings: HessianSettings, blocks: Mapping[str, Tensor], scale: Tensor
) -> tuple[list[LanczosRun], TraceEstimate]:
    """Spend the products: Lanczos runs, then probes of what the first run left open."""
    source = generator(settings.seed)

    def probe() -> Tensor:
        dim, device = hessian.shape[0], hessian.device
        return rademacher(dim, source, dtype=hessian.dtype, device=device)

    home = hessian.basis_device(settings.num_runs * settings.num_steps)

    def run_from(start: Tensor) -> LanczosRun:
        depth, rtol = settings.num_steps, settings.eig_rtol
        return lanczos(hessian, start, depth, rtol=rtol, basis_device=home)

    runs = [run_from(probe())]
    estimator = TraceEstimator(hessian, blocks, runs[0], scale=scale)
    for _ in range(settings.num_runs - 1):
        start = probe()
        runs.append(run_from(start))
        estimator.add_run(runs[-1], start)
    while estimator.num_probes < settings.num_probes:
        if settings.trace_rtol is not None and estimator.num_probes >= LEAST_PROBES:
            reached = estimator.estimate()
            if reached.sem <= settings.trace_rtol * abs(reached.value):
                break
        estimator.add_probe(source)
    return runs, estimator.estimate()


def _stability(
    hessian: LossOperator,
    limit: StabilityLimit | None,
    lambda_max: Eigenvalue,
    settings: HessianSettings,
) -> Eigenvalue:
    """Return the optimizer's stability ratio: from lambda_max, or by a run of its own."""
    if limit is None:
        return Eigenvalue(math.nan, math.nan)
    if limit.is_uniform:
        scale = float(limit.diagonal[0])
        return Eigenvalue(limit.ratio(lambda_max), scale * lambda_max.residual)
    operator = ScaledOperator(hessian, limit.diagonal, limit.shift)
    start = rademacher(
        hessian.shape[0],
        generator(settings.seed, 1),
        dtype=hessian.dtype,
        device=hessian.device,
    )
    # Parameters that the optimizer leaves alone are no part of its spectrum: of a start vector
    # that is mostly theirs, a run sees little but the eigenvalue zero.
    start = start * (limit.diagonal.to(hessian.device) > 0)
    run = lanczos(
        operator,
        start,
        settings.num_steps,
        rtol=STABILITY_RTOL,
        which=[-1],
        basis_device=hessian.basis_device(settings.num_steps),
    )
    end = end_of(run, -1, STABILITY_RTOL if run.num_steps < settings.num_steps else 0.0)
    found = Eigenvalue(float(end), end.beyond)
    if hessian.engine == "exact":
        return found
    # Along D^(1/2) u, where u is the top Ritz vector of D^(1/2) (H + shift) D^(1/2).
    root = limit.diagonal.to(hessian.device, hessian.dtype).sqrt()
    vector = root * run.vectors([run.num_steps - 1])[:, 0].to(hessian.device)
    off = norm(root * hessian.engine_error(vector, hessian @ vector))
    if not off <= BOUND * abs(found):
        return Eigenvalue(math.nan, math.nan)
    return Eigenvalue(float(found), found.residual + off)

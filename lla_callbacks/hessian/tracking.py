"""A light measurement that goes on from the last one: lambda_max and traces in few products."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.hessian.arithmetic import LIGHT_WORTH_ASKING, End, with_arithmetic
from lla_callbacks.hessian.engine_error import END_GAP, random_error, verified_end
from lla_callbacks.hessian.layer_measures import LayerTrace
from lla_callbacks.hessian.settings import TrackingSettings
from lla_callbacks.linalg.eigenvalue import Eigenvalue, end_of
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.linalg.trace import TraceEstimate, TraceEstimator
from lla_callbacks.linalg.tracking import TraceState, advance, begin
from lla_callbacks.linalg.vectors import Index
from lla_callbacks.objective.engines import with_hessian
from lla_callbacks.objective.layers import layer_parameters
from lla_callbacks.objective.objective import Objective

# Key of the streams that probes come from: a stream of its own for each firing, so that no
# probe depends on a vector that is projected out.
STREAM = 6

# Share of the gradient in the start vector, beside the last Ritz vector. Alone, that vector
# can be an eigenvector still when another eigenvalue has overtaken its own: the largest
# eigenvalue was seen to be missed by 13 %, and by less than 1 % with this share, for half a
# product more (docs/benchmarks/tracking.md). The gradient is at hand, and lies in the top
# eigenspace for a good part (Gur-Ari et al. 2018).
GRADIENT_SHARE = 0.3


# Steps of training after which a vector is too old to start from. By then it saves a product at
# most, and once led 9 % below the largest eigenvalue 256 steps later (ibid.).
WARM_STEPS = 16


@dataclass(frozen=True, eq=False)
class TrackerState:
    """What the next light measurement takes from this one.

    Attributes:
        vector: Unit Ritz vector of ``lambda_max``, shape ``(dim,)``, or this process's piece of it.
        trace: State of the chained traces: the whole, then the layers.
        dim: Entries of the whole vector; ``None``: as many as ``vector`` has.
    """

    vector: Tensor | None = None
    trace: TraceState | None = None
    dim: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain tensors and numbers, in nested dicts.

        A piece of a vector is left out, since one process saves for all: the next measurement then
        starts its Lanczos run cold.
        """
        whole = self.vector is None or self.dim in (None, len(self.vector))
        return {
            "vector": self.vector if whole else None,
            "trace": None if self.trace is None else self.trace.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> TrackerState:
        """Return the state that :meth:`state_dict` described."""
        trace = state["trace"]
        return cls(state["vector"], None if trace is None else TraceState.from_state_dict(trace))

    def aged(self, num_steps: int, interval: int) -> TrackerState:
        """Return what is of use so many training steps later, where an interval was expected.

        What is known of the traces' changes is of that interval and shorter ones.
        """
        vector = self.vector if num_steps <= WARM_STEPS else None
        trace = self.trace
        if trace is not None and num_steps > interval:
            trace = trace.unlinked()
        return TrackerState(vector, trace, self.dim)


@dataclass(frozen=True, eq=False)
class HessianTracking:
    """What a light measurement found.

    Attributes:
        lambda_max: Largest (algebraic) eigenvalue, with its residual; NaN if left out. In about
            5 of 100 firings it is one that has been overtaken, up to a quarter too low, which no
            residual shows (docs/benchmarks/coverage.md).
        trace: Trace of the Hessian; NaN if left out.
        trace_sem: Its standard error, from variances that are pooled over the last firings and
            widened for the few probes behind them, so that two cover 95 %; the errors of
            neighbouring firings are correlated.
        layer_traces: Layer to trace and standard error.
        weight_norm: Euclidean norm of the trainable parameters.
        loss: The loss on the held batches.
        gradient_norm: Norm of its gradient.
        num_matvecs: Products spent.
        num_steps: Lanczos steps among them.
        num_probes: Probes among them.
        num_params: Trainable parameters.
        num_samples: Samples behind the loss.
        mode: Normalization mode.
        seconds: Wall time.
        engine: How products were computed.
        engine_reason: Why not exactly; empty if it was.
        gaps: What could not be said within a bound, by name, and why.
    """

    lambda_max: Eigenvalue
    trace: float
    trace_sem: float
    layer_traces: Mapping[str, LayerTrace]
    weight_norm: float
    loss: float
    gradient_norm: float
    num_matvecs: int
    num_steps: int
    num_probes: int
    num_params: int
    num_samples: int
    mode: str
    seconds: float
    engine: str = "exact"
    engine_reason: str = ""
    gaps: Mapping[str, str] = field(default_factory=dict)

    @property
    def trace_times_norm2(self) -> float:
        """``tr H ||w||^2``: no invariant but where a norm follows the weights."""
        return self.trace * self.weight_norm**2


def track(
    objective: Objective,
    settings: TrackingSettings,
    state: TrackerState | None = None,
    *,
    listener: Callable[[int], object] | None = None,
    share: Share | None = None,
) -> tuple[HessianTracking, TrackerState]:
    """Return ``lambda_max`` and the traces of an objective's Hessian, and the next state.

    ``lambda_max`` comes from a Lanczos run that starts at the last Ritz vector and a share of
    the gradient. The top Ritz vector is taken out of the traces, whose remainder is chained
    from time to time; see :func:`~lla_callbacks.linalg.tracking.advance`.

    Args:
        objective: The loss.
        settings: How to measure.
        state: What the last measurement returned, of the same settings and parameters;
            ``None`` starts cold.
        listener: Called after products, with their number.
        share: Processes that share the batches; all get the same result.

    Raises:
        MeasurementError: If the loss or a product is not finite or cannot be had.
    """
    began = time.perf_counter()
    past = state or TrackerState()

    def use(hessian: LossOperator) -> tuple[HessianTracking, TrackerState]:
        hessian.listener = listener
        return _tracked(objective, hessian, settings, past)

    (found, following), reason = with_hessian(
        objective, use, chunk_size=settings.chunk_size, share=share
    )
    seconds = time.perf_counter() - began
    return replace(found, engine_reason=reason, seconds=seconds), following


def _tracked(
    objective: Objective,
    hessian: LossOperator,
    settings: TrackingSettings,
    state: TrackerState,
) -> tuple[HessianTracking, TrackerState]:
    """Spend the products, and leave out what the engine cannot say."""
    space = hessian.space
    state = _fitted(state, hessian)
    gaps: dict[str, str] = {}
    run, top = None, Eigenvalue(math.nan, math.nan)
    if settings.eig_rtol is not None:
        start = _start(hessian, state.vector, settings.seed)
        rtol = settings.eig_rtol
        run = lanczos(
            hessian,
            start,
            settings.num_steps,
            rtol=rtol,
            which="max",
            basis_device=hessian.basis_device(settings.num_steps),
            half=hessian.keeps_half(settings.num_steps),
        )
        state = replace(state, vector=_top_vector(run), dim=space.dim)
        top = verified_end(
            hessian, run, -1, abs(float(run.values[-1])), end_of(run, -1, settings.eig_rtol)
        )
        if math.isnan(top):
            gaps["lambda_max"] = END_GAP
    values, sems, names = [math.nan], [math.nan], list[str]()
    if settings.num_probes:
        values, sems, names, state = _traces(hessian, objective, run, settings, state)
        off = random_error(hessian, settings.seed)
        if off.gap:
            values, sems = [math.nan] * len(values), [math.nan] * len(values)
            gaps["trace"] = off.gap
        # Of a layer's share in the engine's error nothing is known but that.
        sems = [math.hypot(sem, off.trace) for sem in sems]
    weight_norm = hessian.weight_norm()
    if run is not None:
        # The last of all, since it takes the operator's memory.
        ends = [End.of(hessian, top, run, -1, LIGHT_WORTH_ASKING)]
        top = with_arithmetic(objective, hessian, ends, settings.seed)[0]
    found = HessianTracking(
        lambda_max=top,
        trace=values[0],
        trace_sem=sems[0],
        layer_traces={
            name: LayerTrace(value, sem)
            for name, value, sem in zip(names, values[1:], sems[1:], strict=True)
        },
        weight_norm=weight_norm,
        loss=hessian.loss,
        gradient_norm=hessian.vectors.norm(hessian.gradient),
        num_matvecs=hessian.num_matvecs,
        num_steps=0 if run is None else run.num_steps,
        num_probes=settings.num_probes,
        num_params=hessian.shape[0],
        num_samples=objective.num_samples,
        mode=objective.mode,
        seconds=0.0,
        engine=hessian.engine,
        gaps=gaps,
    )
    return found, state


def anchored(
    hessian: LossOperator,
    blocks: Mapping[str, Index],
    runs: Sequence[LanczosRun],
    traces: TraceEstimate,
    settings: TrackingSettings,
    state: TrackerState | None = None,
) -> TrackerState:
    """Return a state that goes on from a full measurement, for half the probes' products.

    Args:
        hessian: The operator that was measured.
        blocks: Layer to its positions, as the traces have them.
        runs: Lanczos runs of the full measurement.
        traces: Its traces.
        settings: How light measurements are done.
        state: State before, of which the variances stay of use.
    """
    state = state or TrackerState()
    run = max(runs, key=lambda run: float(run.values[-1]))
    if settings.eig_rtol is not None:
        state = replace(state, vector=_top_vector(run), dim=hessian.space.dim)
    if settings.num_probes:
        known = _top_alone(run) if settings.eig_rtol is not None else None
        past = _fitting(state.trace, 1 + len(blocks))
        estimator = TraceEstimator(hessian, blocks, known)
        _probe(estimator, settings.num_probes // 2, settings.seed, past.time if past else 0)
        pairs = [(traces.value, traces.sem), *(traces.blocks[name] for name in blocks)]
        level, sem = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
        state = replace(state, trace=begin(estimator.samples, level, sem, past))
    return state


def _traces(
    hessian: LossOperator,
    objective: Objective,
    run: LanczosRun | None,
    settings: TrackingSettings,
    state: TrackerState,
) -> tuple[list[float], list[float], list[str], TrackerState]:
    """Return values and standard errors, the whole first, with the layers' names."""
    groups = layer_parameters(objective.module, hessian.space, settings.layers)
    blocks = {layer: hessian.positions(names) for layer, names in groups.items()}
    known = None if run is None else _top_alone(run)
    past = _fitting(state.trace, 1 + len(blocks))
    time_of = 0 if past is None else past.time
    half = settings.num_probes // 2
    new, old_values = TraceEstimator(hessian, blocks, known), None
    if past is not None and len(past.values) == half:
        old = TraceEstimator(hessian, blocks, known)
        _probe(old, half, settings.seed, time_of - 1)
        old_values = old.samples
    else:
        past = None if past is None else past.unlinked()
        # These come first, since the others are what the next time brings back.
        _probe(new, half, settings.seed, time_of, 1)
    _probe(new, half, settings.seed, time_of)
    found, trace = advance(past, old_values, new.samples)
    sems = (found.sem**2 + new.rounding**2).sqrt()
    return found.value.tolist(), sems.tolist(), list(groups), replace(state, trace=trace)


def _fitted(state: TrackerState, hessian: LossOperator) -> TrackerState:
    """Return what is of use of a state for an operator."""
    vector, dim = state.vector, hessian.shape[0]
    if vector is None:
        return state
    if (state.dim or len(vector)) != dim:
        # Layers were frozen or thawed since.
        return TrackerState()
    if len(vector) == dim and state.dim is None:
        # Saved whole, maybe by a run of one process.
        vector = hessian.vectors.cut(vector)
    # Pieces are of a run with as many processes.
    return replace(state, vector=vector if len(vector) == hessian.vectors.length else None)


def _probe(estimator: TraceEstimator, count: int, seed: int, *key: int) -> None:
    """Spend products on probes, the same ones for the same key."""
    source = generator(seed, STREAM, *key)
    for _ in range(count):
        estimator.add_probe(source)


def _fitting(past: TraceState | None, rows: int) -> TraceState | None:
    """Return the past, unless it is of other layers."""
    return past if past is not None and len(past.level) == rows else None


def _start(hessian: LossOperator, vector: Tensor | None, seed: int) -> Tensor:
    """Return where the Lanczos run begins."""
    if vector is None:
        return hessian.rademacher(generator(seed, STREAM))
    start = vector.to(hessian.device, hessian.dtype)
    length = hessian.vectors.norm(hessian.gradient)
    return start + (GRADIENT_SHARE / length) * hessian.gradient if length else start


def _top_vector(run: LanczosRun) -> Tensor:
    return run.vectors([run.num_steps - 1])[:, 0]


def _top_alone(run: LanczosRun) -> LanczosRun:
    """Return the top Ritz pair as a run of one step: ``A u = theta u + r``, ``r`` normal to u.

    One vector changes little from time to time, and so do the traces' remainders, whose
    changes are estimated.
    """
    return run.pair(run.num_steps - 1)

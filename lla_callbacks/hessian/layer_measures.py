"""What is measured of each layer: trace, weight norm and, on request, its block's spectrum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lla_callbacks.linalg.distance import Quadrature, published_distance, shape_distance
from lla_callbacks.linalg.eigenvalue import Eigenvalue, extremes
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.loss_operator import HessianBlockOperator, LossOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.student import widened_sem
from lla_callbacks.linalg.trace import TraceEstimate, TraceEstimator

# A layer gets this many block probes before it is judged whether more of them pay. Choice:
# the standard deviation of so few is good to a third, enough to tell variances that differ by
# factors.
PILOT_PROBES = 5


class LayerTrace(NamedTuple):
    """Trace of the Hessian over the parameters of one layer, with its standard error."""

    value: float
    sem: float


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The spectrum of one layer's own diagonal block of the Hessian.

    Attributes:
        lambda_max: The block's largest (algebraic) eigenvalue, with its residual; never
            above that of the whole Hessian.
        lambda_min: Its smallest (algebraic) eigenvalue, with its residual.
        nodes: Quadrature nodes of all runs, shape ``(sum(run_sizes),)``, float64.
        weights: Their weights, same shape, sum 1.
        run_sizes: How many nodes each run contributed, in order.
        distance: 1-Wasserstein distance of the normalized spectrum to that of the whole
            Hessian; see :func:`~lla_callbacks.linalg.distance.shape_distance`. Of all the layer's
            parameters, biases among them. NaN for a block that is zero, and where a run ended
            early.
        distance_error: Its standard error over start vectors.
        published_distance: The distance that Sankar et al. 2021 computed; see
            :func:`~lla_callbacks.linalg.distance.published_distance`. Theirs is of weights only,
            without biases.
        ended_early: Whether ``eig_rtol`` ended a run of the layer or of the whole before its
            depth: neither distance is told then, since they rest on whole spectra.
    """

    lambda_max: Eigenvalue
    lambda_min: Eigenvalue
    nodes: Tensor
    weights: Tensor
    run_sizes: tuple[int, ...]
    distance: float
    distance_error: float
    published_distance: float
    ended_early: bool = False


@dataclass(frozen=True, eq=False)
class LayerMeasurement:
    """What one measurement found in one layer.

    Attributes:
        trace: Trace of the Hessian over the layer's parameters.
        trace_sem: Its standard error.
        num_block_probes: Block probes behind the trace; 0 where it comes from the probes of
            the whole Hessian.
        num_params: The layer's trainable parameters.
        norm: Euclidean norm of them all.
        num_matvecs: Products spent on the layer's own block.
        spectrum: That of the layer's own block, where it was asked for.
    """

    trace: float
    trace_sem: float
    num_block_probes: int
    num_params: int
    norm: float
    num_matvecs: int = 0
    spectrum: LayerSpectrum | None = None

    @property
    def trace_times_norm2(self) -> float:
        """``tr ||w||^2``, which does not fall when weights in front of a norm just grow.

        Scaling the weights ``w`` that a normalization layer follows by ``c`` leaves the
        function as it is and scales their trace by ``1 / c^2``.
        """
        return self.trace * self.norm**2


@dataclass(frozen=True)
class LayerPlan:
    """How much is spent on each layer.

    Attributes:
        num_steps: Depth of each Lanczos run in a layer's block; 0: none.
        num_runs: Independent runs.
        num_probes: Most block probes of a layer's trace; 0: none.
        eig_rtol: See :class:`~lla_callbacks.hessian.settings.HessianSettings`.
        seed: Fixes every random vector.
    """

    num_steps: int
    num_runs: int
    num_probes: int
    eig_rtol: float | None
    seed: int

    @property
    def max_matvecs(self) -> int:
        """Block products that a layer takes at most."""
        runs = self.num_runs if self.num_steps else 0
        free = max(0, runs - 1) if self.num_probes else 0
        return runs * self.num_steps + max(0, self.num_probes - free)


def measure_layers(
    hessian: LossOperator,
    groups: Mapping[str, Sequence[str]],
    whole: Quadrature,
    traces: TraceEstimate,
    plan: LayerPlan,
    *,
    shallow: bool = False,
) -> dict[str, LayerMeasurement]:
    """Return what is known of each layer, spending block products as planned.

    **Trace.** A probe ``z`` of the whole Hessian gives every layer's trace at no further
    product, as ``z_l' (H z)_l``, with the variance

        ``2 (||H_ll||_F^2 - sum_i h_ii^2) + sum_{m != l} ||H_lm||_F^2``,

    which holds what the layer shares with all others. A probe of the block alone,
    ``z_l' H_ll z_l``, has the first term only (Hutchinson 1990; the second follows from
    ``Var z_l' H_lm z_m = ||H_lm||_F^2`` for independent signs). In both, what a Lanczos run
    of the operator knows is taken out (:class:`~lla_callbacks.linalg.trace.
    TraceEstimator`), so that these hold with what is left of ``H`` in its place.
    With ``plan.num_probes`` a layer gets :data:`PILOT_PROBES` block probes, and all of them
    if they promise a smaller standard error than that of the whole's; the smaller of the two
    is reported. Where both are alike, this choice makes it up to a tenth too small
    (``E min`` of two errors from 24 and 10 probes).

    Args:
        hessian: The whole Hessian; listeners hear of block products too.
        groups: Layer name to its parameters' names.
        whole: The whole Hessian's spectrum.
        traces: The whole run's traces, with one block a layer.
        plan: What to spend.
        shallow: Whether a run of the whole ended early.
    """
    space = hessian.space
    norms = space.vectors(hessian.share).norms(
        space.flatten(space.tensors),
        [space.place(names) for names in groups.values()],
    )
    found = {}
    for (layer, names), length in zip(groups.items(), norms, strict=True):
        first = min(space.starts[name] for name in names)
        value, sem = traces.blocks[layer]
        num_block_probes = num_matvecs = 0
        spectrum = None
        if plan.max_matvecs:
            block = hessian.block(names)
            block.listener = hessian.listener
            # Streams by the layer's place: they do not depend on which others are chosen.
            source = generator(plan.seed, 2, first)
            runs, starts = _runs(block, source, plan)
            if runs:
                early = shallow or any(_ended_early(run, plan) for run in runs)
                spectrum = _spectrum(block, runs, whole, early)
            own = _block_trace(block, runs, starts, source, plan, sem)
            if own is not None and own.sem < sem:
                value, sem, num_block_probes = own.value, own.sem, own.num_probes
            num_matvecs = block.num_matvecs
        found[layer] = LayerMeasurement(
            trace=value,
            trace_sem=sem,
            num_block_probes=num_block_probes,
            num_params=space.restricted(names).dim,
            norm=length,
            num_matvecs=num_matvecs,
            spectrum=spectrum,
        )
    return found


def _runs(
    block: HessianBlockOperator, source: torch.Generator, plan: LayerPlan
) -> tuple[list[LanczosRun], list[Tensor]]:
    """Return the block's Lanczos runs and their start vectors."""
    if not plan.num_steps:
        return [], []
    starts = [block.rademacher(source) for _ in range(plan.num_runs)]
    home, half = block.basis_device(plan.num_steps), block.keeps_half(plan.num_steps)
    runs = [
        lanczos(
            block,
            z,
            plan.num_steps,
            rtol=plan.eig_rtol,
            basis_device=home,
            half=half,
            noise=1.0,
        )
        for z in starts
    ]
    return runs, starts


def _ended_early(run: LanczosRun, plan: LayerPlan) -> bool:
    return run.num_steps < plan.num_steps and not run.broke_down


def _spectrum(
    block: HessianBlockOperator, runs: Sequence[LanczosRun], whole: Quadrature, early: bool
) -> LayerSpectrum:
    own = Quadrature.of(runs, block.shape[0])
    lowest, highest = extremes(runs)
    distance = error = published = math.nan
    if not early:
        (distance, error), published = shape_distance(own, whole), published_distance(own, whole)
    return LayerSpectrum(
        lambda_max=highest,
        lambda_min=lowest,
        nodes=own.nodes,
        weights=own.weights,
        run_sizes=tuple(run.num_steps for run in runs),
        distance=distance,
        distance_error=error,
        published_distance=published,
        ended_early=early,
    )


def _block_trace(
    block: HessianBlockOperator,
    runs: Sequence[LanczosRun],
    starts: Sequence[Tensor],
    source: torch.Generator,
    plan: LayerPlan,
    sem: float,
) -> TraceEstimate | None:
    """Return the trace by block probes, as many as pay beside a standard error ``sem``."""
    if not plan.num_probes:
        return None
    estimator = TraceEstimator(block, {}, runs[0] if runs else None)
    for run, start in zip(runs[1:], starts[1:], strict=True):
        estimator.add_run(run, start)
    while estimator.num_probes < min(PILOT_PROBES, plan.num_probes):
        estimator.add_probe(source)
    pilot = estimator.estimate()
    promised = pilot.sem * _per_probe(plan.num_probes) / _per_probe(pilot.num_probes)
    if promised >= sem:
        return pilot
    while estimator.num_probes < plan.num_probes:
        estimator.add_probe(source)
    return estimator.estimate()


def _per_probe(count: int) -> float:
    """Return the standard error of so many probes of variance one."""
    return widened_sem(1.0, count) / math.sqrt(count)

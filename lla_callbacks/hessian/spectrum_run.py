"""The products of a measurement: Lanczos runs, then probes of the trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.linalg.heap import give_back
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.trace import TraceEstimate, TraceEstimator
from lla_callbacks.linalg.vectors import Index

# With a wanted relative error, no stop before this many probes: fewer give no honest sem.
LEAST_PROBES = 5


def affordable(hessian: LossOperator, settings: HessianSettings) -> HessianSettings:
    """Return settings of as many steps as there is memory for, if nobody asked for more."""
    if not settings.may_shorten:
        return settings
    depth = hessian.affordable_steps(settings.num_steps, settings.num_runs)
    return settings if depth == settings.num_steps else replace(settings, num_steps=depth)


def memory_notes(
    wanted: HessianSettings, spent: HessianSettings, runs: list[LanczosRun]
) -> tuple[str, ...]:
    """Return what was done for the sake of memory and what it costs, in sentences."""
    found = []
    if spent.num_steps < wanted.num_steps:
        found.append(
            f"{spent.num_steps} Lanczos steps in place of {wanted.num_steps}, which is what memory "
            "allows: residuals and errors of criteria hold what that costs; give num_steps or "
            "max_memory for more"
        )
    if runs[0].kept.is_half:
        largest = max(float(run.values.abs().max()) for run in runs)
        share = max(run.stray for run in runs) / largest if largest else 0.0
        found.append(
            f"basis vectors in float16, for memory: {share:.1g} of the largest eigenvalue in every "
            "residual"
        )
    return tuple(found)


def runs_and_traces(
    hessian: LossOperator,
    settings: HessianSettings,
    blocks: Mapping[str, Index],
    scale: Callable[[], Tensor],
) -> tuple[list[LanczosRun], TraceEstimate]:
    """Spend the products: Lanczos runs, then probes of what the first run left open.

    Args:
        hessian: The operator.
        settings: How many.
        blocks: Layer to its positions.
        scale: Makes the weights of one more sum of the diagonal, once the first run is over.
    """
    source = generator(settings.seed)
    num_vectors = settings.num_runs * settings.num_steps
    home, half = hessian.basis_device(num_vectors), hessian.keeps_half(num_vectors)

    def run_from(start: Tensor | None, *, keep_product: bool) -> LanczosRun:
        return lanczos(
            hessian,
            # Drawn here, so that nobody else holds it meanwhile.
            hessian.rademacher(source) if start is None else start,
            settings.num_steps,
            rtol=settings.eig_rtol,
            basis_device=home,
            half=half,
            keep_product=keep_product,
            noise=1.0,
        )

    if half:
        hessian.save_memory()
        # What the checks took in pieces.
        give_back()
    # Of the first run only the engine's error asks for its first product again, which costs one
    # more where memory is tight.
    keep = hessian.engine != "exact" and not half
    runs = [run_from(None, keep_product=keep)]
    # Where memory is tight they are made anew for each probe.
    weights = scale if half else scale()
    estimator = TraceEstimator(hessian, blocks, runs[0], scale=weights)
    for _ in range(settings.num_runs - 1):
        start = hessian.rademacher(source)
        runs.append(run_from(start, keep_product=True))
        estimator.add_run(runs[-1], start)
    while estimator.num_probes < settings.num_probes:
        if settings.trace_rtol is not None and estimator.num_probes >= LEAST_PROBES:
            reached = estimator.estimate()
            if reached.sem <= settings.trace_rtol * abs(reached.value):
                break
        estimator.add_probe(source)
        if half:
            give_back()
    return runs, estimator.estimate()

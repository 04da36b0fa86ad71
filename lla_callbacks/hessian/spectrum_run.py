"""The products of a measurement: Lanczos runs, then probes of the trace."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.trace import TraceEstimate, TraceEstimator
from lla_callbacks.linalg.vectors import Index

# With a wanted relative error, no stop before this many probes: fewer give no honest sem.
LEAST_PROBES = 5


def runs_and_traces(
    hessian: LossOperator, settings: HessianSettings, blocks: Mapping[str, Index], scale: Tensor
) -> tuple[list[LanczosRun], TraceEstimate]:
    """Spend the products: Lanczos runs, then probes of what the first run left open."""
    source = generator(settings.seed)

    home = hessian.basis_device(settings.num_runs * settings.num_steps)

    def run_from(start: Tensor) -> LanczosRun:
        depth, rtol = settings.num_steps, settings.eig_rtol
        return lanczos(hessian, start, depth, rtol=rtol, basis_device=home)

    runs = [run_from(hessian.rademacher(source))]
    estimator = TraceEstimator(hessian, blocks, runs[0], scale=scale)
    for _ in range(settings.num_runs - 1):
        start = hessian.rademacher(source)
        runs.append(run_from(start))
        estimator.add_run(runs[-1], start)
    while estimator.num_probes < settings.num_probes:
        if settings.trace_rtol is not None and estimator.num_probes >= LEAST_PROBES:
            reached = estimator.estimate()
            if reached.sem <= settings.trace_rtol * abs(reached.value):
                break
        estimator.add_probe(source)
    return runs, estimator.estimate()

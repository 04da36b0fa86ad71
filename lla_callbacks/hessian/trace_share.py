"""How much of the Hessian's trace its Gauss-Newton part makes up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.linalg.student import widened_sem
from lla_callbacks.objective.engines import with_hessian
from lla_callbacks.objective.gauss_newton import GaussNewtonObjective

# Stream of the probes, which both matrices share.
STREAM = 13


@dataclass(frozen=True)
class TraceShare:
    """The trace of a Hessian beside that of its Gauss-Newton part.

    Attributes:
        hessian_trace: Trace of the whole Hessian.
        hessian_trace_sem: Its standard error.
        share: The Gauss-Newton part's trace over it; above 1 where the rest of the Hessian, in
            which the network itself curves, is negative in the mean.
        share_error: Its standard error.
        gap: Why there is none; empty if there is.
        num_matvecs: Products with the Hessian.
    """

    hessian_trace: float = math.nan
    hessian_trace_sem: float = math.nan
    share: float = math.nan
    share_error: float = math.nan
    gap: str = ""
    num_matvecs: int = 0


def quadratic_forms(operator: LossOperator, seed: int, count: int) -> list[float]:
    """Return ``z' A z`` over Rademacher probes ``z``, the same for every operator of one size."""
    source = generator(seed, STREAM)
    found = []
    for _ in range(count):
        z = operator.rademacher(source)
        found.append(operator.vectors.inner(z, operator @ z))
    return found


def trace_share(
    objective: GaussNewtonObjective,
    forms: Sequence[float],
    trace: float,
    sem: float,
    seed: int,
    share: Share | None,
) -> TraceShare:
    """Return the share of the trace, by products with the whole Hessian.

    ``tr H = tr G + mean(z'Hz - z'Gz)``: with the same probes for both, what they have in common
    does not add to the error.

    Args:
        objective: The loss; no operator of it is open.
        forms: ``z'Gz``, see :func:`quadratic_forms`.
        trace: ``tr G``.
        sem: Its standard error.
        seed: Of the probes.
        share: Processes that share the batches.
    """
    try:
        found, _ = with_hessian(
            objective.of_hessian(),
            lambda hessian: quadratic_forms(hessian, seed, len(forms)),
            share=share,
        )
    except MeasurementError as error:
        return TraceShare(gap=str(error))
    rest = torch.tensor(found, dtype=torch.float64) - torch.tensor(forms, dtype=torch.float64)
    mean, count = float(rest.mean()), len(forms)
    mean_sem = widened_sem(float(rest.std()) / math.sqrt(count), count)
    whole = trace + mean
    return TraceShare(
        hessian_trace=whole,
        hessian_trace_sem=math.hypot(sem, mean_sem),
        share=trace / whole if whole else math.nan,
        # d(G / (G + R)) = (R dG - G dR) / (G + R)^2
        share_error=math.hypot(mean * sem, trace * mean_sem) / whole**2 if whole else math.nan,
        num_matvecs=count,
    )

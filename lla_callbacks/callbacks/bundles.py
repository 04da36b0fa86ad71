"""Named sets of callbacks, from cheap to published settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lla_callbacks.callbacks.compat import Callback
from lla_callbacks.callbacks.hessian_monitor import HessianMonitor
from lla_callbacks.callbacks.trace_regularizer import HessianTraceRegularizer

# A strength, or settings of HessianTraceRegularizer by name; None for no penalty.
TraceRegularization = float | Literal["auto"] | Mapping[str, Any] | None


def economy(trace_regularization: TraceRegularization = None, **overrides: Any) -> list[Callback]:
    """Return callbacks for long runs: extremes and trace, few products, no more than 2 %.

    12 Lanczos steps (the largest eigenvalue of a trained ResNet-20 converges to 5 % within
    11) and 8 probes: 20 products a measurement.

    Args:
        trace_regularization: Strength of a penalty on the trace, or settings of
            :class:`HessianTraceRegularizer`; here on every tenth step, which costs about a
            seventh of training time.
        overrides: Settings of :class:`HessianMonitor` that replace the bundle's.
    """
    settings = {"num_steps": 12, "num_probes": 8, "num_samples": 128, "max_overhead": 0.02}
    penalty = _regularizer(trace_regularization, every_n_train_steps=10)
    return [HessianMonitor(**{**settings, **overrides}), *penalty]


def standard(trace_regularization: TraceRegularization = None, **overrides: Any) -> list[Callback]:
    """Return callbacks with every default.

    Args:
        trace_regularization: Strength of a penalty on the trace, or settings of
            :class:`HessianTraceRegularizer`.
        overrides: Settings of :class:`HessianMonitor` that replace the bundle's.
    """
    return [HessianMonitor(**overrides), *_regularizer(trace_regularization)]


def paper(trace_regularization: TraceRegularization = None, **overrides: Any) -> list[Callback]:
    """Return callbacks in the published setting of the spectral criteria.

    100 Lanczos steps from one start vector (Gabdullin 2024), so that KH05 compares with the
    literature; and 40 probes.

    Args:
        trace_regularization: Strength of a penalty on the trace, or settings of
            :class:`HessianTraceRegularizer`; here exactly, with 5 probes on every 50th step
            and a strength that is not scaled for it (Sankar et al. 2021, released code).
        overrides: Settings of :class:`HessianMonitor` that replace the bundle's.
    """
    settings = {"num_steps": 100, "num_runs": 1, "num_probes": 40, "num_samples": 2048}
    penalty = _regularizer(
        trace_regularization,
        estimator="exact",
        num_probes=5,
        every_n_train_steps=50,
        scale_by_interval=False,
    )
    return [HessianMonitor(**{**settings, **overrides}), *penalty]


def _regularizer(asked: TraceRegularization, **settings: Any) -> list[Callback]:
    if asked is None:
        return []
    own = asked if isinstance(asked, Mapping) else {"strength": asked}
    return [HessianTraceRegularizer(**{**settings, **own})]

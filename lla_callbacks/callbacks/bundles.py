"""Named sets of callbacks, from cheap to published settings."""

from __future__ import annotations

from typing import Any

from lla_callbacks.callbacks.compat import Callback
from lla_callbacks.callbacks.hessian_monitor import HessianMonitor


def economy(**overrides: Any) -> list[Callback]:
    """Return callbacks for long runs: extremes and trace, few products, no more than 2 %.

    12 Lanczos steps (the largest eigenvalue of a trained ResNet-20 converges to 5 % within
    11) and 8 probes: 20 products a measurement.

    Args:
        overrides: Settings of :class:`HessianMonitor` that replace the bundle's.
    """
    settings = {"num_steps": 12, "num_probes": 8, "num_samples": 128, "max_overhead": 0.02}
    return [HessianMonitor(**{**settings, **overrides})]


def standard(**overrides: Any) -> list[Callback]:
    """Return callbacks with every default.

    Args:
        overrides: Settings of :class:`HessianMonitor` that replace the bundle's.
    """
    return [HessianMonitor(**overrides)]


def paper(**overrides: Any) -> list[Callback]:
    """Return callbacks in the published setting of the spectral criteria.

    100 Lanczos steps from one start vector (Gabdullin 2024), so that KH05 compares with the
    literature; and 40 probes.

    Args:
        overrides: Settings of :class:`HessianMonitor` that replace the bundle's.
    """
    settings = {"num_steps": 100, "num_runs": 1, "num_probes": 40, "num_samples": 2048}
    return [HessianMonitor(**{**settings, **overrides})]

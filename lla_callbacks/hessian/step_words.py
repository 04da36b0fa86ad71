"""What a measurement of the Hessian found, by the names that people read."""

from __future__ import annotations

from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.report.step_words import Numbers


def numbers_of(m: HessianMeasurement) -> Numbers:
    """Return name to value and error, what matters first."""
    return {
        "λmax": (m.lambda_max, m.lambda_max.beyond),
        "λmin": (m.lambda_min, m.lambda_min.beyond),
        "trace": (m.trace, m.trace_sem),
        "KH05": (m.criteria["kh05"], m.criteria_errors["kh05"]),
        "stability": (m.criteria["stability"], m.criteria_errors["stability"]),
        "loss": (m.loss, 0.0),
        "norm of the gradient": (m.gradient_norm, 0.0),
    }

"""Results as scalars by tag: the only place that spells tags."""

from __future__ import annotations

import math
from typing import Any

from lla_callbacks.hessian.layer_measures import LayerMeasurement
from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.hessian.tracking import HessianTracking

# Half-width of the error bands, in standard errors: about 95 % where errors are normal.
BAND = 2.0


def hessian_scalars(measurement: HessianMeasurement, name: str = "hessian") -> dict[str, float]:
    """Return tag to value; what is not finite is left out, so that curves show a gap.

    Tags: ``<name>/lambda_max``, ``<name>/trace``, ``<name>/trace_sem``, one per criterion,
    ``<name>_layers/<layer>/trace`` and whatever else is known of a layer,
    ``<name>_errors/<criterion>``, and lower and upper ends of error bands under
    ``<name>_bands/``, for charts that draw a band.
    """
    m = measurement
    values: dict[str, float] = {
        f"{name}/lambda_max": float(m.lambda_max),
        f"{name}/lambda_min": float(m.lambda_min),
        f"{name}/trace": m.trace,
        f"{name}/trace_sem": m.trace_sem,
        f"{name}/trace_times_norm2": m.trace_times_norm2,
        f"{name}/filter_curvature": m.filter_curvature,
        f"{name}_errors/filter_curvature": m.filter_curvature_sem,
        f"{name}/weight_norm": m.weight_norm,
        f"{name}/loss": m.loss,
        f"{name}/gradient_norm": m.gradient_norm,
        f"{name}/num_matvecs": float(m.num_matvecs),
        f"{name}/num_steps": float(m.num_steps),
        f"{name}/seconds": m.seconds,
        f"{name}_errors/lambda_max": m.lambda_max.residual,
        f"{name}_errors/lambda_min": m.lambda_min.residual,
        f"{name}_errors/lambda_max_beyond": m.lambda_max.beyond,
        f"{name}_errors/lambda_min_beyond": m.lambda_min.beyond,
    }
    bands = {
        # Outwards as far as the extreme may still lie.
        "lambda_max": (float(m.lambda_max), m.lambda_max.residual, m.lambda_max.beyond),
        "lambda_min": (float(m.lambda_min), m.lambda_min.beyond, m.lambda_min.residual),
        "trace": (m.trace, BAND * m.trace_sem, BAND * m.trace_sem),
        "kh05": (m.criteria["kh05"], *(2 * [BAND * m.criteria_errors["kh05"]])),
    }
    for tag, value in m.criteria.items():
        values[f"{name}/{tag}"] = float(value)
        values[f"{name}_errors/{tag}"] = m.criteria_errors[tag]
    for tag, (value, below, above) in bands.items():
        values[f"{name}_bands/{tag}_lower"] = value - below
        values[f"{name}_bands/{tag}_upper"] = value + above
    for layer, found in m.layers.items():
        for tag, value in layer_scalars(found).items():
            values[f"{name}_layers/{layer}/{tag}"] = value
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def tracking_scalars(tracking: HessianTracking, name: str = "hessian") -> dict[str, float]:
    """Return what a light measurement found, under the tags of a full one.

    What it leaves out has no tag, so that curves of full measurements stay what they are.
    """
    t = tracking
    values = {
        f"{name}/lambda_max": float(t.lambda_max),
        f"{name}/trace": t.trace,
        f"{name}/trace_sem": t.trace_sem,
        f"{name}/trace_times_norm2": t.trace_times_norm2,
        f"{name}/weight_norm": t.weight_norm,
        f"{name}/loss": t.loss,
        f"{name}/gradient_norm": t.gradient_norm,
        f"{name}/num_matvecs": float(t.num_matvecs),
        f"{name}_errors/lambda_max": t.lambda_max.residual,
        f"{name}_errors/lambda_max_beyond": t.lambda_max.beyond,
        f"{name}_bands/lambda_max_lower": float(t.lambda_max) - t.lambda_max.residual,
        f"{name}_bands/lambda_max_upper": float(t.lambda_max) + t.lambda_max.beyond,
        f"{name}_bands/trace_lower": t.trace - BAND * t.trace_sem,
        f"{name}_bands/trace_upper": t.trace + BAND * t.trace_sem,
    }
    for layer, (trace, sem) in t.layer_traces.items():
        values[f"{name}_layers/{layer}/trace"] = trace
        values[f"{name}_layers/{layer}/trace_sem"] = sem
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def layer_scalars(layer: LayerMeasurement) -> dict[str, float]:
    """Return the last part of the tag to value, NaN where it is undefined."""
    values = {
        "trace": layer.trace,
        "trace_sem": layer.trace_sem,
        "trace_times_norm2": layer.trace_times_norm2,
        "weight_norm": layer.norm,
    }
    if layer.spectrum is not None:
        values |= {
            "lambda_max": float(layer.spectrum.lambda_max),
            "lambda_max_residual": layer.spectrum.lambda_max.residual,
            "lambda_min": float(layer.spectrum.lambda_min),
            "lambda_min_residual": layer.spectrum.lambda_min.residual,
            "distance": layer.spectrum.distance,
            "distance_error": layer.spectrum.distance_error,
            "published_distance": layer.spectrum.published_distance,
        }
    return values


def custom_scalars_layout(name: str = "hessian", *, layer_spectra: bool = False) -> dict[str, Any]:
    """Return a TensorBoard layout: each value and its error band in one chart.

    Args:
        name: First part of the tags.
        layer_spectra: Whether there are charts of what the layers' own spectra tell.
    """

    def band(tag: str) -> list[Any]:
        ends = [f"{name}_bands/{tag}_lower", f"{name}_bands/{tag}_upper"]
        return ["Margin", [f"{name}/{tag}", *ends]]

    lines = {
        "stability (1 is the edge)": ["Multiline", [f"{name}/stability"]],
        "trace by layer": ["Multiline", [f"{name}_layers/.*/trace$"]],
    }
    if layer_spectra:
        lines |= {
            "lambda_max by layer": ["Multiline", [f"{name}_layers/.*/lambda_max$"]],
            "distance to the whole by layer": ["Multiline", [f"{name}_layers/.*/distance$"]],
        }
    # TensorBoard shows line charts first, then charts with bands from the last to the first.
    return {
        name: {
            **lines,
            "KH05 (band: 2 standard errors)": band("kh05"),
            "lambda_min (band: residual, and where the lowest may be)": band("lambda_min"),
            "lambda_max (band: residual, and where the largest may be)": band("lambda_max"),
            "trace (band: 2 standard errors)": band("trace"),
        }
    }

"""Results as scalars by tag: the only place that spells tags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lla_callbacks.hessian.layer_measures import LayerMeasurement
from lla_callbacks.hessian.measures import CRITERIA, HessianMeasurement
from lla_callbacks.hessian.tracking import HessianTracking
from lla_callbacks.report.tiers import last_group

# Half-width of the error bands, in standard errors: about 95 % where errors are normal.
BAND = 2.0
# What everybody looks at, in a group of its own that is first among the monitor's.
FEW = (
    "lambda_max", "lambda_min", "trace", "stability", "kh05", "loss", "gradient_norm", "overhead",
    "lambda_max_limit",
)  # fmt: skip
BANDED = ("lambda_max", "lambda_min", "trace", "kh05")
# And every scalar that may be asked for by its name.
NAMES = (
    *FEW, *(c for c in CRITERIA if c not in FEW), "trace_times_norm2", "filter_curvature",
    "weight_norm", "num_matvecs", "num_steps", "seconds",
)  # fmt: skip


def hessian_scalars(measurement: HessianMeasurement, name: str = "hessian") -> dict[str, float]:
    """Return tag to value; what is not finite is left out, so that curves show a gap.

    So is a criterion that is known to less than its own size: its curve would be chance. Those
    that have a band stay, since the band says it, and so does stability.

    Tags: ``<name>/<x>`` for :data:`FEW`, ``<name>_criteria/<x>`` for the others,
    ``<name>_layers/<layer>/trace`` and whatever else is known of a layer. Last in the alphabet
    come ``zz_<name>_errors/<x>``, ``zz_<name>_bands/<x>_lower`` and ``_upper``, for charts that
    draw a band, and ``zz_<name>_cost/``.
    """
    m = measurement
    errors = {
        **m.criteria_errors,
        "filter_curvature": m.filter_curvature_sem,
        "trace": m.trace_sem,
        "lambda_max": m.lambda_max.residual,
        "lambda_min": m.lambda_min.residual,
    }
    values: dict[str, float] = {
        "lambda_max": float(m.lambda_max),
        "lambda_min": float(m.lambda_min),
        "trace": m.trace,
        "loss": m.loss,
        "gradient_norm": m.gradient_norm,
        "trace_times_norm2": m.trace_times_norm2,
        "filter_curvature": m.filter_curvature,
        "weight_norm": m.weight_norm,
        **{tag: float(value) for tag, value in m.criteria.items()},
    }
    if values["stability"] > 0 and values["lambda_max"] > 0:
        # At which lambda_max the optimizer would be at its edge, all else as it is.
        values["lambda_max_limit"] = values["lambda_max"] / values["stability"]
    for tag in (*m.criteria, "filter_curvature"):
        # Stability is open upwards only, as lambda_max is.
        if tag not in (*BANDED, "stability") and abs(values[tag]) <= errors[tag]:
            values[tag] = math.nan
    kh05 = BAND * m.criteria_errors["kh05"]
    bands: dict[str, tuple[float, float, float]] = {
        # Outwards as far as the extreme may still lie.
        "lambda_max": (float(m.lambda_max), m.lambda_max.residual, m.lambda_max.beyond),
        "lambda_min": (float(m.lambda_min), m.lambda_min.beyond, m.lambda_min.residual),
        "trace": (m.trace, BAND * m.trace_sem, BAND * m.trace_sem),
        "kh05": (m.criteria["kh05"], kh05, kh05),
    }
    found = {_tag(name, tag): value for tag, value in values.items()}
    found |= {f"{last_group(name, 'errors')}/{tag}": value for tag, value in errors.items()}
    found |= {
        f"{last_group(name, 'errors')}/lambda_max_beyond": m.lambda_max.beyond,
        f"{last_group(name, 'errors')}/lambda_min_beyond": m.lambda_min.beyond,
        f"{last_group(name, 'cost')}/num_matvecs": float(m.num_matvecs),
        f"{last_group(name, 'cost')}/num_steps": float(m.num_steps),
    }
    found |= _bands(name, bands)
    for layer, about in m.layers.items():
        for tag, value in layer_scalars(about).items():
            found[f"{name}_layers/{layer}/{tag}"] = value
    return {tag: value for tag, value in found.items() if math.isfinite(value)}


def tracking_scalars(tracking: HessianTracking, name: str = "hessian") -> dict[str, float]:
    """Return what a light measurement found, under the tags of a full one.

    What it leaves out has no tag, so that curves of full measurements stay what they are.
    """
    t = tracking
    values = {
        "lambda_max": float(t.lambda_max),
        "trace": t.trace,
        "trace_times_norm2": t.trace_times_norm2,
        "weight_norm": t.weight_norm,
        "loss": t.loss,
        "gradient_norm": t.gradient_norm,
    }
    found = {_tag(name, tag): value for tag, value in values.items()}
    found |= {
        f"{last_group(name, 'errors')}/lambda_max": t.lambda_max.residual,
        f"{last_group(name, 'errors')}/lambda_max_beyond": t.lambda_max.beyond,
        f"{last_group(name, 'errors')}/trace": t.trace_sem,
        f"{last_group(name, 'cost')}/num_matvecs": float(t.num_matvecs),
    }
    found |= _bands(
        name,
        {
            "lambda_max": (float(t.lambda_max), t.lambda_max.residual, t.lambda_max.beyond),
            "trace": (t.trace, BAND * t.trace_sem, BAND * t.trace_sem),
        },
    )
    for layer, (trace, sem) in t.layer_traces.items():
        found[f"{name}_layers/{layer}/trace"] = trace
        found[f"{name}_layers/{layer}/trace_sem"] = sem
    return {tag: value for tag, value in found.items() if math.isfinite(value)}


def _tag(name: str, what: str) -> str:
    return f"{name}/{what}" if what in FEW else f"{name}_criteria/{what}"


def _bands(name: str, bands: Mapping[str, tuple[float, float, float]]) -> dict[str, float]:
    """Return lower and upper ends from values and how far their bands reach down and up."""
    group = last_group(name, "bands")
    return {
        f"{group}/{tag}_{end}": value + sign * reach
        for tag, (value, below, above) in bands.items()
        for end, sign, reach in (("lower", -1, below), ("upper", 1, above))
    }


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
        group = last_group(name, "bands")
        return ["Margin", [f"{name}/{tag}", f"{group}/{tag}_lower", f"{group}/{tag}_upper"]]

    lines = {
        "edge of stability: lambda_max, its limit for the optimizer, trace": [
            "Multiline", [f"{name}/lambda_max$", f"{name}/lambda_max_limit$", f"{name}/trace$"],
        ],
        "stability (lambda_max over its limit: 1 is the edge)": [
            "Multiline", [f"{name}/stability$"],
        ],
        "trace by layer": ["Multiline", [f"{name}_layers/.*/trace$"]],
    }  # fmt: skip
    if layer_spectra:
        lines |= {
            "lambda_max by layer": ["Multiline", [f"{name}_layers/.*/lambda_max$"]],
            "distance to the whole by layer": ["Multiline", [f"{name}_layers/.*/distance$"]],
        }
    # TensorBoard shows line charts first, then charts with bands from the last to the first.
    return {
        name: {
            **lines,
            "KH05: negative over positive part of the spectrum (band: 2 standard errors)": band(
                "kh05"
            ),
            "lambda_min (band: residual, and where the lowest may be)": band("lambda_min"),
            "lambda_max (band: residual, and where the largest may be)": band("lambda_max"),
            "trace (band: 2 standard errors)": band("trace"),
        }
    }

"""Slices as scalars by tag: what curves can tell of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lla_callbacks.report.tiers import last_group
from lla_callbacks.slices.basin import Basin
from lla_callbacks.slices.convexity import Convexity
from lla_callbacks.slices.slices import Line, Plane

# What everybody looks at, by the last parts of tags, and every scalar that may be asked for.
FEW = ("loss", "overhead", "curvature", "explained", "effective_radius", "centre")
NAMES = (
    *FEW, "loss_min", "loss_median", "loss_max", "evaluated", "largest_residual", "curvature_error",
    "eigenvalue", "residual", "median", "num_matvecs", "effective_radius_sem", "open", "cutoff",
    "log10_volume", "log10_volume_error", "seconds",
)  # fmt: skip


def landscape_scalars(
    slices: Mapping[str, Line | Plane | Convexity | Basin],
    name: str,
    *,
    loss: float,
    seconds: float,
) -> dict[str, float]:
    """Return tag to value; what is not finite is left out, so that curves show a gap.

    Tags: ``<name>/loss``; for each plane ``<name>/plane_<plane>/loss_min``,
    ``loss_median``, ``loss_max``, ``evaluated``, and of a path ``explained``,
    ``largest_residual``; for each line ``<name>/line_<line>/curvature`` with its error, beside the
    ``eigenvalue`` with its residual; ``<name>/convexity/centre``, ``median``;
    ``<name>/basin/effective_radius`` with its standard error, quantiles, ``log10_volume`` and
    what bisection leaves open in it.
    """
    values = {f"{name}/loss": loss, f"{last_group(name, 'cost')}/seconds": seconds}
    for part, result in slices.items():
        for tag, value in _scalars(result).items():
            values[f"{name}/{part}/{tag}"] = float(value)
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def _scalars(result: Line | Plane | Convexity | Basin) -> dict[str, float]:
    if isinstance(result, Plane):
        return _of_plane(result)
    if isinstance(result, Line):
        direction = result.directions[0]
        return {
            "curvature": result.curvature,
            "curvature_error": result.curvature_error,
            "eigenvalue": math.nan if direction.eigenvalue is None else direction.eigenvalue,
            "residual": math.nan if direction.residual is None else direction.residual,
        }
    if isinstance(result, Convexity):
        ratio = result.ratio[result.ratio.isfinite()]
        centre = result.ratio[result.alphas.abs().argmin(), result.betas.abs().argmin()]
        return {
            "centre": float(centre),
            "median": float(ratio.median()) if ratio.numel() else math.nan,
            "num_matvecs": float(result.num_matvecs),
        }
    return {
        "effective_radius": result.effective_radius,
        "effective_radius_sem": result.effective_radius_sem,
        **{f"radius_q{round(100 * q)}": radius for q, radius in result.quantiles.items()},
        "open": float(result.open.double().mean()),
        "cutoff": result.cutoff,
        "log10_volume": result.log10_volume,
        "log10_volume_error": result.log10_volume_error,
    }


def _of_plane(plane: Plane) -> dict[str, float]:
    finite = plane.loss[plane.loss.isfinite()]
    values = {"evaluated": float(plane.evaluated.double().mean())}
    if finite.numel():
        values |= {
            "loss_min": float(finite.min()),
            "loss_median": float(finite.median()),
            "loss_max": float(finite.max()),
        }
    if plane.path is not None:
        values["explained"] = float(plane.path.explained.sum())
        values["largest_residual"] = float(plane.path.residuals.max())
    return values

"""What slices found, by the names that people read."""

from __future__ import annotations

from lla_callbacks.report.step_words import Numbers
from lla_callbacks.slices.report import LandscapeReport


def numbers_of(report: LandscapeReport) -> Numbers:
    """Return name to value and error, what matters first."""
    found = {"loss": (report.loss, 0.0)}
    for name, line in report.lines.items():
        found[f"curvature along {name}"] = line.curvature, line.curvature_error
    for name, plane in report.planes.items():
        finite = plane.loss[plane.loss.isfinite()]
        if finite.numel():
            found[f"lowest on the {name} plane"] = float(finite.min()), 0.0
            found[f"highest on the {name} plane"] = float(finite.max()), 0.0
    if report.basin is not None:
        b = report.basin
        found["effective radius of the basin"] = b.effective_radius, b.effective_radius_sem
    return found

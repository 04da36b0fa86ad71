"""Networks, and the curve between them, on the figure of a plane."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import Normal, Stroke

from lla_callbacks.report.style import INK
from lla_callbacks.report.words import written
from lla_callbacks.slices.networks import Marks

_MARKERS = {"start": "s", "end": "D", "first": "s", "second": "D", "third": "o"}
# A projection is told from this share of a network's distance on.
OFF = 0.01


def draw_networks(axes: Axes, marks: Marks) -> list[str]:
    """Draw networks, and the curve between them beside the straight line.

    Args:
        axes: Of the plane.
        marks: What to draw.

    Returns:
        What must be said about it.
    """
    points, curve = marks.points.numpy(), marks.curve.numpy()
    dark = [Stroke(linewidth=3.2, foreground=INK, alpha=0.65), Normal()]
    if len(curve):
        ends = points[[0, -1]]
        axes.plot(
            ends[:, 0], ends[:, 1], color="white", lw=1.4, ls=(0, (3, 2)), zorder=4,
            path_effects=[Stroke(linewidth=2.6, foreground=INK, alpha=0.65), Normal()],
        )  # fmt: skip
        axes.plot(
            curve[:, 0], curve[:, 1], color="white", lw=2.0, zorder=5, path_effects=dark,
            label="curve",
        )  # fmt: skip
    for name, (x, y), loss in zip(marks.names, points, marks.loss.tolist(), strict=True):
        label = f"{name}: {written(float(f'{loss:.2g}'))}" if np.isfinite(loss) else name
        axes.plot(
            [x], [y], _MARKERS.get(name, "o"), mfc="white", mec=INK, ms=7.5, mew=1.2, zorder=7,
            ls="none", label=label, clip_on=False,
        )  # fmt: skip
    worst = float(marks.residuals.max())
    if worst > OFF:
        return [
            f"Networks off the plane are projected: up to {worst:.0%} of their distance from the "
            "first is lost, and the loss beneath them is not their own."
        ]
    return []

"""Minima on axes of anybody's figure."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from lla_callbacks.minima.basins import BasinRatio
from lla_callbacks.minima.maps import Points
from lla_callbacks.minima.relaxation import RelaxationPath
from lla_callbacks.minima.shift import Shift
from lla_callbacks.report.picture import SERIES
from lla_callbacks.report.style import INK
from lla_callbacks.slices.plot_figures import draw_basin, scaled


def draw_ratio(axes: Axes, ratio: BasinRatio) -> None:
    """Draw the radii of both basins."""
    for k, (name, basin) in enumerate(zip(ratio.names, (ratio.a, ratio.b), strict=True)):
        draw_basin(axes, basin, color=SERIES[k], name=name)


def draw_relaxation(axes: Axes, path: RelaxationPath) -> None:
    """Draw the losses over the steps of plain training."""
    steps = path.steps.numpy()
    for k, (name, values) in enumerate((("trained on", path.loss), ("held out", path.held_loss))):
        known = np.isfinite(values.numpy())
        if known.any():
            axes.plot(
                steps[known], values.numpy()[known], color=SERIES[k], lw=1.6, marker="o", ms=3,
                label=name,
            )  # fmt: skip
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("steps of plain training")
    axes.set_ylabel("loss")
    scaled(axes)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def draw_map(axes: Axes, points: Points) -> None:
    """Draw networks as points, by set."""
    x, y = points.coordinates.numpy().T
    for k, name in enumerate(dict.fromkeys(points.sets)):
        chosen = np.array([s == name for s in points.sets])
        axes.scatter(
            x[chosen], y[chosen], s=36, color=SERIES[k % len(SERIES)], label=name, zorder=3
        )
    axes.set_xlabel("first coordinate")
    axes.set_ylabel("second coordinate")
    if len(set(points.sets)) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def draw_shift(axes: Axes, shift: Shift, name: str = "trace") -> None:
    """Draw a number of every set against its accuracy."""
    axes.scatter(
        shift.column("accuracy").numpy(), shift.column(name).numpy(), s=30, color=SERIES[0]
    )
    axes.set_xlabel("accuracy")
    axes.set_ylabel(name)

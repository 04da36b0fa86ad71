"""What every figure shares: colours, axes, titles and the line that says what was measured."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lla_callbacks.landscape.measures import HessianMeasurement

UP = "#2b6cb0"  # curvature upwards
DOWN = "#dd6b20"  # curvature downwards
INK = "#2d3748"
PALE = "#a0aec0"
DPI = 125
MODES = {"batch": "batch statistics", "eval": "running statistics"}


def subplots(
    rows: int, columns: int, *, size: tuple[float, float], widths: list[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(PALE)
        axes.tick_params(colors=INK, labelsize=8)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return figure, list(grid.flat)


def finish(figure: Figure, m: HessianMeasurement, title: str, note: str = "") -> None:
    """Write the title, and below the figure what was measured; ``note`` goes before it."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.supxlabel(
        (f"{note}\n" if note else "")
        + f"{m.num_params:,} parameters · {m.num_samples:,} samples · "
        f"{MODES.get(m.mode, m.mode)} · "
        f"{len(m.run_sizes)} × {m.num_steps} Lanczos steps, {m.num_probes} probes · "
        f"{m.precision} · seed {m.seed}",
        x=0.01, ha="left", fontsize=7.5, color="#718096",
    )  # fmt: skip


def edges(centres: np.ndarray) -> np.ndarray:
    """Return cell edges halfway between centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[:-1] + centres[1:]) / 2
    first, last = centres[0] - (middles[0] - centres[0]), centres[-1] + (centres[-1] - middles[-1])
    return np.concatenate([[first], middles, [last]])

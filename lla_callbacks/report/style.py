"""The look that all figures share: colours, axes, title, footer and hatching."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lla_callbacks.report.shown import Picture

UP = "#2b6cb0"  # curvature upwards
DOWN = "#dd6b20"  # curvature downwards
INK = "#2d3748"
PALE = "#a0aec0"
FOOTER = "#718096"
DPI = 150
MODES = {
    "batch": "batch statistics",
    "eval": "running statistics",
    "recalibrate": "statistics recalibrated at each point",
}


def subplots(
    rows: int,
    columns: int,
    *,
    size: tuple[float, float],
    widths: list[float] | None = None,
    heights: list[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row, without upper and right spines."""
    figure = Picture(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=widths, height_ratios=heights)
    for axes in grid.flat:
        bare(axes, labelsize=8)
    return figure, list(grid.flat)


def bare(axes: Axes, **ticks: Any) -> None:
    """Give axes the look of all figures; settings are those of their ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)
    axes.tick_params(colors=INK, **ticks)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def finish(figure: Figure, title: str, facts: Sequence[str], notes: Sequence[str] = ()) -> None:
    """Write the title above a figure, and below it notes and then facts, as wide as it is."""
    width = figure.get_figwidth()
    figure.suptitle(
        "\n".join(textwrap.fill(line, int(8.8 * width)) for line in title.splitlines()),
        x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK,
    )  # fmt: skip
    lines = [textwrap.fill(note, int(18 * width)) for note in notes]
    figure.supxlabel(
        "\n".join([*lines, joined(facts, int(18 * width))]),
        x=0.01, ha="left", fontsize=7.5, color=FOOTER,
    )  # fmt: skip


def joined(parts: Sequence[str], width: int) -> str:
    """Return parts with dots between them, on lines of at most ``width`` characters."""
    lines = [""]
    for part in filter(None, parts):
        if lines[-1] and len(lines[-1]) + 3 + len(part) > width:
            lines.append("")
        lines[-1] += f" · {part}" if lines[-1] else part
    return "\n".join(lines)


def edges(centres: np.ndarray) -> np.ndarray:
    """Return cell edges halfway between centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[:-1] + centres[1:]) / 2
    first, last = centres[0] - (middles[0] - centres[0]), centres[-1] + (centres[-1] - middles[-1])
    return np.concatenate([[first], middles, [last]])


def spans(steps: np.ndarray) -> np.ndarray:
    """Return cell edges halfway between steps, none of them outside of the first and the last."""
    if len(steps) == 1:
        return edges(steps)
    return np.concatenate([steps[:1], (steps[:-1] + steps[1:]) / 2, steps[-1:]])


def mark_steps(axes: Axes, steps: np.ndarray) -> None:
    """Give a step axis the range of a run and whole numbers within it."""
    borders = spans(steps)
    axes.set_xlim(borders[0], borders[-1])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(steps) == 1:
        axes.set_xticks(steps)
    axes.set_xlabel("optimizer step")


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """Return a range that is wider by a share of itself at either end."""
    span = (high - low) or max(abs(high), 1e-6)
    return low - share * span, high + share * span


def hatched(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Hatch a rectangle behind everything: here is no finite value."""
    axes.add_patch(
        Rectangle(
            (x[0], y[0]),
            x[1] - x[0],
            y[1] - y[0],
            facecolor="white",
            edgecolor=PALE,
            hatch="////",
            lw=0,
            zorder=0.5,
            gid="not finite",
        )
    )


def frame(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Give the axes their range, and equal units if that does not make a strip of them."""
    if len(x) > 1 and len(y) > 1:
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(y[0], y[-1])
        if 0.5 <= ratio(x, y) <= 2:
            axes.set_aspect("equal")
        else:
            axes.set_box_aspect(1)
    axes.xaxis.set_major_locator(round_ticks())
    axes.yaxis.set_major_locator(round_ticks())


def mark_coordinates(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Give axes the range of coordinates and round ticks."""
    if len(x) > 1 and len(y) > 1:
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(y[0], y[-1])
    axes.xaxis.set_major_locator(round_ticks())
    axes.yaxis.set_major_locator(round_ticks())


def ratio(x: np.ndarray, y: np.ndarray) -> float:
    """Return how much wider than high a picture over these coordinates is."""
    return float((x[-1] - x[0]) / (y[-1] - y[0])) if min(len(x), len(y)) > 1 else 1.0


def round_ticks(prune: str | None = None) -> MaxNLocator:
    """Return a locator of about five round values."""
    return MaxNLocator(5, steps=[1, 2, 5, 10], prune=prune)

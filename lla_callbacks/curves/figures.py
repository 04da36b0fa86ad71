"""The loss along curves, and barriers between networks, as figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from lla_callbacks.curves.measure import Along
from lla_callbacks.report.style import (
    DOWN,
    INK,
    PALE,
    UP,
    edges,
    finish,
    hatched,
    padded,
    subplots,
)
from lla_callbacks.report.words import written
from lla_callbacks.slices.fields import counted, facts_of
from lla_callbacks.slices.scales import tick_values

# Decades that a linear axis still shows.
LINEAR_DECADES = 1.0
# Decades below the highest loss that are worth a part of the picture.
MOST_DECADES = 4.0


def curve_figure(along: Along, *, title: str = "", metric: str | None = None) -> Figure:
    """Return the loss along a curve, beside the straight line between its ends.

    Below it one metric, if there is any. The barriers above the ends are in the legend.

    Args:
        along: What was measured.
        title: Above the figure.
        metric: Which metric; ``None``: the first there is.

    Raises:
        ValueError: If there is no such metric.
    """
    name = metric or next(iter(along.metrics), None)
    rows = 1 if name is None else 2
    figure, grid = subplots(rows, 1, size=(5.8, 3.9 if rows == 1 else 5.6))
    _panel(grid[0], along, None)
    if name is not None:
        _panel(grid[1], along, name)
        grid[0].tick_params(labelbottom=False)
    grid[-1].set_xlabel("t  [0: start, 1: end]")
    straight = along.straight
    notes = [f"Length {along.length:.4g}"
             + (f", the straight line's {straight.length:.4g}." if straight else ".")]  # fmt: skip
    total = len(along.evaluated)
    facts = facts_of(along.facts, counted(int(along.evaluated.sum()), total) + " a line")
    finish(figure, title or "Loss along a curve between two networks", facts, notes)
    return figure


def _panel(axes: Axes, along: Along, metric: str | None) -> None:
    lines: list[tuple[Along, str, str, str]] = []
    if along.straight is not None:
        lines.append((along.straight, "straight line", DOWN, "--"))
    label = {"bezier": "Bezier curve", "chain": "chain"}[along.kind]
    if along.bends == 0:
        label = "straight line"
    lines.append((along, label, UP, "-"))
    values = np.concatenate([_seen(part, metric)[1] for part, *_ in lines])
    logarithmic = metric is None and _set_scale(axes, values)
    if not logarithmic:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        axes.set_ylim(*padded(low, high, 0.07))
    bottom, top = axes.get_ylim()
    for part, name, color, style in lines:
        t, y = _seen(part, metric)
        borders = edges(t) if len(t) else t
        for i in np.flatnonzero(~np.isfinite(y)):
            hatched(axes, (borders[i], borders[i + 1]), (bottom, top))
        shown = np.where(np.isfinite(y), np.maximum(y, bottom), np.nan)
        above = part.statistics(metric).barrier_above_ends
        text = f"{name}: barrier {written(float(f'{above:.2g}'))}" if math.isfinite(above) else name
        axes.plot(t, shown, style, color=color, lw=1.9, label=text, zorder=4)
        if not part.complete:
            axes.plot(t, shown, "o", color=color, ms=2.5, zorder=4)
    t, y = _seen(along, metric)
    for where, marker in ((0.0, "s"), (1.0, "D")):
        at = np.flatnonzero(t == where)
        if at.size and np.isfinite(y[at[0]]):
            axes.plot(
                [where], [max(y[at[0]], bottom)], marker, mfc="white", mec=INK, ms=6, mew=1.2,
                zorder=5, clip_on=False,
            )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], labels=["0", "¼", "½", "¾", "1"])
    axes.set_ylabel(metric or ("loss (log scale)" if logarithmic else "loss"))
    axes.grid(axis="y", color=PALE, alpha=0.25, lw=0.6)
    # Above the panel, where no line can lie.
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=9,
        labelcolor=INK, handlelength=1.6, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def _set_scale(axes: Axes, values: np.ndarray) -> bool:
    """Give an axis a log scale if values ask for it, and return whether."""
    finite = values[np.isfinite(values)]
    if not finite.size or not float(finite.min()) > 0:
        return False
    low, high = math.log10(float(finite.min())), math.log10(float(finite.max()))
    if high - low <= LINEAR_DECADES:
        return False
    low, high = padded(max(low, high - MOST_DECADES), high, 0.07)
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0**high)
    axes.yaxis.set_major_locator(FixedLocator(tick_values(low, high, True)))
    axes.yaxis.set_major_formatter(lambda value, _: written(value))
    axes.yaxis.set_minor_locator(NullLocator())
    return True


def _seen(along: Along, metric: str | None) -> tuple[np.ndarray, np.ndarray]:
    mask = along.evaluated.numpy()
    return along.t.numpy()[mask], along.values(metric).numpy()[mask]


def barrier_figure(
    names: Sequence[str],
    matrix: Tensor,
    *,
    what: str = "loss",
    title: str = "",
    facts: Sequence[str] = (),
) -> Figure:
    """Return a matrix of barriers as coloured cells with their numbers.

    Args:
        names: Of the networks.
        matrix: Shape ``(n, n)``, symmetric; the diagonal is left empty.
        what: Quantity that has the barriers.
        title: Above the figure.
        facts: Below it.
    """
    n = len(names)
    side = min(8.0, max(4.4, 2.4 + 0.62 * n))
    figure, (axes,) = subplots(1, 1, size=(side, side * 0.93))
    values = matrix.numpy().copy()
    np.fill_diagonal(values, np.nan)
    finite = values[np.isfinite(values)]
    top = max(float(finite.max()) if finite.size else 1.0, 1e-12)
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis_r", vmin=0.0, vmax=top)
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            if not np.isfinite(values[i, j]):
                hatched(axes, (j - 0.5, j + 0.5), (i - 0.5, i + 0.5))
            elif n <= 12:
                axes.text(
                    j, i, written(float(f"{values[i, j]:.2g}")), ha="center", va="center",
                    fontsize=9 if n <= 6 else 7,
                    color="white" if values[i, j] > 0.55 * top else INK,
                )  # fmt: skip
    axes.set_xticks(range(n), labels=list(names), rotation=45 if max(map(len, names)) > 3 else 0,
                    ha="right" if max(map(len, names)) > 3 else "center")  # fmt: skip
    axes.set_yticks(range(n), labels=list(names))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, shrink=0.85)
    bar.set_label(f"barrier of the {what} above the higher end", color=INK, fontsize=8.5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK)
    finish(figure, title or "Barriers on the straight lines", facts)
    return figure

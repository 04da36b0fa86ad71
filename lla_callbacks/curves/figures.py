"""The loss along curves, and barriers between networks, as figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lla_callbacks.curves.measure import Along
from lla_callbacks.report.sheet import (
    BAR,
    HEAD,
    KEY,
    LETTER,
    TICKS,
    WIDTH,
    Sheet,
    bar,
    caption,
    key,
    plain,
    sheet,
    width_of,
)
from lla_callbacks.report.style import DOWN, FOOTER, INK, PALE, UP, edges, hatched, padded
from lla_callbacks.report.words import in_short, written
from lla_callbacks.slices.axis_figures import set_log_axis
from lla_callbacks.slices.fields import counted, facts_of
from lla_callbacks.slices.scales import tick_values

# Decades that a linear axis still shows.
LINEAR_DECADES = 1.0
# Decades below the highest loss that are worth a part of the picture.
MOST_DECADES = 4.0
# Inches that a matrix of barriers takes at least, and what is above it.
SIDE, ABOVE = 2.9, 0.25
# Colours darker than this, from 0 to 1, have white numbers.
DARK = 0.5
# Of so many networks cells have no room for numbers.
MOST_NUMBERS = 12


def curve_figure(along: Along, *, title: str = "", metric: str | None = None) -> Figure:
    """Return the loss along a curve, beside the straight line between its ends.

    Below it one metric, if there is any. The barriers above the ends are in the headline, and
    those of the metric above its panel.

    Args:
        along: What was measured.
        title: Above the figure.
        metric: Which metric; ``None``: the first there is.

    Raises:
        ValueError: If there is no such metric.
    """
    name = metric or next(iter(along.metrics), None)
    heights = [2.5] if name is None else [1.7, 1.2]
    figure, grid = sheet(heights, left=0.74, above=0.08 if name is None else 0.22, inner=0.12)
    if name is not None:
        # Above the first panel there is no caption.
        figure.make_room(-0.14)
    _panel(grid[0], along, None, heights[0])
    if name is not None:
        _panel(grid[1], along, name, heights[1])
        grid[0].tick_params(labelbottom=False)
        caption(grid[1], ", ".join(text for text, _ in _barriers(along, name)), fontsize=KEY)
    grid[-1].set_xlabel("t  [0: start, 1: end]")
    key(figure, grid[0])
    straight = along.straight
    notes = [f"Length {along.length:.4g}"
             + (f", the straight line's {straight.length:.4g}." if straight else ".")
             + " A barrier: how far the highest point is above the higher end."]  # fmt: skip
    if any(p.get_gid() == "not finite" for axes in grid for p in axes.patches):
        notes.append("Hatched: not finite, so that there is no barrier.")
    total = len(along.evaluated)
    facts = facts_of(along.facts, counted(int(along.evaluated.sum()), total) + " a line")
    title = title or "Loss along a curve between two networks"
    figure.finish(title, facts, notes, _barriers(along, None))
    return figure


def _barriers(along: Along, metric: str | None) -> list[tuple[str, str]]:
    """Return barriers as texts and the colours of their lines."""
    found: list[tuple[str, str]] = []
    for part, name, color in _lines(along):
        above = part.statistics(metric).barrier_above_ends
        words = in_short(above, 0.0) if math.isfinite(above) else "unknown"
        found.append((f"{'' if found else 'barrier: '}{name} {words}", color))
    return found


def _lines(along: Along) -> list[tuple[Along, str, str]]:
    """Return what is drawn: the curve, and the straight line if there is one."""
    name = "curve" if along.kind == "bezier" else "chain"
    lines = [(along, "straight line" if along.bends == 0 else name, UP)]
    if along.straight is not None:
        lines.append((along.straight, "straight line", DOWN))
    return lines


def _panel(axes: Axes, along: Along, metric: str | None, height: float) -> None:
    values = np.concatenate([_seen(part, metric)[1] for part, *_ in _lines(along)])
    logarithmic = metric is None and _set_scale(axes, values, height)
    if not logarithmic:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        axes.set_ylim(*padded(low, high, 0.07))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    bottom, top = axes.get_ylim()
    for part, name, color in _lines(along):
        t, y = _seen(part, metric)
        borders = edges(t) if len(t) else t
        for i in np.flatnonzero(~np.isfinite(y)):
            hatched(axes, (borders[i], borders[i + 1]), (bottom, top))
        shown = np.where(np.isfinite(y), np.maximum(y, bottom), np.nan)
        style = "-" if part is along else "--"
        label = "Bezier curve" if name == "curve" else name
        axes.plot(t, shown, style, color=color, lw=1.9, label=label, zorder=4)
        if not part.complete:
            axes.plot(t, shown, "o", color=color, ms=2.5, zorder=4)
    t, y = _seen(along, metric)
    for where, marker, name in ((0.0, "s", "start"), (1.0, "D", "end")):
        at = np.flatnonzero(t == where)
        if at.size and np.isfinite(y[at[0]]):
            value = float(y[at[0]])
            axes.plot(
                [where], [max(value, bottom)], marker, mfc="white", mec=INK, ms=6, mew=1.2,
                zorder=5, clip_on=False, ls="none", label=f"{name} {in_short(value, 0.0)}",
            )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], labels=["0", "0.25", "0.5", "0.75", "1"])
    axes.set_ylabel(metric or ("loss (log scale)" if logarithmic else "loss"))
    axes.grid(axis="y", color=PALE, alpha=0.25, lw=0.6)


def _set_scale(axes: Axes, values: np.ndarray, height: float) -> bool:
    """Give an axis a log scale if values ask for it, and return whether."""
    finite = values[np.isfinite(values)]
    if not finite.size or not float(finite.min()) > 0:
        return False
    low, high = math.log10(float(finite.min())), math.log10(float(finite.max()))
    if high - low <= LINEAR_DECADES:
        return False
    low, high = padded(max(low, high - MOST_DECADES), high, 0.07)
    set_log_axis(axes, 10.0**low, 10.0**high, height)
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
    values = matrix.numpy().copy()
    np.fill_diagonal(values, np.nan)
    finite = values[np.isfinite(values)]
    top = max(float(finite.max()) if finite.size else 1.0, 1e-12)
    texts = {
        (i, j): written(float(f"{values[i, j]:.2g}"))
        for i in range(n)
        for j in range(n)
        if i != j and np.isfinite(values[i, j]) and n <= MOST_NUMBERS
    }
    # As small as the largest sheet of others, unless numbers would not fit into their cells.
    letters = max(map(len, texts.values()), default=1)
    side = max(SIDE, n * (width_of("0" * letters, KEY) + 0.06) if texts else 0.0)
    longest = max(width_of(name, TICKS) for name in names)
    turned = longest > 0.9 * side / n
    marks = tick_values(0.0, top, False)
    right = BAR[0] + BAR[1] + 0.15 + max(width_of(written(mark), TICKS) for mark in marks)
    left = max(longest + 0.15, WIDTH - side - right - 0.3)
    below = 0.75 * longest + 0.2 if turned else 0.3
    figure = Sheet(ABOVE + side + below, max(WIDTH, left + side + right))
    axes = figure.panel(left, ABOVE, side, side)
    plain(axes, left, below, side, side)
    caption(axes, f"barrier of the {what}")
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap="viridis_r", vmin=0.0, vmax=top, aspect="auto"
    )
    bar(figure, axes, image, marks, [*map(written, marks)], "")
    size = min(HEAD, 72 * (side / n - 0.06) / (LETTER * letters))
    for i in range(n):
        for j in range(n):
            if i != j and not np.isfinite(values[i, j]):
                hatched(axes, (j - 0.5, j + 0.5), (i - 0.5, i + 0.5))
    for (i, j), text in texts.items():
        light = float(np.dot(image.to_rgba(values[i, j])[:3], (0.3, 0.59, 0.11)))
        axes.text(
            j, i, text, ha="center", va="center", fontsize=size,
            color="white" if light < DARK else INK,
        )  # fmt: skip
    axes.set_xticks(range(n), labels=list(names), rotation=45 if turned else 0,
                    ha="right" if turned else "center", rotation_mode="anchor" if turned
                    else "default")  # fmt: skip
    axes.set_yticks(range(n), labels=list(names))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    head = []
    if finite.size:
        ends = [in_short(float(v), 0.0) for v in (finite.min(), finite.max())]
        i, j = divmod(int(np.nanargmax(values)), n)
        head = [(f"barrier {ends[0]}" if n == 2 else f"barriers {ends[0]} to {ends[1]}", INK)]
        if n > 2:
            head.append((f"largest: {names[i]} – {names[j]}", FOOTER))
    notes = [f"A barrier: how far the {what} on the straight line rises above its higher end."]
    if not np.isfinite(values[~np.eye(n, dtype=bool)]).all():
        notes.append("Hatched: not finite.")
    figure.finish(title or "Barriers on the straight lines", facts, notes, head)
    return figure

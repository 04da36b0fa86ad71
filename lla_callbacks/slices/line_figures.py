"""The loss along lines as figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lla_callbacks.report.sheet import KEY, TICKS, caption, sheet
from lla_callbacks.report.style import INK, PALE, UP, edges, hatched, padded, round_ticks
from lla_callbacks.report.words import in_short
from lla_callbacks.slices.axis_figures import set_log_axis
from lla_callbacks.slices.fields import counted, facts_of
from lla_callbacks.slices.slices import Line

METRIC = "#2f855a"
# Decades that a linear axis still shows.
LINEAR_DECADES = 1.5


def line_figure(lines: Sequence[Line], *, title: str = "", metric: str | None = None) -> Figure:
    """Return the loss along one or several lines, with a metric on the right.

    Along an eigenvector of the Hessian the dashed parabola is what the eigenvalue predicts.

    Args:
        lines: At least one.
        title: Above the figure.
        metric: Which metric; ``None``: the first there is.
    """
    # Below each other: side by side nobody could read them in TensorBoard.
    height = 2.6 if len(lines) == 1 else 1.35
    named = [_title(line) for line in lines]
    above = 0.08 + (0.17 if any(named) else 0.0)
    figure, grid = sheet([height] * len(lines), left=0.62, right=0.62, above=above, inner=0.44)
    name = metric or next((n for line in lines for n in line.metrics), "")
    ranges = [_finite(line.loss.numpy()) for line in lines]
    everything = np.concatenate(ranges)
    logarithmic = (
        everything.size > 0
        and float(everything.min()) > 0
        and math.log10(float(everything.max()) / float(everything.min())) > LINEAR_DECADES
    )
    limits = _shared(ranges, logarithmic)
    metric_limits = _limits(
        np.concatenate(
            [_finite(line.metrics[name].numpy()) for line in lines if name in line.metrics]
            or [np.zeros(0)]
        ),
        False,
    )
    for axes, line, values, text in zip(grid, lines, ranges, named, strict=True):
        caption(axes, text, fontsize=KEY)
        low, high = limits or _limits(values, logarithmic)
        if logarithmic:
            set_log_axis(axes, low, high, height)
        else:
            axes.set_ylim(low, high)
        _draw_line(axes, line)
        if name in line.metrics:
            _draw_metric(axes, line, name, metric_limits)
    facts = lines[0].facts
    evaluated, total = int(lines[0].evaluated.sum()), len(lines[0].evaluated)
    each = "" if len(lines) == 1 else " a line"
    parts = facts_of(facts, counted(evaluated, total) + each)
    centre = lines[0].centre_loss
    head = [(f"loss {in_short(centre, 0.0)} at the weights", UP)] if math.isfinite(centre) else []
    notes = ["Dashed: what the Hessian's eigenvalue predicts."] if any(named) else []
    figure.finish(title or "Loss along lines", parts, notes, head)
    return figure


def _title(line: Line) -> str:
    """Return both curvatures along an eigenvector, empty along others."""
    direction = line.directions[0]
    if direction.eigenvalue is None or not math.isfinite(line.centre_loss):
        return ""
    curvature = in_short(line.curvature, line.curvature_error)
    eigenvalue = in_short(direction.eigenvalue, direction.residual or 0.0)
    return f"curvature {curvature}, eigenvalue {eigenvalue}"


def _draw_line(axes: Axes, line: Line) -> None:
    direction = line.directions[0]
    seen = line.evaluated.numpy()
    x, loss = line.alphas.numpy()[seen], line.loss.numpy()[seen]
    bad = ~np.isfinite(loss)
    borders = edges(x)
    low, high = axes.get_ylim()
    for i in np.flatnonzero(bad):
        hatched(axes, (borders[i], borders[i + 1]), (low, high))
    y = np.where(bad, np.nan, loss)
    if direction.eigenvalue is not None and math.isfinite(line.centre_loss):
        fine = np.linspace(x[0], x[-1], 301)
        parabola = (
            line.centre_loss
            + (direction.slope or 0.0) * fine
            + 0.5 * direction.eigenvalue * fine**2
        )
        parabola = np.where((parabola >= low) & (parabola <= high), parabola, np.nan)
        axes.plot(fine, parabola, color=INK, lw=1.1, ls=(0, (4, 3)), zorder=3)
    axes.plot(x, y, color=UP, lw=1.6, marker="o", ms=2.8, zorder=4)
    axes.axvline(0, color=PALE, lw=0.8, ls=":", zorder=1)
    if math.isfinite(line.centre_loss):
        axes.plot([0], [line.centre_loss], "o", mfc="white", mec=UP, ms=6.5, mew=1.6, zorder=5)
    else:
        axes.axvline(1, color=PALE, lw=0.8, ls=":", zorder=1)
    axes.set_xlim(*padded(float(line.alphas[0]), float(line.alphas[-1]), 0.02))
    axes.xaxis.set_major_locator(round_ticks())
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.set_xlabel(direction.label)
    axes.set_ylabel("loss", color=UP)
    axes.tick_params(axis="y", colors=UP, which="both")


def _draw_metric(axes: Axes, line: Line, name: str, limits: tuple[float, float]) -> None:
    seen = line.evaluated.numpy()
    values = line.metrics[name].numpy()[seen]
    right = axes.twinx()
    right.set_title("", y=1.0)
    right.plot(
        line.alphas.numpy()[seen], np.where(np.isfinite(values), values, np.nan), color=METRIC,
        lw=1.1, zorder=2, alpha=0.9,
    )  # fmt: skip
    for side in ("top", "left"):
        right.spines[side].set_visible(False)
    right.spines["right"].set_color(PALE)
    right.tick_params(colors=METRIC, labelsize=TICKS, pad=2, length=3)
    right.set_ylabel(name, color=METRIC, fontsize=TICKS)
    right.yaxis.set_label_coords(1.13, 0.5)
    right.set_ylim(*limits)
    right.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.asarray(values[np.isfinite(values)])


def _limits(values: np.ndarray, logarithmic: bool) -> tuple[float, float]:
    if not values.size:
        return (0.1, 1.0) if logarithmic else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if not logarithmic:
        return padded(low, high, 0.06)
    low, high = padded(math.log10(low), math.log10(high), 0.06)
    return 10.0**low, 10.0**high


def _shared(ranges: Sequence[np.ndarray], logarithmic: bool) -> tuple[float, float] | None:
    """Return one range for all lines, unless one of them would be flat in it."""
    ranges = [r for r in ranges if r.size]
    if not ranges:
        return None
    everything = np.concatenate(ranges)

    def span(values: np.ndarray) -> float:
        low, high = float(values.min()), float(values.max())
        return math.log10(high / low) if logarithmic else high - low

    if min(map(span, ranges)) < 0.25 * span(everything):
        return None
    return _limits(everything, logarithmic)

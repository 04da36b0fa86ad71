"""Planes as figures, with the path of training on them."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal as Plain
from matplotlib.patheffects import Stroke
from matplotlib.transforms import blended_transform_factory

from lla_callbacks.report.style import INK, PALE, edges, finish, frame, hatched, ratio, subplots
from lla_callbacks.slices.fields import Field, counted, facts_of, field_of
from lla_callbacks.slices.network_figures import draw_networks
from lla_callbacks.slices.slices import Plane
from lla_callbacks.slices.trajectory import Path

LOSS_MAP = "viridis"
METRIC_MAP = "cividis"
# An angle whose cosine is below this looks right.
SKEWED = 0.01


def plane_figure(
    plane: Plane,
    *,
    title: str = "",
    metric: str | None = None,
    interpolate: bool = False,
    cap: float | None = None,
    scale: tuple[float, float] | None = None,
) -> Figure:
    """Return filled contours of log10 of the loss, or of a metric, over a plane.

    The scale is linear for a metric and where a loss is negative. Where a value is not finite
    the picture is hatched; of a plane that is not complete the finest complete grid is drawn.
    A path of training is laid over it, its points in the colour of their own loss, or from
    white to black by step where that is not known.

    Args:
        plane: The plane.
        title: Above the figure.
        metric: Draw this metric instead of the loss.
        interpolate: Draw a bicubic spline of the log loss on a grid four times as fine.
        cap: Largest value with a colour of its own.
        scale: Lowest and highest value of the colours, so that pictures of a run share them.
    """
    field = field_of(plane, metric=metric, cap=cap, scale=scale)
    notes = []
    fine = field
    if interpolate and field.finite:
        fine = field.smooth()
        notes.append("Between the computed points (dots): a bicubic spline of what is drawn.")
    elif interpolate:
        notes.append("Not interpolated, since a value is not finite.")
    if abs(plane.cosine) > SKEWED:
        angle = math.degrees(math.acos(max(-1.0, min(1.0, plane.cosine))))
        notes.append(f"The directions meet at {angle:.0f}°, not at a right angle as drawn.")
    figure, (axes,) = subplots(1, 1, size=_size(field))
    image = _fill(axes, fine, METRIC_MAP if metric else LOSS_MAP)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=28, extendfrac=0.035)
    positions, texts = field.ticks()
    bar.set_ticks(positions, labels=texts)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label(field.label, color=INK)
    bar.outline.set_visible(False)
    partial = not plane.complete
    if interpolate or partial:
        x, y = np.meshgrid(field.x, field.y, indexing="ij")
        axes.plot(
            x.ravel(), y.ravel(), "o", ms=1.5, mfc="white", mec=INK, mew=0.2, ls="none",
            alpha=0.7, clip_on=False,
        )  # fmt: skip
        # In the legend, larger: nobody would see it.
        axes.plot([], [], "o", ms=3.2, mfc="white", mec=INK, mew=0.5, label="computed points")
    if plane.path is not None:
        notes.extend(_draw_path(axes, plane.path, field, metric is None))
    if plane.networks is not None:
        notes.extend(draw_networks(axes, plane.networks))
    else:
        _mark_points(axes, plane, field)
    frame(axes, field.x, field.y)
    axes.set_xlabel(plane.directions[0].label)
    axes.set_ylabel(plane.directions[1].label)
    _legend(figure, axes)
    points = counted(int(plane.evaluated.sum()), plane.evaluated.numel())
    default = "Loss over a plane" if metric is None else f"{metric} over a plane"
    finish(figure, title or default, facts_of(plane.facts, points), notes)
    return figure


def _fill(axes: Axes, field: Field, colors: str) -> ContourSet | QuadMesh:
    """Draw filled contours with thin lines between them, over hatching."""
    if not field.finite:
        hatched(axes, (field.x[0], field.x[-1]), (field.y[0], field.y[-1]))
    norm = Normalize(field.low, field.high)
    if min(field.values.shape) < 2:
        return axes.pcolormesh(
            edges(field.x), edges(field.y), np.ma.masked_invalid(field.values.T), norm=norm,
            cmap=colors,
        )  # fmt: skip
    shown = np.ma.masked_invalid(field.values.T)
    image = axes.contourf(
        field.x, field.y, shown, levels=field.bands(), norm=norm,
        cmap=colors, extend=field.extend,
    )  # fmt: skip
    lines = [p for p in field.ticks()[0] if field.low < p < field.high]
    if lines:
        axes.contour(
            field.x, field.y, shown, levels=lines, colors=[INK], linewidths=0.5,
            linestyles="solid", alpha=0.6,
        )  # fmt: skip
    return image


def _mark_points(axes: Axes, plane: Plane, field: Field) -> None:
    """Mark the present weights, and the lowest computed point if it is another one."""
    inside = all(bool(c[0] <= 0 <= c[-1]) for c in (plane.alphas, plane.betas))
    if plane.path is None and inside:
        axes.plot(
            [0], [0], "P", mfc="white", mec=INK, ms=9, mew=0.9, zorder=6,
            label="present weights", ls="none",
        )  # fmt: skip
    if not np.isfinite(field.values).any() or field.name != "loss":
        return
    i, j = np.unravel_index(np.nanargmin(field.values), field.values.shape)
    centre = field.values[np.abs(field.x).argmin(), np.abs(field.y).argmin()]
    if not field.values[i, j] >= centre:
        axes.plot(
            [field.x[i]], [field.y[j]], "v", mfc="white", mec=INK, ms=5.5, mew=0.9, zorder=6,
            clip_on=False, ls="none", label="lowest point",
        )  # fmt: skip


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend between title and picture, without letting it squeeze the picture."""
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = _columns([*map(len, names)], figure.get_figwidth())
    legend = axes.legend(
        handles, names, loc="lower left", bbox_to_anchor=(0.0, 1.0),
        bbox_transform=blended_transform_factory(figure.transFigure, axes.transAxes),
        ncols=columns, frameon=False, fontsize=7.5, labelcolor=INK, handletextpad=0.35,
        columnspacing=1.1, borderaxespad=0.3,
    )  # fmt: skip
    legend.set_in_layout(False)
    # An empty title keeps its lines free.
    rows = math.ceil(len(names) / columns)
    axes.set_title("\n".join(" " * rows), fontsize=9.5)


def _columns(lengths: list[int], width: float) -> int:
    """Return how many columns of labels fit into a width in inches."""
    for columns in range(len(lengths), 1, -1):
        parts = np.array_split(lengths, columns)
        # A mark takes half an inch, a letter a sixteenth.
        if sum(0.5 + 0.0625 * max(part) for part in parts) <= width:
            return columns
    return 1


def _draw_path(axes: Axes, path: Path, field: Field, is_loss: bool) -> list[str]:
    """Draw the path of training and return what must be said about it."""
    x, y = path.points[:, 0].numpy(), path.points[:, 1].numpy()
    axes.plot(
        x, y, color="white", lw=1.2, zorder=4,
        path_effects=[Stroke(linewidth=2.4, foreground=INK, alpha=0.6), Plain()],
    )  # fmt: skip
    own = field.drawn(path.loss.numpy()) if is_loss else np.full(len(x), np.nan)
    known = bool(np.isfinite(own).any())
    if known:
        c, colors, norm = own, LOSS_MAP, Normalize(field.low, field.high)
        label = "path, coloured by its own loss"
    else:
        c, colors, norm = np.arange(len(x)), "Greys", Normalize(0, max(1, len(x) - 1))
        label = "path, from white to black"
    axes.scatter(
        x, y, c=c, cmap=colors, norm=norm, s=30, edgecolors="white", linewidths=0.9, zorder=5,
        clip_on=True,
    )  # fmt: skip
    # In the legend a dot from the middle of the colours, on a dark line that white paper shows.
    axes.plot(
        [], [], "o-", color=PALE, mfc=colormaps[colors](0.5), mec="white", ms=6, label=label
    )  # fmt: skip
    for k, marker, size, name in ((0, "s", 8, "start"), (-1, "*", 13, "end")):
        axes.plot(
            x[k], y[k], marker, mfc="white", mec=INK, ms=size, mew=1, zorder=7, ls="none",
            label=f"{name}, step {int(path.steps[k])}",
        )  # fmt: skip
    worst = float(path.residuals.max())
    notes = [
        f"Largest residual {worst:.0%} (off the plane / distance to the end)"
        + (": the loss beneath it is not its own." if worst > 0.1 else ".")
    ]
    outside = int(
        ((x < field.x[0]) | (x > field.x[-1]) | (y < field.y[0]) | (y > field.y[-1])).sum()
    )
    if outside:
        notes.append(f"Points of the path outside the picture: {outside} of {len(x)}.")
    return notes


def _size(field: Field) -> tuple[float, float]:
    """Return the figure's size: less wide or less high where the picture is."""
    share = ratio(field.x, field.y)
    if not 0.5 <= share <= 2:
        return 5.8, 5.2
    return 5.8 - 3.9 * max(0.0, 1 - share), 5.2 - 3.9 * max(0.0, 1 - 1 / share)

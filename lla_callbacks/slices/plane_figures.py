"""Planes as figures, with the path of training on them."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal as Plain
from matplotlib.patheffects import Stroke

from lla_callbacks.report.sheet import KEY, WIDTH, Sheet, bar, key, sheet, width_of
from lla_callbacks.report.style import (
    FOOTER,
    INK,
    PALE,
    edges,
    hatched,
    mark_coordinates,
    ratio,
)
from lla_callbacks.report.words import in_short, written
from lla_callbacks.slices.fields import Field, counted, facts_of, field_of
from lla_callbacks.slices.network_figures import draw_networks
from lla_callbacks.slices.scales import Scale
from lla_callbacks.slices.slices import Plane
from lla_callbacks.slices.trajectory import Path

LOSS_MAP = "viridis"
METRIC_MAP = "cividis"
# An angle whose cosine is below this looks right.
SKEWED = 0.01
# Inches: what is left and right of a picture, and how large it is at most.
LEFT, RIGHT, HIGHEST = 0.6, 0.84, 3.2


def plane_figure(
    plane: Plane,
    *,
    title: str = "",
    metric: str | None = None,
    interpolate: bool = False,
    cap: float | None = None,
    scale: tuple[float, float] | None = None,
    run: tuple[float, float] | None = None,
) -> Figure:
    """Return a plane in colours of log10 of the loss, or of a metric, with contours.

    Colours range over what is in the picture; contours are at the same values in all pictures. The
    scale is linear for a metric; where a loss changes its sign it is logarithmic on either side of
    zero. Where a value is not finite the picture is hatched; of a plane that is not complete the
    finest complete grid is drawn. A path of training is laid over it, its points in the colour of
    their own loss, or from white to black by step where that is not known.

    Args:
        plane: The plane.
        title: Above the figure.
        metric: Draw this metric instead of the loss.
        interpolate: Draw the surface through the points (:mod:`~lla_callbacks.slices.pictures`) on
            a grid four times as fine, nowhere beyond the points around.
        cap: Largest value with a colour of its own.
        scale: Lowest and highest value of the colours, so that pictures of a run share them.
        run: Lowest and highest loss of a whole run: a second bar shows where this picture is in
            it.
    """
    field = field_of(plane, metric=metric, cap=cap, scale=scale)
    notes = []
    fine = field
    if interpolate and field.finite:
        fine = field.smooth()
        picture = field.picture
        between = "a bicubic spline of what is drawn" if picture is None else picture.words
        if picture is None or not picture.from_outputs:
            between += ", within the points around"
        notes.append(f"Between the computed points (dots): {between}.")
    elif interpolate:
        notes.append("Not interpolated, since a value is not finite.")
    if abs(plane.cosine) > SKEWED:
        angle = math.degrees(math.acos(max(-1.0, min(1.0, plane.cosine))))
        notes.append(f"The directions meet at {angle:.0f}°, not at a right angle as drawn.")
    height, right = _size(field)
    figure, (axes,) = sheet((height,), left=LEFT, right=right, above=0.07)
    image = fill_plane(axes, fine, colormaps[METRIC_MAP if metric else LOSS_MAP])
    bar(figure, axes, image, *field.ticks(), field.label, extend=field.extend)
    if interpolate or not plane.complete:
        x, y = np.meshgrid(field.x, field.y, indexing="ij")
        axes.plot(
            x.ravel(), y.ravel(), "o", ms=1.5, mfc="white", mec=INK, mew=0.2, ls="none",
            alpha=0.7, clip_on=False,
        )  # fmt: skip
        # In the legend, larger: nobody would see it.
        axes.plot(
            [], [], "o", ms=3.2, mfc="white", mec=INK, mew=0.5, ls="none", label="computed points"
        )
    if plane.path is not None:
        notes.extend(_draw_path(axes, plane.path, field, metric is None))
    if plane.networks is not None:
        notes.extend(draw_networks(axes, plane.networks))
    else:
        _mark_points(axes, plane, field)
    mark_coordinates(axes, field.x, field.y)
    axes.set_xlabel(plane.directions[0].label)
    axes.set_ylabel(plane.directions[1].label)
    key(figure, axes)
    if run is not None and metric is None:
        _place_in_run(figure, field, run)
    points = counted(int(plane.evaluated.sum()), plane.evaluated.numel())
    default = "Loss over a plane" if metric is None else f"{metric} over a plane"
    figure.finish(title or default, facts_of(plane.facts, points), notes, headline_of(field))
    return figure


def headline_of(field: Field) -> list[tuple[str, str]]:
    """Return what matters most of a plane, as texts and their colours."""
    seen = field.values[np.isfinite(field.values)]
    parts = []
    if math.isfinite(field.centre):
        parts.append((f"{field.name} {in_short(field.centre, 0.0)} at the weights", INK))
    if seen.size:
        ends = [in_short(field.scale.value(float(v)), 0.0) for v in (seen.min(), seen.max())]
        parts.append((f"{ends[0]} to {ends[1]}", FOOTER))
    return parts


def fill_plane(axes: Axes, field: Field, colors: Colormap) -> ScalarMappable:
    """Draw a field in colours, with thin contours on them, over hatching, and return the colours.

    Args:
        axes: Where.
        field: What.
        colors: From low to high.
    """
    norm = Normalize(field.low, field.high)
    image = ScalarMappable(norm, colors)
    if not field.finite:
        hatched(axes, (field.x[0], field.x[-1]), (field.y[0], field.y[-1]))
    if min(field.values.shape) < 2:
        axes.pcolormesh(
            edges(field.x), edges(field.y), np.ma.masked_invalid(field.values.T), norm=norm,
            cmap=colors,
        )  # fmt: skip
        return image
    values = field.raster()
    shown = image.to_rgba(np.nan_to_num(values), bytes=True)
    # Where it is not finite the hatching shows.
    shown[..., 3] = np.where(np.isnan(values), 0, 255)
    axes.imshow(
        shown, extent=(field.x[0], field.x[-1], field.y[0], field.y[-1]), origin="lower",
        interpolation="nearest", aspect="auto",
    )  # fmt: skip
    for lines, width in zip(field.scale.lines(field.low, field.high), (0.6, 0.25), strict=True):
        levels = sorted(field.scale.place(v) for v in lines)
        if levels:
            axes.contour(
                field.x, field.y, np.ma.masked_invalid(field.values.T), levels=levels,
                colors=[INK], linewidths=width, linestyles="solid", alpha=0.75,
            )  # fmt: skip
    return image


def _place_in_run(figure: Sheet, field: Field, run: tuple[float, float]) -> None:
    """Show below the picture which part of a run's range its colours have."""
    low, high = run
    scale = field.scale if field.scale.kind != "linear" else Scale("log") if low > 0 else Scale()
    ends = scale.place(low), scale.place(high)
    own = [scale.place(field.scale.value(v)) for v in (field.low, field.high)]
    if not (all(map(math.isfinite, [*ends, *own])) and ends[0] < ends[1]):
        return
    top = figure.body + 0.07
    texts = [written(float(f"{v:.2g}")) for v in run]
    left = LEFT + 0.1 + width_of(texts[0], KEY)
    width = figure.width - left - 1.75
    figure.write(LEFT, top, texts[0], fontsize=KEY, va="center_baseline")
    figure.mark(left, top, width, color=PALE, lw=2.5, solid_capstyle="butt")
    a, b = (min(max((v - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0) for v in own)
    figure.mark(
        left + a * width, top, max(b - a, 0.01) * width, color=INK, lw=5, solid_capstyle="butt"
    )
    figure.write(
        left + width + 0.07, top, f"{texts[1]}   range in the run", fontsize=KEY,
        va="center_baseline",
    )  # fmt: skip
    figure.body += 0.2


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
    """Return the height of a picture in equal units, unless that is a strip, and what is right."""
    share = ratio(field.x, field.y)
    share = share if 0.5 <= share <= 2 else 1.0
    most = WIDTH - LEFT - RIGHT
    if most / share <= HIGHEST:
        return most / share, RIGHT
    return HIGHEST, WIDTH - LEFT - HIGHEST * share

"""Surfaces, convexity maps and basins as figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray

from lla_callbacks.objective.grid import complete_axes
from lla_callbacks.report.sheet import TICKS, WIDTH, Sheet, bar, caption, key, sheet, spread
from lla_callbacks.report.style import (
    DOWN,
    INK,
    PALE,
    UP,
    edges,
    hatched,
    mark_coordinates,
    ratio,
    round_ticks,
)
from lla_callbacks.report.words import in_short, with_error, written
from lla_callbacks.slices.basin import Basin
from lla_callbacks.slices.convexity import Convexity
from lla_callbacks.slices.directions import UNITS
from lla_callbacks.slices.fields import counted, facts_of, field_of
from lla_callbacks.slices.plane_figures import LOSS_MAP, headline_of
from lla_callbacks.slices.scales import tick_values
from lla_callbacks.slices.slices import Plane

# Orange curves down, blue up, as in all figures.
SIGNED_MAP = LinearSegmentedColormap.from_list(
    "signed", ["#9c4221", DOWN, "#fbd7b5", "#f7fafc", "#bcd7ee", UP, "#2a4d7c"]
)
# How much further than a mesh the camera of TensorBoard is kept, so that it is within the frame.
FRAME = 1.05
# Letters of a direction's name that fit along a slanted axis.
LONG = 24
BASIN_COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030")


def surface_figure(
    plane: Plane,
    *,
    title: str = "",
    cap: float | None = None,
    scale: tuple[float, float] | None = None,
) -> Figure:
    """Return the log loss as a surface in three dimensions; where it is not finite, a hole.

    A surface hides what is behind it;
    :func:`~lla_callbacks.slices.plane_figures.plane_figure` shows all of the plane.

    Args:
        plane: The plane.
        title: Above the figure.
        cap: Larger losses are drawn as this one.
        scale: Lowest and highest loss of the axis and the colours.
    """
    field = field_of(plane, cap=cap, scale=scale)
    smooth = field.finite and min(field.values.shape) > 1
    fine = field.smooth() if smooth else field
    low, high = fine.low, fine.high
    heights = np.clip(fine.values, low, high)
    figure = Sheet(3.8)
    axes = figure.panel(-0.15, -0.4, WIDTH - 0.05, 3.95, projection="3d")
    assert isinstance(axes, Axes3D)
    corners = _quads(fine.x, fine.y, heights)
    paint = colormaps[LOSS_MAP](Normalize(low, high)(corners[:, :, 2].mean(axis=1)))
    # Shaded as if all three axes were equally long, as they are drawn.
    box = np.array([np.ptp(fine.x) or 1.0, np.ptp(fine.y) or 1.0, high - low])
    shaded = _shaded(corners / box, paint)
    axes.add_collection3d(
        Poly3DCollection(
            corners, facecolors=shaded, edgecolors=shaded, linewidths=0.3, antialiaseds=False
        )
    )
    if min(field.values.shape) > 1:
        axes.set_xlim(field.x[0], field.x[-1])
        axes.set_ylim(field.y[0], field.y[-1])
    axes.set_zlim(low, high)
    positions, texts = field.ticks()
    axes.set_zticks(positions, labels=texts)
    for name, direction in zip(("x", "y"), plane.directions, strict=True):
        # In several lines where one, along a slanted axis, would reach into what stands below.
        lines = wrap(direction.label, LONG)
        size, pad = TICKS - max(0, len(lines) - 2), 3 + 3 * (len(lines) - 1)
        getattr(axes, f"set_{name}label")("\n".join(lines), fontsize=size, labelpad=pad)
    axes.set_zlabel(field.label, fontsize=TICKS, labelpad=3)
    axes.view_init(elev=32, azim=-57)
    axes.set_box_aspect((1, 1, 0.72), zoom=0.92)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
        axis.label.set_color(INK)
        axis.line.set_color(PALE)
        axis._axinfo["grid"].update(color="#e2e8f0", linewidth=0.6)
    # At the corner where both axes meet their ticks would overlap.
    axes.xaxis.set_major_locator(round_ticks(prune="upper"))
    axes.yaxis.set_major_locator(round_ticks(prune="lower"))
    axes.tick_params(colors=INK, labelsize=TICKS - 0.5, pad=0)
    notes = ["Between the computed points: a bicubic spline of what is drawn."] if smooth else []
    if not field.finite:
        notes.append("Holes: not finite.")
    points = counted(int(plane.evaluated.sum()), plane.evaluated.numel())
    facts = facts_of(plane.facts, points)
    figure.finish(title or "Loss over a plane", facts, notes, headline_of(field))
    return figure


def mesh_of(
    plane: Plane, cap: float | None = None
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.int32]]:
    """Return the log loss as a mesh of triangles.

    Args:
        plane: The plane.
        cap: Larger losses are drawn as this one.

    Returns:
        Vertices ``(V, 3)``: coordinates in [-1, 1] and a height in [-0.5, 0.5]; their colours
        ``(V, 3)``; and triangles ``(F, 3)``, none of which touches a value that is not finite.
    """
    field = field_of(plane, cap=cap)
    share = Normalize(field.low, field.high, clip=True)(field.values)
    share = np.nan_to_num(np.ma.filled(share, 0.0))
    x, y = (
        2 * (c - c[0]) / ((c[-1] - c[0]) or 1.0) - 1 if len(c) > 1 else np.zeros(1)
        for c in (field.x, field.y)
    )
    n, m = field.values.shape
    mesh_x, mesh_y = np.meshgrid(x, y, indexing="ij")
    vertices = np.stack([mesh_x, mesh_y, share - 0.5], axis=-1).reshape(-1, 3)
    colors = np.rint(255 * colormaps[LOSS_MAP](share)[..., :3]).reshape(-1, 3)
    index = np.arange(n * m).reshape(n, m)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    faces = np.concatenate(
        [np.stack(t, axis=-1).reshape(-1, 3) for t in ((a, b, c), (a, c, d))], axis=0
    )
    faces = faces[np.isfinite(field.values.ravel())[faces].all(axis=1)]
    return vertices.astype(np.float32), colors.astype(np.uint8), faces.astype(np.int32)


def mesh_from_the_side(
    plane: Plane, cap: float | None = None
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.int32]]:
    """Return a mesh as TensorBoard should get it.

    It looks along the third axis, from above, and comes as near as the corners of what it thinks is
    a flat thing. So the mesh is turned for it to be seen from the side, 30 degrees above the level
    and past one corner; two vertices that no triangle uses keep the camera away.

    Args:
        plane: The plane.
        cap: Larger losses are drawn as this one.

    Returns:
        As :func:`mesh_of`.
    """
    vertices, colors, faces = mesh_of(plane, cap=cap)
    x, y, height = vertices.T
    side, above = math.radians(35), math.radians(30)
    across = x * math.cos(side) - y * math.sin(side)
    away = x * math.sin(side) + y * math.cos(side)
    up = height * math.cos(above) + away * math.sin(above)
    near = height * math.sin(above) - away * math.cos(above)
    found = np.stack([across, up, near], axis=-1)
    room = FRAME * np.abs(found).max(initial=1e-3)
    corners = np.array([[-room, -room, 0.0], [room, room, 0.0]])
    unused = np.zeros((2, 3), dtype=np.uint8)
    vertices = np.concatenate([found, corners]).astype(np.float32)
    return vertices, np.concatenate([colors, unused]), faces


def convexity_figure(convexity: Convexity, *, title: str = "") -> Figure:
    """Return both ratios of the Hessian's extreme eigenvalues over a plane, cell by cell.

    Colours range over what is there: on a log scale over more than a decade; the signed ratio's
    are as far to either side. Nothing is interpolated; a point with no finite eigenvalues is
    hatched. Where no direction curves up at all the ratio is infinite and has the colour of the
    end of the scale.
    """
    c = convexity
    centre = [int(c.alphas.abs().argmin()), int(c.betas.abs().argmin())]
    rows, columns = complete_axes(c.evaluated.shape, c.evaluated, centre)
    x, y = c.alphas[rows].numpy(), c.betas[columns].numpy()
    borders = edges(x), edges(y)
    share = ratio(*borders)
    height = 2.7 / (share if 0.5 <= share <= 2 else 1.0)
    figure, panels = sheet([height] * 2, left=0.75, right=WIDTH - 0.75 - 2.7, inner=0.3)
    for axes, table, label in (
        (panels[0], c.ratio, "|λmin / λmax|: 0 is as good as convex"),
        (panels[1], c.signed_ratio, "λmin / λmax: orange has a way down"),
    ):
        values = table[rows][:, columns].numpy()
        norm, low, high, marks = _range_of(values, signed=axes is panels[1])
        shown = np.ma.masked_where(np.isnan(values), np.clip(values, -1e9, 1e9)).T
        if np.isnan(values).any():
            hatched(axes, *((b[0], b[-1]) for b in borders))
        passes = ("min" if (shown < low).any() else "") + ("max" if (shown > high).any() else "")
        if isinstance(norm, LogNorm):
            # What is exactly convex has the lowest colour.
            shown = np.ma.maximum(shown, low)
        colors = SIGNED_MAP if axes is panels[1] else colormaps[LOSS_MAP]
        image = axes.pcolormesh(*borders, shown, cmap=colors, norm=norm)
        axes.plot([0], [0], "P", mfc="white", mec=INK, ms=9, mew=0.9)
        extend = {"": "neither", "minmax": "both"}.get(passes, passes)
        bar(figure, axes, image, marks, [*map(written, marks)], "", extend=extend)
        caption(axes, label)
        mark_coordinates(axes, *borders)
        axes.set_ylabel(c.directions[1].label)
    panels[1].set_xlabel(c.directions[0].label)
    points = counted(int(c.evaluated.sum()), c.evaluated.numel())
    facts = [*facts_of(c.facts, points), f"{c.num_matvecs:,} Hessian-vector products"]
    here = float(c.signed_ratio[centre[0], centre[1]])
    head = []
    if math.isfinite(here):
        head = [(f"λmin / λmax {in_short(here, 0.0)} at the weights", UP if here >= 0 else DOWN)]
    notes = ["Cross: the present weights."]
    figure.finish(title or "Convexity over a plane", facts, notes, head)
    return figure


def _range_of(values: np.ndarray, *, signed: bool) -> tuple[Normalize, float, float, list[float]]:
    """Return a map's colours over what is in it, and its ticks; ratios end at 1."""
    finite = np.abs(values[np.isfinite(values)])
    finite = np.minimum(finite[finite > 0], 1.0)
    most = float(finite.max()) if finite.size else 1.0
    least = float(finite.min()) if finite.size else 0.1
    if signed:
        return Normalize(-most, most), -most, most, tick_values(-most, most, False)
    if most < 10 * least:
        low, high = (least, most) if least < most else (0.9 * most, 1.1 * most)
        return Normalize(low, high), low, high, tick_values(low, high, False)
    least = max(least, 1e-4 * most)
    marks = tick_values(math.log10(least), math.log10(most), True)
    return LogNorm(least, most), least, most, marks


def basin_figure(
    basins: Mapping[str, Basin], *, title: str = "", headline: Sequence[tuple[str, str]] = ()
) -> Figure:
    """Return how far random rays go before the loss passes a cutoff, as histograms.

    Rays that did not pass it within the largest radius stand in a bar of their own. A line
    marks the median ray, a dot above the histogram the effective radius with its standard error.

    Args:
        basins: Name to basin, at least one.
        title: Above the figure.
        headline: Under the title: texts and their colours.
    """
    first = next(iter(basins.values()))
    unit = UNITS.get(first.facts.normalization, "‖v‖")  # type: ignore[call-overload]
    figure, (axes,) = sheet((2.3,), left=0.5, above=0.1)
    closed = {name: b.radii[~b.open].numpy() for name, b in basins.items()}
    reached = np.concatenate(
        [*closed.values(), np.array([b.effective_radius for b in basins.values()])]
    )
    low, high = math.log10(float(reached.min())), math.log10(float(reached.max()))
    low, high = low - 0.04 - 0.1 * (high - low), high + 0.04 + 0.1 * (high - low)
    bins = np.linspace(low, high, 21)
    any_open = any(bool(b.open.any()) for b in basins.values())
    gap = 0.05 * (high - low)
    tallest = 1
    marked: list[tuple[Basin, str, str]] = []
    notes = ["Dashed: the median ray. Dot: effective radius (geometric mean) ± standard error."]
    for k, (name, basin) in enumerate(basins.items()):
        color = BASIN_COLORS[k % len(BASIN_COLORS)]
        counts, _ = np.histogram(np.log10(closed[name]), bins)
        tallest = max(tallest, int(counts.max()), int(basin.open.sum()))
        notes.append(
            f"{name}: cutoff {basin.cutoff:.4g} (loss {basin.centre_loss:.3g}), "
            f"{len(basin.radii)} rays, median {basin.quantiles[0.5]:.3g}".replace(
                "inf", "not reached"
            )
        )
        label = f"{name}: effective radius {radius_in_words(basin).replace('+-', '±')}"
        axes.stairs(counts, bins, fill=True, color=color, alpha=0.3, zorder=2)
        axes.stairs(counts, bins, color=color, lw=1.3, zorder=3)
        marked.append((basin, color, label))
        if math.isfinite(basin.quantiles[0.5]):
            axes.axvline(math.log10(basin.quantiles[0.5]), color=color, lw=1.4, ls="--", zorder=4)
        if any_open:
            width = 3 * gap / len(basins)
            axes.bar(
                high + gap + (k + 0.5) * width, int(basin.open.sum()), width=0.9 * width,
                color=color, alpha=0.6, zorder=2,
            )  # fmt: skip
    # Above all bars, one below the other: what it comes to.
    step = 0.12 * tallest
    for k, (basin, color, label) in enumerate(marked):
        height, middle = tallest + step * (len(marked) - k), basin.effective_radius
        if math.isfinite(basin.effective_radius_sem):
            ends = [max(middle + s * basin.effective_radius_sem, 10**low) for s in (-1, 1)]
            axes.plot(np.log10(ends), [height] * 2, color=color, lw=2.4, zorder=5)
        axes.plot(
            [math.log10(middle)], [height], "o", mfc="white", mec=color, mew=1.8, ms=7, zorder=6,
            ls="none", label=label,
        )  # fmt: skip
    ticks = tick_values(low, high, True)
    if len(ticks) < 4:
        exponents = range(math.floor(low), math.floor(high) + 1)
        found = (d * 10.0**e for e in exponents for d in (1, 1.5, 2, 3, 4, 5, 7))
        ticks = [t for t in found if low <= math.log10(t) <= high]
    # Labels are about four letters wide, and twice as wide as they are high.
    kept = spread([(math.log10(t) - low) / (high - low) for t in ticks], 1.6)
    ticks = [ticks[i] for i in kept]
    labels = [*map(written, ticks)]
    positions = [math.log10(t) for t in ticks]
    end = high
    if any_open:
        positions.append(high + 2.5 * gap)
        labels.append("not\nreached")
        end = high + 4.5 * gap
        axes.axvline(high + 0.5 * gap, color=PALE, lw=0.8)
    axes.set_xticks(positions, labels)
    axes.set_xlim(low, end)
    axes.set_ylim(0, tallest + step * (len(marked) + 0.7))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(f"radius where the loss passes the cutoff  [{unit}]")
    axes.set_ylabel("rays")
    key(figure, axes)
    facts = facts_of(first.facts, f"{first.facts.num_points:,} passes")
    figure.finish(title or "Radii of the basin", facts, notes, headline)
    return figure


def radius_in_words(basin: Basin) -> str:
    """Return the effective radius with its error, or as what it is at least."""
    if basin.at_least:
        return f"at least {basin.effective_radius:.3g}"
    return with_error(basin.effective_radius, basin.effective_radius_sem)


def _quads(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the corners of the cells whose four values are finite, shape ``(k, 4, 3)``."""
    mesh_x, mesh_y = np.meshgrid(x, y, indexing="ij")
    points = np.stack([mesh_x, mesh_y, z], axis=-1)
    quads = np.stack([points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]], axis=2)
    quads = quads.reshape(-1, 4, 3)
    return np.asarray(quads[np.isfinite(quads).all(axis=(1, 2))])


def _shaded(corners: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Return colours as a light from the upper left leaves them."""
    normal = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-300)
    light = np.array([-0.5, -0.35, 0.8])
    brightness = 0.78 + 0.22 * (normal @ (light / np.linalg.norm(light))).clip(0, 1)
    return np.concatenate([colors[:, :3] * brightness[:, None], colors[:, 3:]], axis=1)

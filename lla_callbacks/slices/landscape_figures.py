"""Surfaces, convexity maps and basins as figures."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray

from lla_callbacks.objective.grid import complete_axes
from lla_callbacks.report.style import (
    DOWN,
    DPI,
    INK,
    PALE,
    UP,
    edges,
    finish,
    frame,
    hatched,
    round_ticks,
    subplots,
)
from lla_callbacks.report.words import with_error
from lla_callbacks.slices.basin import Basin
from lla_callbacks.slices.convexity import Convexity
from lla_callbacks.slices.directions import UNITS
from lla_callbacks.slices.fields import counted, facts_of, field_of, tick_values, written
from lla_callbacks.slices.plane_figures import LOSS_MAP
from lla_callbacks.slices.slices import Plane

# Orange curves down, blue up, as in all figures.
SIGNED_MAP = LinearSegmentedColormap.from_list(
    "signed", ["#652b19", DOWN, "#f7fafc", UP, "#1a365d"]
)
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
    figure = Figure(figsize=(5.8, 5.2), dpi=DPI)
    axes = figure.add_axes((0.0, 0.05, 0.94, 0.92), projection="3d")
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
    axes.set_xlabel(plane.directions[0].label, fontsize=8.5, labelpad=2)
    axes.set_ylabel(plane.directions[1].label, fontsize=8.5, labelpad=2)
    axes.set_zlabel(field.label, fontsize=8.5, labelpad=2)
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
    axes.tick_params(colors=INK, labelsize=7.5, pad=0)
    notes = ["Between the computed points: a bicubic spline of what is drawn."] if smooth else []
    if not field.finite:
        notes.append("Holes: not finite.")
    points = counted(int(plane.evaluated.sum()), plane.evaluated.numel())
    finish(figure, title or "Loss over a plane", facts_of(plane.facts, points), notes)
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


def convexity_figure(convexity: Convexity, *, title: str = "") -> Figure:
    """Return both ratios of the Hessian's extreme eigenvalues over a plane, cell by cell.

    Nothing is interpolated; a point with no finite eigenvalues is hatched. Where no direction
    curves up at all the ratio is infinite and has the colour of the end of the scale.
    """
    c = convexity
    figure, (left, right) = subplots(1, 2, size=(9.4, 4.9))
    centre = [int(c.alphas.abs().argmin()), int(c.betas.abs().argmin())]
    rows, columns = complete_axes(c.evaluated.shape, c.evaluated, centre)
    x, y = c.alphas[rows].numpy(), c.betas[columns].numpy()
    panels = (
        (left, c.ratio, colormaps[LOSS_MAP], (0.0, 1.0), "|λmin / λmax|",
         "0: as good as convex · 1: as much downward as upward curvature"),
        (right, c.signed_ratio, SIGNED_MAP, (-1.0, 1.0), "λmin / λmax",
         "orange: some direction curves down · blue: all curve up"),
    )  # fmt: skip
    for axes, table, colors, (low, high), label, caption in panels:
        values = table[rows][:, columns].numpy()
        borders = edges(x), edges(y)
        shown = np.ma.masked_where(np.isnan(values), np.clip(values, -1e9, 1e9)).T
        if np.isnan(values).any():
            hatched(axes, *((b[0], b[-1]) for b in borders))
        passes = ("min" if (shown < low).any() else "") + ("max" if (shown > high).any() else "")
        image = axes.pcolormesh(*borders, shown, cmap=colors, norm=Normalize(low, high))
        axes.plot([0], [0], "P", mfc="white", mec=INK, ms=9, mew=0.9)
        bar = figure.colorbar(
            image, ax=axes, location="bottom", aspect=36, pad=0.02, extendfrac=0.035,
            extend={"": "neither", "minmax": "both"}.get(passes, passes),
        )  # fmt: skip
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, colors=INK)
        ticks = np.linspace(low, high, 5).tolist()
        bar.set_ticks(ticks, labels=[*map(written, ticks)])
        bar.set_label(caption, color=INK, fontsize=8)
        axes.set_title(label, loc="left", fontsize=10, color=INK)
        frame(axes, *borders)
        axes.set_xlabel(c.directions[0].label)
        axes.set_ylabel(c.directions[1].label)
    points = counted(int(c.evaluated.sum()), c.evaluated.numel())
    facts = [*facts_of(c.facts, points), f"{c.num_matvecs:,} Hessian-vector products"]
    finish(figure, title or "Convexity over a plane", facts, ["Cross: the present weights."])
    return figure


def basin_figure(basins: Mapping[str, Basin], *, title: str = "") -> Figure:
    """Return how far random rays go before the loss passes a cutoff, as histograms.

    Rays that did not pass it within the largest radius stand in a bar of their own. A line
    marks the median ray, a band the effective radius with its standard error.

    Args:
        basins: Name to basin, at least one.
        title: Above the figure.
    """
    first = next(iter(basins.values()))
    unit = UNITS.get(first.facts.normalization, "‖v‖")  # type: ignore[call-overload]
    figure, (axes,) = subplots(1, 1, size=(6.4, 4.4))
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
    for k, (name, basin) in enumerate(basins.items()):
        color = BASIN_COLORS[k % len(BASIN_COLORS)]
        counts, _ = np.histogram(np.log10(closed[name]), bins)
        tallest = max(tallest, int(counts.max()), int(basin.open.sum()))
        label = (
            f"{name}: cutoff {basin.cutoff:.4g} (loss {basin.centre_loss:.3g}), "
            f"{len(basin.radii)} rays\n"
            f"effective radius {radius_in_words(basin).replace('+-', '±')}"
            f", median {basin.quantiles[0.5]:.3g}".replace("inf", "not reached")
        )
        axes.stairs(counts, bins, fill=True, color=color, alpha=0.35, zorder=2)
        axes.stairs(counts, bins, color=color, lw=1.3, zorder=3, label=label)
        middle, sem = basin.effective_radius, basin.effective_radius_sem
        if math.isfinite(sem):
            axes.axvspan(
                math.log10(max(middle - sem, 10**low)), math.log10(middle + sem), color=color,
                alpha=0.3, lw=0, zorder=1,
            )  # fmt: skip
        if math.isfinite(basin.quantiles[0.5]):
            axes.axvline(math.log10(basin.quantiles[0.5]), color=color, lw=1.2, ls="--", zorder=4)
        if any_open:
            width = 3 * gap / len(basins)
            axes.bar(
                high + gap + (k + 0.5) * width, int(basin.open.sum()), width=0.9 * width,
                color=color, alpha=0.6, zorder=2,
            )  # fmt: skip
    ticks = tick_values(low, high, True)
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
    axes.set_ylim(0, 1.08 * tallest)
    axes.set_xlabel(f"radius at which the loss passes the cutoff  [{unit}]")
    axes.set_ylabel("rays")
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=8, labelcolor=INK,
        borderaxespad=0.2,
    )  # fmt: skip
    facts = facts_of(first.facts, f"{first.facts.num_points:,} passes")
    finish(
        figure, title or "Radii of the basin", facts,
        ["Dashed: the median ray. Band: effective radius (geometric mean) ± its standard error."],
    )  # fmt: skip
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

"""Lines, planes and basins on axes of anybody's figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from lla_callbacks.report.picture import SERIES, figure_of, picture
from lla_callbacks.report.style import INK, PALE, UP, edges, hatched, round_ticks
from lla_callbacks.slices.basin import Basin
from lla_callbacks.slices.convexity import Convexity
from lla_callbacks.slices.slices import Line, Plane

# The largest over the smallest loss from which on an axis is logarithmic.
LOGARITHMIC = 30.0


def draw_line(axes: Axes, line: Line, *, color: str = UP, name: str = "") -> None:
    """Draw the loss along a line; what was not evaluated or is not finite is a gap."""
    loss = line.loss.numpy()
    axes.plot(
        line.alphas.numpy(), np.where(np.isfinite(loss), loss, np.nan), color=color, lw=1.6,
        marker="o", ms=3, label=name or None,
    )  # fmt: skip
    axes.axvline(0, color=PALE, lw=0.8, ls=":", zorder=1)
    axes.set_xlabel(line.directions[0].label)
    axes.set_ylabel("loss")
    scaled(axes)


def draw_plane(
    axes: Axes, plane: Plane, *, norm: Normalize | None = None, bar: bool = True
) -> None:
    """Draw the loss over a plane: its logarithm where all of it is positive."""
    values, label = shown(plane)
    norm = norm or limits([values])
    draw_table(axes, plane.alphas, plane.betas, values, norm=norm, label=label if bar else "")
    axes.plot([0], [0], "P", mfc="white", mec=INK, ms=8, mew=0.9)
    axes.set_xlabel(plane.directions[0].label)
    axes.set_ylabel(plane.directions[1].label)


def draw_convexity(
    axes: Axes, c: Convexity, *, norm: Normalize | None = None, bar: bool = True
) -> None:
    """Draw ``|lambda_min / lambda_max|`` over a plane."""
    label = "|λmin / λmax|" if bar else ""
    draw_table(axes, c.alphas, c.betas, c.ratio.numpy(), norm=norm or Normalize(0, 1), label=label)
    axes.plot([0], [0], "P", mfc="white", mec=INK, ms=8, mew=0.9)
    axes.set_xlabel(c.directions[0].label)
    axes.set_ylabel(c.directions[1].label)


def draw_basin(axes: Axes, basin: Basin, *, color: str = UP, name: str = "") -> None:
    """Draw which share of the rays has passed the rim within a radius."""
    radii = np.sort(np.where(basin.open.numpy(), np.inf, basin.radii.numpy()))
    shares = np.arange(1, len(radii) + 1) / len(radii)
    closed = np.isfinite(radii)
    label = f"{name}: " if name else ""
    axes.step(
        radii[closed], shares[closed], where="post", color=color, lw=1.8,
        label=f"{label}median {basin.quantiles[0.5]:.3g}".replace("inf", "not reached"),
    )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("radius in filter norms")
    axes.set_ylabel("share of rays beyond the rim")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def draw_table(
    axes: Axes, x: Tensor, y: Tensor, values: np.ndarray, *, norm: Normalize, label: str
) -> None:
    """Draw a table over a plane cell by cell, over hatching, with a colour bar if it has a name."""
    borders = edges(x.numpy()), edges(y.numpy())
    if not np.isfinite(values).all():
        hatched(axes, *((float(b[0]), float(b[-1])) for b in borders))
    image = axes.pcolormesh(
        *borders, np.ma.masked_invalid(values).T, norm=norm, cmap="viridis", rasterized=True
    )
    axes.set_xlim(borders[0][0], borders[0][-1])
    axes.set_ylim(borders[1][0], borders[1][-1])
    axes.xaxis.set_major_locator(round_ticks())
    axes.yaxis.set_major_locator(round_ticks())
    if label:
        bar = figure_of(axes).colorbar(image, ax=axes)
        bar.set_label(label, color=INK)
        bar.outline.set_visible(False)


def shown(plane: Plane) -> tuple[np.ndarray, str]:
    """Return what is drawn of a plane, and its name."""
    loss = plane.loss.numpy()
    finite = loss[np.isfinite(loss)]
    if finite.size and finite.min() > 0:
        return np.log10(loss, where=loss > 0, out=np.full(loss.shape, np.nan)), "log10 of the loss"
    return loss, "loss"


def limits(tables: Sequence[np.ndarray]) -> Normalize:
    """Return one scale for all tables."""
    finite = np.concatenate([t[np.isfinite(t)] for t in tables])
    return Normalize(finite.min(), finite.max()) if finite.size else Normalize(0, 1)


def scaled(axes: Axes) -> None:
    """Make the height logarithmic where what is drawn needs it."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    finite = drawn[np.isfinite(drawn)]
    low, high = axes.dataLim.ymin, axes.dataLim.ymax
    if finite.size and low > 0 and high > LOGARITHMIC * low:
        axes.set_yscale("log")


def compared_lines(lines: Sequence[Line], names: Sequence[str]) -> Figure:
    """Return lines over each other."""
    figure, (axes,) = picture(size=(6.0, 4.0))
    for k, (line, name) in enumerate(zip(lines, names, strict=True)):
        draw_line(axes, line, color=SERIES[k % len(SERIES)], name=name)
    labels = list(dict.fromkeys(line.directions[0].label for line in lines))
    axes.set_xlabel(labels[0] if len(labels) == 1 else "coordinate along each line")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def compared_planes(planes: Sequence[Plane], names: Sequence[str]) -> Figure:
    """Return planes beside each other, in one colour scale."""
    parts = [shown(plane) for plane in planes]
    if len({label for _, label in parts}) > 1:
        parts = [(plane.loss.numpy(), "loss") for plane in planes]
    norm = limits([values for values, _ in parts])
    figure, grid = picture(len(planes), size=(3.4 * len(planes) + 0.8, 3.5))
    for axes, plane, (values, label), name in zip(grid, planes, parts, names, strict=True):
        last = axes is grid[-1]
        draw_table(axes, plane.alphas, plane.betas, values, norm=norm, label=label if last else "")
        axes.plot([0], [0], "P", mfc="white", mec=INK, ms=8, mew=0.9)
        axes.set_title(name, loc="left", fontsize=10, color=INK)
        axes.set_xlabel(plane.directions[0].label)
        axes.set_ylabel(plane.directions[1].label)
    return figure


def compared_maps(maps: Sequence[Convexity], names: Sequence[str]) -> Figure:
    """Return convexity maps beside each other, in one colour scale."""
    figure, grid = picture(len(maps), size=(3.4 * len(maps) + 0.8, 3.5))
    for axes, c, name in zip(grid, maps, names, strict=True):
        draw_convexity(axes, c, bar=axes is grid[-1])
        axes.set_title(name, loc="left", fontsize=10, color=INK)
    return figure


def compared_basins(basins: Sequence[Basin], names: Sequence[str]) -> Figure:
    """Return radii of basins over each other."""
    figure, (axes,) = picture(size=(6.0, 4.0))
    for k, (basin, name) in enumerate(zip(basins, names, strict=True)):
        draw_basin(axes, basin, color=SERIES[k % len(SERIES)], name=name)
    return figure

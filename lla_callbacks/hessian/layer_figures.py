"""Layers as figures: traces, how they moved over a run, spectra, and distance to the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from lla_callbacks.hessian.figures import finish_measured
from lla_callbacks.hessian.layer_measures import LayerMeasurement, LayerSpectrum
from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.hessian.scalars import BAND
from lla_callbacks.hessian.words import outside_words
from lla_callbacks.linalg.density import resolved_density
from lla_callbacks.report.style import DOWN, INK, PALE, UP, edges, subplots

# More rows than this cannot be read, nor more small panels; the layers with most curvature
# are kept.
MOST_LAYERS = 30
MOST_PANELS = 12
# Decades of a map's colours below its largest value.
DECADES = 4
# Of a normalized spectrum, eigenvalues below this share of the largest are drawn linearly.
LINEAR = 3e-3
# Down, nothing, up; colours stand where lightness (L* of CIELAB) falls evenly to either side.
SIGNED = LinearSegmentedColormap.from_list(
    "signed",
    [
        (0.0, "#7b3306"), (0.2, DOWN), (0.43, "#f7d9bd"), (0.5, "#f7fafc"), (0.587, "#bcd7ee"),
        (0.853, UP), (1.0, "#14365c"),
    ],
)  # fmt: skip


def layer_figure(measurement: HessianMeasurement, *, title: str = "") -> Figure:
    """Return each layer's trace as a bar with its error bar, in the module's order."""
    m = measurement
    names, note = _largest({name: abs(t.value) for name, t in m.layer_traces.items()}, MOST_LAYERS)
    values = np.array([m.layer_traces[name].value for name in names])
    errors = BAND * np.nan_to_num(np.array([m.layer_traces[name].sem for name in names]))
    figure, (axes,) = subplots(1, 1, size=(6.4, 1.7 + 0.27 * len(names)))
    rows = np.arange(len(names))
    axes.barh(rows, values, color=np.where(values >= 0, UP, DOWN), height=0.72, zorder=2)
    axes.errorbar(values, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5)
    axes.axvline(0, color=INK, lw=0.8)
    _name_rows(axes, names)
    axes.set_xlabel("trace of the layer's Hessian block  (bars: ±2 standard errors)")
    finish_measured(figure, m, (title or "Curvature by layer") + note, outside_words(m))
    return figure


def layer_history_figure(
    history: Sequence[tuple[int, HessianMeasurement]], *, title: str = ""
) -> Figure:
    """Return layers against steps as maps of the trace and, where known, of λ_max.

    Colours are logarithmic: one hue where everything curves up, blue and orange where some
    curves down. What is unknown is hatched.

    Args:
        history: Pairs of optimizer step and measurement, at least one, steps ascending.
        title: Above the figure.
    """
    steps = np.array([step for step, _ in history], dtype=float)
    measurements = [m for _, m in history]
    every = {name: 0.0 for m in measurements for name in m.layers}
    for m in measurements:
        for name, layer in m.layers.items():
            every[name] = max(every[name], abs(np.nan_to_num(layer.trace)))
    names, note = _largest(every, MOST_LAYERS)
    quantities: dict[str, Callable[[LayerMeasurement], float]] = {"trace": lambda m: m.trace}
    if any(layer.spectrum for m in measurements for layer in m.layers.values()):
        quantities["largest eigenvalue"] = lambda m: (
            float(m.spectrum.lambda_max) if m.spectrum else math.nan
        )
    size = (1.6 + 3.9 * len(quantities), 1.9 + 0.27 * len(names))
    figure, grid = subplots(1, len(quantities), size=size)
    for number, (axes, (label, of)) in enumerate(zip(grid, quantities.items(), strict=True)):
        values = np.array(
            [[of(m.layers[n]) if n in m.layers else math.nan for m in measurements] for n in names]
        )
        image = _draw_map(axes, steps, values)
        axes.set_title(f"{label} of each layer's block", loc="left", color=INK, fontsize=9)
        _name_rows(axes, names if number == 0 else [""] * len(names))
        axes.grid(visible=False)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        # The first column reaches below step 0, where there is none.
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 0 else "")
        # As wide in a tall figure as in a low one.
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=max(12, 2.2 * len(names)))
        bar.ax.tick_params(labelsize=8, colors=INK)
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.outline.set_visible(False)
    heading = (title or "How the layers' curvature moved") + note
    finish_measured(figure, measurements[-1], heading, outside_words(measurements[-1]))
    return figure


def layer_density_figure(measurement: HessianMeasurement, *, title: str = "") -> Figure:
    """Return each layer's normalized spectral density, filled, against the whole's, a line.

    Both are divided by their own largest eigenvalue, so that shapes compare; the axis is
    linear near zero and logarithmic beyond.

    Raises:
        ValueError: If no layer's spectrum was measured.
    """
    m = measurement
    spectra = _spectra(m)
    names, note = _largest({name: abs(m.layers[name].trace) for name in spectra}, MOST_PANELS)
    rows = math.ceil(len(names) / 4)
    columns = math.ceil(len(names) / rows)
    figure, grid = subplots(rows, columns, size=(1.6 + max(2.2 * columns, 4.0), 1.5 + 1.65 * rows))
    reach = math.asinh(1 / LINEAR)
    every = [m.nodes, *(s.nodes for s in spectra.values())]
    lowest = min((float((q / q.abs().max()).min()) for q in every if q.any()), default=0.0)
    low = -reach if lowest < -LINEAR else -1.0
    points = torch.linspace(1.1 * low, 1.1 * reach, 400, dtype=torch.float64)
    floor = 0.1 / m.num_params
    whole = _shares(m.nodes, m.weights, m.run_sizes, points)
    x = points.numpy()
    for axes, name in zip(grid, names, strict=False):
        s = spectra[name]
        own = _shares(s.nodes, s.weights, s.run_sizes, points)
        for mask, color in ((x >= 0, UP), (x <= 0, DOWN)):
            axes.fill_between(
                x[mask], floor, np.maximum(own[mask], floor), color=color, alpha=0.45, lw=0,
                label=f"layer, curving {'up' if color == UP else 'down'}",
            )  # fmt: skip
        axes.plot(x, np.where(whole > floor, whole, np.nan), color=INK, lw=1.1, label="whole")
        axes.set_yscale("log")
        axes.set_ylim(floor, 3)
        axes.set_xlim(x[0], x[-1])
        axes.set_title(_short(name, 26), loc="left", color=INK, fontsize=8.5, pad=3)
        if math.isfinite(s.distance):
            axes.text(
                0.97, 0.95, f"distance {s.distance:.2g}\n± {s.distance_error:.1g}",
                transform=axes.transAxes, ha="right", va="top", fontsize=7, color=INK,
            )  # fmt: skip
        ticks = [t for t in (-1, -0.1, 0, 0.01, 0.1, 1) if math.asinh(t / LINEAR) >= x[0]]
        axes.xaxis.set_major_locator(FixedLocator([math.asinh(t / LINEAR) for t in ticks]))
        axes.set_xticklabels([f"{t:g}" for t in ticks], fontsize=7)
        axes.yaxis.set_minor_locator(NullLocator())
    for number, axes in enumerate(grid):
        if number >= len(names):
            axes.set_visible(False)
            continue
        if number % columns:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("share of\neigenvalues", fontsize=8)
        if number + columns >= len(names):
            axes.set_xlabel("eigenvalue / largest", fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", fontsize=7.5, frameon=False,
        labelcolor=INK,
    )  # fmt: skip
    heading = (title or "Spectrum of each layer and of the whole") + note
    finish_measured(figure, m, heading, _footer(m))
    return figure


def layer_distance_figure(measurement: HessianMeasurement, *, title: str = "") -> Figure:
    """Return how far each layer's spectrum is from the whole's, by depth, with error bars.

    The published measure stands beside it. The nearest layer is filled, and the middle half
    of the layers is shaded.

    Raises:
        ValueError: If no layer's spectrum was measured.
    """
    m = measurement
    spectra = _spectra(m)
    names, note = _largest({name: abs(m.layers[name].trace) for name in spectra}, MOST_LAYERS)
    rows = np.arange(len(names))
    figure, grid = subplots(1, 2, size=(7.2, 1.9 + 0.27 * len(names)), widths=[3, 2])
    values = np.array([spectra[name].distance for name in names])
    errors = BAND * np.array([spectra[name].distance_error for name in names])
    published = np.array([spectra[name].published_distance for name in names])
    quarter = len(names) / 4
    draws = [(grid[0], values, errors, UP), (grid[1], published, None, "#718096")]
    for axes, numbers, half, color in draws:
        if len(names) >= 4:
            axes.axhspan(quarter - 0.5, 3 * quarter - 0.5, color=PALE, alpha=0.15, lw=0, zorder=0)
        axes.errorbar(
            numbers, rows, xerr=half, fmt="o-", color=color, lw=1, ms=5, mfc="white",
            ecolor=color, elinewidth=1.2, capsize=2.5, zorder=3,
        )  # fmt: skip
        if np.isfinite(numbers).any():
            nearest = int(np.nanargmin(numbers))
            axes.plot(numbers[nearest], rows[nearest], "o", color=color, ms=6, zorder=4)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(names) >= 4:
        grid[0].text(
            0.985, quarter - 0.45, "middle half", transform=grid[0].get_yaxis_transform(),
            ha="right", va="top", fontsize=7, color="#718096",
        )  # fmt: skip
    _name_rows(grid[0], names)
    _name_rows(grid[1], [""] * len(names))
    grid[0].set_xlabel("Wasserstein distance of normalized spectra\n(bars: ±2 standard errors)")
    grid[1].set_xlabel("published measure\n(ignores where eigenvalues lie)")
    heading = (title or "How unlike the whole each layer is") + note
    finish_measured(figure, m, heading, _footer(m))
    return figure


def _largest(sizes: Mapping[str, float], most: int) -> tuple[list[str], str]:
    """Return the names of the largest, in order, and what to say of the others."""
    left = len(sizes) - most
    if left <= 0:
        return list(sizes), ""
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:most])
    return [name for name in sizes if name in kept], f"; {left} smaller layers not shown"


def _spectra(m: HessianMeasurement) -> dict[str, LayerSpectrum]:
    spectra = {name: layer.spectrum for name, layer in m.layers.items() if layer.spectrum}
    if not spectra:
        raise ValueError(
            "no layer's spectrum was measured: give num_layer_steps, the Lanczos depth in each "
            "layer's own block."
        )
    return spectra


def _footer(m: HessianMeasurement) -> str:
    sizes = next(iter(_spectra(m).values())).run_sizes
    depth = max(max(s.run_sizes) for s in _spectra(m).values())
    parts = [f"each layer's own block by {len(sizes)} × {depth} Lanczos steps", outside_words(m)]
    return " · ".join(part for part in parts if part)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Put one layer a row, the first on top."""
    axes.set_yticks(np.arange(len(names)), [_short(name, 36) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color=PALE, alpha=0.35, lw=0.6, zorder=0)
    axes.set_axisbelow(True)


def _short(name: str, most: int) -> str:
    """Return a path's end, which tells layers apart, if all of it is too long."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _draw_map(axes: Axes, steps: np.ndarray, values: np.ndarray) -> ScalarMappable:
    """Draw values of shape ``(layers, steps)`` as coloured cells."""
    # What no cell covers shows through.
    axes.patch.set(facecolor="white", hatch="////", edgecolor=PALE)
    rows = np.arange(values.shape[0] + 1) - 0.5
    known = np.ma.masked_invalid(values)
    largest = float(np.ma.abs(known).max()) if known.count() else 1.0
    largest = largest or 1.0
    least = largest * 10.0**-DECADES
    norm: Normalize
    cmap: str | LinearSegmentedColormap
    if known.count() and float(known.min()) < -least:
        norm, cmap = SymLogNorm(100 * least, vmin=-largest, vmax=largest, base=10), SIGNED
    else:
        known = np.ma.maximum(known, least)
        smallest = float(known.min()) if known.count() else least
        norm, cmap = LogNorm(min(smallest, 0.5 * largest), largest), "viridis"
    return axes.pcolormesh(edges(steps), rows, known, norm=norm, cmap=cmap, rasterized=True)


def _shares(nodes: Tensor, weights: Tensor, run_sizes: Sequence[int], points: Tensor) -> np.ndarray:
    """Return the share of eigenvalues within one band of the normalized asinh axis."""
    largest = float(nodes.abs().max()) or 1.0
    width = float(points[-1] - points[0]) / 60
    mapped = torch.asinh(nodes / largest / LINEAR)
    density = resolved_density(mapped, weights, run_sizes, points, width)
    return (density * width * math.sqrt(2 * math.pi)).numpy()

"""Layers as figures: traces, how they moved over a run, spectra, and distance to the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lla_callbacks.hessian.figures import finish_measured
from lla_callbacks.hessian.layer_measures import LayerMeasurement, LayerSpectrum
from lla_callbacks.hessian.layer_names import short_names
from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.hessian.scalars import BAND
from lla_callbacks.hessian.words import outside_words
from lla_callbacks.linalg.density import resolved_density
from lla_callbacks.report.sheet import KEY, bar, caption, key, letters, sheet, width_of
from lla_callbacks.report.style import DOWN, FOOTER, INK, PALE, UP, mark_steps, spans
from lla_callbacks.report.words import in_short, power, written

# More rows than this cannot be read, nor more small panels; the layers with most curvature
# are kept.
MOST_LAYERS = 30
MOST_PANELS = 12
# Height of a row in inches, and letters of the longest name.
ROW, LONGEST = 0.19, 32
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
    shown, left = _names(m.layer_traces, names)
    figure, (axes,) = sheet((ROW * max(len(names), 2),), left=left, above=0.05)
    rows = np.arange(len(names))
    for chosen, color in ((values >= 0, UP), (values < 0, DOWN)):
        _bars(axes, rows[chosen], values[chosen], color)
    axes.hlines(rows, values - errors, values + errors, color=INK, lw=1.2, zorder=3)
    axes.axvline(0, color=INK, lw=0.8)
    _name_rows(axes, shown)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: written(value))
    axes.set_xlabel("trace of the layer's block")
    heading = (title or "Curvature by layer") + note
    most = max(m.layer_traces.items(), key=lambda item: item[1].value, default=None)
    head = []
    if most is not None and math.isfinite(most[1].value):
        every = short_names(list(m.layer_traces))
        name = every[list(m.layer_traces).index(most[0])]
        head = [(f"most in {name}: {in_short(*most[1])}", UP if most[1].value >= 0 else DOWN)]
    notes = "\n".join(filter(None, ["Lines: ± 2 standard errors.", outside_words(m)]))
    finish_measured(figure, m, heading, notes, head)
    return figure


def _bars(axes: Axes, rows: np.ndarray, values: np.ndarray, color: str) -> None:
    """Draw level bars as one collection: thirty patches take as long as the rest."""
    corners = [
        [(0, r - 0.36), (v, r - 0.36), (v, r + 0.36), (0, r + 0.36)]
        for r, v in zip(rows, np.nan_to_num(values), strict=True)
    ]
    if corners:
        axes.add_collection(PolyCollection(corners, facecolors=color, linewidths=0, zorder=2))


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
    shown, left = _names(every, names)
    height = ROW * max(len(names), 4)
    figure, grid = sheet([height] * len(quantities), left=left, right=0.62, inner=0.3, above=0.24)
    for number, (axes, (label, of)) in enumerate(zip(grid, quantities.items(), strict=True)):
        values = np.array(
            [[of(m.layers[n]) if n in m.layers else math.nan for m in measurements] for n in names]
        )
        image = _draw_map(axes, steps, values)
        caption(axes, f"{label} of each layer's block")
        _name_rows(axes, shown)
        axes.grid(visible=False)
        mark_steps(axes, steps)
        if number + 1 < len(grid):
            axes.set_xlabel("")
        assert isinstance(image.norm, Normalize)
        bar(figure, axes, image, *_powers(image.norm), "")
    heading = (title or "How the layers' curvature moved") + note
    finish_measured(figure, measurements[-1], heading, outside_words(measurements[-1]))
    return figure


def _powers(norm: Normalize) -> tuple[list[float], list[str]]:
    """Return powers of ten in a logarithmic range, or round values if there are too few."""
    assert norm.vmin is not None
    assert norm.vmax is not None
    largest = max(abs(norm.vmin), abs(norm.vmax))
    last = math.floor(math.log10(largest) + 1e-9)
    exponents = range(last - DECADES, last + 1)
    positive = [(10.0**k, power(k)) for k in exponents if norm.vmin <= 10.0**k <= norm.vmax]
    if norm.vmin < 0:
        kept = positive[-2:]
        marks = [*((-v, f"−{t}") for v, t in reversed(kept)), (0.0, "0"), *kept]
    elif len(positive) < 2:
        ends = [norm.vmin, math.sqrt(norm.vmin * norm.vmax), norm.vmax]
        marks = [(v, written(float(f"{v:.2g}"))) for v in ends]
    else:
        marks = positive
    return [v for v, _ in marks], [t for _, t in marks]


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
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure, grid = sheet(
        [0.95 if columns > 1 else 1.6] * rows, columns, left=0.52, between=0.14, right=0.08,
        inner=0.06, above=0.22,
    )  # fmt: skip
    shown = short_names(list(spectra))
    called = dict(zip(spectra, shown, strict=True))
    reach = math.asinh(1 / LINEAR)
    every = [m.nodes, *(s.nodes for s in spectra.values())]
    lowest = min((float((q / q.abs().max()).min()) for q in every if q.any()), default=0.0)
    low = -reach if lowest < -LINEAR else -1.0
    points = torch.linspace(1.1 * low, 1.1 * reach, 240, dtype=torch.float64)
    floor = 0.1 / m.num_params
    whole = _shares(m, points)
    x = points.numpy()
    for axes, name in zip(grid, names, strict=False):
        s = spectra[name]
        own = _shares(s, points)
        for mask, color in ((x >= 0, UP), (x <= 0, DOWN)):
            axes.fill_between(
                x[mask], floor, np.maximum(own[mask], floor), color=color, alpha=0.45, lw=0,
            )  # fmt: skip
        axes.plot(
            x,
            np.where(whole > floor, whole, np.nan),
            color=INK,
            lw=1.1,
            label="the whole" if axes is grid[0] else None,
        )
        axes.set_yscale("log")
        axes.set_ylim(floor, 3)
        axes.set_xlim(x[0], x[-1])
        _, _, width, _ = figure.box_of(axes)
        caption(axes, _short(called[name], letters(width, KEY)), fontsize=KEY)
        if math.isfinite(s.distance):
            axes.text(
                0.97, 0.95, f"{s.distance:.2g}\n± {s.distance_error:.1g}",
                transform=axes.transAxes, ha="right", va="top", fontsize=KEY, color=INK,
            )  # fmt: skip
        ticks = [t for t in (-1, -0.1, 0, 0.1, 1) if math.asinh(t / LINEAR) >= x[0]]
        axes.set_xticks([math.asinh(t / LINEAR) for t in ticks], [written(t) for t in ticks])
        axes.set_yticks([t for t in (1e-6, 1e-4, 1e-2, 1.0) if t >= floor])
        axes.yaxis.set_major_formatter(lambda value, _: power(round(math.log10(value))))
        axes.tick_params(labelsize=KEY)
    for number, axes in enumerate(grid):
        if number >= len(names):
            axes.set_visible(False)
            continue
        if number % columns:
            axes.tick_params(labelleft=False)
        if number + columns < len(names):
            axes.tick_params(labelbottom=False)
        if number >= columns * (rows - 1):
            axes.set_xlabel("eigenvalue / largest")
    # Colours are named once, and so is what the numbers in the panels are.
    grid[0].plot([], [], "s", color=UP, alpha=0.45, ms=7, ls="none", label="layer, up")
    grid[0].plot([], [], "s", color=DOWN, alpha=0.45, ms=7, ls="none", label="down")
    key(figure, grid[0])
    heading = (title or "Spectrum of each layer and of the whole") + note
    note = "Vertical: share of eigenvalues. Numbers: distance to the whole."
    finish_measured(figure, m, heading, "\n".join([note, _footer(m)]))
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
    shown, left = _names(spectra, names)
    figure, grid = sheet(
        (ROW * max(len(names), 3),), 2, left=min(left, 1.7), between=0.08, right=0.14, above=0.4,
        below=0.26,
    )  # fmt: skip
    values = np.array([spectra[name].distance for name in names])
    errors = BAND * np.array([spectra[name].distance_error for name in names])
    published = np.array([spectra[name].published_distance for name in names])
    quarter = len(names) / 4
    draws = [(grid[0], values, errors, UP), (grid[1], published, None, FOOTER)]
    for axes, numbers, half, color in draws:
        if len(names) >= 4:
            axes.axhspan(quarter - 0.5, 3 * quarter - 0.5, color=PALE, alpha=0.15, lw=0, zorder=0)
        axes.plot(numbers, rows, "o-", color=color, lw=1, ms=5, mfc="white", zorder=3)
        if half is not None:
            axes.hlines(rows, numbers - half, numbers + half, color=color, lw=1.2, zorder=2)
        if np.isfinite(numbers).any():
            nearest = int(np.nanargmin(numbers))
            axes.plot(numbers[nearest], rows[nearest], "o", color=color, ms=6, zorder=4)
        known = numbers[np.isfinite(numbers)]
        axes.set_xlim(
            0,
            1.08
            * max(
                float((known if half is None else np.nan_to_num(numbers + half)).max(initial=0)),
                1e-300,
            ),
        )
        axes.xaxis.set_major_locator(MaxNLocator(3 if half is not None else 2))
        axes.xaxis.set_major_formatter(lambda value, _: written(float(f"{value:.3g}")))
    if len(names) >= 4:
        grid[0].text(
            0.985, quarter - 0.45, "middle half", transform=grid[0].get_yaxis_transform(),
            ha="right", va="top", fontsize=7, color="#718096",
        )  # fmt: skip
    for axes, names_there in zip(grid, (shown, [""] * len(names)), strict=True):
        _name_rows(axes, names_there)
    caption(grid[0], "Wasserstein distance\nof normalized spectra")
    caption(grid[1], "published measure:\nignores their places")
    heading = (title or "How unlike the whole each layer is") + note
    finish_measured(figure, m, heading, "Lines: ± 2 standard errors.\n" + _footer(m))
    return figure


def _names(every: Iterable[str], names: Sequence[str]) -> tuple[list[str], float]:
    """Return how layers are called on an axis, and the room that this takes, in inches."""
    every = list(every)
    called = dict(zip(every, short_names(every), strict=True))
    found = [_short(called[name], LONGEST) for name in names]
    return found, 0.14 + max((width_of(name, KEY + 0.5) for name in found), default=0.0)


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
    runs = f"{len(sizes)} runs of " if len(sizes) > 1 else ""
    depth = max(max(s.run_sizes) for s in _spectra(m).values())
    parts = [f"each layer's own block by {runs}{depth} Lanczos steps", outside_words(m)]
    return " · ".join(part for part in parts if part)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Put one layer a row, the first on top."""
    axes.set_yticks(np.arange(len(names)), names, fontsize=KEY + 0.5)
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
    return axes.pcolormesh(spans(steps), rows, known, norm=norm, cmap=cmap, rasterized=True)


def _shares(found: HessianMeasurement | LayerSpectrum, points: Tensor) -> np.ndarray:
    """Return the share of eigenvalues within one band of the normalized asinh axis.

    There is none beyond the extremes and their residuals.
    """
    nodes = found.nodes
    largest = float(nodes.abs().max()) or 1.0
    width = float(points[-1] - points[0]) / 60
    low, high = float(nodes.min()), float(nodes.max())
    for end, sign in ((found.lambda_min, -1), (found.lambda_max, 1)):
        if math.isfinite(float(end) + end.residual):
            low = min(low, float(end) + sign * end.residual)
            high = max(high, float(end) + sign * end.residual)
    low, high = (math.asinh(end / largest / LINEAR) for end in (low, high))
    mapped = torch.asinh(nodes / largest / LINEAR)
    density = resolved_density(mapped, found.weights, found.run_sizes, points, width, (low, high))
    return (density * width * math.sqrt(2 * math.pi)).numpy()

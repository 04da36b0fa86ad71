"""The spectrum as figures: at one measurement and over a run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.linalg.density import default_width, resolved_density
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.report.sheet import Sheet, bar, caption, sheet
from lla_callbacks.report.style import (
    DOWN,
    INK,
    MODES,
    UP,
    mark_steps,
    padded,
    round_ticks,
    spans,
)
from lla_callbacks.report.words import end_in_short, in_short, power

# Of a history's largest eigenvalue, what is below this share is drawn linearly.
LINEAR = 3e-3
# Decades below the largest eigenvalue that are worth a part of the picture of counts.
DECADES = 5.0


def density_figure(measurement: HessianMeasurement, *, title: str = "") -> Figure:
    """Return the spectral density on a true eigenvalue axis, and how many eigenvalues are larger.

    Above, the height is the estimated number of eigenvalues within one smoothing width, on a
    log axis, and zero beyond the extremes; a dotted line marks one eigenvalue. Eigenvalues that
    the Lanczos run resolved one by one stand as pins of that height, and are in no curve. The
    extremes carry where they may still lie. Below, how many eigenvalues curve more than a size,
    upwards and downwards, both axes logarithmic: bulk and outliers in one line. Its band is what
    the quadrature leaves open. Negative curvature is orange.
    """
    m = measurement
    if not m.nodes.numel():
        return _gap_figure(m, title or "Hessian spectrum")
    figure, (whole, larger) = sheet((1.5, 1.35), left=0.5, inner=0.44)
    width = default_width(m.nodes)
    single = _single(m, width)
    _draw_density(whole, m, width, single)
    caption(whole, f"eigenvalues within {width:.2g} of each value")
    _mark_extremes(whole, m)
    _draw_counts(larger, m, single)
    caption(larger, "how many curve more than that, up and down")
    what = "Gauss-Newton spectrum" if m.matrix == "ggn" else "Hessian spectrum"
    finish_measured(figure, m, title or what, headline=headline_of(m))
    return figure


def headline_of(m: HessianMeasurement) -> list[tuple[str, str]]:
    """Return what matters most, as texts and their colours."""
    parts = [
        ("λmax", m.lambda_max, end_in_short(m.lambda_max, 1), UP),
        ("λmin", m.lambda_min, end_in_short(m.lambda_min, -1), DOWN if m.lambda_min < 0 else UP),
        ("trace", m.trace, in_short(m.trace, m.trace_sem), INK),
    ]
    return [(f"{name} {text}", c) for name, value, text, c in parts if math.isfinite(value)]


def reach_of(end: Eigenvalue, sign: int) -> tuple[float, float]:
    """Return from where to where an extreme may lie: inwards its residual, outwards ``beyond``."""
    inner, outer = end - sign * end.residual, end + sign * end.beyond
    return min(inner, outer), max(inner, outer)


def history_figure(history: Sequence[tuple[int, HessianMeasurement]], *, title: str = "") -> Figure:
    """Return how the spectrum moved: density over steps as a map, extremes as lines on it.

    The eigenvalue axis is linear near zero and logarithmic beyond, so that the bulk and
    the outliers are both seen.

    Args:
        history: Pairs of optimizer step and measurement, at least one, steps ascending; those
            without a density are left out.
        title: Above the figure.
    """
    known = [(step, m) for step, m in history if m.nodes.numel()]
    if not known:
        return _gap_figure(history[-1][1], title or "How the spectrum moved")
    steps = np.array([step for step, _ in known], dtype=float)
    measurements = [m for _, m in known]
    reach = max(float(m.nodes.abs().max()) for m in measurements) or 1.0
    linear = LINEAR * reach

    def drawn(values: Sequence[float]) -> np.ndarray:
        return np.arcsinh(np.array(values, dtype=float) / linear)

    ends = [_extremes(m) for m in measurements]
    low = min(float(drawn([min(low for low, _ in ends)])[0]), -0.4)
    high = max(float(drawn([max(high for _, high in ends)])[0]), 1.0)
    low, high = padded(low, high, 0.04)
    grid = torch.linspace(low, high, 240, dtype=torch.float64)
    width = (high - low) / 40
    columns = [
        m.num_params
        * width
        * resolved_density(
            torch.asinh(m.nodes / linear), m.weights, m.run_sizes, grid, width,
            (float(drawn([a])[0]), float(drawn([b])[0])),
        )
        for m, (a, b) in zip(measurements, ends, strict=True)
    ]  # fmt: skip
    density = torch.stack(columns, dim=1).numpy()
    top = max(10.0, float(density.max()))
    figure, (axes,) = sheet((2.3,), left=0.56, right=0.84, above=0.1)
    borders = spans(steps)
    heights = np.linspace(low, high, len(grid) + 1)
    image = axes.pcolormesh(
        borders, heights, np.ma.masked_less(density, 0.1), norm=LogNorm(0.1, top), cmap="viridis",
        rasterized=True,
    )  # fmt: skip
    for key, sign, color in (("lambda_max", 1, UP), ("lambda_min", -1, DOWN)):
        values = drawn([float(getattr(m, key)) for m in measurements])
        spread = np.array([reach_of(getattr(m, key), sign) for m in measurements])
        axes.vlines(
            steps,
            drawn(spread[:, 0].tolist()),
            drawn(spread[:, 1].tolist()),
            color=color,
            lw=1.2,
            zorder=4,
        )
        axes.plot(
            steps, values, color=color, lw=1.8, marker="o", ms=4, mec="white", mew=0.7, zorder=5,
            clip_on=False, label=key,
        )  # fmt: skip
    exponents = range(math.ceil(math.log10(3 * linear)), math.ceil(math.log10(reach)) + 1)
    marks = [0.0, *(s * 10.0**k for k in exponents for s in (1, -1))]
    texts = ["0", *(sign + power(k) for k in exponents for sign in ("", "−"))]
    inside = [
        (p, t) for p, t in zip(drawn(marks), texts, strict=True) if low - 1e-9 <= p <= high + 1e-9
    ]
    axes.set_yticks([p for p, _ in inside], [t for _, t in inside])
    axes.set_ylim(low, high)
    mark_steps(axes, steps)
    axes.set_ylabel("eigenvalue")
    decades = range(-1, math.floor(math.log10(top)) + 1)
    bar(
        figure, axes, image, [10.0**k for k in decades], [power(k) for k in decades],
        "eigenvalues per band",
    )  # fmt: skip
    last = measurements[-1]
    finish_measured(figure, last, title or "How the spectrum moved", headline=headline_of(last))
    return figure


def _gap_figure(m: HessianMeasurement, title: str) -> Figure:
    """Return a figure that says why there is no density, and what is known instead."""
    figure, (axes,) = sheet((1.6,), left=0.14)
    axes.set_axis_off()
    ends = [(m.lambda_min, "λmin", -1), (m.lambda_max, "λmax", 1)]
    known = [f"{name} {end_in_short(v, s)}" for v, name, s in ends if v == v]
    text = [*textwrap.wrap("No density: " + m.gaps.get("density", "it was not measured"), 54)]
    text += ["", "   ".join(known) or "No extreme eigenvalues either."]
    axes.text(0, 1.0, "\n".join(text), transform=axes.transAxes, va="top", color=INK, fontsize=9.5)
    finish_measured(figure, m, title)
    return figure


def spent_words(runs: int, num_steps: int, num_probes: int) -> list[str]:
    """Return on what a measurement rests, and what for."""
    each = f"{runs} runs of {num_steps}" if runs > 1 else f"{num_steps}"
    return [f"{each} Lanczos steps (eigenvalues)", f"{num_probes} probes (trace)"]


def finish_measured(
    figure: Sheet,
    m: HessianMeasurement,
    title: str,
    note: str = "",
    headline: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the title, and below the figure what was measured; ``note`` goes before it."""
    figure.finish(
        title,
        [
            "Gauss-Newton part" if m.matrix == "ggn" else "",
            f"{m.num_params:,} parameters",
            f"{m.num_samples:,} samples",
            MODES.get(m.mode, m.mode),
            *spent_words(len(m.run_sizes), m.num_steps, m.num_probes),
            m.precision if m.engine == "exact" else f"{m.precision}, by differences of gradients",
            f"seed {m.seed}",
            "" if m.self_check is None else m.self_check.footer(),
        ],
        [*note.splitlines(), *m.notes],
        headline,
    )


def _draw_density(axes: Axes, m: HessianMeasurement, width: float, single: Tensor) -> None:
    """Draw a density within the extremes, and pins for what was resolved one by one."""
    ends = _extremes(m)
    low, high = padded(*ends, 0.06)
    grid = torch.linspace(*ends, 500, dtype=torch.float64)
    # Times width and dimension: a number of eigenvalues, which means something to a reader.
    scale = m.num_params * width * math.sqrt(2 * math.pi)
    weights = torch.where(single, torch.zeros_like(m.weights), m.weights)
    counts = (scale * resolved_density(m.nodes, weights, m.run_sizes, grid, width, ends)).numpy()
    x = grid.numpy()
    floor = 0.1
    for mask, color in ((x >= 0, UP), (x <= 0, DOWN)):
        height = counts[mask]
        if mask.any():
            seen = np.where(height > floor, height, np.nan)
            axes.fill_between(
                x[mask], floor, np.maximum(height, floor), color=color, alpha=0.35, lw=0
            )
            axes.plot(x[mask], seen, color=color, lw=1.6)
    axes.axhline(1, color=INK, lw=0.8, ls=":", zorder=1)
    axes.axvline(0, color=INK, lw=0.6, alpha=0.5)
    pins = m.nodes[: m.run_sizes[0]][single[: m.run_sizes[0]]].numpy()
    for chosen, color in ((pins[pins >= 0], UP), (pins[pins < 0], DOWN)):
        if len(chosen):
            axes.vlines(chosen, floor, 1, color=color, lw=1.2, zorder=3)
            axes.plot(chosen, np.ones(len(chosen)), "o", color=color, ms=4.5, zorder=4)
    axes.set_yscale("log")
    top = max(10.0, float(counts.max())) * 3
    axes.set_ylim(floor, top)
    _mark_powers(axes.yaxis, -1, math.log10(top), 5)
    axes.set_xlim(low, high)
    axes.set_xlabel("eigenvalue")
    axes.xaxis.set_major_locator(round_ticks())


def _draw_counts(axes: Axes, m: HessianMeasurement, single: Tensor) -> None:
    """Draw how many eigenvalues of the first run's quadrature are larger than a size."""
    count = m.run_sizes[0]
    nodes = m.nodes[:count]
    each = m.weights[:count] * len(m.run_sizes) * m.num_params
    # A weight is random; what was resolved one by one is one.
    number = torch.where(single[:count], torch.ones_like(each), each).numpy()
    values = nodes.numpy()
    reach = float(np.abs(values).max()) or 1.0
    sizes = np.abs(values)
    seen = sizes[sizes > 10**-DECADES * reach]
    left = 0.7 * min(float(seen.min()) if seen.size else reach, 0.1 * reach)
    floor, most = 0.4, 1.0
    for sign, color in ((1, UP), (-1, DOWN)):
        order = np.flatnonzero(sign * values > 0)
        order = order[np.argsort(-sizes[order])]
        if not order.size:
            continue
        x = np.maximum(sizes[order], 1e-3 * left)
        upper = np.cumsum(number[order])
        lower = upper - number[order]
        # On to the left edge, where nothing more is told apart.
        x, upper, lower = (np.append(a, b) for a, b in ((x, 1e-3 * left), (upper, upper[-1]),
                                                        (lower, lower[-1])))  # fmt: skip
        axes.fill_between(
            x, np.maximum(lower, floor), np.maximum(upper, floor), color=color, alpha=0.2, lw=0
        )
        axes.plot(x, np.maximum((upper + lower) / 2, floor), color=color, lw=1.8)
        most = max(most, float(upper[-1]))
    axes.axhline(1, color=INK, lw=0.8, ls=":", zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, 1.3 * reach)
    axes.set_ylim(floor, 2 * most)
    _mark_powers(axes.yaxis, math.log10(floor), math.log10(2 * most), 5)
    _mark_powers(axes.xaxis, math.log10(left), math.log10(1.3 * reach), 6)
    axes.set_xlabel("size of the eigenvalue")


def _mark_powers(axis: object, low: float, high: float, most: int) -> None:
    """Put plain or superscript powers of ten on a log axis, at most so many."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    # One, where it is there, is marked.
    start = first + (-first) % stride
    chosen = range(start, last + 1, stride)
    axis.set_ticks([10.0**k for k in chosen], labels=[power(k) for k in chosen])  # type: ignore[attr-defined]
    axis.set_ticks([], minor=True)  # type: ignore[attr-defined]


def _extremes(m: HessianMeasurement) -> tuple[float, float]:
    """Return the range in which eigenvalues are drawn: no further than any was found."""
    ends = [float(m.nodes.min()), float(m.nodes.max())]
    ends += [float(v) for v in (m.lambda_min, m.lambda_max) if math.isfinite(v)]
    low, high = min(ends), max(ends)
    if not low < high:
        half = 0.05 * abs(low) or 1e-12
        return low - half, high + half
    return low, high


def _single(m: HessianMeasurement, width: float) -> Tensor:
    """Return which nodes stand for one eigenvalue that converged, as a mask.

    A node does when its residual is far below the smoothing width and its weight is that
    of a few eigenvalues at most (a weight is random, so it is not asked to be exactly one).
    What other runs found of the same eigenvalue is it too.
    """
    weights = m.weights * len(m.run_sizes) * m.num_params
    found = torch.zeros_like(m.nodes, dtype=torch.bool)
    first = m.run_sizes[0]
    found[:first] = (m.eigenvalue_residuals < 0.1 * width) & (weights[:first] < 8)
    pins = m.nodes[:first][found[:first]]
    if len(pins) and first < len(m.nodes):
        near = (m.nodes[first:, None] - pins[None]).abs().min(dim=1).values < 0.5 * width
        found[first:] = near & (weights[first:] < 8)
    return found


def _mark_extremes(axes: Axes, m: HessianMeasurement) -> None:
    lowest = DOWN if m.lambda_min < 0 else UP
    for value, sign, color in ((m.lambda_max, 1, UP), (m.lambda_min, -1, lowest)):
        axes.axvline(float(value), color=color, lw=1, ls="--", alpha=0.8)
        low, high = reach_of(value, sign)
        if math.isfinite(high):
            axes.axvspan(low, high, color=color, alpha=0.2, lw=0)

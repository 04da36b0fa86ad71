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
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator
from torch import Tensor

from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.linalg.density import broadened, default_width, resolved_density
from lla_callbacks.report.style import DOWN, INK, MODES, PALE, UP, edges, finish, padded, subplots


def density_figure(measurement: HessianMeasurement, *, title: str = "") -> Figure:
    """Return the spectral density on a true eigenvalue axis, with a close-up of the bulk.

    The height is the estimated number of eigenvalues within one smoothing width, on a log
    axis; a dotted line marks one eigenvalue. Eigenvalues that the Lanczos run resolved one
    by one stand as pins of that height. Negative curvature is orange. The extreme
    eigenvalues carry their residuals.
    """
    m = measurement
    if not m.nodes.numel():
        return _gap_figure(m, title or "Hessian spectrum")
    figure, (whole, bulk) = subplots(1, 2, size=(8.0, 3.5), widths=[2, 1])
    low, high = float(m.nodes.min()), float(m.nodes.max())
    _draw_density(whole, m, *padded(low, high, 0.06), default_width(m.nodes))
    whole.set_title("whole spectrum", loc="left", color=INK)
    _mark_extremes(whole, m)

    inner_low, inner_high = _bulk(m)
    # A close-up is never coarser than the whole.
    width = min(max((inner_high - inner_low) / 50, 1e-12), default_width(m.nodes))
    _draw_density(bulk, m, *padded(inner_low, inner_high, 0.1), width, resolution=True)
    bulk.set_title("close-up of the bulk", loc="left", color=INK)
    # Where the close-up sits in the whole.
    whole.axvspan(inner_low, inner_high, color=PALE, alpha=0.18, lw=0, zorder=0)
    finish_measured(figure, m, title or "Hessian spectrum")
    return figure


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
    history = known
    steps = np.array([step for step, _ in history], dtype=float)
    measurements = [m for _, m in history]
    reach = max(float(m.nodes.abs().max()) for m in measurements) or 1.0
    # Smaller eigenvalues than this share of the largest count as the middle of the map.
    linear = 3e-3 * reach
    low, high = (
        math.asinh(end / linear)
        for end in (min(float(m.nodes.min()) for m in measurements) * 1.3, reach * 1.3)
    )
    low = min(low, -1.0)
    grid = torch.linspace(low, high, 260, dtype=torch.float64)
    width = (high - low) / 36
    columns = [
        m.num_params * width * _spread(torch.asinh(m.nodes / linear), m, grid, width)
        for m in measurements
    ]
    density = torch.stack(columns, dim=1).clamp(min=1e-2).numpy()
    figure, (axes,) = subplots(1, 1, size=(7.2, 3.8))
    image = axes.pcolormesh(
        edges(steps), edges(linear * np.sinh(grid.numpy())), density,
        norm=LogNorm(0.1, max(10.0, float(density.max()))), cmap="viridis", rasterized=True,
    )  # fmt: skip
    axes.set_yscale("symlog", linthresh=linear)
    powers = range(math.ceil(math.log10(3 * linear)), math.ceil(math.log10(reach)) + 1)
    decades = [10.0**k for k in powers]
    lowest = linear * math.sinh(low)
    ticks = [*(-t for t in decades if t < -1.3 * lowest), 0.0, *decades]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(linear * math.sinh(low), linear * math.sinh(high))
    for key, color, label in (("lambda_max", "white", "λmax"), ("lambda_min", DOWN, "λmin")):
        values = [float(getattr(m, key)) for m in measurements]
        residuals = [getattr(m, key).residual for m in measurements]
        axes.errorbar(
            steps, values, yerr=residuals, color=color, lw=1.4, marker="o", ms=3, capsize=2,
            label=label,
        )  # fmt: skip
    axes.set_xlim(edges(steps)[0], edges(steps)[-1])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("eigenvalue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, facecolor="#44546a",
        labelcolor="white", framealpha=0.9, borderaxespad=0.2,
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.set_label("eigenvalues per band (log)")
    bar.outline.set_visible(False)
    finish_measured(figure, measurements[-1], title or "How the spectrum moved")
    return figure


def _gap_figure(m: HessianMeasurement, title: str) -> Figure:
    """Return a figure that says why there is no density, and what is known instead."""
    figure, (axes,) = subplots(1, 1, size=(8.0, 2.2))
    axes.set_axis_off()
    ends = [(m.lambda_min, "λmin"), (m.lambda_max, "λmax")]
    known = [f"{name} = {float(v):.4g} ± {v.residual:.0e}" for v, name in ends if v == v]
    text = [*textwrap.wrap("No density: " + m.gaps.get("density", "it was not measured"), 78)]
    text += ["", "   ".join(known) or "No extreme eigenvalues either."]
    axes.text(0, 0.95, "\n".join(text), transform=axes.transAxes, va="top", color=INK, fontsize=10)
    finish_measured(figure, m, title)
    return figure


def finish_measured(figure: Figure, m: HessianMeasurement, title: str, note: str = "") -> None:
    """Write the title, and below the figure what was measured; ``note`` goes before it."""
    finish(
        figure,
        title,
        [
            "Gauss-Newton part" if m.matrix == "ggn" else "",
            f"{m.num_params:,} parameters",
            f"{m.num_samples:,} samples",
            MODES.get(m.mode, m.mode),
            f"{len(m.run_sizes)} × {m.num_steps} Lanczos steps, {m.num_probes} probes",
            m.precision if m.engine == "exact" else f"{m.precision}, by differences of gradients",
            f"seed {m.seed}",
            "" if m.self_check is None else m.self_check.footer(),
        ],
        [*note.splitlines(), *m.notes],
    )


def _draw_density(
    axes: Axes,
    m: HessianMeasurement,
    low: float,
    high: float,
    width: float,
    *,
    resolution: bool = False,
) -> None:
    grid = torch.linspace(low, high, 900, dtype=torch.float64)
    # Times width and dimension: a number of eigenvalues, which means something to a reader.
    scale = m.num_params * width * math.sqrt(2 * math.pi)
    density = (
        _spread(m.nodes, m, grid, width)
        if resolution
        else broadened(m.nodes, m.weights, grid, width)
    )
    counts = (scale * density).numpy()
    x = grid.numpy()
    floor = 0.1
    for mask, color in ((x >= 0, UP), (x <= 0, DOWN)):
        height = counts[mask]
        seen = np.where(height > floor, height, np.nan)
        axes.fill_between(x[mask], floor, np.maximum(height, floor), color=color, alpha=0.35, lw=0)
        axes.plot(x[mask], seen, color=color, lw=1.6)
    axes.axhline(1, color=INK, lw=0.8, ls=":", zorder=1)
    axes.axvline(0, color=INK, lw=0.6, alpha=0.5)
    for value, color in _resolved(m, low, high, width):
        axes.plot([value, value], [floor, 1], color=color, lw=1.2, zorder=3)
        axes.plot([value], [1], "o", color=color, ms=4.5, zorder=4)
    axes.set_yscale("log")
    axes.set_ylim(floor, max(10.0, float(counts.max())) * 4)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.set_xlim(low, high)
    axes.set_xlabel("eigenvalue")
    axes.xaxis.set_major_locator(MaxNLocator(4 if resolution else 6))
    axes.set_ylabel(f"eigenvalues within {width:.2g}")


def _spread(nodes: Tensor, m: HessianMeasurement, grid: Tensor, width: float) -> Tensor:
    return resolved_density(nodes, m.weights, m.run_sizes, grid, width)


def _resolved(
    m: HessianMeasurement, low: float, high: float, width: float
) -> list[tuple[float, str]]:
    """Return single eigenvalues that converged, with their colours.

    A node is one when its residual is far below the smoothing width and its weight is that
    of a few eigenvalues at most (a weight is random, so it is not asked to be exactly one).
    """
    weights = m.weights[: m.run_sizes[0]] * len(m.run_sizes) * m.num_params
    return [
        (float(value), UP if value >= 0 else DOWN)
        for value, residual, weight in zip(
            m.eigenvalues, m.eigenvalue_residuals, weights, strict=True
        )
        if low <= value <= high and residual < 0.1 * width and weight < 8
    ]


def _mark_extremes(axes: Axes, m: HessianMeasurement) -> None:
    marks = [(m.lambda_max, UP, "λmax"), (m.lambda_min, DOWN, "λmin")]
    for row, (value, color, label) in enumerate(marks):
        color = color if label == "λmax" or value < 0 else UP
        axes.axvline(float(value), color=color, lw=1, ls="--", alpha=0.8)
        low, high = float(value) - value.residual, float(value) + value.residual
        axes.axvspan(low, high, color=color, alpha=0.2, lw=0)
        axes.text(
            0.95, 0.98 - 0.075 * row, f"{label} = {float(value):.4g} ± {value.residual:.0e}",
            transform=axes.transAxes, ha="right", va="top", fontsize=9, color=color,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )  # fmt: skip


def _bulk(m: HessianMeasurement) -> tuple[float, float]:
    """Return the range of nodes around zero that holds 99 % of the weight."""
    order = torch.argsort(m.nodes.abs())
    share = torch.cumsum(m.weights[order], dim=0)
    count = int((share < 0.99).sum()) + 1
    inner = m.nodes[order[:count]]
    low, high = min(float(inner.min()), 0.0), max(float(inner.max()), 0.0)
    if high == low:
        high = low + 1e-12
    return low, high

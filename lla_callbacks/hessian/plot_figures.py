"""Spectra and runs on axes of anybody's figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lla_callbacks.hessian.figures import reach_of
from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.linalg.density import broadened, default_width
from lla_callbacks.report.picture import SERIES, picture
from lla_callbacks.report.style import INK, UP
from lla_callbacks.report.words import end_in_short

# Fewer eigenvalues than this in a width are nothing.
FLOOR = 0.1
History = Sequence[tuple[int, HessianMeasurement]]


def draw_spectrum(
    axes: Axes,
    m: HessianMeasurement,
    *,
    color: str = UP,
    name: str = "",
    width: float | None = None,
) -> None:
    """Draw how many eigenvalues lie near each value, and both extremes, with where they may lie."""
    axes.set_xlabel("eigenvalue")
    if not m.nodes.numel():
        axes.text(
            0.5, 0.5, m.gaps.get("density", "no density"), transform=axes.transAxes, ha="center",
            wrap=True, fontsize=9, color=INK,
        )  # fmt: skip
        return
    width = width or default_width(m.nodes)
    # No kernel paints what lies beyond the extremes.
    low, high = float(m.nodes.min()), float(m.nodes.max())
    if high == low:
        low, high = low - width, high + width
    grid = torch.linspace(low, high, 700, dtype=torch.float64)
    scale = m.num_params * width * math.sqrt(2 * math.pi)
    counts = (scale * broadened(m.nodes, m.weights, grid, width)).numpy()
    seen = np.where(counts > FLOOR, counts, np.nan)
    axes.plot(grid.numpy(), seen, color=color, lw=1.6)
    axes.fill_between(grid.numpy(), FLOOR, np.maximum(counts, FLOOR), color=color, alpha=0.25, lw=0)
    ends = [(m.lambda_min, "λmin", -1), (m.lambda_max, "λmax", 1)]
    known = [(e, t, s) for e, t, s in ends if math.isfinite(e)]
    words = ", ".join(f"{t} {end_in_short(e, s)}" for e, t, s in known)
    for end, _, sign in known:
        axes.axvspan(*reach_of(end, sign), color=color, alpha=0.3, lw=0)
    axes.plot(
        [float(e) for e, _, _ in known], [FLOOR * 1.2] * len(known), "^", color=color, ms=6,
        label=f"{name}: {words}" if name else words, clip_on=False,
    )  # fmt: skip
    axes.set_yscale("log")
    top = max(10.0, float(counts.max()), axes.get_ylim()[1] / 3)
    axes.set_ylim(FLOOR, 3 * top)
    axes.set_ylabel(f"eigenvalues within {width:.2g}")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper right")


def compared_spectra(reports: Sequence[HessianMeasurement], names: Sequence[str]) -> Figure:
    """Return spectra over each other, all with one width."""
    figure, (axes,) = picture(size=(6.4, 4.0))
    widths = [default_width(m.nodes) for m in reports if m.nodes.numel()]
    for k, (m, name) in enumerate(zip(reports, names, strict=True)):
        color = SERIES[k % len(SERIES)]
        draw_spectrum(axes, m, color=color, name=name, width=max(widths, default=None))
    return figure


def compared_runs(histories: Sequence[History], names: Sequence[str]) -> Figure:
    """Return the largest eigenvalue and the trace of runs over steps, errors as bands."""
    figure, (left, right) = picture(2, size=(8.4, 3.6))
    for k, (history, name) in enumerate(zip(histories, names, strict=True)):
        color = SERIES[k % len(SERIES)]
        steps = np.array([step for step, _ in history], dtype=float)
        found = [m for _, m in history]
        tops = np.array([float(m.lambda_max) for m in found])
        low, high = np.array([reach_of(m.lambda_max, 1) for m in found]).reshape(-1, 2).T
        traces, sems = (np.array([getattr(m, n) for m in found]) for n in ("trace", "trace_sem"))
        bands = (left, tops, low, high), (right, traces, traces - 2 * sems, traces + 2 * sems)
        for axes, values, lower, upper in bands:
            axes.plot(steps, values, color=color, lw=1.6, marker="o", ms=3.5, label=name)
            axes.fill_between(steps, lower, upper, color=color, alpha=0.2, lw=0)
            if len(steps) == 1:  # a band of no width is not seen
                axes.vlines(steps, lower, upper, color=color, alpha=0.3, lw=6)
    for axes, text in ((left, "largest eigenvalue"), (right, "trace (± 2 standard errors)")):
        axes.set_title(text, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    left.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure

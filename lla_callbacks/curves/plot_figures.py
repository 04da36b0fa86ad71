"""Losses along curves, and barriers, on axes of anybody's figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lla_callbacks.curves.measure import Along
from lla_callbacks.report.picture import SERIES, figure_of, picture
from lla_callbacks.report.style import DOWN, INK, UP


def draw_curve(axes: Axes, along: Along, *, color: str = UP, name: str = "") -> None:
    """Draw the loss along a curve, and dashed that of the straight line."""
    loss = along.loss.numpy()
    barrier = along.statistics().barrier_above_ends
    text = f"{name or ('curve' if along.bends else 'straight line')}, barrier {barrier:.3g}"
    axes.plot(
        along.t.numpy(), np.where(np.isfinite(loss), loss, np.nan), color=color, lw=1.7, label=text
    )
    if along.straight is not None:
        loss = along.straight.loss.numpy()
        barrier = along.straight.statistics().barrier_above_ends
        axes.plot(
            along.straight.t.numpy(), np.where(np.isfinite(loss), loss, np.nan), ls="--", lw=1.3,
            color=DOWN if not name else color,
            label=f"{f'{name}, ' if name else ''}straight line, barrier {barrier:.3g}",
        )  # fmt: skip
    axes.set_xlabel("t  [0: start, 1: end]")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)


def draw_barriers(axes: Axes, names: Sequence[str], matrix: Tensor) -> None:
    """Draw a matrix of barriers with its numbers."""
    values = matrix.numpy()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis")
    bar = figure_of(axes).colorbar(image, ax=axes)
    bar.set_label("barrier above the higher end", color=INK)
    bar.outline.set_visible(False)
    places = range(len(names))
    axes.set_xticks(places, list(names), rotation=45, ha="right")
    axes.set_yticks(places, list(names))


def compared_curves(curves: Sequence[Along], names: Sequence[str]) -> Figure:
    """Return losses along curves over each other."""
    figure, (axes,) = picture(size=(6.2, 4.0))
    for k, (along, name) in enumerate(zip(curves, names, strict=True)):
        draw_curve(axes, along, color=SERIES[k % len(SERIES)], name=name)
    return figure

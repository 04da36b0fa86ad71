"""Small figures in the look of all others, and figures as HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lla_callbacks.report.shown import Picture, png_of
from lla_callbacks.report.style import DPI, INK, bare

# Of several results in one figure.
SERIES = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#4a5568")


def picture(
    columns: int = 1, *, size: tuple[float, float] = (5.2, 3.6)
) -> tuple[Picture, list[Axes]]:
    """Return a figure and its axes, in one row."""
    figure = Picture(figsize=size, dpi=DPI, layout="constrained")
    found = list(figure.subplots(1, columns, squeeze=False).flat)
    for axes in found:
        bare(axes, labelsize=9)
    return figure, found


def heading(figure: Figure, title: str) -> None:
    """Write a title above a figure."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)


def html_of(figures: Sequence[Figure], text: str) -> str:
    """Return figures and a text below them as a piece of HTML that needs no other file."""
    images = [
        f'<img style="max-width:100%" src="data:image/png;base64,'
        f'{base64.b64encode(png_of(figure)).decode()}"/>'
        for figure in figures
    ]
    words = f'<pre style="white-space:pre-wrap">{html.escape(text)}</pre>' if text else ""
    return f"<div>{''.join(images)}{words}</div>"


def figure_of(axes: Any) -> Figure:
    """Return the figure that axes are on, whatever part of it they are in.

    Raises:
        ValueError: If they are no axes of matplotlib.
    """
    if not isinstance(axes, Axes):
        raise ValueError(
            f"ax is of type {type(axes).__name__}; give axes of matplotlib, or None for a figure "
            "of its own."
        )
    found: Any = axes.figure
    while getattr(found, "figure", found) is not found:  # a part of another one
        found = found.figure
    assert isinstance(found, Figure)
    return found

"""Figures whose margins are known beforehand, so that nothing is laid out and drawn twice."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lla_callbacks.report.shown import Picture
from lla_callbacks.report.style import DPI, FOOTER, INK, bare, joined

# TensorBoard shows a picture about 330 pixels wide: at this width a point is a pixel there.
WIDTH = 4.6
TITLE, HEAD, TICKS, KEY, SMALL = 12.0, 10.5, 9.5, 8.0, 6.6
ROW = 0.17
# Mean width of a letter in sizes of its font (DejaVu Sans), and of a bold one.
LETTER, BOLD = 0.58, 0.66
# Inches from the edge of the paper, and between the parts of a headline.
EDGE, GAP = 0.07, 0.13
# Where the end of a colour bar is, from its axes on.
BAR = (0.07, 0.13)


class Sheet(Picture):
    """A figure of axes whose places are told in inches, under a title and above a footer.

    Matplotlib's own layouts draw every text once to see how large it is; that takes longer than
    the picture itself (docs/cost.md).

    Args:
        body: Height of what is between title and footer, in inches.
        width: Of all of it.
    """

    def __init__(self, body: float, width: float = WIDTH) -> None:
        super().__init__(figsize=(width, body), dpi=DPI)
        self.body = body
        self.width = width
        self._head = self._foot = 0.0
        self._boxes: list[tuple[Axes, tuple[float, float, float, float]]] = []
        self._loose: list[tuple[Any, float]] = []

    def panel(self, left: float, top: float, width: float, height: float, **settings: Any) -> Any:
        """Return axes at a place in inches, ``top`` from the upper end of the body."""
        box = (left, top, width, height)
        axes = self.add_axes(self._rectangle(box), **settings)
        self._boxes.append((axes, box))
        return axes

    def box_of(self, axes: Axes) -> tuple[float, float, float, float]:
        """Return left, top, width and height of axes in inches."""
        return next(box for known, box in self._boxes if known is axes)

    def write(self, left: float, top: float, text: str, **settings: Any) -> None:
        """Write a text, its upper left corner at a place in inches."""
        look: dict[str, Any] = {"ha": "left", "va": "top", "fontsize": TICKS, "color": INK}
        self._loose.append((self.text(left / self.width, 0, text, **(look | settings)), top))

    def mark(self, left: float, top: float, width: float = 0.0, **settings: Any) -> None:
        """Draw a marker at a place in inches, or a level line from there on."""
        x = [left / self.width, (left + width) / self.width]
        settings = {"ls": "none" if width == 0 else "-"} | settings
        line = Line2D(
            x[: 1 + (width > 0)], [0] * (1 + (width > 0)), transform=self.transFigure, **settings
        )
        self.add_artist(line)
        self._loose.append((line, top))

    def make_room(self, height: float) -> None:
        """Move everything in the body down, by inches."""
        self.body += height
        self._boxes = [(a, (x, top + height, w, h)) for a, (x, top, w, h) in self._boxes]
        self._loose = [(artist, top + height) for artist, top in self._loose]

    def finish(
        self,
        title: str,
        facts: Sequence[str],
        notes: Sequence[str] = (),
        headline: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Write title, headline and footer, and give the paper the height that all of it takes.

        Args:
            title: The title.
            facts: Conditions, for the last lines.
            notes: Before them.
            headline: Under the title: texts and their colours.
        """
        space = self.width - 2 * EDGE
        lines = _wrapped(title.splitlines(), space, TITLE, BOLD)
        heads = _rows(headline, space)
        last = joined(facts, letters(space, SMALL)).splitlines()
        below = [line for line in [*_wrapped(notes, space, SMALL), *last] if line]
        step = 1.3 * HEAD / 72
        self._head = EDGE + (1.25 * TITLE * len(lines) + 2) / 72 + step * len(heads)
        self._foot = EDGE + 1.3 * SMALL * len(below) / 72
        height = self._head + self.body + self._foot
        self.set_size_inches(self.width, height)
        self.suptitle(
            "\n".join(lines), x=EDGE / self.width, y=1 - EDGE / height, ha="left", va="top",
            fontsize=TITLE, fontweight="bold", color=INK, linespacing=1.1,
        )  # fmt: skip
        self.supxlabel(
            "\n".join(below), x=EDGE / self.width, y=EDGE / height, ha="left", va="bottom",
            fontsize=SMALL, color=FOOTER, linespacing=1.15,
        )  # fmt: skip
        for axes, box in self._boxes:
            axes.set_position(self._rectangle(box))
        for number, row in enumerate(heads):
            left = EDGE
            for text, color in row:
                self.write(left, step * (number - len(heads)), text, fontsize=HEAD, color=color)
                left += width_of(text, HEAD) + GAP
        for artist, top in self._loose:
            y = 1 - (self._head + top) / height
            if isinstance(artist, Line2D):
                artist.set_ydata([y] * len(np.atleast_1d(artist.get_xdata())))
            else:
                artist.set_y(y)

    def _rectangle(
        self, box: tuple[float, float, float, float]
    ) -> tuple[float, float, float, float]:
        left, top, width, height = box
        whole = self._head + self.body + self._foot
        return (
            left / self.width, 1 - (self._head + top + height) / whole, width / self.width,
            height / whole,
        )  # fmt: skip


def sheet(
    heights: Sequence[float],
    columns: int = 1,
    *,
    left: float = 0.64,
    between: float | None = None,
    right: float = 0.14,
    above: float = 0.24,
    below: float = 0.46,
    inner: float | None = None,
) -> tuple[Sheet, list[Axes]]:
    """Return a sheet and its axes, row by row, without upper and right spines.

    Args:
        heights: Of the axes of each row, in inches.
        columns: How many axes a row has.
        left: Room for ticks and the label left of the first column.
        between: Left of the others; the same unless told.
        right: Right of each column.
        above: Above each row.
        below: Below the last row.
        inner: Below the others; the same unless told.
    """
    between = left if between is None else between
    inner = below if inner is None else inner
    gaps = [inner] * (len(heights) - 1) + [below]
    made = Sheet(sum(heights) + sum(gaps) + above * len(heights))
    width = (WIDTH - left - between * (columns - 1) - right * columns) / columns
    axes: list[Axes] = []
    top = 0.0
    for height, gap in zip(heights, gaps, strict=True):
        top += above
        for column in range(columns):
            start = left + column * (width + between + right)
            panel = made.panel(start, top, width, height)
            plain(panel, left if column == 0 else between, gap, width, height)
            axes.append(panel)
        top += height + gap
    return made, axes


def plain(axes: Axes, left: float, below: float, width: float, height: float) -> None:
    """Give axes their look, and their labels a fixed place, in inches."""
    bare(axes, labelsize=TICKS, pad=2, length=3)
    for axis, place in (
        (axes.xaxis, (0.5, -(below - 0.2) / height)), (axes.yaxis, (-(left - 0.21) / width, 0.5)),
    ):  # fmt: skip
        axis.label.set_fontsize(TICKS + 0.5)
        axis.set_label_coords(*place)
        axis.set_minor_locator(NullLocator())
    caption(axes, "")


def caption(axes: Axes, text: str, **settings: Any) -> None:
    """Write a title above axes, on the left, in a place that need not be searched for."""
    look: dict[str, Any] = {"fontsize": TICKS, "color": INK}
    axes.set_title("", y=1.0)
    axes.set_title(text, loc="left", y=1.0, pad=3, **(look | settings))


def bar(
    figure: Sheet,
    axes: Axes,
    image: Any,
    positions: Sequence[float],
    texts: Sequence[str],
    label: str,
    *,
    extend: str = "neither",
) -> Colorbar:
    """Draw a colour bar right of axes, which have room for it there.

    Args:
        figure: The sheet.
        axes: Beside which.
        image: Whose colours.
        positions: Of the ticks, in the image's units.
        texts: What is written there.
        label: Of the bar.
        extend: Which ends of the range values pass.
    """
    left, top, width, height = figure.box_of(axes)
    ruler = figure.panel(left + width + BAR[0], top, BAR[1], height)
    found = figure.colorbar(image, cax=ruler, extend=extend, extendfrac=0.035)
    places = [float(image.norm(p)) for p in positions]
    kept = spread(places, height)
    found.set_ticks([positions[i] for i in kept], labels=[texts[i] for i in kept])
    found.minorticks_off()
    ruler.tick_params(labelsize=TICKS, colors=INK, pad=2, length=3)
    ruler.set_title("", y=1.0)
    found.set_label(label, color=INK, fontsize=TICKS)
    ruler.yaxis.set_label_coords(4.6, 0.5)
    found.outline.set_visible(False)
    return found


def spread(places: Sequence[float], height: float) -> list[int]:
    """Return which ticks are written, so that labels do not overlap.

    All that are inside, every second one, every third: so that they stay even.

    Args:
        places: Where they are on an axis from 0 to 1, ascending.
        height: Of the axis, in inches.
    """
    inside = [i for i, place in enumerate(places) if -1e-6 <= place <= 1 + 1e-6]
    least = 1.35 * TICKS / 72 / height
    for stride in range(1, len(inside) + 1):
        kept = inside[::stride]
        if all(places[b] - places[a] >= least for a, b in pairwise(kept)):
            return kept
    return inside[:1]


def key(figure: Sheet, axes: Axes) -> None:
    """Write what axes' labelled lines are in rows above them, each after its marker."""
    handles, texts = axes.get_legend_handles_labels()
    rows: list[list[tuple[Any, str]]] = []
    used = math.inf
    for handle, text in zip(handles, texts, strict=True):
        need = 0.3 + width_of(text, KEY)
        if used + need > figure.width - EDGE:
            rows.append([])
            used = 0.0
        rows[-1].append((handle, text))
        used += need
    figure.make_room(ROW * len(rows) + 0.04 * bool(rows))
    for number, row in enumerate(rows):
        x, middle = EDGE, ROW * (number + 0.5)
        for handle, text in row:
            # White lines are for pictures; on paper nobody would see them.
            color = INK if handle.get_color() == "white" else handle.get_color()
            if handle.get_linestyle() != "None":
                figure.mark(x, middle, 0.17, color=color, lw=1.6, ls=handle.get_linestyle())
            figure.mark(
                x + 0.085, middle, marker=handle.get_marker(), mfc=handle.get_markerfacecolor(),
                mec=handle.get_markeredgecolor(), ms=min(handle.get_markersize(), 7.5),
                mew=handle.get_markeredgewidth(), color=color,
            )  # fmt: skip
            figure.write(x + 0.21, middle, text, fontsize=KEY, va="center_baseline")
            x += 0.3 + width_of(text, KEY)


def width_of(text: str, size: float) -> float:
    """Return about how wide a text is, in inches."""
    return len(text) * LETTER * size / 72


def letters(width: float, size: float, letter: float = LETTER) -> int:
    """Return how many letters fit into a width in inches."""
    return max(1, int(72 * width / (letter * size)))


def _wrapped(lines: Sequence[str], width: float, size: float, letter: float = LETTER) -> list[str]:
    most = letters(width, size, letter)
    return [part for line in lines for part in textwrap.wrap(line, most)]


def _rows(parts: Sequence[tuple[str, str]], width: float) -> list[list[tuple[str, str]]]:
    rows: list[list[tuple[str, str]]] = []
    used = math.inf
    for text, color in parts:
        need = width_of(text, HEAD) + GAP
        if used + need > width + GAP:
            rows.append([])
            used = 0.0
        rows[-1].append((text, color))
        used += need
    return rows

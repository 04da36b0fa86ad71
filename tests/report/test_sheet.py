"""Figures with fixed margins: nothing overlaps, nothing is outside of the paper, in few steps."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from PIL import Image

from lla_callbacks.report.sheet import WIDTH, Sheet, bar, key, sheet, spread
from lla_callbacks.report.shown import pixels, png_of
from lla_callbacks.report.style import DPI, INK, UP, spans
from lla_callbacks.report.words import in_short, power


def boxes(figure: Sheet) -> list[tuple[float, float, float, float]]:
    """Left, lower, right, upper end of all texts that are drawn, in pixels."""
    pixels(figure)
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, axes._left_title]
    return [tuple(t.get_window_extent().extents) for t in texts if t.get_text().strip()]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] - 1 and b[0] < a[2] - 1 and a[1] < b[3] - 1 and b[1] < a[3] - 1


def test_no_text_lies_on_another_or_off_the_paper() -> None:
    figure, panels = sheet((1.0, 1.2), right=0.84)
    for axes in panels:
        axes.plot([0, 1000], [0.001, 2], "o", ls="none", label="a line of the legend")
        axes.set_xlabel("across")
        axes.set_ylabel("up")
    image = ScalarMappable(LogNorm(1, 1e4))
    bar(figure, panels[0], image, [10.0**k for k in range(5)], list("abcde"), "of colours")
    key(figure, panels[0])
    figure.finish(
        "a long title of a figure " * 4, ["a fact"] * 30, ["a note " * 30],
        [("first number 1.234", UP), ("second number 5.678 ± 0.001", INK), ("third 9", INK)],
    )  # fmt: skip
    found = boxes(figure)
    width, height = figure.bbox.width, figure.bbox.height
    assert len(found) == 11
    for i, box in enumerate(found):
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= width
        assert box[3] <= height
        assert not any(overlap(box, other) for other in found[:i])


def test_axes_keep_their_size_whatever_is_written_above_and_below() -> None:
    sizes = []
    for title, notes in (("short", []), ("long " * 30, ["note " * 200])):
        figure, (axes,) = sheet((1.5,))
        figure.finish(title, [], notes)
        box = axes.get_window_extent()
        sizes.append((round(box.width), round(box.height)))
    assert sizes[0] == sizes[1] == (round((WIDTH - 0.64 - 0.14) * DPI), round(1.5 * DPI))


def test_a_figure_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    figure, (axes,) = sheet((1.5,))
    axes.plot([0, 1], [0, 1])
    figure.finish("title", ["fact"])
    assert figure.get_layout_engine() is None
    drawn = []
    monkeypatch.setattr(type(axes), "get_tightbbox", lambda *a, **k: drawn.append(1))
    data = png_of(figure)
    assert not drawn
    image = Image.open(BytesIO(data))
    assert image.mode == "RGB"
    assert image.size == (round(WIDTH * DPI), round(figure.get_figheight() * DPI))
    np.testing.assert_array_equal(np.asarray(image), pixels(figure))


@pytest.mark.parametrize(
    ("places", "height", "kept"),
    [
        ([0, 0.5, 1], 2.0, [0, 1, 2]),
        ([0, 0.05, 0.1, 0.15, 0.2], 1.0, [0, 4]),
        ([-0.5, 0, 0.5, 1, 1.5], 2.0, [1, 2, 3]),
        ([0.5, 0.51], 1.0, [0]),
        ([], 1.0, []),
    ],
)
def test_ticks_are_left_out_evenly_where_labels_would_overlap(
    places: list[float], height: float, kept: list[int]
) -> None:
    assert spread(places, height) == kept


def test_cells_of_steps_end_where_the_run_does() -> None:
    assert spans(np.array([0.0, 197.0, 395.0])).tolist() == [0, 98.5, 296, 395]
    assert spans(np.array([7.0])).tolist() == [6.5, 7.5]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (5.22925, 1e-4, "5.23"),
        (73.61, 6.4, "73.6 ± 6.4"),
        (-1.5945, float("nan"), "−1.59"),
        (123456.0, 0.0, "1.23·10⁵"),
    ],
)
def test_headlines_have_three_digits_and_an_error_that_is_seen_in_them(
    value: float, error: float, text: str
) -> None:
    assert in_short(value, error) == text


def test_powers_of_ten_are_plain_where_that_is_short() -> None:
    assert [power(k) for k in (-3, -2, 0, 3, 5, 12)] == ["10⁻³", "0.01", "1", "1000", "10⁵", "10¹²"]

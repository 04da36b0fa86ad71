"""Figures of minima and of curves fit on their paper: no text on another, none outside."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lla_callbacks.curves.figures import barrier_figure, curve_figure
from lla_callbacks.curves.measure import Along
from lla_callbacks.minima.basins import basin_ratio
from lla_callbacks.minima.figures import map_figure, ratio_figure, relaxation_figure, shift_figure
from lla_callbacks.minima.maps import Points
from lla_callbacks.minima.relaxation import RelaxationPath
from lla_callbacks.report.sheet import WIDTH, Sheet
from lla_callbacks.report.style import DPI
from tests.minima.test_basins import FACTS, NARROW, WIDE, basin
from tests.report.test_sheet import boxes, overlap

N = 12
STEP = torch.linspace(0, 1, N, dtype=torch.float64)
NAMES = ("loss", "confidence", "trace", "lambda_max", "kh05", "r_e")


def curve() -> Any:
    def along(loss: torch.Tensor, bends: int, straight: Along | None) -> Along:
        whole, steps = torch.ones(N, dtype=torch.bool), torch.ones(N - 1)
        return Along(STEP, loss, {"error": 0.1 * loss}, whole, steps, "bezier", bends, straight,
                     FACTS)  # fmt: skip

    bump = torch.sin(math.pi * STEP)
    return curve_figure(along(1e-3 + 0.004 * bump, 1, along(1e-3 + 0.44 * bump**2, 0, None)))


def barriers(names: list[str], factor: float = 1.0) -> Any:
    n = len(names)
    matrix = torch.rand(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return barrier_figure(names, factor * (matrix + matrix.T), facts=["a fact"])


def relaxation(*, labels: bool) -> Any:
    unknown = torch.full((N,), math.nan)
    accuracy = 0.5 + 0.4 * STEP if labels else unknown
    values = {"accuracy": accuracy, "held_accuracy": accuracy - 0.1}
    path = RelaxationPath(
        (1000**STEP - 1).round(), 10 ** (-3 * STEP), held_loss=10**-STEP if labels else unknown,
        displacement=0.1 * STEP, gradient_norm=1 - STEP, num_samples=200,
        num_held=100 * labels, num_params=8642, optimizer="SGD", mode="eval", state_dict={},
        **values,
    )  # fmt: skip
    return relaxation_figure(path)


def points(values: Any, method: Any = "mds") -> Any:
    found = Points(
        names=("",) * N, sets=("path",) * 6 + ("bad", "a long name of a set", "three") * 2,
        distances=torch.zeros(N, N), coordinates=torch.stack([STEP, STEP.sin()], 1), scores=STEP,
        explained=0.86, trustworthiness=0.98, rank_correlation=0.97, distance="predictions",
        method=method, num_samples=1000, num_params=8642, mode="eval", seed=0,
    )  # fmt: skip
    return map_figure(found, values=values, values_name="held-out accuracy", path="path")


def shift(names: tuple[str, ...]) -> Any:
    columns = {name: 10.0**k * (0.01 + STEP) for k, name in enumerate(NAMES)}
    found: Any = SimpleNamespace(
        sets=dict.fromkeys(map(str, range(N))), few_wrong=("3",), num_samples=1000, mode="eval",
        num_steps=80, column=lambda name: 1 - STEP if name == "accuracy" else columns[name],
        rank_correlation=lambda name: SimpleNamespace(value=-0.93, low=-1.0, high=-0.42),
    )  # fmt: skip
    return shift_figure(found, names)


FIGURES = {
    "curve": curve,
    "two": lambda: barriers(["a", "b"], 1e-4),
    "eight": lambda: barriers([f"epoch={k}-step={391 * k}" for k in range(8)]),
    "many": lambda: barriers([str(k) for k in range(14)]),
    "ratio": lambda: ratio_figure(basin_ratio(basin(WIDE), basin(NARROW), ("good", "bad"))),
    "relaxation": lambda: relaxation(labels=True),
    "no labels": lambda: relaxation(labels=False),
    "map": lambda: points(STEP.tolist()),
    "t-SNE": lambda: points(None, "tsne"),
    "shift": lambda: shift(NAMES),
    "three numbers": lambda: shift(NAMES[:3]),
}


def labels(axes: Any) -> list[Any]:
    """Texts in axes and at those of its ticks that are seen; turned ones have no own box."""
    found = [*axes.texts]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        found += [
            text
            for tick in axis.get_major_ticks()
            if low <= tick.get_loc() <= high
            for text in (tick.label1, tick.label2)
        ]
    return [
        text for text in found if text.get_visible() and text.get_text() and not text.get_rotation()
    ]


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_overlaps_or_is_cut_off(name: str) -> None:
    figure = FIGURES[name]()
    assert isinstance(figure, Sheet)
    assert (figure.dpi, figure.get_layout_engine()) == (DPI, None)
    # Only a matrix of many names is wider than what TensorBoard shows.
    assert (figure.width == pytest.approx(WIDTH)) == (name != "eight")
    found = [*boxes(figure)]
    for axes in figure.axes:
        if axes.get_visible():
            found += [tuple(text.get_window_extent().extents) for text in labels(axes)]
    width, height = figure.bbox.width, figure.bbox.height
    for k, box in enumerate(found):
        assert box[0] >= -1
        assert box[1] >= -1
        assert box[2] <= width + 1
        assert box[3] <= height + 1
        assert not any(overlap(box, other) for other in found[:k])


def test_what_was_not_measured_has_no_panel() -> None:
    captions = [axes.get_title(loc="left") for axes in relaxation(labels=False).axes]
    assert [caption.split(":")[0] for caption in captions] == ["loss", "moved"]

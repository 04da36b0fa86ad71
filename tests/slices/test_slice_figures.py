"""Figures of slices. What is drawn is tested: data, ranges, holes and words."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from torch import Tensor

from lla_callbacks.report.words import written
from lla_callbacks.slices.basin import Basin
from lla_callbacks.slices.convexity import Convexity
from lla_callbacks.slices.directions import Direction
from lla_callbacks.slices.fields import field_of
from lla_callbacks.slices.interpolation import refined, supported
from lla_callbacks.slices.landscape_figures import (
    basin_figure,
    convexity_figure,
    mesh_from_the_side,
    mesh_of,
    surface_figure,
)
from lla_callbacks.slices.line_figures import line_figure
from lla_callbacks.slices.plane_figures import plane_figure
from lla_callbacks.slices.scales import tick_values
from lla_callbacks.slices.slices import Line, Plane, SliceFacts
from lla_callbacks.slices.surface_html import surface_html
from lla_callbacks.slices.trajectory import Path

NAN, INF = math.nan, math.inf
FACTS = SliceFacts(
    mode="eval", normalization="filter", seed=3, num_samples=512, num_params=12345,
    precision="float32", method="loop", num_points=45, seconds=1.0,
)  # fmt: skip
FIRST = Direction(torch.tensor([1.0, 0.0, 0.0]), "random 1", "filter norm")
SECOND = Direction(torch.tensor([0.0, 1.0, 0.0]), "random 2", "filter norm")


def plane_of(
    loss: Callable[[Tensor, Tensor], Tensor], n: int = 5, m: int = 9, **changes: Any
) -> Plane:
    """A plane of n x m points over [-1, 1] x [-2, 2]."""
    alphas = torch.linspace(-1, 1, n, dtype=torch.float64)
    betas = torch.linspace(-2, 2, m, dtype=torch.float64)
    values = loss(*torch.meshgrid(alphas, betas, indexing="ij")).double()
    whole = Plane(
        alphas=alphas, betas=betas, loss=values, metrics={},
        evaluated=torch.ones(n, m, dtype=torch.bool), directions=(FIRST, SECOND),
        centre_loss=float(values[n // 2, m // 2]), cosine=0.0, path=None, facts=FACTS,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def bowl(a: Tensor, b: Tensor) -> Tensor:
    return 10 ** (a + b**2 - 1)


def line_of(loss: Callable[[Tensor], Tensor], direction: Direction = FIRST, n: int = 9) -> Line:
    alphas = torch.linspace(-1, 1, n, dtype=torch.float64)
    values = loss(alphas)
    return Line(
        alphas=alphas, loss=values, metrics={"accuracy": 0.5 - 0.1 * alphas},
        evaluated=torch.ones(n, dtype=torch.bool), directions=(direction,),
        centre_loss=float(values[n // 2]), facts=FACTS,
    )  # fmt: skip


def footer(figure: Figure) -> str:
    """The text below a figure, on one line."""
    return " ".join(figure._supxlabel.get_text().split())


def colours(figure: Figure) -> tuple[float, float]:
    """The lowest and the highest value that has a colour, as drawn."""
    norm = figure.axes[1]._colorbar.norm
    return norm.vmin, norm.vmax


def extend(figure: Figure) -> str:
    """Which ends of the colours have an arrow."""
    return str(figure.axes[1]._colorbar.extend)


def hatches(axes: Axes) -> list[Any]:
    return [patch for patch in axes.patches if patch.get_gid() == "not finite"]


def is_painted(figure: Figure, x: float, y: float) -> bool:
    """Whether a point of the first axes has a colour of the plane."""
    (image,) = figure.axes[0].images
    left, right, bottom, top = image.get_extent()
    shown = np.asarray(image.get_array())
    row = int((y - bottom) / (top - bottom) * shown.shape[0])
    return bool(shown[row, int((x - left) / (right - left) * shown.shape[1]), 3])


def labels(axes: Axes) -> list[str]:
    """What the legend above axes says."""
    names: list[str] = axes.get_legend_handles_labels()[1]
    assert {*names} <= {text.get_text() for text in axes.figure.texts}
    return names


def rendered(figure: Figure) -> np.ndarray:
    """The pixels; a figure's own canvas has a draw() that does nothing."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def pixel(figure: Figure, x: float, y: float) -> str:
    """The colour at a point of the first axes, as it is rendered."""
    image = rendered(figure)
    column, row = figure.axes[0].transData.transform((x, y))
    return to_hex(image[image.shape[0] - 1 - int(row), int(column)] / 255)


def brightness(color: str) -> int:
    return sum(int(color[i : i + 2], 16) for i in (1, 3, 5))


# Planes


def test_the_first_direction_is_x_and_the_second_y() -> None:
    # The loss rises along the first direction alone, on a grid that is not square.
    figure = plane_figure(plane_of(lambda a, b: 10**a + 0 * b))
    axes = figure.axes[0]
    assert axes.get_xlim() == (-1, 1)
    assert axes.get_ylim() == (-2, 2)
    assert axes.get_xlabel() == "random 1  [filter norm]"
    assert axes.get_ylabel() == "random 2  [filter norm]"
    left, right = pixel(figure, -0.87, 1.3), pixel(figure, 0.87, 1.3)
    # Viridis is dark where it is low.
    assert brightness(left) < brightness(right) - 100
    assert abs(brightness(left) - brightness(pixel(figure, -0.87, -1.3))) < 20


def test_it_is_the_logarithm_that_is_drawn_and_the_loss_that_is_written() -> None:
    figure = plane_figure(plane_of(lambda a, b: 10 ** (3 * a + 0 * b)))
    assert colours(figure) == pytest.approx((-3, 3))
    bar = figure.axes[1]
    written_there = dict(
        zip([t.get_text() for t in bar.get_yticklabels()], bar.get_yticks(), strict=True)
    )
    assert written_there["1"] == pytest.approx(0)
    assert written_there["100"] == pytest.approx(2)
    assert "log" in bar.get_ylabel()


@pytest.mark.parametrize("shift", [-2.0, -100.0])
def test_a_loss_below_zero_has_a_linear_scale_within_a_decade(shift: float) -> None:
    figure = plane_figure(plane_of(lambda a, b: a**2 + b**2 + shift))
    assert colours(figure) == pytest.approx((shift, 5 + shift))
    assert "log" not in figure.axes[1].get_ylabel()
    assert shift != -100 or "−98" in [t.get_text() for t in figure.axes[1].get_yticklabels()]


def test_a_loss_that_changes_its_sign_over_decades_is_logarithmic_on_either_side() -> None:
    plane = plane_of(lambda a, b: 1e3 * (a**2 + b**2) - 30)
    figure = plane_figure(plane)
    assert "log scale about 0" in figure.axes[1].get_ylabel()
    assert {"0", "1000"} <= {t.get_text() for t in figure.axes[1].get_yticklabels()}
    field = field_of(plane)
    assert (field.scale.kind, field.scale.threshold) == ("symlog", pytest.approx(10))
    assert field.scale.value(field.low) == pytest.approx(-30)
    # The middle of the colours is far below that of the values: most are not one colour.
    assert field.scale.value((field.low + field.high) / 2) < 0.05 * 5e3
    # A threshold that is no share of nothing.
    far = field_of(plane_of(lambda a, b: 1e4 * (a**2 + b**2) - 3))
    assert far.scale.threshold == pytest.approx(1e-3 * 5e4, rel=0.01)


def test_a_loss_that_underflows_to_zero_keeps_the_logarithm() -> None:
    figure = plane_figure(plane_of(lambda a, b: torch.where(a.abs() + b.abs() < 0.1, 0, 1 + a**2)))
    assert colours(figure)[0] == 0
    assert "0 drawn as 1" in figure.axes[1].get_ylabel()


def test_the_scale_can_be_fixed() -> None:
    low = plane_figure(plane_of(lambda a, b: 0.1 * bowl(a, b)), scale=(1e-3, 10.0))
    high = plane_figure(plane_of(bowl), scale=(1e-3, 10.0))
    for figure in (low, high):
        assert colours(figure) == (-3, 1)
    # What goes beyond it has an arrow.
    assert [extend(f) for f in (low, high)] == ["max", "max"]
    assert extend(plane_figure(plane_of(bowl), scale=(0.1, 1e9))) == "min"
    with pytest.raises(ValueError, match="is empty"):
        plane_figure(plane_of(bowl), scale=(1.0, 1.0))


def test_a_cap_is_said() -> None:
    figure = plane_figure(plane_of(bowl), cap=2.0)
    assert colours(figure)[1] == pytest.approx(math.log10(2))
    assert extend(figure) == "max"
    assert "capped at 2" in figure.axes[1].get_ylabel()
    untouched = plane_figure(plane_of(bowl), cap=1e9)
    assert "capped" not in untouched.axes[1].get_ylabel()


def test_one_spike_does_not_take_all_colours() -> None:
    def spiked(a: Tensor, b: Tensor) -> Tensor:
        loss = bowl(a / 2, b / 3)
        loss[0, 0] = 1e30
        return loss

    figure = plane_figure(plane_of(spiked, 9, 9))
    assert colours(figure)[1] < 1
    assert extend(figure) == "max"
    assert "highest: 10³⁰" in figure.axes[1].get_ylabel()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_hatched_and_not_filled(bad: float) -> None:
    plane = plane_of(bowl)
    plane.loss[0, 6] = bad  # at (-1, 1)
    figure = plane_figure(plane)
    assert not is_painted(figure, -0.95, 1.0)
    assert is_painted(figure, -0.95, 0.0)
    assert is_painted(figure, 0.95, 1.0)
    (patch,) = hatches(figure.axes[0])
    assert patch.get_hatch()
    # The other values set the scale.
    assert np.isfinite(colours(figure)).all()
    assert not hatches(plane_figure(plane_of(bowl)).axes[0])


def test_an_incomplete_plane_is_drawn_as_fine_as_it_is_complete() -> None:
    plane = plane_of(bowl, 5, 5)
    done = torch.zeros(5, 5, dtype=torch.bool)
    done[::2, ::2] = True
    done[1, 1] = True
    figure = plane_figure(
        dataclasses.replace(plane, evaluated=done, loss=torch.where(done, plane.loss, NAN))
    )
    assert "10 of 25 points" in footer(figure)
    (dots,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 9]
    assert sorted(set(dots.get_xdata())) == [-1, 0, 1]
    assert not hatches(figure.axes[0])
    assert is_painted(figure, 0.5, 1.0)
    assert "computed points" in labels(figure.axes[0])


def test_interpolation_is_of_the_logarithm_and_is_marked() -> None:
    # A cubic in log space comes back exactly; of the loss itself it would not.
    plane = plane_of(lambda a, b: 10 ** (a**3 - b))
    fine = field_of(plane).smooth()
    a, b = np.meshgrid(fine.x, fine.y, indexing="ij")
    np.testing.assert_allclose(fine.values, a**3 - b, atol=1e-12)
    figure = plane_figure(plane, interpolate=True)
    assert "bicubic spline" in footer(figure)
    assert any(len(line.get_xdata()) == 45 for line in figure.axes[0].lines)
    plane.loss[0, 0] = NAN
    figure = plane_figure(plane, interpolate=True)
    assert "Not interpolated, since a value is not finite" in footer(figure)
    assert "spline" not in footer(figure)


def test_a_spline_goes_nowhere_beyond_the_points_around() -> None:
    # An accuracy that is 1 on a plateau: the spline alone overshoots it.
    plane = plane_of(bowl, 9, 9)
    accuracy = torch.where(plane.alphas[:, None].abs() < 0.6, 1.0, 0.1) * torch.ones(9, 9)
    field = field_of(dataclasses.replace(plane, metrics={"a": accuracy.double()}), metric="a")
    assert refined(field.x, field.y, field.values)[2].max() > 1.05
    fine = field.smooth().values
    assert (fine.min(), fine.max()) == pytest.approx((0.1, 1.0))
    assert fine.max() <= field.values.max()
    np.testing.assert_allclose(fine[::4, ::4], field.values, rtol=1e-12)
    # In each cell and on its border, nothing that none of its corners supports.
    noise = np.random.default_rng(0).normal(size=(6, 5))
    x, y = np.arange(6.0), np.arange(5.0)
    fine = supported(noise, refined(x, y, noise, 4)[2], 4)
    for i in range(5):
        for j in range(4):
            cell = fine[4 * i : 4 * i + 5, 4 * j : 4 * j + 5]
            corners = noise[i : i + 2, j : j + 2]
            assert corners.min() <= cell.min() <= cell.max() <= corners.max()


def test_pictures_of_a_run_have_their_own_colours_and_the_same_contours() -> None:
    flat = plane_of(lambda a, b: 2.3 + 0.02 * (a + b))
    deep = plane_of(lambda a, b: 0.5 + 20 * (a**2 + b**2))
    figures = [plane_figure(p, run=(2.3e-3, 23.0)) for p in (flat, deep)]
    for figure, plane in zip(figures, (flat, deep), strict=True):
        ends = math.log10(plane.loss.min()), math.log10(plane.loss.max())
        assert colours(figure) == pytest.approx(ends)
        assert any("23   range in the run" in text.get_text() for text in figure.texts)
    fixed, fine = field_of(deep).scale.lines(*colours(figures[1]))
    assert fixed == [1, 2, 5, 10, 20, 50, 100]
    assert not fine
    # Where none of these is in the picture it has finer ones of its own.
    fixed, fine = field_of(flat).scale.lines(*colours(figures[0]))
    assert not fixed
    assert len(fine) >= 3
    assert not any("in the run" in text.get_text() for text in plane_figure(deep).texts)


def test_between_its_points_a_plane_is_drawn_by_the_four_around() -> None:
    raster = field_of(plane_of(lambda a, b: 10 ** (a * b + a))).raster()
    n = len(raster)
    a, b = (r * ((np.arange(n) + 0.5) / n * 2 - 1) for r in (1, 2))
    np.testing.assert_allclose(raster, a * b[:, None] + a, atol=1e-12)


def test_a_metric_has_a_linear_scale_and_its_own_name() -> None:
    plane = plane_of(bowl)
    plane = dataclasses.replace(plane, metrics={"accuracy": 0.5 + 0.1 * plane.loss.sign()})
    plane.metrics["accuracy"][0, 0] = 0.1
    figure = plane_figure(plane, metric="accuracy")
    assert colours(figure) == pytest.approx((0.1, 0.6))
    assert figure.axes[1].get_ylabel() == "accuracy"
    with pytest.raises(ValueError, match="no metric is named 'f1'; they are: accuracy"):
        plane_figure(plane, metric="f1")


def test_the_footer_says_how_it_was_measured() -> None:
    text = footer(plane_figure(plane_of(bowl), title="train loss at step 7"))
    for part in ("12,345 parameters", "512 samples", "running statistics", "filter-normalized",
                 "seed 3", "float32", "45 points"):  # fmt: skip
        assert part in text
    # Eigenvectors are not random: no normalization, no seed.
    bare = dataclasses.replace(FACTS, normalization="", mode="recalibrate")
    text = footer(plane_figure(plane_of(bowl, facts=bare)))
    assert "seed" not in text
    assert "recalibrated" in text


def test_a_skewed_plane_says_its_angle() -> None:
    assert "meet at 60°" in footer(plane_figure(plane_of(bowl, cosine=0.5)))
    assert "meet" not in footer(plane_figure(plane_of(bowl, cosine=1e-8)))


def test_the_centre_and_the_lowest_point_are_marked() -> None:
    axes = plane_figure(plane_of(lambda a, b: 1 + (a - 0.5) ** 2 + (b + 1) ** 2)).axes[0]
    marks = {line.get_label(): line for line in axes.lines}
    assert marks["present weights"].get_xydata().tolist() == [[0, 0]]
    assert marks["lowest point"].get_xydata().tolist() == [[0.5, -1]]
    axes = plane_figure(plane_of(lambda a, b: 1 + a**2 + b**2)).axes[0]
    assert labels(axes) == ["present weights"]


@pytest.mark.parametrize("stretch", [1.0, 40.0])
def test_units_are_equal_where_that_is_no_strip(stretch: float) -> None:
    plane = plane_of(bowl)
    figure = plane_figure(dataclasses.replace(plane, alphas=plane.alphas * stretch))
    box = figure.axes[0].get_position()
    wide = box.width * figure.bbox.width / (box.height * figure.bbox.height)
    assert wide == pytest.approx(0.5 if stretch == 1 else 1.0)


# The path of training


def path_of(loss: list[float], far: float = 0.25) -> Path:
    points = torch.tensor([[-0.9, -1.5], [-0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)
    return Path(
        steps=torch.tensor([0, 40, 90]), points=points, explained=torch.tensor([0.8, 0.1]),
        residuals=torch.tensor([far, 0.1, 0.0], dtype=torch.float64),
        loss=torch.tensor(loss, dtype=torch.float64),
    )  # fmt: skip


def test_a_path_is_coloured_by_its_own_loss() -> None:
    plane = plane_of(bowl, path=path_of([5.0, 0.5, 0.1]))
    figure = plane_figure(plane)
    axes = figure.axes[0]
    (dots,) = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert dots.get_offsets().tolist() == plane.path.points.tolist()  # type: ignore[union-attr]
    np.testing.assert_allclose(dots.get_array(), np.log10([5.0, 0.5, 0.1]))
    # The same colours mean the same loss.
    assert dots.get_cmap().name == figure.axes[1]._colorbar.cmap.name
    assert (dots.norm.vmin, dots.norm.vmax) == colours(figure)
    assert {"start, step 0", "end, step 90", "path, coloured by its own loss"} <= {*labels(axes)}
    assert "Largest residual 25%" in footer(figure)
    assert "not its own" in footer(figure)


def test_a_path_whose_loss_is_unknown_goes_from_white_to_black() -> None:
    figure = plane_figure(plane_of(bowl, path=path_of([NAN] * 3, far=0.01)))
    assert "path, from white to black" in labels(figure.axes[0])
    (dots,) = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    assert dots.get_array().tolist() == [0, 1, 2]
    assert "not its own" not in footer(figure)


def test_the_range_of_colours_holds_the_losses_of_the_path() -> None:
    figure = plane_figure(plane_of(lambda a, b: 1 + a**2 + 0 * b, path=path_of([8.0, 2.0, 0.5])))
    assert colours(figure) == pytest.approx((math.log10(0.5), math.log10(8)))


def test_points_of_a_path_outside_of_the_picture_are_counted() -> None:
    plane = plane_of(bowl, path=path_of([NAN] * 3))
    figure = plane_figure(dataclasses.replace(plane, alphas=plane.alphas * 0.6))
    assert "outside the picture: 1 of 3" in footer(figure)
    assert figure.axes[0].get_xlim() == (-0.6, 0.6)


# Lines


def test_lines_are_small_multiples_with_a_metric_on_the_right() -> None:
    lines = [line_of(lambda a, k=k: 1 + k * a**2) for k in (1, 2, 3, 4)]
    lines[1] = dataclasses.replace(lines[1], metrics={"accuracy": 0.1 * lines[1].alphas})
    figure = line_figure(lines, title="four")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 8
    assert sum(axes.get_ylabel() == "accuracy" for axes in shown) == 4
    # One below the other: as wide as the picture, each.
    assert len({axes.get_position().y0 for axes in shown}) == 4
    # One axis of the metric, so that panels can be compared.
    assert len({axes.get_ylim() for axes in shown if axes.get_ylabel() == "accuracy"}) == 1
    assert "9 points a line" in footer(figure)


def drawn_loss(axes: Axes) -> np.ndarray:
    (line,) = [line for line in axes.lines if len(line.get_xdata()) == 9]
    return np.asarray(line.get_ydata(), dtype=float)


def test_loss_and_centre_are_drawn_at_true_coordinates() -> None:
    line = line_of(lambda a: 1 + (a - 0.5) ** 2)
    axes = line_figure([line]).axes[0]
    np.testing.assert_array_equal(drawn_loss(axes), line.loss)
    assert [[0.0, 1.25]] in [found.get_xydata().tolist() for found in axes.lines]
    assert axes.get_xlabel() == "random 1  [filter norm]"
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        (lambda a: 10 ** (2 * a), "log"),
        (lambda a: 10 ** (0.5 * a), "linear"),
        (lambda a: 10 ** (2 * a) - 1, "linear"),
    ],
)
def test_the_scale_is_logarithmic_over_decades(
    loss: Callable[[Tensor], Tensor], scale: str
) -> None:
    assert line_figure([line_of(loss)]).axes[0].get_yscale() == scale


def test_panels_share_their_range_unless_one_would_be_flat() -> None:
    alike = line_figure([line_of(lambda a: 1 + a**2), line_of(lambda a: 1 + 2 * a**2)])
    assert alike.axes[0].get_ylim() == alike.axes[1].get_ylim()
    apart = line_figure([line_of(lambda a: 1 + a**2), line_of(lambda a: 1 + 0.1 * a**2)])
    assert apart.axes[0].get_ylim() != apart.axes[1].get_ylim()


def test_an_eigenvector_has_its_parabola_and_both_curvatures() -> None:
    known = dataclasses.replace(FIRST, eigenvalue=4.0, residual=0.05, slope=1.0)
    axes = line_figure([line_of(lambda a: 3 + a + 2 * a**2, known)]).axes[0]
    (dashed,) = [line for line in axes.lines if line.is_dashed() and len(line.get_xdata()) > 9]
    x, y = np.asarray(dashed.get_xdata()), np.asarray(dashed.get_ydata())
    inside = np.isfinite(y)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(y[inside], (3 + x + 2 * x**2)[inside])
    text = axes.get_title(loc="left")
    assert "curvature 4, eigenvalue 4.000 ± 0.050" in text
    assert "Dashed" in footer(line_figure([line_of(lambda a: 3 + a + 2 * a**2, known)]))
    assert not line_figure([line_of(lambda a: a)]).axes[0].get_title(loc="left")


def test_the_parabola_is_clipped_to_the_axes() -> None:
    steep = dataclasses.replace(FIRST, eigenvalue=-1000.0, residual=0.0)
    axes = line_figure([line_of(lambda a: 1 + a**2, steep)]).axes[0]
    low, high = axes.get_ylim()
    assert (low, high) == pytest.approx((0.94, 2.06))
    (dashed,) = [line for line in axes.lines if line.is_dashed() and len(line.get_xdata()) > 9]
    assert low <= np.nanmin(dashed.get_ydata())


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_gap_in_a_line_is_hatched(bad: float) -> None:
    line = line_of(lambda a: 1 + a**2)
    line.loss[2] = bad
    axes = line_figure([line]).axes[0]
    (patch,) = hatches(axes)
    assert (patch.get_x(), patch.get_width()) == (-0.625, 0.25)
    assert np.isnan(drawn_loss(axes)).tolist() == [k == 2 for k in range(9)]


def test_points_that_were_not_evaluated_are_no_gap() -> None:
    line = line_of(lambda a: 1 + a**2)
    done = torch.arange(9) % 2 == 0
    loss = torch.where(done, line.loss, NAN)
    figure = line_figure([dataclasses.replace(line, loss=loss, evaluated=done)])
    assert not hatches(figure.axes[0])
    assert "5 of 9 points" in footer(figure)
    assert any(len(drawn.get_xdata()) == 5 for drawn in figure.axes[0].lines)


# Surfaces and meshes


def corners(surface: Any) -> np.ndarray:
    """Return the corners of a surface's faces, which matplotlib has no public name for."""
    if hasattr(surface, "_faces"):
        return np.asarray(surface._faces)
    return np.stack([surface._vec[:3, part].T for part in surface._segslices])


def test_a_surface_has_holes_where_it_is_not_finite() -> None:
    plane = plane_of(bowl)
    plane.loss[2, 4] = NAN
    figure = surface_figure(plane, cap=2.0)
    (surface,) = figure.axes[0].collections
    # Of 4 x 8 cells four touch the centre.
    assert len(corners(surface)) == 28
    assert corners(surface)[:, :, 2].max() == pytest.approx(math.log10(2))
    assert "Holes: not finite" in footer(figure)
    assert "capped at 2" in figure.axes[0].get_zlabel()
    assert figure.axes[0].get_xlim() == (-1, 1)
    assert figure.axes[0].get_ylim() == (-2, 2)


@pytest.mark.parametrize("name", ["random 1", "2nd eigenvector, λ = -0.0421", None])
def test_names_along_a_surface_stand_clear_of_the_notes(name: str | None) -> None:
    unsettled = "unsettled Ritz vector for the bottom eigenvector, λ < -0.0421"
    named = dataclasses.replace(FIRST, name=name or unsettled, unit="‖v‖")
    figure = surface_figure(dataclasses.replace(plane_of(bowl), directions=(named, named)))
    renderer = FigureCanvasAgg(figure)
    renderer.draw()
    axes = figure.axes[0]
    notes = max(t.get_window_extent().y1 for t in figure.texts if "Between" in t.get_text())
    for axis in (axes.xaxis, axes.yaxis):
        assert axis.label.get_window_extent().y0 > notes


def test_a_mesh_has_the_plane_as_it_is() -> None:
    vertices, colors, faces = mesh_of(plane_of(lambda a, b: 10 ** (a + 0 * b)))
    assert (vertices.dtype, colors.dtype, faces.dtype) == (np.float32, np.uint8, np.int32)
    assert vertices.shape == colors.shape == (45, 3)
    assert faces.shape == (64, 3)
    assert (vertices[:, :2].min(), vertices[:, :2].max()) == (-1, 1)
    np.testing.assert_allclose(vertices[:, 2], vertices[:, 0] / 2, atol=1e-6)
    # Each triangle looks up, and together they cover the square.
    corners = vertices[faces]
    sides = corners[:, 1:, :2] - corners[:, :1, :2]
    areas = np.linalg.det(sides.astype(np.float64)) / 2
    assert (areas > 0).all()
    assert areas.sum() == pytest.approx(4)


def test_a_mesh_is_seen_from_the_side_and_within_the_frame() -> None:
    plane = plane_of(lambda a, b: 10 ** (a + 0 * b))
    flat, _, faces = mesh_of(plane)
    vertices, painted, same = mesh_from_the_side(plane)
    np.testing.assert_array_equal(same, faces)
    assert len(vertices) == len(painted) == len(flat) + 2
    # Turned, not bent: distances stay.
    here = vertices[:-2].astype(np.float64)
    np.testing.assert_allclose(
        np.linalg.norm(here - here[0], axis=1), np.linalg.norm(flat - flat[0], axis=1), atol=1e-6
    )
    # What is higher is higher in the picture too, and triangles look at who looks from above.
    centre = mesh_from_the_side(plane_of(lambda a, b: 10 ** (1 - a**2 - b**2)))[0]
    assert centre[2 * 9 + 4][1] > centre[:-2, 1].mean()
    # Corners that nothing uses keep the camera away.
    assert np.ptp(vertices[-2:, :2], axis=0).min() >= 2.0 * np.abs(here).max()
    assert faces.max() < len(flat)


def test_a_mesh_leaves_out_what_is_not_finite_and_is_capped() -> None:
    plane = plane_of(bowl)
    plane.loss[0, 0] = INF
    plane.loss[2, 4] = NAN
    vertices, _, faces = mesh_of(plane, cap=2.0)
    assert np.isfinite(vertices).all()
    assert 0 not in faces
    assert 2 * 9 + 4 not in faces
    # The corner has two triangles, a point inside six.
    assert len(faces) == 64 - 2 - 6
    assert (vertices[:, 2] == 0.5).sum() == (plane.loss[torch.isfinite(plane.loss)] >= 2).sum()


def test_without_plotly_the_remedy_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: FilePath
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match="pip install plotly"):
        surface_html(plane_of(bowl), tmp_path / "surface.html")


def test_the_html_surface_is_one_file(tmp_path: FilePath) -> None:
    pytest.importorskip("plotly")
    plane = plane_of(bowl)
    plane.loss[0, 0] = NAN
    path = surface_html(plane, tmp_path / "deep" / "surface.html", title="step 7")
    text = path.read_text(encoding="utf-8")
    assert "step 7" in text
    assert "512 samples" in text
    assert "random 1" in text
    # Its script is in it, not on a server.
    assert len(text) > 1_000_000
    assert "<script src=" not in text


# Convexity


def convexity_of(low: Tensor, high: Tensor) -> Convexity:
    n, m = low.shape
    return Convexity(
        alphas=torch.linspace(-1, 1, n, dtype=torch.float64),
        betas=torch.linspace(-1, 1, m, dtype=torch.float64),
        lambda_min=low, lambda_max=high, residual_min=0 * low, residual_max=0 * low,
        loss=torch.ones_like(low), evaluated=torch.ones(n, m, dtype=torch.bool),
        directions=(FIRST, SECOND), num_matvecs=77, facts=FACTS,
    )  # fmt: skip


def test_both_ratios_are_drawn_cell_by_cell_in_colours_of_what_is_there() -> None:
    high = torch.full((3, 5), 2.0, dtype=torch.float64)
    low = torch.linspace(-0.5, 0.4, 15, dtype=torch.float64).reshape(3, 5)
    low[0, 4] = NAN
    high[2, 0], low[2, 0] = -1.0, -3.0  # concave: the ratio is infinite
    high[1, 1], low[1, 1] = 0.5, -0.5
    figure = convexity_figure(convexity_of(low, high))
    left, right = figure.axes[:2]
    # Nearly convex everywhere: not all dark, but the logarithm of what is there.
    slight = -torch.logspace(-4, -1, 15, dtype=torch.float64).reshape(3, 5)
    flat = convexity_figure(convexity_of(slight, torch.ones_like(slight)))
    assert isinstance(flat.axes[0].collections[0].norm, LogNorm)
    assert flat.axes[1].collections[0].norm.vmin == pytest.approx(-0.1)
    sizes = (low / high)[(low / high).isfinite() & (high > 0)].abs()
    for axes, limits in ((left, (float(sizes.min()), 1)), (right, (-1, 1))):
        (mesh,) = axes.collections
        assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx(limits)
        values = np.ma.asarray(mesh.get_array()).reshape(5, 3)
        assert values.mask[4, 0]
        assert values.mask.sum() == 1
        assert len(hatches(axes)) == 1
        assert values[1, 0] == pytest.approx(
            float(abs(low[0, 1]) / 2 * (1 if axes is left else -1))
        )
        # True cells: half a spacing beyond the outermost points.
        assert axes.get_xlim() == (-1.5, 1.5)
        assert axes.get_ylim() == (-1.25, 1.25)
    assert left.collections[0].get_array().max() > 1
    assert right.collections[0].get_array().min() < -1
    text = footer(figure)
    assert "77 Hessian-vector products" in text
    assert "15 points" in text


# Basins


def basin_of(radii: list[float], closed: list[bool]) -> Basin:
    return Basin(
        radii=torch.tensor(radii, dtype=torch.float64), open=~torch.tensor(closed), cutoff=1.5,
        centre_loss=0.5, max_radius=8.0, dim=10, rtol=0.01, facts=FACTS,
    )  # fmt: skip


def test_rays_are_counted_and_open_ones_stand_apart() -> None:
    basin = basin_of([0.5, 0.6, 1.0, 2.0, 8.0, 8.0], [True] * 4 + [False] * 2)
    figure = basin_figure({"good": basin})
    axes = figure.axes[0]
    steps = [p for p in axes.patches if hasattr(p, "get_data")]
    assert steps[0].get_data().values.sum() == 4
    (bar,) = [p for p in axes.patches if hasattr(p, "get_height") and p.get_height() == 2]
    assert axes.get_xlim()[1] > bar.get_x()
    assert bar.get_x() > math.log10(2.0)
    assert any("not\nreached" in t.get_text() for t in axes.get_xticklabels())
    (text,) = labels(axes)
    assert "good: effective radius at least" in text
    assert "cutoff 1.5" in footer(figure)
    assert "6 rays" in footer(figure)
    verticals = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert verticals == [pytest.approx(math.log10(basin.quantiles[0.5]))]


def test_basins_are_compared_on_the_same_bins() -> None:
    closed = [True] * 3
    figure = basin_figure(
        {"good": basin_of([1.0, 1.1, 1.3], closed), "bad": basin_of([0.01, 0.02, 0.03], closed)}
    )
    axes = figure.axes[0]
    steps = [p for p in axes.patches if hasattr(p, "get_data")]
    assert len({tuple(s.get_data().edges) for s in steps}) == 1
    assert [s.get_data().values.sum() for s in steps] == [3] * 4
    assert [text.split(":")[0] for text in labels(axes)] == ["good", "bad"]
    assert not any("reached" in t.get_text() for t in axes.get_xticklabels())


# All of them


@pytest.mark.parametrize(
    ("factor", "size"),
    [(0.0, (5, 9)), (1e-300, (2, 9)), (1e300, (5, 9)), (NAN, (5, 9)), (1.0, (1, 1)), (NAN, (1, 1))],
)
def test_figures_survive_extreme_planes(factor: float, size: tuple[int, int]) -> None:
    plane = plane_of(lambda a, b: factor * bowl(a, b), *size)
    rendered(plane_figure(plane, interpolate=True))
    rendered(surface_figure(plane, cap=1.0))
    assert np.isfinite(mesh_of(plane)[0]).all()


@pytest.mark.parametrize("loss", [1.7e308, -1e300, 0.0, 0.5, 1e-308])
def test_one_value_everywhere_has_a_range_and_ticks(loss: float) -> None:
    field = field_of(plane_of(lambda a, b: 0 * a + loss))
    assert field.low < field.high
    assert np.isfinite(field.ticks()[0]).all()


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e300, NAN])
def test_figures_survive_extreme_lines(factor: float) -> None:
    known = dataclasses.replace(FIRST, eigenvalue=4.0, residual=NAN)
    rendered(line_figure([line_of(lambda a: factor * (1 + a**2), known)]))


def test_a_narrow_picture_has_room_beside_its_legend() -> None:
    path = dataclasses.replace(path_of([1.0, 2.0, 3.0]), steps=torch.tensor([0, 1, 10**9]))
    figure = plane_figure(plane_of(bowl, path=path), interpolate=True)
    rendered(figure)
    axes = figure.axes[0]
    assert axes.get_position().width * figure.bbox.width > 150
    known = {*labels(axes)}
    boxes = [t.get_window_extent() for t in figure.texts if t.get_text() in known]
    assert len(boxes) == len(known) >= 4
    assert max(box.x1 for box in boxes) <= figure.bbox.width
    assert max(box.y1 for box in boxes) <= figure._suptitle.get_window_extent().y0
    assert min(box.y0 for box in boxes) >= axes.get_window_extent().y1


def test_all_rays_may_be_open_or_equal() -> None:
    for basin in (basin_of([8.0] * 3, [False] * 3), basin_of([0.5], [True])):
        rendered(basin_figure({"basin": basin}))


def test_no_figure_is_left_with_pyplot() -> None:
    plane = plane_of(bowl, path=path_of([1.0, 1.0, 1.0]))
    rendered(plane_figure(plane))
    rendered(surface_figure(plane))
    rendered(line_figure([line_of(lambda a: a)]))
    rendered(basin_figure({"basin": basin_of([0.5, 0.7], [True, True])}))
    rendered(convexity_figure(convexity_of(-torch.ones(3, 3), torch.ones(3, 3))))
    assert matplotlib._pylab_helpers.Gcf.get_all_fig_managers() == []


def test_titles_and_footers_fit_their_figure() -> None:
    figure = plane_figure(plane_of(bowl), title="the loss of a network with a long name " * 4)
    rendered(figure)
    width = figure.bbox.width
    for text in (figure._suptitle, figure._supxlabel):
        assert text.get_window_extent().x1 <= width


@pytest.mark.parametrize(
    ("low", "high", "logarithmic", "values"),
    [
        (-1.0, 1.0, False, [-1, -0.5, 0, 0.5, 1]),
        (-2.0, 2.0, True, [0.01, 0.1, 1, 10, 100]),
        (-1.0, 0.5, True, [0.1, 0.2, 0.5, 1, 2]),
    ],
)
def test_ticks_are_round(low: float, high: float, logarithmic: bool, values: list[float]) -> None:
    assert tick_values(low, high, logarithmic) == pytest.approx(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.05, "0.05"), (-2.0, "−2"), (1e5, "10⁵"), (2.5e-7, "2.5·10⁻⁷"), (-1e9, "−10⁹")],
)
def test_values_are_written_as_people_do(value: float, text: str) -> None:
    assert written(value) == text

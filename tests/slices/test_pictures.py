"""The surface through a plane's points: exact where it can be, and its error not understated."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lla_callbacks import loss_plane
from lla_callbacks.slices.pictures import picture_through, straight_matrix

X = np.linspace(-1.0, 1.0, 17)
Y = np.linspace(-0.5, 1.5, 13)
BETWEEN = np.linspace(-1.0, 1.0, 53), np.linspace(-0.5, 1.5, 47)


def on(function: Callable[[np.ndarray, np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray):  # type: ignore[no-untyped-def]
    return function(x[:, None], y[None])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: 2.0 + x**2 + 0.5 * x * y + 3 * y**2,
        lambda x, y: 20.0 + x**3 - 2 * x**2 * y**3 + y - x * y**2,
        lambda x, y: np.exp(1 + x - 2 * y + 0.3 * x**3 * y**2),
        lambda x, y: (2 + x + y + x * y**2) ** 2,
        lambda x, y: x**3 - y**2,
    ],
    ids=["paraboloid", "cubic", "log of a cubic", "square", "negative somewhere"],
)
def test_paraboloids_and_cubics_come_back_exactly(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    values = on(function, X, Y)
    picture = picture_through(X, Y, values)
    truth = on(function, *BETWEEN)
    np.testing.assert_allclose(picture.at(*BETWEEN), truth, rtol=1e-12, atol=1e-12)
    # Of 17 x 13 products of sums of rounded numbers.
    assert picture.error < 1e-13 * np.abs(values).max()
    assert picture.decades == bool(values.min() > 0)


def sharp(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Quadratic about a minimum of nearly zero: its log has a pole there."""
    return 1e-5 + 3 * x**2 + x * y + 5 * y**2 + 1e-3 * np.abs(x + y)


def kinked(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.1 + np.abs(x + 0.4 * y) + np.abs(y - 0.3 * x - 0.21)


def wavy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.exp(np.sin(3 * x + y) + np.cos(2 * y - x))


def rough(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1.0 + x**2 + y**2 + 0.05 * np.sin(7 * x + 3 * y) * np.cos(8 * y)


@pytest.mark.parametrize("function", [kinked, wavy, rough])
@pytest.mark.parametrize("side", [9, 13, 17, 25])
def test_the_error_of_a_picture_is_not_understated(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray], side: int
) -> None:
    x = np.linspace(-1.0, 1.0, side)
    picture = picture_through(x, x, on(function, x, x))
    source = np.random.default_rng(0)
    at = np.sort(source.uniform(-1, 1, (2, 40)), axis=1)
    off = np.abs(np.log10(picture.at(*at)) - np.log10(on(function, *at)))
    assert off.mean() <= picture.error
    # Nor is it useless: a smooth loss errs a sixteenth at half the spacing, of which a quarter
    # and no less is believed, twice over.
    assert picture.error <= 27 * off.mean()
    assert picture.error < picture.error_high


def test_about_a_sharp_minimum_the_log_is_not_interpolated() -> None:
    x = np.linspace(-1.0, 1.0, 17)
    values = on(sharp, x, x)
    picture = picture_through(x, x, values)
    assert "log" not in picture.form.name


def test_interpolated_losses_stay_positive() -> None:
    values = np.full((9, 9), 1.0)
    values[4, 4:6] = 1e-6
    picture = picture_through(np.arange(9.0), np.arange(9.0), values)
    assert picture.at(np.linspace(0, 8, 60), np.linspace(0, 8, 60)).min() >= 5e-7


def test_few_points_have_no_estimate() -> None:
    picture = picture_through(X[:4], Y[:4], np.ones((4, 4)))
    assert math.isnan(picture.error)
    assert picture.words == "a bicubic spline of the log loss"


def test_straight_lines_are_straight() -> None:
    x = np.array([0.0, 1.0, 3.0])
    at = np.array([0.5, 2.0, 3.0])
    np.testing.assert_allclose(straight_matrix(x, at) @ (2 * x + 1), 2 * at + 1)


def test_a_plane_tells_the_error_of_its_picture_and_draws_it() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        a, b = module.weight[0]
        return (a**2 + 2 * b**2 + a * b).sum()

    axes = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64)
    pair = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    plane = loss_plane(Two(), [torch.zeros(1)], loss=loss, directions=pair, alphas=axes, betas=axes)
    picture = plane.picture
    assert picture is not None
    at = np.array([0.13, 0.37])
    a, b = 1 + at[:, None], 1 + at[None]
    np.testing.assert_allclose(picture.at(at, at), a**2 + 2 * b**2 + a * b, rtol=1e-12)
    assert picture.error < 1e-12
    notes = " ".join(t.get_text() for t in plane.figure(interpolate=True).texts)
    assert "a bicubic spline of the loss, off by up to about" in " ".join(notes.split())
    plane.loss[3, 3] = math.nan
    assert plane.picture is None

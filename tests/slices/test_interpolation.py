"""Splines against scipy's, and against the polynomials that they must give back."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import CubicSpline, RectBivariateSpline

from lla_callbacks.slices.interpolation import refined, spline_matrix, subdivided


def uneven(n: int, seed: int = 0) -> np.ndarray:
    """Coordinates whose intervals differ by up to a factor 5."""
    return np.cumsum(np.random.default_rng(seed).uniform(0.2, 1.0, n)) - 1.0


@pytest.mark.parametrize("n", [4, 5, 9, 20])
def test_it_is_the_spline_that_scipy_calls_not_a_knot(n: int) -> None:
    x, y = uneven(n), np.random.default_rng(1).normal(size=n)
    # A little beyond both ends too: the outermost pieces go on.
    at = np.linspace(x[0] - 0.1, x[-1] + 0.1, 77)
    np.testing.assert_allclose(spline_matrix(x, at) @ y, CubicSpline(x, y)(at), atol=1e-11)


@pytest.mark.parametrize(("n", "degree"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3), (17, 3)])
def test_polynomials_come_back(n: int, degree: int) -> None:
    x = uneven(n)
    at = np.linspace(x[0], x[-1], 33)
    truth = np.polynomial.Polynomial([0.3, -1.0, 2.0, 0.7][: degree + 1])
    np.testing.assert_allclose(spline_matrix(x, at) @ truth(x), truth(at), atol=1e-11)


def test_points_keep_their_values() -> None:
    x = uneven(9)
    np.testing.assert_allclose(spline_matrix(x, x), np.eye(9), atol=1e-13)


def test_intervals_are_cut_evenly_and_points_stay() -> None:
    fine = subdivided(np.array([-1.0, 0.0, 4.0]), 4)
    assert fine.tolist() == [-1.0, -0.75, -0.5, -0.25, 0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
def test_a_grid_is_splined_along_both_axes(shape: tuple[int, int]) -> None:
    x, y = uneven(shape[0]), uneven(shape[1], 2)
    values = np.random.default_rng(3).normal(size=shape)
    fine_x, fine_y, fine = refined(x, y, values, 4)
    assert fine.shape == (4 * (shape[0] - 1) + 1, 4 * (shape[1] - 1) + 1)
    np.testing.assert_allclose(fine[::4, ::4], values, atol=1e-12)
    truth = RectBivariateSpline(x, y, values, s=0)(fine_x, fine_y)
    np.testing.assert_allclose(fine, truth, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 1)])
def test_small_grids_are_splined_as_far_as_they_go(shape: tuple[int, int]) -> None:
    x, y = uneven(shape[0]), uneven(shape[1], 2)
    values = 1 + 2 * x[:, None] - y[None, :]
    if shape == (2, 3):
        values = values + y[None, :] ** 2 * x[:, None]
    fine_x, fine_y, fine = refined(x, y, values)
    truth = 1 + 2 * fine_x[:, None] - fine_y[None, :]
    if shape == (2, 3):
        truth = truth + fine_y[None, :] ** 2 * fine_x[:, None]
    np.testing.assert_allclose(fine, truth, atol=1e-12)

from __future__ import annotations

import math

import pytest
import torch

from lla_callbacks.linalg.density import broadened, default_width, sampling_error, spacing
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.operators import DenseOperator
from tests.linalg.test_lanczos import spectrum


@pytest.mark.parametrize("width", [0.05, torch.tensor([0.05, 0.3]).double()])
def test_the_density_integrates_to_the_weights(width: float | torch.Tensor) -> None:
    grid = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    nodes, weights = torch.tensor([-1.0, 2.0]).double(), torch.tensor([0.25, 0.75]).double()
    density = broadened(nodes, weights, grid, width)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-9)
    assert float(torch.trapezoid(density * grid, grid)) == pytest.approx(1.25, abs=1e-9)


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan])
def test_a_width_that_is_not_positive_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match="width is"):
        broadened(torch.zeros(1), torch.ones(1), torch.zeros(1), width)


def test_the_default_width_is_positive_even_for_one_node() -> None:
    assert default_width(torch.tensor([3.0])) > 0
    assert default_width(torch.zeros(2)) > 0
    assert default_width(torch.tensor([-1.0, 4.0])) == pytest.approx(0.05)


def test_spacing_is_the_distance_to_the_neighbours() -> None:
    nodes = torch.tensor([0.0, 1.0, 4.0])
    assert spacing(nodes).tolist() == [1.0, 2.0, 3.0]
    assert spacing(nodes[:1]).tolist() == [0.0]


def test_the_sampling_error_is_the_scatter_between_runs() -> None:
    dim, depth = 400, 12
    matrix = spectrum(torch.cat([torch.tensor([8.0, 5.0]), torch.randn(dim - 2)]))
    functions = {
        "trace": lambda w, t: dim * float((w * t).sum()),
        "root": lambda w, t: float((w * t.clamp(min=0)).sqrt().sum()),
    }
    for function in functions.values():
        values, errors = [], []
        for _ in range(200):
            run = lanczos(DenseOperator(matrix), torch.randn(dim).double(), depth)
            values.append(function(run.weights, run.values))
            errors.append(
                sampling_error(lambda w, r=run, f=function: f(w, r.values), run.weights, dim)
            )
        ratio = float(torch.tensor(errors).square().mean().sqrt() / torch.tensor(values).std())
        assert 0.7 < ratio < 1.4


def test_nothing_lies_beyond_the_extremes_and_no_weight_is_lost() -> None:
    nodes = torch.tensor([-1.0, 0.2, 5.0], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    grid = torch.linspace(-4, 8, 40_001, dtype=torch.float64)
    for width in (0.05, 0.5):
        density = broadened(nodes, weights, grid, width, (-1.0, 5.0))
        assert not density[(grid < -1) | (grid > 5)].any()
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=3e-3)
    # Far from the ends nothing changes.
    plain = broadened(nodes, weights, grid, 0.05)
    middle = (grid > 0) & (grid < 4)
    torch.testing.assert_close(
        broadened(nodes, weights, grid, 0.05, (-1.0, 5.0))[middle], plain[middle]
    )

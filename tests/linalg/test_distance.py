from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from lla_callbacks.linalg.distance import Quadrature, published_distance, shape_distance
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.operators import DenseOperator
from tests.linalg.test_lanczos import spectrum


def quadrature(nodes: Tensor, weights: Tensor | None = None) -> Quadrature:
    nodes = nodes.double()
    if weights is None:
        weights = torch.full_like(nodes, 1 / len(nodes))
    return Quadrature(nodes, weights, 100, 1, float(nodes.min()), float(nodes.max()))


def arbitrary(size: int) -> Quadrature:
    weights = torch.rand(size, dtype=torch.float64)
    return quadrature(torch.randn(size), weights / weights.sum())


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (24, 24), (40, 7)])
def test_the_distance_is_that_of_scipy_on_normalized_nodes(sizes: tuple[int, int]) -> None:
    a, b = (arbitrary(size) for size in sizes)
    scaled = [(q.nodes / q.nodes.abs().max()).numpy() for q in (a, b)]
    expected = wasserstein_distance(*scaled, a.weights.numpy(), b.weights.numpy())
    assert shape_distance(a, b)[0] == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_identities() -> None:
    a, b = arbitrary(12), arbitrary(9)
    order = torch.randperm(12)
    shuffled = quadrature(a.nodes[order], a.weights[order])
    assert shape_distance(a, a) == (0.0, 0.0)
    assert shape_distance(a, shuffled)[0] == pytest.approx(0, abs=1e-14)
    # Rounding is no difference, and no difference has no error.
    parted = quadrature(torch.cat([a.nodes] * 2), torch.cat([a.weights / 3, a.weights * 2 / 3]))
    assert shape_distance(a, parted) == (0.0, 0.0)
    assert shape_distance(a, b) == pytest.approx(shape_distance(b, a), rel=1e-12)
    # All weight at the one end against all weight at the other: as far as can be.
    ends = quadrature(torch.tensor([1.0])), quadrature(torch.tensor([-3.0]))
    assert shape_distance(*ends)[0] == pytest.approx(2)


@pytest.mark.parametrize("factor", [1e-8, 7.0, 1e8])
def test_scale_does_not_matter_and_sign_does(factor: float) -> None:
    a, b = arbitrary(12), arbitrary(9)
    scaled = quadrature(factor * a.nodes, a.weights)
    assert shape_distance(scaled, b) == pytest.approx(shape_distance(a, b), rel=1e-9)
    assert published_distance(scaled, b) == pytest.approx(published_distance(a, b), rel=1e-6)
    both = [quadrature(-q.nodes, q.weights) for q in (a, b)]
    assert shape_distance(*both) == pytest.approx(shape_distance(a, b), rel=1e-9)
    assert shape_distance(quadrature(-a.nodes, a.weights), a)[0] > 0.01


def test_the_reported_error_is_the_scatter_over_start_vectors() -> None:
    dim, other, repeats = 300, 80, 60
    matrix = spectrum(torch.cat([torch.tensor([8.0, 5.0]), 0.3 * torch.randn(dim - 2)]))
    block = spectrum(torch.cat([torch.tensor([6.0, 1.0]), 0.1 * torch.randn(other - 2)]))
    exact, _ = shape_distance(*(quadrature(torch.linalg.eigvalsh(m)) for m in (block, matrix)))
    for num_runs in (1, 2):
        found, errors = [], []
        for _ in range(repeats):
            pair = []
            for m in (block, matrix):
                starts = torch.randn(num_runs, len(m)).double()
                runs = [lanczos(DenseOperator(m), z, 16) for z in starts]
                pair.append(Quadrature.of(runs, len(m)))
            value, error = shape_distance(*pair)
            found.append(value)
            errors.append(error)
        values = torch.tensor(found)
        ratio = float(torch.tensor(errors).square().mean().sqrt() / values.std())
        assert 0.6 < ratio < 1.6
        # The noise of the weights and the depth leave a bias below one error.
        assert abs(float(values.mean()) - exact) < float(values.std())


def test_a_zero_operator_has_no_shape() -> None:
    zero = quadrature(torch.zeros(1))
    assert all(math.isnan(value) for value in shape_distance(zero, arbitrary(3)))
    assert math.isnan(published_distance(zero, arbitrary(3)))


def published_heights(nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The published recipe once more, step by step."""
    low, high = nodes.min(), nodes.max()
    margin = 0.05 * (high - low)
    low, high = low - margin, high + margin
    places = (nodes - (low + high) / 2) / ((high - low) / 2)
    sigma = (2 / 127) / np.sqrt(8 * np.log(1.25))
    reach = sigma * np.sqrt(-2 * np.log(1e-8))
    density = np.zeros(1024)
    for i, x in enumerate(np.linspace(-1, 1, 1024)):
        for place, weight in zip(places, weights, strict=True):
            if abs(x - place) < reach:
                density[i] += weight * np.exp(-((x - place) ** 2) / (2 * sigma**2))
    density[density == 0] = density[density > 0].min()
    p = np.log(density)
    p = (p - p.min()) / (p.max() - p.min())
    return p / p.sum()


def test_the_published_measure_follows_its_recipe() -> None:
    a, b = arbitrary(10), arbitrary(25)
    heights = [published_heights(q.nodes.numpy(), q.weights.numpy()) for q in (a, b)]
    assert published_distance(a, b) == pytest.approx(wasserstein_distance(*heights), rel=1e-9)


def test_the_published_measure_does_not_see_where_eigenvalues_lie() -> None:
    a = arbitrary(10)
    mirrored = quadrature(-a.nodes, a.weights)
    assert published_distance(a, mirrored) == pytest.approx(0, abs=1e-12)
    assert shape_distance(a, mirrored)[0] > 0.01

"""Convexity maps and basin radii, where both are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lla_callbacks import basin_radii, convexity_map
from lla_callbacks.linalg.probes import generator
from lla_callbacks.slices.filters import Filters
from tests.cases import cross_entropy, tanh_net
from tests.slices.slice_cases import BATCH, Weights, quadratic, space, two_batches

GRID = {"alphas": torch.linspace(-1, 1, 3), "betas": torch.linspace(-1, 1, 5)}


@pytest.mark.parametrize(
    "values",
    [(1.0, 2.0, 5.0), (-1.0, 2.0, 5.0), (-6.0, 2.0, 3.0), (0.5, 0.9, 1.0)],
    ids=["convex", "saddle", "mostly concave", "well conditioned"],
)
def test_ratios_of_a_quadratic_are_exact_at_every_point(values: tuple[float, ...]) -> None:
    loss = quadratic(torch.diag(torch.tensor(values, dtype=torch.float64)))
    found = convexity_map(Weights((1, 3)), [BATCH], loss=loss, **GRID)
    assert found.ratio.shape == (3, 5)
    expected = torch.full((3, 5), values[0] / values[-1], dtype=torch.float64)
    torch.testing.assert_close(found.signed_ratio, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.ratio, expected.abs(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.lambda_min, torch.full_like(expected, values[0]))
    assert found.num_matvecs == 3 * 15


def test_where_no_direction_curves_up_the_ratio_is_infinite() -> None:
    loss = quadratic(-torch.eye(3, dtype=torch.float64))
    found = convexity_map(Weights((1, 3)), [BATCH], loss=loss, **GRID)
    assert found.ratio.isposinf().all()
    assert found.signed_ratio.isneginf().all()


def test_eigenvalues_are_those_of_the_dense_hessian_at_each_point() -> None:
    module = tanh_net().double()
    batches = [(x.double(), y) for x, y in two_batches()]
    before = [p.detach().clone() for p in module.parameters()]
    found = convexity_map(
        module, batches, loss=cross_entropy, num_steps=43, rtol=1e-9, seed=1, **GRID
    )
    from lla_callbacks.objective.objective import Objective
    from lla_callbacks.slices.directions import random_directions
    from tests.cases import dense_hessian

    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    layout = space(module)
    d, e = random_directions(module, layout, seed=1)
    for i, j in ((0, 0), (1, 2), (2, 3)):
        offset = found.alphas[i] * d.vector + found.betas[j] * e.vector
        with torch.no_grad():
            for p, part in zip(module.parameters(), layout.unflatten(offset), strict=True):
                p.add_(part)
        values = torch.linalg.eigvalsh(dense_hessian(module, batches, cross_entropy, "batch"))
        assert float(found.lambda_min[i, j]) == pytest.approx(float(values[0]), rel=1e-4)
        assert float(found.lambda_max[i, j]) == pytest.approx(float(values[-1]), rel=1e-4)
        assert float(found.loss[i, j]) == pytest.approx(Objective(module, batches, cross_entropy)())
        with torch.no_grad():
            for p, value in zip(module.parameters(), before, strict=True):
                p.copy_(value)


def test_a_point_without_a_hessian_is_a_gap_and_the_centre_an_error() -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        value = 0.5 * module.flat().square().sum()
        return value if float(module.flat().detach()[0]) <= limit else value * torch.nan

    module = Weights((1, 3))
    limit = float(module.flat().detach()[0]) + 1e-9
    direction = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    other = torch.tensor([0, 1.0, 0], dtype=torch.float64)
    found = convexity_map(module, [BATCH], loss=loss, directions=(direction, other), **GRID)
    assert found.ratio[2].isnan().all()
    assert found.ratio[:2].isfinite().all()
    assert found.evaluated.all()
    limit -= 1
    with pytest.raises(Exception, match=r"not finite|nan"):
        convexity_map(module, [BATCH], loss=loss, directions=(direction, other), **GRID)


# -- the basin ----------------------------------------------------------------------------


def test_radii_of_a_quadratic_are_known() -> None:
    module = Weights((3, 4))
    matrix = torch.diag(torch.linspace(1, 30, 12, dtype=torch.float64))
    centre = module.flat().detach().clone()

    def loss(module: Any, batch: Any) -> Tensor:
        offset = module.flat() - centre
        return 0.5 * offset @ matrix @ offset + 7.0

    found = basin_radii(module, [BATCH], loss=loss, num_rays=20, rise=0.3, rtol=1e-6, seed=4)
    assert found.centre_loss == 7.0
    assert found.cutoff == 7.3
    filters = Filters(module, space(module), "filter", "zero")
    for k, radius in enumerate(found.radii.tolist()):
        noise = torch.randn(12, generator=generator(4, 5, k), dtype=torch.float64)
        ray = filters.scaled(noise)
        assert radius == pytest.approx(math.sqrt(2 * 0.3 / float(ray @ matrix @ ray)), rel=2e-6)
    assert not found.open.any()
    logs = found.radii.log()
    assert found.effective_radius == pytest.approx(float(logs.mean().exp()))
    assert found.effective_radius_sem == pytest.approx(
        found.effective_radius * float(logs.std()) / 20**0.5
    )
    assert found.quantiles[0.1] <= found.quantiles[0.5] <= found.quantiles[0.9]
    more = basin_radii(module, [BATCH], loss=loss, num_rays=25, rise=0.3, rtol=1e-6, seed=4)
    assert torch.equal(more.radii[:20], found.radii)


def test_the_volume_of_a_ball_is_the_balls() -> None:
    module = Weights((1, 6))
    centre = module.flat().detach().clone()
    norm = float(centre.norm())

    def loss(module: Any, batch: Any) -> Tensor:
        return (module.flat() - centre).square().sum()

    # Rays have the norm of the weights, so a cutoff of (r norm)^2 is a ball of radius r.
    found = basin_radii(module, [BATCH], loss=loss, num_rays=5, cutoff=(0.5 * norm) ** 2, rtol=1e-6)
    torch.testing.assert_close(found.radii, torch.full((5,), 0.5).double(), rtol=1e-6, atol=0)
    assert found.dim == 6
    ball = math.log10(math.pi**3 / 6)  # of six dimensions
    assert found.log10_volume == pytest.approx(ball + 6 * math.log10(0.5), abs=1e-5)
    # A relative error of the radius counts as often as there are dimensions.
    wider = replace(found, radii=found.radii * (1 + found.rtol / 2))
    apart = wider.log10_volume - found.log10_volume
    assert apart == pytest.approx(found.log10_volume_error, rel=found.rtol)


def test_rays_that_never_pass_the_rim_are_open() -> None:
    found = basin_radii(
        tanh_net(), two_batches(), loss=lambda m, b: 0 * cross_entropy(m, b), num_rays=4
    )
    assert found.open.all()
    assert (found.radii == 4.0).all()
    assert math.isinf(found.quantiles[0.5])
    assert "4 open" in repr(found)


def test_a_loss_that_is_not_finite_is_beyond_the_rim() -> None:
    module = Weights((1, 3))
    centre = module.flat().detach().clone()

    def loss(module: Any, batch: Any) -> Tensor:
        distance = (module.flat() - centre).norm() / centre.norm()
        return torch.where(distance > 0.37, torch.nan, 0 * distance)

    found = basin_radii(module, [BATCH], loss=loss, num_rays=3, rtol=1e-4)
    torch.testing.assert_close(found.radii, torch.full((3,), 0.37).double(), rtol=1e-3, atol=0)


def test_a_tiny_basin_is_found() -> None:
    module = Weights((1, 3))
    centre = module.flat().detach().clone()

    def loss(module: Any, batch: Any) -> Tensor:
        return (module.flat() - centre).square().sum() * 1e12

    found = basin_radii(module, [BATCH], loss=loss, num_rays=2, rise=0.1, rtol=1e-4)
    expected = math.sqrt(0.1 / 1e12) / float(centre.norm())
    assert float(found.radii[0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_rays": 0}, "num_rays is 0"),
        ({"rise": -1}, "rise is -1; give a positive"),
        ({"rtol": 1.0}, "rtol is 1.0"),
        ({"max_radius": math.inf}, "max_radius is inf"),
        ({"cutoff": -1.0}, "not above the loss"),
        ({"time_budget": -1}, "time_budget is -1"),
    ],
)
def test_settings_that_are_not_allowed(setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        basin_radii(tanh_net(), two_batches(), loss=cross_entropy, **setting)

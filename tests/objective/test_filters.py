"""The curvature along filter-normalized directions."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import measure_hessian
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.filters import filter_scales
from lla_callbacks.objective.objective import Objective, trainable
from lla_callbacks.slices.filters import Filters


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(36, 3),
    ).double()  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(12, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (12,))


def loss(module: nn.Module, held: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(module(held[0]), held[1])


def exact(module: nn.Module) -> float:
    space = ParameterSpace(trainable(module))
    dense = Objective(module, [batch()], loss).hessian().to_dense()
    return float(filter_scales(module, space) @ dense.diagonal())


def test_scales_are_the_second_moment_of_filter_normalized_directions() -> None:
    module = net()
    space = ParameterSpace(trainable(module))
    filters = Filters(module, space, "filter", "zero")
    count = 3000
    torch.manual_seed(2)
    square = torch.zeros(space.dim, dtype=torch.float64)
    for _ in range(count):
        square += filters.scaled(torch.randn(space.dim, dtype=torch.float64)) ** 2 / count
    scales = filter_scales(module, space)
    assert torch.equal(scales == 0, square == 0)
    moved = scales > 0
    # Of normal numbers the square has a relative standard deviation of sqrt(2), less in a filter.
    off = (square[moved] / scales[moved] - 1).abs()
    assert float(off.max()) <= 5 * math.sqrt(2 / count)


def test_the_estimate_is_within_its_errors_and_costs_no_product() -> None:
    module, seeds = net(), 40
    truth = exact(module)
    found = [
        measure_hessian(module, [batch()], loss=loss, num_steps=4, num_probes=6, seed=seed)
        for seed in range(seeds)
    ]
    assert {f.num_matvecs for f in found} == {10}
    values = torch.tensor([f.filter_curvature for f in found])
    assert abs(float(values.mean()) - truth) <= 5 * float(values.std()) / math.sqrt(seeds)
    within = sum(abs(f.filter_curvature - truth) <= 2 * f.filter_curvature_sem for f in found)
    assert within >= 0.85 * seeds


def test_scaling_a_relu_network_without_changing_its_function_changes_nothing() -> None:
    module = net()
    before = exact(module)
    with torch.no_grad():
        for parameter in (module[0].weight, module[0].bias):
            parameter *= 8
        module[2].weight /= 8
    assert abs(exact(module) / before - 1) < 1e-9
    # Where the trace times the squared norm does not stay what it was.
    twin = net()
    old, new = (
        measure_hessian(m, [batch()], loss=loss, num_steps=40, num_probes=200).trace_times_norm2
        for m in (twin, module)
    )
    assert new > 3 * old

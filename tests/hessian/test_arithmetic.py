"""What another rounding of the weights is worth for an eigenvalue, and that it is reported."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks import measure_hessian
from lla_callbacks.hessian.settings import TrackingSettings
from lla_callbacks.hessian.tracking import track
from lla_callbacks.linalg.errors import OutOfMemoryError
from lla_callbacks.linalg.lanczos import ROUNDING
from lla_callbacks.objective.objective import Objective

ROUNDINGS = ROUNDING * torch.finfo(torch.float32).eps
FAR = 20_000.0


def squares(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def far_from_zero(seed: int, kink: nn.Module) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """Return a float32 network on data that nobody centred: sums lose digits before a kink."""
    source = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 8), kink, nn.Linear(8, 1))
    for parameter in module.parameters():
        parameter.data.copy_(0.5 * (2 * torch.rand(parameter.shape, generator=source) - 1))
    module[0].bias.data.copy_(-FAR * module[0].weight.data.sum(dim=1))  # type: ignore[operator, union-attr]
    x, y = torch.randn(128, 4, generator=source) + FAR, torch.randn(128, 1, generator=source)
    return module, (x, y)


def largest_of_dense(module: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Return the largest eigenvalue of the dense Hessian in float64."""
    exact = copy.deepcopy(module).double()
    parameters = list(exact.parameters())
    loss = squares(exact, [part.double() for part in batch])
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    eye = torch.eye(len(flat), dtype=torch.float64)
    rows = torch.autograd.grad(flat, parameters, eye, is_grads_batched=True, retain_graph=True)
    dense = torch.cat([row.reshape(len(flat), -1) for row in rows], dim=1)
    return float(torch.linalg.eigvalsh(dense)[-1])


def test_the_error_of_a_relu_network_in_float32_covers_its_kinks() -> None:
    outside = {"residual": 0, "without the arithmetic": 0}
    for seed in range(20):
        module, batch = far_from_zero(seed, nn.ReLU())
        found = measure_hessian(
            module, [batch], loss=squares, num_steps=6, num_probes=2, check=False
        ).lambda_max
        off = abs(found - largest_of_dense(module, batch))
        outside["residual"] += off > found.residual
        outside["without the arithmetic"] += off > found.residual - found.arithmetic
    assert outside["residual"] <= 1, outside
    # Otherwise this would show nothing: it is what was reported before.
    assert outside["without the arithmetic"] >= 4, outside


@pytest.mark.parametrize("check", [True, False])
def test_a_smooth_network_is_not_told_of_more_than_rounding(check: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    batch = torch.randn(32, 4), torch.randn(32, 1)
    report = measure_hessian(module, [batch], loss=squares, num_probes=2, check=check)
    largest = abs(report.lambda_max)
    for end in (report.lambda_max, report.lambda_min):
        assert 0 < end.arithmetic <= ROUNDINGS * largest
        assert end.beyond >= end.residual >= end.arithmetic + ROUNDINGS * largest


def test_in_float64_the_arithmetic_is_worth_nothing() -> None:
    module, batch = far_from_zero(0, nn.ReLU())
    wide = [tuple(part.double() for part in batch)]
    report = measure_hessian(module.double(), wide, loss=squares, num_probes=2, check=False)
    assert report.lambda_max.arithmetic == report.lambda_min.arithmetic == 0.0


def test_differences_have_an_error_of_their_own() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    batch = torch.randn(32, 4), torch.randn(32, 1)
    report = measure_hessian(
        module, [batch], loss=squares, num_probes=2, num_steps=3, engine="difference"
    )
    assert math.isnan(report.lambda_max.arithmetic)
    assert math.isfinite(report.lambda_max.residual)


@pytest.mark.parametrize("error", [OutOfMemoryError("it is full.", ""), torch.OutOfMemoryError()])
def test_weights_come_back_to_the_bit_and_short_memory_leaves_it_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = far_from_zero(0, nn.ReLU())
    before = copy.deepcopy(module.state_dict())
    hessian, calls, moved = Objective.hessian, [], []

    def full_later(objective: Objective, **settings: Any) -> Any:
        calls.append(settings)
        moved.append(any(not torch.equal(v, before[k]) for k, v in module.state_dict().items()))
        if len(calls) == 3:
            raise error
        return hessian(objective, **settings)

    monkeypatch.setattr(Objective, "hessian", full_later)
    settings: dict[str, Any] = {"loss": squares, "num_probes": 2, "check": False}
    short = measure_hessian(module, [batch], **settings)
    assert moved == [False, True, True]
    full = measure_hessian(module, [batch], **settings)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert math.isnan(short.lambda_max.arithmetic)
    # The run is the same; only the sum of its residual and the arithmetic is rounded.
    added = full.lambda_max.residual - short.lambda_max.residual
    assert added == pytest.approx(full.lambda_max.arithmetic, rel=1e-12)
    assert short.trace == full.trace


@pytest.mark.parametrize("steps", [2, 12])
def test_a_light_measurement_asks_where_it_has_converged(steps: int) -> None:
    module, batch = far_from_zero(6, nn.ReLU())
    objective = Objective(module, [batch], squares, check=False)
    settings = TrackingSettings(num_probes=0, eig_rtol=1e-7, num_steps=steps)
    found = track(objective, settings)[0].lambda_max
    if steps == 2:
        assert math.isnan(found.arithmetic)
    else:
        off = abs(found - largest_of_dense(module, batch))
        assert found.residual - found.arithmetic < off <= found.residual

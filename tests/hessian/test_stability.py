"""Stability ratios against what the real optimizers do on a quadratic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lla_callbacks import measure_hessian
from lla_callbacks.hessian.stability import stability_limit
from lla_callbacks.linalg.space import ParameterSpace

CURVATURE = 3.0
SGD: dict[str, dict[str, object]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"momentum": 0.5, "weight_decay": 2.0},
}


def grows(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int = 3000) -> bool:
    """Whether the optimizer diverges on 0.5 * CURVATURE * p^2."""
    for _ in range(steps):
        p.grad = CURVATURE * p.detach()
        optimizer.step()
        if not 1e-100 < abs(float(p.detach())) < 1e100:
            break
    return abs(float(p.detach())) > 1


def ratio_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> float:
    limit = stability_limit(optimizer, ParameterSpace({"p": p}))
    assert limit is not None
    assert limit.is_uniform
    return limit.ratio(CURVATURE)


@pytest.mark.parametrize("target", [0.98, 1.02])
@pytest.mark.parametrize("name", SGD)
def test_sgd_diverges_exactly_beyond_one(name: str, target: float) -> None:
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    trial = ratio_of(torch.optim.SGD([p], lr=1e-3, **SGD[name]), p)
    optimizer = torch.optim.SGD([p], lr=1e-3 * target / trial, **SGD[name])
    assert ratio_of(optimizer, p) == pytest.approx(target)
    assert grows(optimizer, p) is (target > 1)


def settled_adam(
    kind: type[torch.optim.Optimizer], p: nn.Parameter, lr: float, **settings: float
) -> torch.optim.Optimizer:
    """An Adam whose preconditioner has stopped moving, as the theory assumes."""
    optimizer = kind([p], lr=lr, betas=(0.9, 1 - 1e-12), eps=1e-3, **settings)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[p]
    state["exp_avg_sq"].fill_(4.0)
    state["exp_avg"].zero_()
    state["step"].fill_(1e15)
    p.data.fill_(1e-3)
    return optimizer


@pytest.mark.parametrize("target", [0.98, 1.02])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"weight_decay": 1.0}),
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.AdamW, {"weight_decay": 0.05}),
    ],
    ids=["adam", "adam, coupled decay", "adamw", "adamw, decoupled decay"],
)
def test_adam_diverges_exactly_beyond_one(
    kind: type[torch.optim.Optimizer], settings: dict[str, float], target: float
) -> None:
    def ratio_at(lr: float) -> float:
        p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        return ratio_of(settled_adam(kind, p, lr, **settings), p)

    low, high = 1e-3, 38.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio_at(middle) < target else (low, middle)
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = settled_adam(kind, p, low, **settings)
    start = abs(float(p.detach()))
    for _ in range(1500):
        p.grad = CURVATURE * p.detach()
        optimizer.step()
        if abs(float(p.detach())) > 1:
            break
    assert (abs(float(p.detach())) > start) is (target > 1)


def test_adam_has_the_published_limit() -> None:
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    lr = 0.1
    optimizer = settled_adam(torch.optim.Adam, p, lr)
    preconditioner = math.sqrt(4.0) + 1e-3
    # Cohen et al. 2022: lambda_max(P^-1 H) = 38 / lr for beta1 = 0.9.
    assert ratio_of(optimizer, p) == pytest.approx(CURVATURE / preconditioner / (38 / lr))


def test_rmsprop_diverges_exactly_beyond_one() -> None:
    for target in (0.98, 1.02):
        p = nn.Parameter(torch.tensor([1e-3], dtype=torch.float64))
        lr = target * 2 * (math.sqrt(4.0) + 1e-3) / CURVATURE
        optimizer = torch.optim.RMSprop([p], lr=lr, alpha=1 - 1e-12, eps=1e-3)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.state[p]["square_avg"].fill_(4.0)
        assert ratio_of(optimizer, p) == pytest.approx(target)
        assert grows_beyond(optimizer, p) is (target > 1)


def grows_beyond(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> bool:
    start = abs(float(p.detach()))
    for _ in range(200):
        p.grad = CURVATURE * p.detach()
        optimizer.step()
    return abs(float(p.detach())) > start


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.LBFGS(p),
    ],
    ids=["adam before its first step", "adagrad", "ascent", "lbfgs"],
)
def test_where_no_limit_is_known_there_is_none(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    p = nn.Parameter(torch.ones(2))
    assert stability_limit(make([p]), ParameterSpace({"p": p})) is None


def quadratic(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """0.5 sum_i c_i p_i^2 with curvatures 1 and 10."""
    return 0.5 * (torch.tensor([1.0, 10.0]).double() * module.weight.squeeze(1) ** 2).sum()


def test_two_learning_rates_are_told_apart() -> None:
    module = nn.Linear(1, 2, bias=False).double()
    uniform = torch.optim.SGD(module.parameters(), lr=0.1)
    report = measure_hessian(module, [torch.ones(1)], loss=quadratic, optimizer=uniform)
    assert report.criteria["stability"] == pytest.approx(10 * 0.1 / 2)

    class TwoParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(1).double())
            self.b = nn.Parameter(torch.ones(1).double())

    parts = TwoParts()
    optimizer = torch.optim.SGD(
        [{"params": [parts.a], "lr": 1.0}, {"params": [parts.b], "lr": 0.01}]
    )
    report = measure_hessian(
        parts,
        [torch.ones(1)],
        loss=lambda m, _: (0.5 * (m.a**2 + 10 * m.b**2)).sum(),
        optimizer=optimizer,
    )
    assert report.criteria["stability"] == pytest.approx(max(1.0 * 1 / 2, 10 * 0.01 / 2))
    assert report.criteria_errors["stability"] < 0.05


def test_a_parameter_outside_of_the_optimizer_does_not_move() -> None:
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    space = ParameterSpace(dict(module.named_parameters()))
    limit = stability_limit(torch.optim.SGD(module[1].parameters(), lr=0.2), space)
    assert limit is not None
    assert limit.diagonal.tolist() == [0.0, 0.1]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_at_a_rate_of_zero_there_is_no_limit(kind) -> None:
    module = nn.Linear(3, 1)
    optimizer = kind(module.parameters(), lr=0.0)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert stability_limit(optimizer, ParameterSpace(dict(module.named_parameters()))) is None

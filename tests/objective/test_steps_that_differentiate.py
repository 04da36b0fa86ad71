"""Inputs that want a gradient, and steps that differentiate on their own way."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import HessianTraceRegularizer, loss_line, loss_plane, measure_hessian
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.batches import fresh, hold
from lla_callbacks.objective.objective import Objective
from lla_callbacks.penalty.displacement import DisplacedLoss
from lla_callbacks.penalty.penalty import PenaltySettings, penalty_gradient
from tests.kinds import dense_by_differences


def field() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def points(count: int = 8) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)[:, None].requires_grad_()


def equation(module: Any, x: Tensor) -> Tensor:
    """u' = -u, by the gradient that the batch itself wants."""
    u = module(x)
    return (torch.autograd.grad(u.sum(), x, create_graph=True)[0] + u).square().mean()


def force(module: Any, batch: Any) -> Tensor:
    """A force field: positions that the step makes variables of."""
    x, wanted = batch
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    return F.mse_loss(-found, wanted)


def inner_step(module: Any, batch: Any) -> Tensor:
    """Differentiates by the weights, as meta-learning and gradient penalties do."""
    x, wanted = batch
    weights = dict(module.named_parameters())
    loss = F.mse_loss(module(x), wanted)
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    moved = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), slopes, strict=True)}
    return F.mse_loss(torch.func.functional_call(module, moved, (x,)), wanted)


def pair() -> Any:
    x = points(8).detach()
    return x, (3 * x).sin()


LOSSES: dict[str, tuple[Any, Any]] = {
    "points that want a gradient": (points, equation),
    "a force field": (pair, force),
    "a step of its own": (pair, inner_step),
}


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_measured_also_in_parts_and_in_little_memory(name: str) -> None:
    make, loss = LOSSES[name]
    batch = make()
    dense = dense_by_differences(field(), [batch], loss, "batch")
    for settings in ({}, {"engine": "difference"}):
        objective = Objective(field(), [batch], loss, **settings)
        found = objective.hessian().to_dense()
        torch.testing.assert_close(found, dense, atol=1e-6 * float(dense.abs().max()), rtol=0)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    report = measure_hessian(field(), [batch], loss=loss, num_steps=20)
    assert report.self_check is not None
    assert {c.outcome for c in report.self_check.checks} == {"passed"}
    assert float(report.lambda_max) == pytest.approx(top, rel=1e-5)
    if loss is not inner_step:
        for small in ({"microbatch_size": 3}, {"max_memory": 2000}):
            parts = measure_hessian(field(), [batch], loss=loss, num_steps=20, **small)
            assert float(parts.lambda_max) == pytest.approx(top, rel=1e-5)
            assert parts.engine == "exact"


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_drawn(name: str) -> None:
    make, loss = LOSSES[name]
    batch, module = make(), field()
    line = loss_line(module, [batch], loss=loss, alphas=[-1, 0, 1])
    assert line.loss[1] == pytest.approx(float(loss(module, batch).detach()), rel=1e-14)
    plane = loss_plane(module, [batch], loss=loss, alphas=range(-3, 4), betas=range(-3, 4))
    assert bool(torch.isfinite(plane.loss).all())
    assert plane.loss[3, 3] == line.loss[1]


def test_held_batches_want_a_gradient_where_theirs_did() -> None:
    x = points()
    held = hold((x, x.detach()))
    assert [t.requires_grad for t in held] == [True, False]
    assert held[0] is not x
    again = fresh(held, torch.device("cpu"))
    assert [t.requires_grad and t.is_leaf for t in again] == [True, False]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("estimator", ["perturbation", "difference", "exact", "gauss_newton"])
def test_the_penalty_s_gradient_is_that_of_gradients_one_by_one(name: str, estimator: Any) -> None:
    make, loss = LOSSES[name]
    batch, module = make(), field()
    space = ParameterSpace(dict(module.named_parameters()))
    around = DisplacedLoss(lambda: loss(module, batch), space, space.names)
    settings = PenaltySettings(estimator)
    if estimator == "gauss_newton" and name == "points that want a gradient":
        with pytest.raises(RuntimeError, match="no criterion"):
            penalty_gradient(around, 1e-3, settings)
        return
    found = penalty_gradient(around, 1e-3, settings, with_task=False)
    flat = space.flatten(found.gradient)
    assert bool(torch.isfinite(flat).all())
    assert float(flat.norm()) > 0
    if estimator == "perturbation":
        step = (2 * 1e-3) ** 0.5
        with around.displacing():
            parts = [around.gradient(c, 0)[1] for c in (step, -step, 0.0)]
        ahead, behind, here = (space.flatten(p) for p in parts)
        torch.testing.assert_close(flat, (ahead + behind) / 2 - here, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", ["middle", ["net.0"]])
def test_the_regularizer_takes_it_with_whatever_layers(layers: Any, tmp_path: Any) -> None:
    import pytorch_lightning as pl

    class Network(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = field()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return equation(self.net, batch[0].requires_grad_())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    module = Network()
    before = module.net[0].weight.clone()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points().detach()), 4)
    penalty = HessianTraceRegularizer(1e-3, layers=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[penalty], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, loader)
    assert penalty.skipped == 0
    assert not torch.equal(before, module.net[0].weight)

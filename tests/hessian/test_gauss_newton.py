"""The Gauss-Newton part against dense ``J' A J`` in float64, and against curvlinops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import MeasurementError, hessian_operator, measure_hessian
from lla_callbacks.linalg import gathering
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.objective.batch_plan import BatchPlan
from lla_callbacks.objective.gauss_newton import GaussNewtonObjective
from lla_callbacks.objective.memory import MemoryPlan
from tests.cases import CASES, dense_hessian, trainable

Batch = tuple[Tensor, Tensor]
WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
# Name to (criterion as the loss calls it, the same of outputs and targets, kind of target).
CRITERIA: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "cross_entropy": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), "labels"),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1), "labels"),
    "soft labels": (lambda z, y: F.cross_entropy(z, y.softmax(1)), "numbers"),
    "nll_loss": (lambda z, y: F.nll_loss(z.log_softmax(1), y), "labels"),
    "mse_loss": (lambda z, y: F.mse_loss(z, y, reduction="sum") / 7, "numbers"),
    "MSELoss": (nn.MSELoss(), "numbers"),
    "bce": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, y.sigmoid(), pos_weight=WEIGHTS),
        "numbers",
    ),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(reduction="sum"), "binary"),
    "two of them": (lambda z, y: F.mse_loss(z, y) + 0.3 * F.huber_loss(z, y), "numbers"),
    "a mean of its own": (
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * WEIGHTS[y]).mean(), "labels",
    ),
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches_of(kind: str) -> list[Batch]:
    torch.manual_seed(2)
    found = []
    for size in (5, 3):
        y: Tensor = torch.randn(size, 3, dtype=torch.float64)
        if kind == "labels":
            y = torch.randint(0, 3, (size,))
        elif kind == "binary":
            y = (y > 0).double()
        found.append((torch.randn(size, 4, dtype=torch.float64), y))
    return found


def dense_ggn(
    module: nn.Module, batches: list[Batch], criterion: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Jacobians by one backward pass an output; the criterion's Hessian by torch.func."""
    parameters = list(trainable(module).values())
    total, whole = torch.zeros(()), sum(len(x) for x, _ in batches)
    for x, y in batches:
        z = module(x)
        rows = []
        for entry in z.reshape(-1):
            found = torch.autograd.grad(entry, parameters, retain_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in found]))
        J = torch.stack(rows)
        shape = z.shape
        A = torch.func.hessian(lambda v, y=y, shape=shape: criterion(v.reshape(shape), y))(
            z.detach().reshape(-1)
        )
        total = total + len(x) / whole * J.T @ A @ J
    return total


@pytest.mark.parametrize("name", CRITERIA)
def test_it_is_the_dense_one(name: str) -> None:
    criterion, kind = CRITERIA[name]
    module, batches = net(), batches_of(kind)
    dense = dense_ggn(module, batches, criterion)
    before = [p.clone() for p in module.parameters()]

    def loss(m: Any, batch: Batch) -> Tensor:
        return criterion(m(batch[0]), batch[1])

    operator = hessian_operator(module, batches, loss=loss, matrix="ggn")
    found = operator.to_dense()
    # Rounding of products as long as the vector.
    within = 100 * torch.finfo(torch.float64).eps * len(dense) * float(dense.norm())
    assert float((found - dense).abs().max()) <= within
    assert float(torch.linalg.eigvalsh(found).min()) >= -within
    assert operator.matrix == "ggn"
    assert "Gauss-Newton part" in repr(operator)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    if name not in ("cross_entropy", "MSELoss", "bce"):
        return  # no mean over samples
    # In parts, without kept graphs: each product builds them anew.
    tight = hessian_operator(module, batches, loss=loss, matrix="ggn", max_memory=1)
    v = torch.randn(len(dense), 2, dtype=torch.float64)
    assert float((tight @ v - dense @ v).abs().max()) <= 10 * within


def test_it_is_that_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    module, batches = net(), batches_of("labels")
    theirs = curvlinops.GGNLinearOperator(
        module, nn.CrossEntropyLoss(), list(trainable(module).values()), batches
    )
    found = hessian_operator(
        module, batches, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), matrix="ggn"
    )
    v = torch.randn(found.shape[0], dtype=torch.float64)
    assert torch.allclose(found @ v, theirs @ v, rtol=1e-9, atol=1e-12)


class Lit(nn.Module):
    """A training step, with a criterion of its own among its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.criterion = nn.CrossEntropyLoss()
        self.automatic_optimization = True

    def log(self, *args: Any) -> None: ...

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            self.log("other", F.mse_loss(self.net(x), F.one_hot(y, 3).double()))
        return self.criterion(self.net(x), y)


def test_a_report_holds_its_share_of_the_trace() -> None:
    module, batches = Lit().double(), batches_of("labels")
    criterion = module.criterion
    ggn = dense_ggn(module.net, batches, criterion)
    hessian = dense_hessian(module.net, batches, lambda m, b: criterion(m(b[0]), b[1]), "batch")
    report = measure_hessian(module, batches, matrix="ggn", num_steps=12, num_probes=40)
    assert report.matrix == "ggn"
    assert abs(report.trace - float(ggn.trace())) <= 5 * report.trace_sem
    assert abs(report.hessian_trace - float(hessian.trace())) <= 5 * report.hessian_trace_sem
    share = float(ggn.trace() / hessian.trace())
    assert abs(report.gauss_newton_share - share) <= 5 * report.gauss_newton_share_error
    assert 0 < report.gauss_newton_share_error < 0.2
    assert report.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(ggn)[-1]), rel=1e-6)
    assert report.lambda_min >= -report.lambda_min.residual
    assert "Gauss-Newton part of the Hessian of 43 parameters" in report.summary()
    assert "share of the trace" in report.summary()
    plain = measure_hessian(module, batches, num_steps=4, num_probes=4)
    assert plain.matrix == "hessian"
    assert math.isnan(plain.gauss_newton_share)


class Squares(nn.Module):
    """Outputs that each depend on one weight, so that probes of either matrix have no error."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w**2


def test_the_share_is_exact_where_probes_are() -> None:
    module, y = Squares(), torch.tensor([[3.0, 1.0, 1.0]], dtype=torch.float64)
    batches = [(torch.ones(1, 3, dtype=torch.float64), y)]
    report = measure_hessian(
        module, batches, loss=lambda m, b: F.mse_loss(m(b[0]), b[1]), matrix="ggn", num_probes=2
    )
    w = module.w.detach()
    ggn = float((2 / 3 * (2 * w) ** 2).sum())
    whole = ggn + float((4 / 3 * (w**2 - y)).sum())
    assert report.trace == pytest.approx(ggn)
    assert report.hessian_trace == pytest.approx(whole)
    assert report.gauss_newton_share == pytest.approx(ggn / whole)
    assert report.gauss_newton_share_error < 1e-9


def _penalized(m: Any, b: Batch) -> Tensor:
    return F.mse_loss(m(b[0]), b[1]) + 0.1 * sum(p.square().sum() for p in m.parameters())


REFUSED: dict[str, tuple[Callable[[Any, Batch], Tensor], str]] = {
    "another loss": (
        lambda m, b: F.l1_loss(m(b[0]), b[1]), "calls no criterion.* It calls l1_loss",
    ),
    "divergence": (
        lambda m, b: F.kl_div(m(b[0]).log_softmax(1), b[1].softmax(1), reduction="sum"),
        "It calls kl_div",
    ),
    "probabilities": (
        lambda m, b: F.binary_cross_entropy(m(b[0]).sigmoid(), b[1].sigmoid()),
        "It calls binary_cross_entropy",
    ),
    "by hand": (lambda m, b: (m(b[0]) - b[1]).square().mean(), "calls no criterion"),
    "a penalty": (_penalized, "has a part beside its criteria"),
    "a function of it": (
        lambda m, b: F.mse_loss(m(b[0]), b[1]).exp(), "no sum of criteria with constant weights",
    ),
    "both sides": (lambda m, b: F.mse_loss(m(b[0]), m(b[1][:, [0, 0, 1, 2]])), "beside its"),
    "targets first": (lambda m, b: F.mse_loss(b[1], m(b[0])), "its targets first"),
    "for show": (
        lambda m, b: (F.mse_loss(m(b[0]), b[1]), m(b[0]).square().mean())[1], "calls no criterion",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_losses_are_refused_by_name(name: str) -> None:
    loss, message = REFUSED[name]
    with pytest.raises(
        MeasurementError, match=rf"matrix='ggn' is the curvature.*{message}"
    ) as told:
        hessian_operator(net(), batches_of("numbers"), loss=loss, matrix="ggn", check=False)
    assert "Take matrix='hessian', or compute the loss by" in told.value.remedy


def test_differences_see_the_whole_hessian() -> None:
    with pytest.raises(
        ValueError, match=r"engine is 'difference' beside matrix='ggn'.*give engine"
    ):
        measure_hessian(
            net(), batches_of("labels"), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            matrix="ggn", engine="difference",
        )  # fmt: skip


def test_what_loses_its_graph_on_the_way_is_refused() -> None:
    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g.detach()

    with pytest.raises(MeasurementError, match=r"double backward|second derivative is lost"):
        hessian_operator(
            net(), batches_of("labels"), matrix="ggn",
            loss=lambda m, b: F.cross_entropy(Lost.apply(m[:2](b[0])) @ m[2].weight.T, b[1]),
        )  # fmt: skip


def test_batch_statistics_are_part_of_the_network() -> None:
    module, batches, loss = CASES[5].build()
    found = hessian_operator(module, batches, loss=loss, matrix="ggn").to_dense()
    module.train()
    dense = dense_ggn(module, batches, F.cross_entropy)
    assert float((found - dense).abs().max()) <= 1e-9 * float(dense.norm())


def mean_loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("kept", [2, 1, 0], ids=["all kept", "one kept", "none kept"])
def test_products_do_not_depend_on_what_is_kept_and_gathered(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product() -> Tensor:
        hessian = GaussNewtonObjective(net(), batches_of("labels"), mean_loss).hessian()
        vectors = torch.linspace(-1, 1, 2 * hessian.shape[0]).double().reshape(-1, 2)
        assert torch.equal(hessian.gradient, again(hessian))
        return hessian @ vectors

    def again(hessian: LossOperator) -> Tensor:
        hessian.save_memory()
        return hessian.gradient

    wanted = product()
    freed = []
    grad = torch.autograd.grad

    def noting(*args: Any, **settings: Any) -> Any:
        freed.append(settings.get("retain_graph") is False)
        return grad(*args, **settings)

    monkeypatch.setattr(torch.autograd, "grad", noting)
    monkeypatch.setattr(gathering, "LEAST", 1)
    plan = MemoryPlan(kept, 1, 64, 1.0)
    monkeypatch.setattr(BatchPlan, "_memory_plan", lambda self, counts: plan)
    found = product()
    # Graphs that are not kept are taken down by the last walks through them.
    assert any(freed) == (kept < 2)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-12)

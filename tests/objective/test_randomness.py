"""What is random in a forward pass: off where it is dropout, held where it is the model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import loss_line, measure_hessian
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.randomness import stream
from tests.cases import cross_entropy


class Path(nn.Module):
    """Stochastic depth by whatever a user calls it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.kind == "bernoulli":
            return x * x.new_empty(len(x), 1).bernoulli_(0.5) / 0.5
        if self.kind == "uniform":
            return x * (torch.rand(len(x), 1, dtype=x.dtype) < 0.5) / 0.5
        if self.kind == "python":
            return x * float(random.random() < 0.5) / 0.5
        if self.kind == "numpy":
            return x * float(np.random.rand() < 0.5) / 0.5
        return F.rrelu(x, 0.1, 0.9, training=True)


class DropPath(Path):
    """By the name that timm gives it."""


class Skipping(nn.Module):
    """Layers that skip themselves, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layerdrop = 0.5
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) < self.layerdrop:
            return x
        return torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.h, self.drop = (
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), drop,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.h(x + self.drop(torch.tanh(self.norm(self.a(x)))))


def batches() -> list[Any]:
    source = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(8, 4, dtype=torch.float64, generator=source),
            torch.randint(0, 3, (8,), generator=source),
        )
        for _ in range(2)
    ]


KINDS = {
    "bernoulli": lambda: Path("bernoulli"),
    "uniform": lambda: Path("uniform"),
    "python": lambda: Path("python"),
    "numpy": lambda: Path("numpy"),
    "rrelu": lambda: Path("rrelu"),
    "by name": lambda: DropPath("bernoulli"),
    "layers that skip": Skipping,
}


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_depth_is_off_with_dropout(kind: str) -> None:
    torch.manual_seed(0)
    module = Net(KINDS[kind]()).double()
    found = [Objective(module, batches(), cross_entropy, seed=seed)() for seed in range(3)]
    # With batch statistics, and nothing dropped.
    module.train()
    module.drop.training = False
    plain = sum(float(cross_entropy(module, batch).detach()) for batch in batches()) / 2
    module.train()
    assert found == pytest.approx([plain] * 3, rel=1e-14)
    report = measure_hessian(module, batches(), loss=cross_entropy, num_steps=3, num_probes=2)
    assert report.loss == pytest.approx(plain, rel=1e-12)
    assert report.notes == ()
    assert all(m.training for m in module.modules())
    # On, if it is asked for: one mask, which a seed changes.
    asked = [
        Objective(module, batches(), cross_entropy, seed=seed, dropout=True)() for seed in range(9)
    ]
    assert len(set(asked)) > 1


class Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, width = self.encode(x).chunk(2, dim=1)
        if not self.training:
            return self.decode(mean)
        return self.decode(mean + torch.exp(width) * torch.randn_like(mean))


def reconstruction(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[0])


def test_noise_that_is_the_model_is_held_and_each_batch_has_its_own() -> None:
    torch.manual_seed(0)
    module = Variational().double()
    (first, _) = batches()
    same = [first, first]
    report = measure_hessian(module, same, loss=reconstruction, num_steps=4, num_probes=4)
    assert any("loss is random" in note for note in report.notes)
    assert "loss is random" in report.summary()
    assert report.self_check is not None
    assert report.self_check.outcome("repeats") == "passed"
    assert report.self_check.outcome("slope") == "passed"
    one = Objective(module, [first], reconstruction)()
    both = Objective(module, same, reconstruction)()
    assert both != one  # the second has noise of its own
    module.train()
    values = []
    for place in range(2):
        torch.manual_seed(stream(0, place))
        values.append(float(reconstruction(module, first).detach()))
    assert values[0] == one
    assert sum(values) / 2 == pytest.approx(both, rel=1e-14)
    # Gradients and values have the same noise.
    assert report.loss == pytest.approx(both, rel=1e-12)
    line = loss_line(module, same, loss=reconstruction, alphas=[-1, 0, 1])
    assert "loss is random" in line.facts.self_check_words


def test_noise_outside_of_any_module_is_the_model_too() -> None:
    def diffusion(module: Any, batch: Any) -> Tensor:
        noise = torch.randn_like(batch[0])
        level = torch.rand(len(batch[0]), 1, dtype=noise.dtype)
        return F.mse_loss(module(batch[0] + level * noise), noise)

    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    report = measure_hessian(module, batches(), loss=diffusion, num_steps=3, num_probes=2)
    assert any("loss is random" in note for note in report.notes)


def test_a_module_without_randomness_is_evaluated_no_more_often() -> None:
    calls = []

    def loss(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        return cross_entropy(module, batch)

    Objective(Net(nn.Identity()).double(), batches(), loss)()
    assert len(calls) == 2


# -- batches that are skipped, losses that are not finite, parts that have one mode ---------------


def skipping(module: Any, batch: Any) -> Any:
    return None if float(batch[0].sum()) > 1e6 else cross_entropy(module, batch)


def test_a_batch_without_a_loss_is_left_out_with_a_line() -> None:
    torch.manual_seed(0)
    module = Net(nn.Identity()).double()
    first, second = batches()
    far = (first[0] + 1e6, first[1])
    report = measure_hessian(module, [first, far, second], loss=skipping, num_steps=3, num_probes=2)
    plain = measure_hessian(module, [first, second], loss=cross_entropy, num_steps=3, num_probes=2)
    assert report.loss == pytest.approx(plain.loss, rel=1e-14)
    assert report.num_samples == plain.num_samples
    assert "held batch 2 of 3" in report.summary()
    line = loss_line(module, [first, far, second], loss=skipping, alphas=[-1, 0, 1], check=False)
    assert line.loss[1] == pytest.approx(plain.loss, rel=1e-14)
    assert "held batch 2 of 3" in line.facts.self_check_words
    with pytest.raises(RuntimeError, match="returned None for every held batch"):
        measure_hessian(module, [far], loss=skipping)


def test_a_loss_that_is_not_finite_names_its_batch() -> None:
    module = Net(nn.Identity()).double()
    first, second = batches()
    bad = (second[0] * float("nan"), second[1])
    with pytest.raises(RuntimeError, match=r"held batch 2 of 2 is nan"):
        measure_hessian(module, [first, bad], loss=cross_entropy)


def test_an_exported_module_that_refuses_train_is_measured() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    exported = torch.export.export(inner, (batches()[0][0],)).module()
    module = nn.Sequential(exported, nn.Linear(4, 3).double())
    with pytest.raises(NotImplementedError):
        module.train()
    report = measure_hessian(module, batches(), loss=cross_entropy, num_steps=3, num_probes=2)
    plain = nn.Sequential(inner, module[1])
    expected = measure_hessian(plain, batches(), loss=cross_entropy, num_steps=3, num_probes=2)
    assert report.loss == pytest.approx(expected.loss, rel=1e-14)

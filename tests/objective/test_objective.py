from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lla_callbacks import MeasurementError, measure_hessian
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.batches import fresh, hold, sample_count, split
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.layers import layer_parameters
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.state import preserved, take_snapshot, weights_at
from lla_callbacks.objective.training_step import SkippedBatchError
from tests.cases import Case, batch_norm_net, conv_net, cross_entropy, tanh_net, trainable


class Restless(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
        )
        self.seen: list[Tensor] = []
        self.alias = self.seen
        self.nested = {"counts": [0], "array": np.zeros(2)}
        self.counter = 0
        self.average = torch.zeros(3)
        self.dice = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        assert self.alias is self.seen
        self.nested["counts"][0] += 1
        self.nested["array"][0] += 1
        self.counter += 1
        self.new_attribute = 1
        for p in self.parameters():
            p.grad = torch.ones_like(p)
        noise = torch.rand(1) + random.random() + np.random.rand() + self.dice.random()
        out = self.net(x + noise)
        self.average.mul_(0.9).add_(out.detach().mean(0))
        x.zero_()
        return out


def state_of(module: Restless) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "identities": [id(b) for b in module.buffers()],
        "versions": [b._version for b in module.buffers()],
        "modes": [m.training for m in module.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires": [p.requires_grad for p in module.parameters()],
        "attributes": (len(module.seen), module.nested["counts"][0], module.counter),
        "array": module.nested["array"].copy(),
        "average": module.average.clone(),
        "new": hasattr(module, "new_attribute"),
        "alias": module.alias is module.seen,
        "random": (
            torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate(),
            module.dice.getstate(),
        ),
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def restless() -> tuple[Restless, tuple[Tensor, Tensor]]:
    module = Restless()
    batch = torch.randn(8, 4), torch.randint(0, 3, (8,))
    cross_entropy(module, (batch[0].clone(), batch[1])).backward()
    del module.new_attribute
    module.net[2].eval()
    module.net[0].bias.requires_grad_(False)
    return module, batch


@pytest.mark.parametrize("mode", ["batch", "eval"])
def test_a_measurement_leaves_no_trace(mode: str) -> None:
    module, batch = restless()
    kept = batch[0].clone()
    before = state_of(module)
    measure_hessian(module, [batch], loss=cross_entropy, mode=mode, num_steps=3, num_probes=2)
    after = state_of(module)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert torch.equal(batch[0], kept)


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_inside_leaves_no_trace(call: int) -> None:
    module, batch = restless()
    before = state_of(module)
    calls = []

    def broken(module: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(module, batch)
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        measure_hessian(module, [batch, batch], loss=broken, num_steps=3, num_probes=2)
    after = state_of(module)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_without_the_guard_traces_are_left() -> None:
    module, batch = restless()
    before = state_of(module)
    cross_entropy(module, (batch[0].clone(), batch[1]))
    after = state_of(module)
    changed = {key for key in before if not same(before[key], after[key])}
    assert {"weights", "versions", "attributes", "array", "average", "new", "random"} <= changed


def test_the_objective_is_the_same_function_at_every_call() -> None:
    module, batch = restless()
    objective = Objective(module, [batch], cross_entropy, dropout=True)
    value = objective()
    assert objective() == value
    first, second = objective.hessian(), objective.hessian()
    assert first.loss == second.loss
    assert torch.equal(first.gradient, second.gradient)
    module.counter += 1
    torch.rand(3)
    assert objective() == value
    # The operator normalizes in elementary form, which rounds differently.
    assert first.loss == pytest.approx(value, rel=1e-6)


def test_its_value_is_the_plain_loss() -> None:
    module = tanh_net()
    batches = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (5, 3)]
    objective = Objective(module, batches, cross_entropy)
    expected = sum(len(b[0]) / 8 * float(cross_entropy(module, b).detach()) for b in batches)
    assert objective() == pytest.approx(expected, rel=1e-7)
    assert objective.num_samples == 8


def test_batch_mode_and_eval_mode_differ_as_batch_norm_does() -> None:
    module = batch_norm_net()
    batch = torch.randn(16, 4) * 3 + 2, torch.randint(0, 3, (16,))
    module(batch[0])
    values = {
        mode: Objective(module, [batch], cross_entropy, mode=mode)() for mode in ("eval", "batch")
    }
    for mode, value in values.items():
        expected = cross_entropy(module.train(mode == "batch"), batch)
        assert value == pytest.approx(expected.item(), rel=1e-5)
    assert values["batch"] != values["eval"]


def test_frozen_statistics_stay_frozen_where_training_has_them_so() -> None:
    module = batch_norm_net()
    batch = torch.randn(16, 4) * 3 + 2, torch.randint(0, 3, (16,))
    module.train()[1].eval()
    training = {m: m.training for m in module.modules()}
    value = Objective(module, [batch], cross_entropy, training=training)()
    assert value == pytest.approx(cross_entropy(module, batch).item(), rel=1e-5)


def test_under_inference_mode_it_works_all_the_same() -> None:
    module = tanh_net()
    with torch.inference_mode():
        batch = torch.randn(5, 4), torch.randint(0, 3, (5,))
        report = measure_hessian(module, [batch], loss=cross_entropy, num_steps=3)
    outside = measure_hessian(
        module, [(batch[0].clone(), batch[1].clone())], loss=cross_entropy, num_steps=3
    )
    assert report.trace == outside.trace


def test_microbatches_are_refused_where_samples_see_each_other() -> None:
    case = Case("", lambda: conv_net(nn.BatchNorm2d(4)), (2, 4, 4), (8,))
    module, batches, loss = case.build()
    with pytest.raises(MeasurementError, match=r"see each other.*Leave out microbatch_size"):
        Objective(module, batches, loss, microbatch_size=4)
    Objective(module, batches, loss, microbatch_size=4, mode="eval")


def test_graphs_beyond_the_memory_are_built_anew_with_the_same_result() -> None:
    module = tanh_net().double()
    batches = [(torch.randn(n, 4).double(), torch.randint(0, 3, (n,))) for n in (5, 5, 5, 2)]
    calls = []

    def counted(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return cross_entropy(module, batch)

    findings = Findings()
    everything = Objective(module, batches, counted, findings=findings).hessian()
    vector = torch.randn(43).double()
    first = everything @ vector
    before = len(calls)
    assert torch.equal(everything @ vector, first)
    assert len(calls) == before
    # Room for one graph beside the one at work, each three times what a forward pass saves.
    room = 2 * 3 * findings.saved + 1
    little = Objective(module, batches, counted, max_memory=room, findings=findings).hessian()
    before = len(calls)
    torch.testing.assert_close(little @ vector, first, rtol=1e-12, atol=1e-12)
    assert len(calls) == before + 3


# -- the training step --------------------------------------------------------------------


class Stepping(nn.Module):
    """Looks like a LightningModule to whoever asks for methods."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.step = step
        self.logged: list[str] = []

    def log(self, name: str, value: Any, **settings: Any) -> None:
        raise AssertionError("the replay must not log")

    def log_dict(self, values: dict[str, Any], **settings: Any) -> None:
        raise AssertionError("the replay must not log")


class OneArgument(Stepping):
    def training_step(self, batch: Tensor) -> Any:
        self.log("loss", 1.0, prog_bar=True)
        self.log_dict({"loss": 1.0})
        return self.step(self.net(batch).square().mean())


class TwoArguments(Stepping):
    def training_step(self, batch: Tensor, number: int) -> Any:
        return self.step(self.net(batch).square().mean())


class Iterating(Stepping):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.step(self.net(batch).square().mean())


class Variadic(Stepping):
    def training_step(self, *arguments: Any) -> Any:
        batch, _ = arguments
        return self.step(self.net(batch).square().mean())


@pytest.mark.parametrize("kind", [OneArgument, TwoArguments, Iterating, Variadic])
@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: {"loss": loss, "other": 1}])
def test_every_kind_of_step_is_replayed(
    kind: type[Stepping], wrap: Callable[[Tensor], Any]
) -> None:
    module, batch = kind(wrap), torch.randn(6, 2)
    replayed = measure_hessian(module, [batch], num_steps=3)
    direct = measure_hessian(
        module, [batch], loss=lambda m, b: m.net(b).square().mean(), num_steps=3
    )
    assert replayed.trace == pytest.approx(direct.trace, rel=1e-6)
    assert "log" not in module.__dict__


def test_a_skipped_batch_is_named() -> None:
    with pytest.raises(SkippedBatchError, match=r"returned None for every held batch.*Give loss="):
        measure_hessian(TwoArguments(lambda loss: None), [torch.randn(6, 2)])


def test_a_step_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="returned float"):
        measure_hessian(TwoArguments(lambda loss: 1.0), [torch.randn(6, 2)])


def test_manual_optimization_needs_a_loss() -> None:
    module = TwoArguments(lambda loss: loss)
    module.automatic_optimization = False  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"manual optimization.*\n.*def loss"):
        measure_hessian(module, [torch.randn(6, 2)])


# -- parts ----------------------------------------------------------------------------------


def test_weights_of_a_snapshot_come_and_go_to_the_bit() -> None:
    module = batch_norm_net()
    then = take_snapshot(module)
    for p in module.parameters():
        p.data.add_(torch.randn_like(p))
    module(torch.randn(5, 4))
    now, objects = take_snapshot(module), [*map(id, module.parameters())]
    inside = now

    def fail_inside() -> None:
        nonlocal inside
        with weights_at(module, then):
            inside = take_snapshot(module)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert same(dict(inside.parameters), dict(then.parameters))
    assert same(dict(inside.buffers), dict(then.buffers))
    assert same(dict(take_snapshot(module).parameters), dict(now.parameters))
    assert same(dict(take_snapshot(module).buffers), dict(now.buffers))
    assert objects == [*map(id, module.parameters())]


def test_a_graph_outlives_the_guard() -> None:
    module = batch_norm_net()
    with preserved(module, seed=0):
        loss = module(torch.randn(5, 4)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


@dataclass(frozen=True)
class FrozenBatch:
    x: Tensor


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(7, 2), 7),
        ((torch.zeros(3, 2), torch.zeros(3)), 3),
        ({"scale": torch.zeros(()), "x": [torch.zeros(4, 1)]}, 4),
        ([1, 2, 3], 3),
        (torch.zeros(()), 1),
        (FrozenBatch(torch.zeros(6, 2)), 6),
    ],
)
def test_samples_are_counted(batch: Any, count: int) -> None:
    assert sample_count(batch) == count


def test_a_held_batch_shares_nothing() -> None:
    x = torch.zeros(2, requires_grad=True) * 2
    held = hold({"x": x, "name": "a"})
    assert held["name"] == "a"
    assert not held["x"].requires_grad
    copy = fresh(held, torch.device("cpu"))
    copy["x"].add_(1)
    assert torch.equal(held["x"], torch.zeros(2))


def test_splitting_shares_what_is_no_sample() -> None:
    batch = {"x": torch.arange(5), "scale": torch.ones(2)}
    parts = list(split(batch, 2, 5, strict=False))
    assert [len(part["x"]) for part in parts] == [2, 2, 1]
    assert all(len(part["scale"]) == 2 for part in parts)
    with pytest.raises(TypeError, match="cannot be split"):
        list(split("text", 2))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        self.head = nn.Linear(2, 1)
        self.temperature = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["temperature", "encoder.0", "encoder.2", "head"]),
        (["head"], ["head"]),
        (["encoder"], ["encoder"]),
        (["encoder.*", "head"], ["encoder.0", "encoder.2", "head"]),
        (["enc*"], ["encoder"]),
    ],
)
def test_layers_are_named_by_module_path(layers: list[str] | None, expected: list[str]) -> None:
    module = Nested()
    groups = layer_parameters(module, ParameterSpace(trainable(module)), layers)
    assert list(groups) == expected
    if layers == ["encoder"]:
        assert len(groups["encoder"]) == 4


def test_overlapping_layers_are_refused() -> None:
    module = Nested()
    with pytest.raises(ValueError, match="overlap"):
        layer_parameters(module, ParameterSpace(trainable(module)), ["encoder", "encoder.0"])


def scalar_parameter() -> nn.Module:
    module = nn.Linear(4, 3)
    module.register_parameter("temperature", nn.Parameter(torch.tensor(2.0)))
    return module


def channels_last() -> nn.Module:
    module = nn.Sequential(nn.Unflatten(1, (2, 1, 2)), nn.Conv2d(2, 3, (1, 2)), nn.Flatten())
    return module.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [scalar_parameter, channels_last])
def test_parameters_of_any_shape_and_layout_are_measured(make: Callable[[], nn.Module]) -> None:
    module, batch = make(), (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    before = [p.detach().clone() for p in module.parameters()]
    report = measure_hessian(module, [batch], loss=cross_entropy, num_steps=3, num_probes=2)
    assert report.lambda_max > 0
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_a_loss_that_changes_its_weights_is_refused_and_they_come_back() -> None:
    module, batch = scalar_parameter(), (torch.randn(8, 4), torch.randint(0, 3, (8,)))

    def shrinking(module: nn.Module, batch: Any) -> Tensor:
        module.temperature.data.mul_(-0.0)
        return cross_entropy(module, batch)

    with pytest.raises(MeasurementError, match=r"changes the trainable weights.*Give loss="):
        measure_hessian(module, [batch], loss=shrinking)
    assert module.temperature.item() == 2.0


def test_names_of_buffers_that_are_not_saved_are_a_set() -> None:
    """As in the embeddings of every BERT."""
    module = nn.Linear(3, 2)
    module.register_buffer("places", torch.arange(4), persistent=False)
    objective = Objective(module, [torch.ones(2, 3)], lambda m, x: m(x).square().mean())
    assert objective() == objective()
    with evaluating(objective) as evaluate:
        assert float(evaluate()[0]) == float(evaluate()[0]) == objective()

"""`loss_curve`, `connect` and `barrier`: against loops by hand, and leaving everything alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lla_callbacks import Barriers, Curve, LossCurve, barrier, connect, interpolate, loss_curve
from lla_callbacks.curves.plain_training import published_rate
from lla_callbacks.linalg.errors import NonFiniteError
from lla_callbacks.linalg.probes import generator

from .curve_cases import batches, error, loss, norm_net, tanh_net, train_by_hand, value

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
}


def order(epochs: int, seed: int = 0) -> list[list[Any]]:
    """The batches of each step, as `connect` takes them."""
    return [
        [batches()[i]]
        for epoch in range(epochs)
        for i in torch.randperm(3, generator=generator(seed, -1, epoch)).tolist()
    ]


@pytest.mark.parametrize("kind", ["bezier", "chain"])
@pytest.mark.parametrize("bends", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True])
def test_connect_is_a_plain_loop(kind: Any, bends: int, optimizer: str, scaled: bool) -> None:
    a, b, net = map(tanh_net, (1, 2, 3))
    make: Any = OPTIMIZERS[optimizer]
    curve = connect(
        net, batches(), a, b, kind=kind, bends=bends, loss=loss, epochs=4, optimizer=make,
        weight_decay=0.01, scale_steps=scaled,
    )  # fmt: skip
    expected = train_by_hand(
        a, b, order(4), make, kind=kind, bends=bends, decay=0.01,
        scaled=scaled and optimizer == "sgd", rate=lambda step: published_rate(step // 3 / 4),
    )  # fmt: skip
    for point, bend in zip(curve.points[1:-1], expected, strict=True):
        for name, trained in bend.items():
            torch.testing.assert_close(point[name], trained, rtol=1e-10, atol=1e-10)
    assert curve.bends == bends


def test_connect_leaves_modules_alone_and_lowers_the_loss() -> None:
    a, b, net = map(norm_net, (1, 2, 3))
    before = [copy.deepcopy(n.state_dict()) for n in (a, b, net)]
    net.eval()
    stream = torch.get_rng_state()
    curve = connect(net, batches(), a, b, loss=loss, lr=0.1, epochs=30)
    assert torch.equal(stream, torch.get_rng_state())
    assert not net.training
    assert all(p.grad is None for p in net.parameters())
    for n, state in zip((a, b, net), before, strict=True):
        assert all(torch.equal(value, n.state_dict()[key]) for key, value in state.items())
    found = loss_curve(net, batches(), curve, loss=loss, t=[0, 0.25, 0.5, 0.75, 1])
    assert found.straight is not None
    assert found.statistics().mean < 0.7 * found.straight.statistics().mean


def test_the_rate_is_the_published_one() -> None:
    assert [published_rate(p) for p in (0, 0.5, 0.7, 0.9, 1.0)] == pytest.approx(
        [1, 1, 0.505, 0.01, 0.01]
    )


@pytest.mark.parametrize("mode", ["recalibrate", "eval", "batch"])
def test_the_ends_are_the_networks_themselves(mode: Any) -> None:
    a, b, net = map(norm_net, (1, 2, 3))
    curve = connect(net, batches(), a, b, loss=loss, epochs=1)
    before = copy.deepcopy(net.state_dict())
    found = loss_curve(
        net, batches(1), curve, loss=loss, metrics={"error": error}, mode=mode, t=[0, 0.5, 1]
    )
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    for k, end in ((0, a), (2, b)):
        end.train(mode == "batch")
        assert float(found.loss[k]) == value(end, batches(1)[0])
        assert float(found.metrics["error"][k]) == float(error(end, batches(1)[0]))
    assert found.straight is not None
    assert found.straight.loss[[0, 2]].tolist() == found.loss[[0, 2]].tolist()


def test_statistics_in_between_are_weighted_by_samples() -> None:
    a, b, net = map(norm_net, (1, 2, 3))
    parts = [(batches()[0][0][:2], batches()[0][1][:2]), batches()[1]]
    found = loss_curve(net, parts, [a, b], loss=loss, t=[0, 0.4, 1])
    middle = norm_net(4)
    middle.load_state_dict(
        {n: torch.lerp(v.double(), b.state_dict()[n].double(), 0.4)
         for n, v in a.state_dict().items()}
    )  # fmt: skip
    hidden = [middle[0](x) for x, _ in parts]
    mean = sum(len(h) / 8 * h.mean(0) for h in hidden)
    var = sum(len(h) / 8 * h.var(0) for h in hidden)
    middle[1].running_mean, middle[1].running_var = mean.detach(), var.detach()
    middle.eval()
    expected = sum(len(x) / 8 * value(middle, (x, y)) for x, y in parts)
    assert float(found.loss[1]) == pytest.approx(expected, rel=1e-12)


def test_two_networks_are_their_straight_line() -> None:
    a, b, net = map(tanh_net, (1, 2, 3))
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = loss_curve(net, batches(), [a, b.state_dict()], loss=loss, t=t)
    line = interpolate(net, batches(), a, b, alphas=t, loss=loss, mode="eval")
    torch.testing.assert_close(found.loss, line.loss, rtol=1e-12, atol=1e-12)
    assert found.straight is None
    assert found.length == pytest.approx(float((flat(a) - flat(b)).norm()), rel=1e-12)
    three = loss_curve(net, batches(), [a, net, b], loss=loss, t=[0, 0.5, 1])
    net.eval()
    expected = sum(value(net, x) for x in batches()) / 3
    assert float(three.loss[1]) == pytest.approx(expected, rel=1e-14)


def flat(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_metrics_files_scalars_and_words(tmp_path: Any) -> None:
    a, b, net = map(tanh_net, (1, 2, 3))
    curve = connect(net, batches(), a, b, loss=loss, epochs=1)
    found = loss_curve(
        net, batches(), curve, loss=loss,
        metrics={"error": error, "accuracy": MulticlassAccuracy(2, average="micro")},
    )  # fmt: skip
    torch.testing.assert_close(found.metrics["accuracy"], 1 - found.metrics["error"])
    again = LossCurve.load(found.save(tmp_path / "curve.npz"))
    assert again.facts == found.facts
    for x, y in ((found, again), (found.straight, again.straight)):
        assert torch.equal(x.loss, y.loss)
        assert x.statistics("error") == y.statistics("error")
    scalars = found.scalars()
    assert scalars["curve/barrier_above_line"] == found.statistics().barrier_above_line
    assert scalars["curve_straight/error/maximum"] == found.straight.statistics("error").maximum
    assert {k.split("/")[-1] for k in scalars} == {
        "length", "maximum", "mean", "integral",
        "barrier_above_ends", "barrier_above_line", "barrier_above_mean",
    }  # fmt: skip
    assert "barrier" in found.summary()
    figure = found.figure(metric="error")
    texts = [t.get_text() for t in figure.texts]
    head = [f"{part.statistics().barrier_above_ends:.3g}" for part in (found, found.straight)]
    assert {f"barrier: curve {head[0]}", f"straight line {head[1]}"} <= {*texts}
    assert {"Bezier curve", "straight line"} <= {*texts}
    assert figure.axes[1].get_title(loc="left").startswith("barrier: curve ")
    with pytest.raises(ValueError, match="no metric is named 'x'; they are: accuracy, error"):
        found.figure(metric="x")


def test_a_loss_that_is_not_finite_is_hatched_and_has_no_barrier() -> None:
    a, b, net = map(tanh_net, (1, 2, 3))

    def broken(module: nn.Module, batch: Any) -> torch.Tensor:
        found = loss(module, batch)
        return found * float("nan") if abs(found.item() - middle) < 1e-9 else found

    middle = float(loss_curve(net, batches(1), [a, b], loss=loss, t=[0, 0.5, 1]).loss[1])
    found = loss_curve(net, batches(1), [a, b], loss=broken, t=[0, 0.5, 1])
    assert torch.isnan(found.loss[1])
    assert found.statistics().barrier_above_ends != found.statistics().barrier_above_ends
    figure = found.figure()
    assert any(p.get_gid() == "not finite" for p in figure.axes[0].patches)
    assert "barrier: straight line unknown" in [t.get_text() for t in figure.texts]
    assert "Hatched: not finite" in figure.get_supxlabel()
    assert "curve/maximum" not in found.scalars()


def test_barriers_of_pairs(tmp_path: Any) -> None:
    nets = {name: tanh_net(k) for k, name in enumerate("abc")}
    found = barrier(nets["a"], batches(), nets, loss=loss, metrics={"error": error}, points=11)
    assert isinstance(found, Barriers)
    matrix = found.matrix()
    assert torch.equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == [0, 0, 0]
    names = list(nets)
    for i, j in itertools.combinations(range(3), 2):
        line = loss_curve(nets["a"], batches(), [nets[names[i]], nets[names[j]]], loss=loss,
                          t=torch.arange(11, dtype=torch.float64) / 10)  # fmt: skip
        assert float(matrix[i, j]) == line.statistics().barrier_above_ends
        assert float(found.matrix(definition="above_mean")[i, j]) >= float(matrix[i, j])
    assert found.save(tmp_path / "b.npz").exists()
    assert len(found.figure().axes[0].texts) == 6
    with pytest.raises(ValueError, match="definition is 'mine'"):
        found.matrix(definition="mine")  # type: ignore[arg-type]


def test_networks_that_are_not_alike_are_refused_by_name() -> None:
    a, b, net = map(norm_net, (1, 2, 3))
    state = dict(b.state_dict())
    del state["3.bias"]
    with pytest.raises(ValueError, match=r"end lacks '3.bias'"):
        connect(net, batches(), a, state, loss=loss)
    with pytest.raises(ValueError, match=r"end: '0.weight' has shape \(7, 3\)"):
        connect(net, batches(), a, {**b.state_dict(), "0.weight": torch.zeros(7, 3)}, loss=loss)
    bad = {**a.state_dict(), "0.weight": torch.full((6, 3), float("nan"))}
    with pytest.raises(ValueError, match=r"start: '0.weight' is not finite"):
        connect(net, batches(), bad, b, loss=loss)
    net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"start and end differ in '0.weight', which is not tr"):
        connect(net, batches(), a, b, loss=loss)
    with pytest.raises(ValueError, match=r"start is 'no.ckpt', which is no file"):
        connect(net, batches(), "no.ckpt", b, loss=loss)
    with pytest.raises(TypeError, match="end is of type int"):
        connect(net, batches(), a, 3, loss=loss)
    with pytest.raises(ValueError, match="curve is one network"):
        loss_curve(net, batches(), a, loss=loss)


def test_what_is_frozen_comes_from_the_networks(tmp_path: Any) -> None:
    a, net = tanh_net(1), tanh_net(3)
    b = copy.deepcopy(a)
    b[2] = tanh_net(2)[2]
    for n in (a, b, net):
        n[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    torch.save({"state_dict": a.state_dict()}, tmp_path / "a.ckpt")
    found = loss_curve(net, batches(1), [tmp_path / "a.ckpt", str(tmp_path / "a.ckpt"), b],
                       loss=loss, t=[0, 1])  # fmt: skip
    assert float(found.loss[0]) == value(a, batches(1)[0])
    assert float(found.loss[1]) == value(b, batches(1)[0])
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_tied_weights_are_one_point() -> None:
    a, b, net = map(Tied, (1, 2, 3))
    curve = connect(net, batches(), a, b, loss=loss, epochs=2)
    assert "second.weight" not in curve.points[1]
    net.load_state_dict(curve.weights(0.5))
    net.eval()
    found = loss_curve(Tied(4), batches(1), curve, loss=loss, t=[0, 0.5, 1])
    assert float(found.loss[1]) == pytest.approx(value(net, batches(1)[0]), rel=1e-14)
    untied = {**b.state_dict(), "second.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match="are one parameter in the module, and two"):
        connect(net, batches(), a, untied, loss=loss)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "spline"}, "kind is 'spline'"),
        ({"bends": 0}, "bends is 0; give a whole number of at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": -1}, "lr is -1; give a positive number"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"optimizer": lambda p: torch.optim.Adam(p, weight_decay=0.1)}, "decays the bends"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS, which evaluates the loss several times"),
    ],
)
def test_settings_of_connect_are_checked(settings: dict[str, Any], says: str) -> None:
    a, b, net = map(tanh_net, (1, 2, 3))
    with pytest.raises(ValueError, match=says):
        connect(net, batches(), a, b, loss=loss, **settings)


def test_a_loss_without_a_value_ends_with_what_to_do() -> None:
    a, b, net = map(tanh_net, (1, 2, 3))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NonFiniteError, match=r"on batch .* Lower lr"):
        connect(net, batches(), a, b, loss=lambda m, x: loss(m, x) * float("nan"))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


def test_a_curve_is_a_curve() -> None:
    a, b, net = map(tanh_net, (1, 2, 3))
    curve = connect(net, batches(), a, b, kind="chain", bends=2, loss=loss, epochs=1)
    assert isinstance(curve, Curve)
    assert repr(curve).startswith("<Curve: chain, 2 bends, 26 weights, length ")
    net.load_state_dict(curve.weights(0.0))
    assert torch.equal(flat(net), flat(a))

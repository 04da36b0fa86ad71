"""The published rates, what an ensemble answers, and how alike members are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lla_callbacks.curves.ensemble import agreement, cyclic_rate, ensemble_of

from .curve_cases import norm_net, tanh_net


def test_the_first_rates_are_the_published_ones() -> None:
    # Exact in floats: c = 8, alpha_1 = 1, alpha_2 = 0; then a whole cycle again.
    expected = [0.75, 0.5, 0.25, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert [cyclic_rate(i, 8, 1.0, 0.0) for i in range(1, 9)] == expected
    assert [cyclic_rate(i, 8, 1.0, 0.0) for i in range(9, 17)] == expected
    assert cyclic_rate(3, 4, 0.05, 0.01) == pytest.approx(0.03, rel=1e-15)
    assert cyclic_rate(2, 4, 0.05, 0.01) == 0.01


def members(make: Any, count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [make(k).state_dict() for k in range(count)]


@pytest.mark.parametrize("make", [tanh_net, norm_net])
def test_an_ensemble_is_a_loop_over_its_members(make: Any) -> None:
    net, states = make(9), members(make)
    net.train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = ensemble_of(net, states)
    x = torch.randn(7, 3, dtype=torch.float64)
    outputs = []
    for state in states:
        one = make(8)
        one.load_state_dict(state)
        outputs.append(one.eval()(x))
    p = sum(torch.softmax(z, 1) for z in outputs) / 3
    torch.testing.assert_close(found(x), p.log(), rtol=1e-13, atol=1e-13)
    # Log probabilities are logits: cross entropy takes them as they are.
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    torch.testing.assert_close(F.cross_entropy(found(x), y), F.nll_loss(p.log(), y))
    mean = ensemble_of(net, states, combine="outputs")(x)
    torch.testing.assert_close(mean, sum(outputs) / 3)
    own = ensemble_of(net, states, combine=lambda zs: zs[2])(x)
    assert torch.equal(own, outputs[2])
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in before.items())
    assert net.training
    assert "forward" not in net.__dict__


def test_two_classes_in_one_logit() -> None:
    net = nn.Linear(3, 1)
    states = members(lambda k: nn.Linear(3, 1), 4)
    x = torch.randn(5, 3)
    p = sum(torch.sigmoid(F.linear(x, s["weight"], s["bias"])) for s in states) / 4
    found = ensemble_of(net, states, combine="binary")(x)
    torch.testing.assert_close(torch.sigmoid(found), p)
    with pytest.raises(ValueError, match=r"shape \(5, 1\), with one class"):
        ensemble_of(net, states)(x)


def test_huge_logits_stay_finite() -> None:
    net = nn.Linear(1, 2, bias=False)
    states = [{"weight": torch.tensor([[1e4], [-1e4]])}, {"weight": torch.tensor([[-1e4], [1e4]])}]
    found = ensemble_of(net, states)(torch.ones(1, 1))
    torch.testing.assert_close(found, torch.full((1, 2), math.log(0.5)))


def test_classes_along_another_dimension_and_structured_outputs() -> None:
    net = nn.Linear(3, 4)
    states = members(lambda k: nn.Linear(3, 4), 2)
    x = torch.randn(2, 5, 3)
    p = sum(torch.softmax(F.linear(x, s["weight"], s["bias"]), -1) for s in states) / 2
    torch.testing.assert_close(ensemble_of(net, states, dim=-1)(x), p.log())

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.net(x), "twice": 2 * self.net(x)}

    pairs = members(lambda k: Pair(), 2)
    found = ensemble_of(Pair(), pairs, combine="outputs")(x)
    torch.testing.assert_close(found["twice"], 2 * found["logits"])
    inside = ensemble_of(Pair(), pairs, part="net", dim=-1)(x)
    torch.testing.assert_close(inside["logits"].exp().sum(-1), torch.ones(2, 5))
    with pytest.raises(ValueError, match="returns dict, not a tensor"):
        ensemble_of(Pair(), pairs)(x)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"members": []}, "there is no member yet"),
        ({"combine": "logits"}, "combine is 'logits'; give one of probabilities"),
        ({"part": "body"}, "part is 'body', which is no submodule; there are: 0, 1, 2"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], says: str) -> None:
    given = {"members": members(tanh_net), **settings}
    with pytest.raises(ValueError, match=says):
        ensemble_of(tanh_net(0), given.pop("members"), **given)


def test_probabilities_are_not_taken_for_logits() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1))
    with pytest.raises(ValueError, match="outputs are probabilities, not logits"):
        ensemble_of(net, [net.state_dict()])(torch.randn(2, 3))


def test_agreement_by_hand() -> None:
    z = [torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]),
         torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])]  # fmt: skip
    y = torch.tensor([0, 1, 0])
    found = agreement(z, y)
    assert found.disagreement == pytest.approx(1 / 3)
    # Predictions 0 1 1 and 0 0 1: one wrong of three, then two.
    assert found.quality["error"][0] == pytest.approx(0.5)
    p = sum(torch.softmax(x.double(), 1) for x in z) / 2
    assert found.quality["nll"][1] == pytest.approx(float(F.nll_loss(p.log(), y)))
    assert found.quality["error"][1] == float((p.argmax(1) != y).double().mean())
    assert not found.alike
    assert agreement([z[0], z[0] + 1e-4], y).alike
    values = agreement([torch.tensor([[1.0], [3.0]]), torch.tensor([[3.0], [5.0]])],
                       torch.tensor([2.0, 4.0]))  # fmt: skip
    assert values.quality == {"mse": (1.0, 0.0)}
    # Deviation between members sqrt(2), of the targets sqrt(2).
    assert values.disagreement == pytest.approx(1.0)

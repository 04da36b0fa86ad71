from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.penalty.middle import penalized_parameters, published_middle


def chosen(module: nn.Module, layers: object, x: Tensor | None = None) -> list[str]:
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    run = (lambda: None) if x is None else (lambda: module(x))
    return penalized_parameters(module, ParameterSpace(parameters), layers, run)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "middle"),
    [(1, [0]), (2, [0, 1]), (3, [1]), (4, [1, 2]), (5, [1, 2, 3]), (6, [1, 2, 3, 4])],
)  # fmt: skip
def test_middle_half_of_so_many_layers(count: int, middle: list[int]) -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    assert chosen(module, "middle", torch.zeros(1, 2)) == [f"{i}.weight" for i in middle]


class OutOfOrder(nn.Module):
    """Layers are made in another order than they are called; one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.second = nn.Conv1d(2, 2, 1)
        self.never = nn.Linear(2, 2)
        self.first = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).T).T
        return self.last(self.first(x))  # the first call counts


def test_order_is_that_of_a_forward_pass() -> None:
    """``first, second, never (after its predecessor), last``: the middle two."""
    found = chosen(OutOfOrder(), "middle", torch.zeros(3, 2))
    assert found == ["second.weight", "never.weight"]


def test_hooks_do_not_stay_and_do_not_change_the_pass() -> None:
    module, x = OutOfOrder(), torch.randn(3, 2)
    before = module(x)
    passes = []

    def run() -> None:
        passes.append(module(x))

    space = ParameterSpace(dict(module.named_parameters()))
    penalized_parameters(module, space, "middle", run)
    assert torch.equal(passes[0], before)
    assert all(not m._forward_pre_hooks for m in module.modules())


def test_parametrized_and_frozen_weights() -> None:
    module = nn.Sequential(
        nn.Linear(2, 2),
        parametrizations.weight_norm(nn.Linear(2, 2)),
        nn.Linear(2, 2).requires_grad_(False),
        nn.Linear(2, 2),
    )
    found = chosen(module, "middle", torch.zeros(1, 2))
    prefix = "1.parametrizations.weight.original"
    assert found == [f"{prefix}0", f"{prefix}1"]


def test_published_middle_counts_tensors() -> None:
    """LeNet has ten: conv1, conv2, fc1, fc2, fc3; the rule takes conv2, fc1 and fc2."""
    names = [f"{m}.{t}" for m in ("c1", "c2", "f1", "f2", "f3") for t in ("weight", "bias")]
    assert published_middle(names) == names[2:8]


def test_all_and_names() -> None:
    module = nn.ModuleDict({"middle": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    names = ["middle.weight", "middle.bias", "b.weight", "b.bias"]
    assert chosen(module, "all") == chosen(module, None) == names
    assert chosen(module, ["middle"]) == names[:2]
    assert chosen(module, "b") == chosen(module, lambda path, _: path == "b") == names[2:]
    with pytest.raises(ValueError, match="'c', which matches no module"):
        chosen(module, "c")


def test_middle_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="no trainable convolution or linear layer"):
        chosen(nn.LayerNorm(2), "middle")

"""Groups from graphs, planted permutations found again, and what is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import aligned, barrier, interpolate
from lla_callbacks.alignment.functions import verify
from lla_callbacks.alignment.groups import groups_of, permuted
from lla_callbacks.alignment.tracing import traced_groups


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 3)
    )


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Two blocks that share their stream of channels, a depthwise one, and a mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.two = nn.Conv2d(5, 6, 3, padding=1)
        self.each = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.two(F.relu(self.norm(self.one(x))))
        x = x + torch.tanh(self.each(x))
        return self.head(x.mean([2, 3]))


class Tied(nn.Module):
    """One weight before and after a nonlinearity: its rows and its columns are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.into = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(self.into(x))))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.two = nn.Linear(4, 6)
        self.after = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat([self.one(x), self.two(x)], 1))


VECTORS, IMAGES = (7, 5), (3, 2, 4, 4)
CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = [
    (mlp, VECTORS, [8, 6]),
    (conv, IMAGES, [6, 4]),
    (Residual, IMAGES, [6, 5]),
]


@pytest.mark.parametrize(("make", "shape", "sizes"), CASES)
def test_groups_are_those_of_the_graph_and_change_nothing(
    make: Callable[[], nn.Module], shape: tuple[int, ...], sizes: list[int]
) -> None:
    net = make().double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    groups = traced_groups(net, [x])
    assert [group.size for group in groups] == sizes
    assert verify(net, [x], groups) < 1e-13


@pytest.mark.parametrize(("make", "shape", "sizes"), CASES)
def test_a_planted_permutation_is_found_whole(
    make: Callable[[], nn.Module], shape: tuple[int, ...], sizes: list[int]
) -> None:
    net, start = make(), make()
    x = torch.randn(shape)
    for _ in range(3):
        start(2 * torch.randn(shape) + 1)
    groups = traced_groups(start, [x])
    planted = [torch.randperm(size) for size in sizes]
    end = copy.deepcopy(start)
    end.load_state_dict(permuted(start.state_dict(), groups, planted))
    # A little apart, as two networks are.
    for p in end.parameters():
        p.data += 0.01 * torch.randn_like(p)
    before = copy.deepcopy((net.state_dict(), start.state_dict(), end.state_dict()))
    found = aligned(net, start, end, (x, torch.zeros(1)))
    for one, two in zip(before, (net, start, end), strict=True):
        assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.items())
    for found_one, planted_one in zip(found.permutations, planted, strict=True):
        assert torch.equal(planted_one[found_one], torch.arange(len(planted_one)))
    assert found.aligned_distance < 0.1 < found.distance
    net.load_state_dict(found.state)
    torch.testing.assert_close(net.eval()(x), end.eval()(x), rtol=1e-4, atol=1e-5)


def test_tied_weights_are_one_group_or_none() -> None:
    net = Tied().double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    groups = traced_groups(net, [x])
    assert [g.size for g in groups] == [5]
    assert {a.name for a in groups[0].axes} >= {"first.weight", "second.weight"}
    assert verify(net, [x], groups) < 1e-13
    found = aligned(net, Tied(), Tied(), x)
    assert torch.equal(found.state["first.weight"], found.state["second.weight"])


@pytest.mark.parametrize(
    ("make", "shape", "says"),
    [
        (Attention, (2, 3, 4), "no units of Attention can be permuted"),
        (Branching, (6, 4), "no units of Branching can be permuted"),
        (lambda: nn.Linear(4, 3), (6, 4), "no units of Linear can be permuted"),
    ],
)
def test_what_is_not_understood_stays_where_it_is(
    make: Callable[[], nn.Module], shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        aligned(make(), make(), make(), torch.randn(shape))


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x if x.sum() > 0 else -x)


def test_groups_of_ones_own_are_verified() -> None:
    net, a, b = Deciding(), Deciding(), Deciding()
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"Deciding cannot be traced .* Give groups="):
        aligned(net, a, b, x)
    right = {"hidden": [("one.weight", 0), ("one.bias", 0), ("two.weight", 1)]}
    found = aligned(net, a, b, x, groups=right)
    assert found.change < 1e-9
    wrong = {"hidden": [("one.weight", 0), ("two.weight", 1)]}
    with pytest.raises(ValueError, match=r"group 'hidden' \(one.weight\[0\], two.weight\[1\]\) ch"):
        aligned(net, a, b, x, groups=wrong)
    classes = {"classes": [("two.weight", 0), ("two.bias", 0)]}
    with pytest.raises(ValueError, match="units of group 'classes'"):
        aligned(net, a, b, x, groups=classes)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"a": [("x", 0)]}, "no dimension 0 of 'x'"),
        ({"a": [("one.weight", 2)]}, "no dimension 2 of 'one.weight'"),
        ({"a": [("one.weight", 0), ("two.bias", 0)]}, "axes of different sizes"),
        ({"a": ["one"]}, r"group 'a' has the entry 'one'; give \(name, dim\)"),
    ],
)
def test_specifications_are_checked(spec: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        groups_of(spec, Deciding().state_dict())


def test_settings_and_batches_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    x = torch.randn(VECTORS)
    with pytest.raises(ValueError, match="restarts is 0"):
        aligned(net, net, net, x, restarts=0)
    with pytest.raises(ValueError, match="batch is of type dict"):
        aligned(net, net, net, {"x": x})
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'lla_callbacks\[align\]'"):
        aligned(net, net, net, x)


def test_restarts_find_what_one_start_does_not() -> None:
    torch.manual_seed(2)
    start = Residual()
    groups = traced_groups(start, [torch.randn(IMAGES)])
    gains = []
    for restarts in (1, 20):
        end = Residual()
        torch.manual_seed(5)
        end.load_state_dict(permuted(start.state_dict(), groups, [torch.randperm(g.size)
                                                                  for g in groups]))  # fmt: skip
        for p in end.parameters():
            p.data += 0.1 * torch.randn_like(p)
        gains.append(aligned(start, start, end, torch.randn(IMAGES), restarts=restarts))
    assert gains[1].aligned_distance <= gains[0].aligned_distance


def digits(seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """An MLP of width 64 after 20 epochs of scikit-learn's digits, half a second."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:1437] / 16, dtype=torch.float32)
    y = torch.tensor(labels[:1437])
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(15):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net, [(x, y)]


def test_on_digits_the_barrier_of_the_line_falls_fivefold() -> None:
    (a, batches), (b, _) = digits(0), digits(1)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    plain, matched = (
        float(barrier(a, batches, [a, b], loss=loss, align=align).matrix()[0, 1])
        for align in (False, True)
    )
    assert plain > 0.1
    assert matched < plain / 5
    x = batches[0][0]
    one = copy.deepcopy(b)
    one.load_state_dict(aligned(a, a, b, x).state)
    expected = b(x).detach()
    torch.testing.assert_close(one(x).detach(), expected, rtol=0, atol=1e-5 * float(expected.max()))
    line = interpolate(a, batches, a, b, align=True, loss=loss, alphas=[0, 0.5, 1], mode="eval")
    assert float(line.loss[1]) - float(line.loss[[0, 2]].max()) < plain / 5

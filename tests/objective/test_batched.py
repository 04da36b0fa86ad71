"""Operations that were noted give, at other points, what vmap gives there, or are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks.objective.batched import BatchedEvaluator
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import space_of

Step = Callable[[Any, Any], Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.norm(self.first(x))).tanh())  # type: ignore[no-any-return]


def plain(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def squares(net: Any, batch: Any) -> Tensor:
    out = net(batch[0])
    return (out.relu() + out).square().mean()  # type: ignore[no-any-return]


def in_place(net: Any, batch: Any) -> Tensor:
    out = net(batch[0])
    view = out[:, :2]
    view.mul_(2.0)
    return out.relu_().square().sum() + torch.stack([out.mean(), out.std()]).sum()  # type: ignore[no-any-return]


def drawing(net: Any, batch: Any) -> Tensor:
    return net(batch[0] + torch.randn(20, 3)).square().mean()  # type: ignore[no-any-return]


def counting(net: Any, batch: Any) -> Tensor:
    net.count += 1
    return net(batch[0]).square().mean() * net.count  # type: ignore[no-any-return]


def unseen(net: Any, batch: Any) -> Tensor:
    found = net(batch[0]).square().mean()
    batch[0].numpy()[0] += 9.0
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize(
    ("step", "noted"),
    [(plain, True), (squares, True), (in_place, True), (drawing, False), (counting, False),
     (unseen, False)],
)  # fmt: skip
def test_noted_operations_give_what_vmap_gives(step: Step, noted: bool, mode: Any) -> None:
    source = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(20, 3, generator=source), torch.randint(0, 4, (20,), generator=source))
        for _ in range(2)
    ]
    objective = Objective(Net(), batches, step, mode=mode)
    space = space_of(objective)
    family = Offsets(space, [torch.randn(space.dim, generator=source) for _ in range(2)])
    points = torch.randn(20, 2, dtype=torch.float64, generator=source)
    with evaluating(objective, check_weights=False) as evaluate:
        evaluate.row()
        batched = BatchedEvaluator(evaluate, family)
        batched.size = 8
        # 8 that are noted, 8 by what was noted, 4 that do not fill a pass.
        found = torch.cat([batched(part) for part in points.split(8)])
        assert bool(batched._programs) == noted
        expected = []
        for point in points.tolist():
            family.place(point)
            expected.append(evaluate.row())
        family.restore()
        whole = BatchedEvaluator(evaluate, family)._from_the_start(points)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7)

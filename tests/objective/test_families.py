"""Weights along directions: the same to the bit whatever the order, alone or many at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks.objective import families
from lla_callbacks.objective.batched import MOST_POINTS, BatchedEvaluator
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, evaluate_points, space_of


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(),
                         nn.Linear(8, 3))  # fmt: skip


def directions(count: int) -> list[Tensor]:
    """Of which some tensors are moved by all, some by the first, some by the last, some by none."""
    found = [torch.randn(24 + 8 + 64 + 24 + 3) for _ in range(count)]
    for vector in found:
        vector[24:32] = 0.0
    found[0][32:96] = 0.0
    found[-1][-3:] = 0.0
    return found


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def objective_of(module: nn.Module, loss: Any = cross_entropy) -> Objective:
    source = torch.Generator().manual_seed(1)
    batch = torch.randn(20, 3, generator=source), torch.randint(0, 3, (20,), generator=source)
    return Objective(module, [batch], loss, mode="eval")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("room", [families.ROW_BYTES, 0])
def test_points_have_the_same_weights_to_the_bit_in_any_order(
    count: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "ROW_BYTES", room)
    module = net()
    start = [p.detach().clone() for p in module.parameters()]
    vectors = directions(count)
    family = Offsets(space_of(objective_of(module)), vectors)
    axis = [-1.0, 0.0, 0.3]
    points = torch.cartesian_prod(*[torch.tensor(axis)] * count).reshape(-1, count).tolist()
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(2)).tolist()
    for point in [points[i] for i in [*range(len(points)), *order]]:
        with torch.no_grad():
            # Whatever a step wrote into the weights is gone.
            for p in module.parameters():
                p.data.mul_(1.5)
        family.place(point)
        expected = [w.clone() for w in start]
        for c, vector in zip(point, vectors, strict=True):
            for w, part in zip(expected, family.space.unflatten(vector), strict=True):
                if c and bool(part.any()):
                    w.add_(part, alpha=c)
        for p, w in zip(module.parameters(), expected, strict=True):
            assert torch.equal(p, w)
    family.restore()
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), start, strict=True))


def weighted(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 3.0]))


def ignoring(module: nn.Module, batch: Any) -> Tensor:
    target = torch.where(batch[1] == 0, -100, batch[1])
    return F.cross_entropy(module(batch[0]), target)


def smoothed(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.1)


def sequences(module: nn.Module, batch: Any) -> Tensor:
    x = batch[0].reshape(4, 5, 3)
    return F.cross_entropy(module(x).flatten(0, 1), batch[1], reduction="mean")


def moved_targets(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), module(batch[0]).detach().softmax(1))


@pytest.mark.parametrize(
    "loss", [cross_entropy, weighted, ignoring, smoothed, sequences, moved_targets]
)
def test_many_points_at_once_have_the_values_of_each_alone(loss: Any) -> None:
    module = net()
    objective = objective_of(module, loss)
    family = Offsets(space_of(objective), directions(2))
    points = torch.randn(40, 2, dtype=torch.float64)
    alone = evaluate_points(objective, family, points, PointSettings(evaluation="loop"))
    together = evaluate_points(objective, family, points, PointSettings(evaluation="vmap"))
    assert together.method == "vmap"
    # Sums of 8 products three times over, in single precision.
    torch.testing.assert_close(together.table, alone.table, rtol=2e-6, atol=1e-6)


def test_values_do_not_depend_on_how_many_points_go_together() -> None:
    objective = objective_of(net())
    family = Offsets(space_of(objective), directions(2))
    points = torch.randn(33, 2, dtype=torch.float64)
    with evaluating(objective) as evaluate:
        evaluate.row()
        batched = BatchedEvaluator(evaluate, family)
        whole = batched(points)
        for size in (1, 2, 16, 32):
            parts = torch.cat([batched(part) for part in points.split(size)])
            assert torch.equal(parts, whole)


def test_passes_grow_as_long_as_that_pays() -> None:
    objective = objective_of(net())
    with evaluating(objective) as evaluate:
        batched = BatchedEvaluator(evaluate, Offsets(space_of(objective), directions(2)))
        batched.fit(1000)
        first = batched.size
        sizes = []
        for each in (1.0, 0.5, 0.4, 0.6, 0.1):
            batched.learn(batched.size, each * batched.size)
            sizes.append(batched.size)
        # Twice as many while it gains; back where it loses, and settled there.
        assert sizes == [2 * first, 4 * first, 8 * first, 4 * first, 4 * first]
        assert 8 * first <= MOST_POINTS

"""Passes by their operations alone: the loop's numbers, or they are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import loss_plane
from lla_callbacks.linalg.recorded import Program
from lla_callbacks.objective import recorded_passes
from lla_callbacks.objective.batched import BatchedEvaluator
from lla_callbacks.objective.families import Offsets, Segment
from lla_callbacks.objective.first_layers import FirstLayers
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, Values, evaluate_points, space_of
from tests.kinds import KINDS, Kind
from tests.objective.test_watching import BATCH, STEPS, Net, loss

Loss = Callable[[Any, Any], Tensor]


@pytest.fixture(autouse=True)
def no_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchedEvaluator, "serves", staticmethod(lambda *_: False))


def values(
    objective: Objective, directions: list[Tensor], evaluation: Any, count: int = 40
) -> Values:
    source = torch.Generator().manual_seed(3)
    points = torch.randn(count, len(directions), dtype=torch.float64, generator=source)
    points[5] = 0.0
    points[10:20, :-1] = points[10, :-1]
    family = Offsets(space_of(objective), directions)
    return evaluate_points(objective, family, points, PointSettings(evaluation=evaluation))


def both(module: nn.Module, step: Loss, batches: list[Any], **settings: Any) -> tuple[Any, Any]:
    """Return what is found by operations, where they may be used, and by the loop."""
    found = []
    for evaluation in ("auto", "loop"):
        torch.manual_seed(0)
        objective = Objective(module, batches, step, **{"mode": "eval", "check": False} | settings)
        space = space_of(objective)
        source = torch.Generator().manual_seed(1)
        directions = [torch.randn(space.dim, generator=source, dtype=space.dtype) for _ in range(2)]
        found.append(values(objective, directions, evaluation))
    assert found[1].method == "loop"
    assert len(found[1].table.unique()) > 30
    return found[0], found[1]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_writes_gives_the_numbers_of_the_loop(name: str) -> None:
    by_operations, by_loop = both(Net(STEPS[name]), loss, [BATCH, BATCH])
    assert torch.equal(by_operations.table, by_loop.table)
    # What is put back, in whatever way it was written.
    stays = ("nothing", "buffer below autograd", "frozen", "frozen parameter",
             "gradient of a buffer", "weight turned off")  # fmt: skip
    assert (by_operations.method == "recorded") == (name in stays)


SOURCE = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 6, generator=SOURCE), torch.randint(0, 3, (12,), generator=SOURCE)
IMAGES = torch.randn(5, 2, 6, 6, generator=SOURCE), Y[:5]
WORDS = (torch.randint(0, 7, (4, 5), generator=SOURCE),)


class Tied(nn.Module):
    """Embedding and head share their weights; one block of attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, batch: Any) -> Tensor:
        return F.linear(self.block(self.words(batch[0])), self.words.weight)


def classes(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def words(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch)[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


def watched(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    (out.argmax(1) == batch[1]).float().mean()  # a metric that goes nowhere
    return F.cross_entropy(out, batch[1])


def through_data(module: Any, batch: Any) -> Tensor:
    return F.linear(batch[0], module.weight.data[:, :].T.contiguous().T).square().mean()


def in_place(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    out[:, :1].mul_(2.0)
    return out.relu_().square().sum() + torch.stack([out.mean(), out.std()]).sum()  # type: ignore[no-any-return]


def weights(module: Any, batch: Any) -> Tensor:
    return classes(module, batch) + sum(p.square().sum() for p in module.parameters())


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(64, 3))  # fmt: skip


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    net[0].requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("make", "step", "batches", "settings"),
    [
        (conv, classes, [IMAGES], {}),
        (conv, classes, [IMAGES, IMAGES], {"mode": "batch"}),
        (Tied, words, [WORDS], {}),
        (frozen, watched, [(X, Y)], {}),
        (lambda: nn.Linear(6, 3), through_data, [(X, Y)], {}),
        (lambda: nn.Linear(6, 3), in_place, [(X, Y)], {}),
        (lambda: nn.Linear(6, 3), weights, [(X, Y)], {}),
        (lambda: nn.GRUCell(6, 4), classes, [(X, Y)], {}),
    ],
    ids=["conv", "batch statistics", "tied", "frozen", "data", "in place", "weights", "gru"],
)
def test_operations_give_the_numbers_of_the_loop_to_the_bit(
    make: Callable[[], nn.Module], step: Loss, batches: list[Any], settings: Any
) -> None:
    by_operations, by_loop = both(make(), step, batches, **settings)
    assert by_operations.method == "recorded"
    assert torch.equal(by_operations.table, by_loop.table)


LOOPED = (
    "LSTM, packed", "spectral norm, old form", "weight norm, old form", "CTC loss",
    "values looked at", "loss with derivatives inside",
    "operator of torch.library without a second derivative",
)  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [k for k in KINDS if not any(slow in k.name for slow in ("compiled", "GPT"))],
    ids=lambda k: k.name,
)
def test_every_kind_of_module_has_the_numbers_of_the_loop(kind: Kind) -> None:
    torch.manual_seed(0)
    module, batch = kind.make().double(), kind.batch()
    kind.loss(module, batch)  # lazy ones learn their shapes
    found = []
    for evaluation in ("auto", "loop"):
        objective = Objective(module, [batch], kind.loss, mode="eval", check=False)
        space = space_of(objective)
        direction = torch.randn(space.dim, generator=torch.Generator().manual_seed(1)) * 0.3
        found.append(values(objective, [direction.double()], evaluation, 26))
    assert (found[0].method == "recorded") == (kind.name not in LOOPED)
    assert torch.equal(found[0].table, found[1].table)


def test_what_goes_nowhere_and_what_stays_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    run = Program.__call__
    monkeypatch.setattr(
        Program, "__call__", lambda self, *a: (steps.append(len(self.steps)), run(self, *a))[1]
    )
    both(frozen(), watched, [(X, Y)])
    # The second layer, log-softmax and the mean: neither the frozen layer nor the metric.
    assert set(steps) == {3}


def branches_by_list(module: Any, batch: Any) -> Tensor:
    found: Tensor = module(batch[0]).square().mean()
    return found if found.tolist() > -1.0 else 2 * found


def branches_by_array(module: Any, batch: Any) -> Tensor:
    found: Tensor = module(batch[0]).square().mean()
    return found if np.asarray(found.detach()) > -1.0 else 2 * found


def branches(module: Any, batch: Any) -> Tensor:
    found: Tensor = module(batch[0]).square().mean()
    return found if found > 3.0 else 2 * found


def chooses(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    return out[out > 0].sum() / max(int((out > 0).sum()), 1)  # type: ignore[no-any-return]


def picks(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    return out[out > 0].mean()  # type: ignore[no-any-return]


def finds(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    return out[(out > 0).nonzero(as_tuple=True)].mean()  # type: ignore[no-any-return]


def fills(module: Any, batch: Any) -> Tensor:
    out = torch.zeros(12, 3)
    out[:] = module(batch[0])
    return out.square().mean()


def counts(module: Any, batch: Any) -> Tensor:
    module.count.data += 1
    return module(batch[0]).square().mean() * module.count  # type: ignore[no-any-return]


def lists(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    # Exceeded at one of the points, where the module is not asked, and read by no operation.
    return out.mean() * torch.tensor([out.abs().max(), 24.0]).max()  # type: ignore[no-any-return]


def lists_in_old_words(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    return out.mean() * torch.FloatTensor([out.abs().max(), 24.0]).max()  # type: ignore[no-any-return]


def renames(module: Any, batch: Any) -> Tensor:
    out = module(batch[0])
    return out.mean() * nn.Parameter(out.abs().max()).clamp(min=24.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "step",
    [branches_by_list, branches_by_array, branches, chooses, picks, finds, fills, counts, lists,
     lists_in_old_words, renames],
)  # fmt: skip
def test_what_depends_on_numbers_goes_through_the_loop(step: Loss) -> None:
    torch.manual_seed(5)
    module = nn.Linear(6, 3)
    module.register_buffer("count", torch.zeros(()))
    by_operations, by_loop = both(module, step, [(X, Y)])
    assert by_operations.method == "loop"
    assert torch.equal(by_operations.table, by_loop.table)
    assert "numpy" not in Tensor.__dict__  # the watch is over
    assert not hasattr(torch.tensor, "__wrapped__")
    assert "new_tensor" not in Tensor.__dict__


def test_numbers_made_on_the_way_are_constants() -> None:
    def makes(module: Any, batch: Any) -> Tensor:
        out = module(batch[0]) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor(0.5)
        return F.cross_entropy(out, batch[1])

    by_operations, by_loop = both(nn.Linear(6, 3), makes, [(X, Y)])
    assert by_operations.method == "recorded"
    assert torch.equal(by_operations.table, by_loop.table)


@pytest.mark.parametrize("after", [0, 10, 30])
def test_a_value_that_the_module_does_not_have_makes_all_of_them_void(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = Program.__call__, []

    def wrong_at_last(self: Program, *a: Any) -> Tensor:
        calls.append(None)
        return run(self, *a) * (1.0 if len(calls) <= after else 1.0 + 1e-6)

    monkeypatch.setattr(Program, "__call__", wrong_at_last)
    by_operations, by_loop = both(nn.Linear(6, 3), classes, [(X, Y)])
    assert len(calls) > after
    assert by_operations.method == "loop"
    assert by_operations.num_new == 40
    assert torch.equal(by_operations.table, by_loop.table)


def test_what_was_not_confirmed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls, kept, told = Program.__call__, [], [], []

    def wrong_at_last(self: Program, *a: Any) -> Tensor:
        calls.append(None)
        return run(self, *a) * (1.0 if len(calls) <= 16 else 2.0)

    def stop(count: int) -> None:
        told.append(count)
        if sum(told) > 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(Program, "__call__", wrong_at_last)
    objective = Objective(nn.Linear(6, 3), [(X, Y)], classes, mode="eval", check=False)
    family = Offsets(space_of(objective), [torch.ones(21)])
    points = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]

    def keep(table: Tensor, done: Tensor) -> None:
        kept.append((table.clone(), done.clone()))

    with pytest.raises(KeyboardInterrupt):
        evaluate_points(objective, family, points, PointSettings(), keep=keep, listener=stop)
    table, done = kept[-1]
    assert len(calls) > 16
    assert int(done.sum()) == 18  # two that were not recorded, and those the module was asked after
    loop = evaluate_points(objective, family, points, PointSettings(evaluation="loop")).table
    assert torch.equal(table[done], loop[done])


def test_operations_that_fail_leave_the_points_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = Program.__call__, []

    def fails(self: Program, *a: Any) -> Tensor:
        calls.append(None)
        if len(calls) > 7:
            raise RuntimeError("out of memory")
        return run(self, *a)

    monkeypatch.setattr(Program, "__call__", fails)
    by_operations, by_loop = both(nn.Linear(6, 3), classes, [(X, Y)])
    assert len(calls) == 8
    assert by_operations.method == "loop"
    assert torch.equal(by_operations.table, by_loop.table)


def test_a_pass_of_large_results_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lla_callbacks.objective.points.MOST_BYTES", 100)
    assert both(nn.Linear(6, 3), classes, [(X, Y)])[0].method == "loop"


def test_points_on_a_segment_are_those_of_the_loop() -> None:
    net = conv()
    objective = Objective(net, [IMAGES], classes, mode="eval", check=False)
    space = space_of(objective)
    ends = [torch.randn(space.dim, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    points = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
    found = [
        evaluate_points(objective, Segment(space, *ends), points, PointSettings(evaluation=e))  # type: ignore[arg-type]
        for e in ("auto", "loop")
    ]
    assert found[0].method == "recorded"
    assert torch.equal(found[0].table, found[1].table)


# --- First layers. ---------------------------------------------------------------------------

WIDE = torch.randn(9, 80, generator=SOURCE), Y[:9]


class Wide(nn.Module):
    """A first layer of 80 inputs, and what else is done with its weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Linear(80, 5, bias=kind != "no bias")
        self.second = nn.Linear(5, 3)
        if kind == "factors":
            self.low = nn.Parameter(0.01 * torch.randn(80, 9).t())  # not contiguous
        if kind == "frozen bias":
            self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "factors":
            return self.second((self.low @ self.first.weight.t()).tanh())  # type: ignore[no-any-return]
        if self.kind == "other side":
            return self.second((self.first.weight @ x.T).T.tanh())  # type: ignore[no-any-return]
        h = self.first(x).relu()
        if self.kind == "used twice":
            h = h + (self.first.weight[:, :5] @ h.T).T
        return self.second(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "count", "still", "taken"),
    [("bias", 2, False, True), ("bias", 1, False, True), ("bias", 3, False, True),
     ("bias", 2, True, True), ("no bias", 2, False, True), ("frozen bias", 2, False, True),
     ("other side", 2, False, True), ("used twice", 2, False, True),
     ("factors", 2, False, False)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_layers_give_the_numbers_of_the_loop(
    kind: str, count: int, still: bool, taken: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    used: list[int] = []
    at = FirstLayers.at
    monkeypatch.setattr(FirstLayers, "at", lambda self, point: (used.append(1), at(self, point))[1])
    net = Wide(kind).to(dtype)
    objective = Objective(net, [(WIDE[0].to(dtype), WIDE[1])], classes, mode="eval", check=False)
    space = space_of(objective)
    source = torch.Generator().manual_seed(1)
    directions = [torch.randn(space.dim, generator=source).to(dtype) for _ in range(count)]
    if still:  # the last direction leaves the first layer alone
        directions[-1][: 80 * 5 + 5] = 0.0
    before = [p.clone() for p in net.parameters()]
    found = [values(objective, directions, e) for e in ("auto", "loop")]
    assert found[0].method == "recorded"
    assert bool(used) == taken
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found[0].table, found[1].table, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_weights_of_a_first_layer_that_nothing_else_reads_are_not_placed() -> None:
    objective = Objective(Wide("bias"), [WIDE], classes, mode="eval", check=False)
    placed: list[frozenset[int]] = []
    partly = Offsets.place_partly

    def watched(self: Offsets, point: Any, but: frozenset[int]) -> None:
        placed.append(but)
        partly(self, point, but)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offsets, "place_partly", watched)
        values(objective, [torch.ones(space_of(objective).dim)], "auto")
    # weight and bias of the first layer
    assert frozenset({0, 1}) in placed
    assert placed.count(frozenset({0, 1})) > placed.count(frozenset())


def test_a_plane_says_how_it_was_evaluated() -> None:
    axis = torch.linspace(-1, 1, 7)
    plane = loss_plane(conv(), [IMAGES], loss=classes, alphas=axis, betas=axis)
    assert plane.facts.method == "recorded"
    assert recorded_passes.LEAST_POINTS < 49

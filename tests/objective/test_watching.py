"""Skipping what puts a module back: where a pass wrote nothing, and nowhere else."""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.namespaces import Namespaces
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import space_of
from lla_callbacks.objective.repetition import MOST_CHANGES
from lla_callbacks.objective.watching import FEW_ENTRIES, entries_of, snapshot, watch

BATCH = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)


class Net(nn.Module):
    """A linear network, and a place for what a step writes."""

    total = 0
    seen: ClassVar[list[int]] = []

    def __init__(self, step: Callable[[Any], Any] = lambda net: 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 1, dtype=torch.float64)
        self.step = step
        self.count = 0
        self.flags = [False, False]
        self.table = {"a": [1, 2], "b": deque([3], maxlen=2)}
        self.words = dict.fromkeys(range(FEW_ENTRIES + 1), 0)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.frozen = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)
        self.config = Config()
        self.options = Options(rate=1.0)
        self.tensors = {"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros(999)}
        self.order = OrderedDict(a=1.0, b=2.0, c=3.0)
        self.found: defaultdict[str, list[int]] = defaultdict(list)
        self.state = State()
        self.recent = {"a": 1.0, "b": 2.0}


class Config:
    """Some object of the user's."""

    def __init__(self) -> None:
        self.count = 0.0
        self.inside = {"deep": [Inner()]}


class Other(Config):
    """What a step makes of an object."""


@dataclass
class State:
    """Equal to every other, whatever it counts."""

    count: float = field(default=0.0, compare=False)


class Inner:
    """An object within an object."""

    count = 0.0


class Options(dict[str, Any]):
    """A dictionary that is read by attributes, as hyperparameters are."""

    __getattr__ = dict.__getitem__


def deep(net: Any) -> float:
    inner = net.config.inside["deep"][0]
    inner.count += 1
    return inner.count  # type: ignore[no-any-return]


def at_the_far_end(net: Any) -> float:
    net.tensors["b"].data[-1] += 1
    return float(net.tensors["b"][-1])


def equal_to_what_it_was(net: Any) -> float:
    net.state = State(net.state.count + 1)
    return net.state.count  # type: ignore[no-any-return]


def by_a_weak_reference(net: Any) -> float:
    net.friend().count += 1
    return net.friend().count  # type: ignore[no-any-return]


def last_to_first(net: Any) -> float:
    name = next(iter(net.recent))
    net.recent[name] = net.recent.pop(name)
    return net.recent[name]  # type: ignore[no-any-return]


def of_another_class(net: Any) -> float:
    before, net.config.__class__ = type(net.config), Other
    return float(before is Other)


def gradients(tensor: Tensor) -> float:
    with torch.enable_grad():
        (3 * tensor.requires_grad_()).sum().backward(inputs=[tensor])
    assert tensor.grad is not None
    return float(tensor.grad.sum())


def turned_off(net: Any) -> float:
    before = net.inner.bias.requires_grad
    net.inner.bias.requires_grad_(False)
    return float(before)


def loss(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    found: Tensor = (net.inner(batch[0]) - batch[1]).square().mean() + net.step(net)
    return found


def written(net: Any, name: str, value: Any) -> Any:
    old = getattr(net, name)
    setattr(net, name, value(old))
    return old


def flagged(net: Any) -> float:
    net.flags[0] = not net.flags[0]
    return float(net.flags[0])


def counted_on_the_class(net: Any) -> float:
    Net.total += 1
    return float(Net.total)


def listed_on_the_class(net: Any) -> float:
    Net.seen.append(1)
    return float(len(Net.seen))


def counted_below(net: Any) -> float:
    net.inner.scale = getattr(net.inner, "scale", 0.0) + 1.0
    return net.inner.scale  # type: ignore[no-any-return]


def drawn(net: Any) -> Tensor:
    return torch.rand((), dtype=torch.float64) + np.random.rand()


def buffered(net: Any) -> Tensor:
    net.calls += 1
    return net.calls  # type: ignore[no-any-return]


def buffered_unseen(net: Any) -> Tensor:
    net.calls.data += 1
    return net.calls.clone()  # type: ignore[no-any-return]


def replaced(net: Any) -> Tensor:
    net.frozen = nn.Parameter(net.frozen + 1, requires_grad=False)
    return net.frozen  # type: ignore[no-any-return]


def hooked(net: Any) -> float:
    net.inner.register_forward_hook(lambda m, a, out: out + 1)
    return float(len(net.inner._forward_hooks))


def late(net: Any) -> float:
    """Writes from the fourth pass on, as far as it can count passes."""
    Holder.passes += 1
    before = net.count
    if Holder.passes > 3:
        net.count += 1
    return float(before)


class Holder:
    passes = 0


STEPS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda net: 0.0,
    "number": lambda net: written(net, "count", lambda n: n + 1),
    "array": lambda net: float(np.sum(written(net, "count", lambda n: np.ones(2) + n))),
    "tensor": lambda net: float(written(net, "count", lambda n: torch.ones(2) + n) != 0),
    "list": flagged,
    "nested": lambda net: net.table["a"].append(1) or float(len(net.table["a"])),
    "deque": lambda net: net.table["b"].append(4) or float(sum(net.table["b"])),
    "long": lambda net: net.words.update({7: net.words[7] + 1}) or float(net.words[7]),
    "class": counted_on_the_class,
    "list of a class": listed_on_the_class,
    "submodule": counted_below,
    "random": drawn,
    "buffer": buffered,
    "buffer below autograd": buffered_unseen,
    "frozen": lambda net: float(net.frozen.data.add_(1.0)),
    "frozen parameter": replaced,
    "hook": hooked,
    "mode": lambda net: written(net, "training", lambda on: not on) * 1.0,
    "late": late,
    "object": lambda net: written(net.config, "count", lambda n: n + 1),
    "object within": deep,
    "options": lambda net: net.options.update(rate=net.options.rate + 1) or net.options.rate,
    "order": lambda net: (
        net.order.move_to_end(next(iter(net.order))) or next(iter(net.order.values()))
    ),
    "default": lambda net: net.found["x"].append(1) or float(len(net.found["x"])),
    "tensors": lambda net: net.tensors["a"].add_(1),
    "tensors unseen": lambda net: net.tensors["a"].data.add_(1).clone(),
    "large tensor": at_the_far_end,
    "equal object": equal_to_what_it_was,
    "order of a dictionary": last_to_first,
    "class of an object": of_another_class,
    "gradient of an attribute": lambda net: gradients(net.tensors["a"]),
    "gradient of a buffer": lambda net: gradients(net.calls),
    "gradient of a weight": lambda net: gradients(net.inner.bias),
    "weight turned off": turned_off,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_writes_is_the_same_at_every_pass_as_from_its_start(name: str) -> None:
    net = Net(STEPS[name])
    objective = Objective(net, [BATCH, BATCH], loss, mode="eval")
    Holder.passes = 0
    before = {k: str(v) for k, v in vars(net).items()}
    family = Offsets(space_of(objective), [torch.ones(3, dtype=torch.float64)])
    with evaluating(objective) as evaluate:
        values = []
        for alpha in (0.0, 1.0, 0.0, 1.0, 0.0):
            family.place([alpha])
            values.append(evaluate.row()[0])
        family.restore()
    assert values[0] == values[2] == values[4]
    assert values[1] == values[3]
    assert values[0] == objective()
    assert {k: str(v) for k, v in vars(net).items()} == before
    assert (Net.total, Net.seen) == (0, [])


@pytest.mark.parametrize(
    ("name", "skips"),
    [("nothing", True), ("buffer", True), ("frozen", True), ("list", False), ("number", False),
     ("long", False),
     ("class", False), ("hook", False)],
)  # fmt: skip
def test_what_puts_a_module_back_is_skipped_only_where_nothing_was_written(
    name: str, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    put = Namespaces.put_copies

    def counted(self: Namespaces, copier: Any) -> None:
        calls.append(None)
        put(self, copier)

    objective = Objective(Net(STEPS[name]), [BATCH], loss, mode="eval")
    with evaluating(objective) as evaluate:
        monkeypatch.setattr(Namespaces, "put_copies", counted)
        for _ in range(9):
            evaluate.row()
    # The first pass always is; after a few that wrote, nothing more is hoped for.
    assert len(calls) == (1 if skips else 9)
    assert evaluate._reset.num_changed == (0 if skips else MOST_CHANGES)


class WithSlots:
    """Has no dictionary."""

    __slots__ = ("count",)


@pytest.mark.parametrize(
    "attribute",
    [
        SimpleNamespace(),
        Random(0),
        torch.Generator(),
        [1] * 1001,
        np.zeros(2),
        [WithSlots()],
        [Random(0)],
        nn.Linear(2, 2).weight.T,
        iter([1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_attributes_that_may_change_unseen_are_copied_each_time(
    attribute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lla_callbacks.objective.watching.MOST_ENTRIES", 1000)
    net = Net()
    net.extra = attribute
    objective = Objective(net, [BATCH], loss, mode="eval")
    with evaluating(objective) as evaluate:
        evaluate.row()
        evaluate.row()
        assert evaluate._reset._unchanged is None


@pytest.mark.parametrize("make", [tuple, list, lambda pair: {"x": pair[0], "y": pair[1]}])
def test_a_batch_that_a_step_writes_into_is_whole_at_every_pass(make: Any) -> None:
    def writes(net: Any, batch: Any) -> Tensor:
        x, y = batch.values() if isinstance(batch, dict) else batch
        found: Tensor = (net.inner(x) - y).square().mean()
        x.add_(1.0)
        y.data.add_(1.0)
        if isinstance(batch, list):
            batch.clear()
        if isinstance(batch, dict):
            batch.pop("x")
        return found

    objective = Objective(Net(), [make(BATCH)], writes, mode="eval")
    with evaluating(objective) as evaluate:
        assert len({evaluate.row()[0] for _ in range(5)}) == 1


ROWS = {
    "lists": lambda: [[i, str(i)] for i in range(100)],
    "of several kinds": lambda: [[1], {"a": 2.0}, (3,), {4}, None, *({"b": i} for i in range(70))],
    "tuples": lambda: [(i, i) for i in range(100)],
    "deeper": lambda: [[i, [i]] for i in range(100)],
    "with a tensor": lambda: [[torch.zeros(1)] for _ in range(100)],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_table_are_copied_and_seen_to_change(name: str) -> None:
    table = ROWS[name]()
    copied = Copier().copy(table, (None, "table"))
    plain = name != "with a tensor"
    assert len(copied) == len(table)
    assert entries_of(table) == (None if not plain else len(table) + sum(map(entries, table)))
    if not plain:
        return
    before = snapshot(copied)
    assert before == copied == table
    for row in copied:
        if isinstance(row, list):
            row.append(1)
        elif isinstance(row, dict):
            row["more"] = 1
    assert before == table
    assert (copied != before) == (name != "tuples")


def entries(row: Any) -> int:
    return entries_of(row) or 0


def test_a_row_that_is_somewhere_else_too_stays_the_same_row() -> None:
    table = [[i] for i in range(100)]
    copied = Copier().copy({"rows": table, "first": table[0]}, (None, "both"))
    assert copied["rows"][0] is copied["first"] is not table[0]
    both = Copier().copy([table[0], *table], (None, "twice"))
    assert both[0] is both[1] is not table[0]


def asked(net: Any) -> float:
    return float(net.boss.max_epochs)


def told(net: Any) -> float:
    net.boss.fit_loop.max_epochs += 1
    return float(net.boss.fit_loop.max_epochs)


def used_up(net: Any) -> float:
    net.boss.callback_metrics["seen"] = net.boss.callback_metrics.get("seen", 0.0) + 1.0
    return net.boss.callback_metrics["seen"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("step", "watched"), [(lambda net: 0.0, True), (asked, False), (told, False), (used_up, False)]
)
def test_what_a_step_does_to_its_trainer_is_the_same_at_every_pass(
    step: Any, watched: bool
) -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    net = Net(step)
    net.boss = lightning.Trainer(
        max_epochs=5, logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    net.boss.fit_loop.max_epochs = 5
    objective = Objective(net, [BATCH], loss, mode="eval")
    with evaluating(objective) as evaluate:
        rows = [evaluate.row()[0] for _ in range(5)]
        assert evaluate.is_steady is watched
    assert len(set(rows)) == 1
    assert net.boss.fit_loop.max_epochs == 5


def test_what_a_weak_reference_leads_to_is_the_same_at_every_pass() -> None:
    friend = Config()
    net = Net(by_a_weak_reference)
    net.friend = weakref.ref(friend)
    with evaluating(Objective(net, [BATCH], loss, mode="eval")) as evaluate:
        assert len({evaluate.row()[0] for _ in range(4)}) == 1
    assert friend.count == 0.0


def test_an_attribute_that_is_a_view_of_weights_moves_with_them() -> None:
    net = Net(lambda net: net.seen_from_aside["w"].sum())
    net.seen_from_aside = {"w": net.inner.weight.data[0]}
    objective = Objective(net, [BATCH], loss, mode="eval")
    family = Offsets(space_of(objective), [torch.ones(3, dtype=torch.float64)])
    with evaluating(objective) as evaluate:
        found = []
        for alpha in (0.0, 1.0, 0.0, 1.0, 2.0):
            family.place([alpha])
            net_part = ((net.inner(BATCH[0]) - BATCH[1]) ** 2).mean().item()
            found.append((evaluate.row()[0] - net_part, net.inner.weight.sum().item()))
        family.restore()
    for seen, expected in found:
        assert seen == pytest.approx(expected, abs=1e-12)


def test_containers_that_hold_themselves_or_are_deep_come_to_an_end() -> None:
    ring: list[Any] = []
    ring.append(ring)
    deep: tuple[Any, ...] = ()
    for _ in range(5000):
        deep = (deep,)
    began = time.process_time()
    for value in (ring, deep):
        assert entries_of(value) is None
        # Object by object a ring of one is known, and a chain of thousands is not.
        assert (watch(nn.Module(), [(value, None)]) is not None) == (value is ring)
    assert time.process_time() - began < 0.5


def test_an_array_that_is_a_view_of_weights_or_of_a_tensor_stays_one() -> None:
    def adds(net: Any) -> float:
        net.one += 1  # in place
        return float(net.aside.sum() + net.calls)

    net = Net(adds)
    net.aside = net.inner.weight.detach().numpy()[0, 1:]
    net.one = net.calls.numpy()
    objective = Objective(net, [BATCH], loss, mode="eval")
    family = Offsets(space_of(objective), [torch.ones(3, dtype=torch.float64)])
    with evaluating(objective) as evaluate:
        found = []
        for alpha in (0.0, 1.0, 0.0, 1.0):
            family.place([alpha])
            found.append(evaluate.row()[0])
            with torch.no_grad():
                by_hand = (net.inner(BATCH[0]) - BATCH[1]).square().mean() + net.inner.weight[0, 1]
            assert found[-1] == pytest.approx(float(by_hand) + 1.0, rel=1e-12)
        family.restore()
    assert found[:2] == found[2:]
    assert float(net.calls) == 0.0

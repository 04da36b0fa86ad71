"""How many samples a batch has: told right or asked for, and cut along nothing else."""

from __future__ import annotations

import argparse
import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence

from lla_callbacks import HessianMonitor, MeasurementError, loss_line, measure_hessian
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.objective.batches import first_of, split
from lla_callbacks.objective.counting import about, known_count, sample_count

X, Y = torch.zeros(5, 2), torch.zeros(5)
EDGES, NODES = torch.zeros(2, 9, dtype=torch.long), torch.zeros(7, 3)


def images(count: int) -> list[Tensor]:
    return [torch.full((3, 4, 4 + k), float(k)) for k in range(count)]


def targets(count: int) -> list[dict[str, Tensor]]:
    return [{"label": torch.tensor(k % 2), "boxes": torch.zeros(2, 4)} for k in range(count)]


class Graphs:
    num_graphs = 4

    def __init__(self) -> None:
        self.edge_index, self.x = EDGES, NODES


class Sized:
    def __len__(self) -> int:
        return 5


@dataclass
class Fields:
    x: Tensor
    names: list[str]


Pair = namedtuple("Pair", "x y")
UNKNOWN = None


def name_of(value: Any) -> str:
    """Return a name that is the same in every process, which an object's own text is not."""
    return str(value) if value is None or isinstance(value, int) else type(value).__name__


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (X, 5),
        ((X, Y), 5),
        ([X, torch.tensor(2.0), "text", None], 5),
        ({"ids": X, "mask": X, "labels": Y}, 5),
        (UserDict(ids=X, mask=X), 5),
        (argparse.Namespace(x=X, y=Y), 5),
        (Fields(X, ["a"] * 5), 5),
        (Pair(X, Y), 5),
        ({"a": [X, Y.long()], "b": [X, Y.long()]}, 5),
        ([[X, X + 1], Y], 5),  # views
        ({"a": [X, X], "b": [X, X]}, 5),  # of regression
        ((X, Sized()), 5),
        (Sized(), 5),
        (Graphs(), 4),
        ((Graphs(), torch.zeros(4)), 4),
        (pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)]), 2),
        ((images(6), targets(6)), 6),
        ((images(1), targets(1)), 1),
        ((images(3), targets(3)), 3),
        ((tuple(images(6)), tuple(targets(6))), 6),  # of tuple(zip(*batch))
        ([tuple(images(6)), tuple(targets(6))], 6),
        (([torch.zeros(k + 1, 2) for k in range(4)], [0, 1, 2, 3]), 4),
        ([torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 4, 4)], 5),  # superresolution
        ({"edge_index": EDGES, "x": NODES}, UNKNOWN),
        ((EDGES, NODES, Y), UNKNOWN),
        ([torch.zeros(k + 1, 2) for k in range(4)], UNKNOWN),
        (images(6), UNKNOWN),
        ([(image, 1) for image in images(6)], UNKNOWN),
        ([{"image": image} for image in images(6)], UNKNOWN),
        ({"images": images(6)}, UNKNOWN),
        ({"x": X, "scale": torch.ones(2)}, UNKNOWN),
        ((Graphs(), Y), UNKNOWN),
    ],
    ids=name_of,
)  # fmt: skip
def test_samples_are_told_right_or_asked_for(batch: Any, count: int | None) -> None:
    assert known_count(batch) == count
    assert about(batch) >= 1
    if count is None:
        with pytest.raises(MeasurementError, match=r"offers \d.*Give batch_size="):
            sample_count(batch)
    assert known_count(batch, lambda b: 6) == 6


def test_a_number_holds_save_for_smaller_batches_that_agree() -> None:
    assert known_count((EDGES, NODES), 4) == 4
    assert [known_count((X[:k], Y[:k]), 4) for k in (3, 4, 5)] == [3, 4, 4]


@pytest.mark.parametrize("returned", [None, 0, 1.5, "x", torch.ones(2)], ids=str)
def test_a_function_that_returns_no_number_is_told(returned: Any) -> None:
    with pytest.raises(MeasurementError, match=r"batch_size= returned .*whole number"):
        known_count(X, lambda batch: returned)


def test_lists_of_images_are_cut_as_lists() -> None:
    parts = list(split((images(6), targets(6)), 4))
    assert [[len(entry) for entry in part] for part in parts] == [[4, 4], [2, 2]]
    assert [i.shape for i in parts[1][0]] == [i.shape for i in images(6)[4:]]
    (whole,) = split(images(6), 6, 6)
    assert len(whole) == 6
    assert [len(p) for p in split([(i, 1) for i in images(6)], 4, 6)] == [4, 2]
    assert [len(p[0][1]) for p in split([[X, X], Y], 3)] == [3, 2]


@pytest.mark.parametrize(
    ("batch", "batch_size", "kept"),
    [
        ((images(6), targets(6)), None, 2),
        ((X, Y), None, 2),
        ({"edge_index": EDGES, "x": NODES}, None, UNKNOWN),
        ({"edge_index": EDGES, "x": NODES}, 7, UNKNOWN),  # edges would be of other nodes
        ((Graphs(), torch.zeros(4)), None, UNKNOWN),
        ((images(3), targets(3)), None, 2),  # as many as channels
        ((images(3), torch.zeros(3)), None, 2),
        (([torch.zeros(3, 4, 4) for _ in range(3)], torch.zeros(3)), None, UNKNOWN),  # or views
        (images(6), lambda batch: len(batch), 2),
        (images(6), lambda batch: 6, UNKNOWN),  # a part would have six too
    ],
    ids=name_of,
)
def test_held_batches_are_cut_only_along_samples(batch: Any, batch_size: Any, kept: Any) -> None:
    held = HeldBatches(2, batch_size)
    held.add(batch)
    held.keep(2)
    (found,) = held.batches
    if kept is None:
        assert found is first_of([found], 2, batch_size)[0]
        if isinstance(batch, list):
            assert len(found) == len(batch)
        assert about(found, batch_size) == about(batch, batch_size)
    else:
        assert known_count(found, batch_size) == kept


class Net(nn.Module):
    """Takes images one by one, as of unequal sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3), nn.Linear(2, 2)

    def forward(self, batch: list[Tensor]) -> Tensor:
        return torch.stack([self.head(self.conv(i[None]).tanh().mean((2, 3))[0]) for i in batch])


def detection_loss(module: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(module(batch[0]), torch.stack([t["label"] for t in batch[1]]))


def test_batches_of_images_weigh_by_their_images_and_are_split_along_them() -> None:
    torch.manual_seed(0)
    module = Net().double()
    batches = [([torch.randn_like(i).double() for i in images(n)], targets(n)) for n in (6, 5, 1)]
    expected = sum(len(b[0]) * detection_loss(module, b).item() for b in batches) / 12
    for settings in ({}, {"microbatch_size": 4}, {"max_memory": 2000}):
        found = measure_hessian(
            module, batches, loss=detection_loss, num_steps=2, num_probes=2, num_layer_steps=0,
            check=False, **settings,
        )  # fmt: skip
        assert found.num_samples == 12
        assert found.loss == pytest.approx(expected, rel=1e-12)


class Network(pl.LightningModule):
    """Reads graphs as a mapping whose first tensor is an edge list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = torch.zeros(len(batch["x"]), 2, dtype=batch["x"].dtype)
        sources, ends = batch["edge_index"]
        found = found.index_add(0, ends, self.net(batch["x"])[sources])
        return cross_entropy(found, batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def graph(nodes: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(nodes)
    return {
        "edge_index": torch.randint(0, nodes, (2, 3 * nodes), generator=source),
        "x": torch.randn(nodes, 3, generator=source),
        "y": torch.randint(0, 2, (nodes,), generator=source),
    }


def nodes_of(batch: Any) -> int:
    return len(batch["x"])


def test_batches_that_do_not_tell_are_asked_for_by_the_functions() -> None:
    torch.manual_seed(0)
    module, batches = Network().double(), [graph(5), graph(9)]
    batches = [{k: v.double() if k == "x" else v for k, v in b.items()} for b in batches]
    settings = {"num_steps": 2, "num_probes": 2, "num_layer_steps": 0, "check": False}
    for measure in (lambda b: measure_hessian(module, b, **settings),
                    lambda b: measure_hessian(module, b[:1], microbatch_size=2, **settings),
                    lambda b: measure_hessian(module, b[:1], **settings),
                    lambda b: loss_line(module, b, alphas=[0.0], check=False)):  # fmt: skip
        with pytest.raises(MeasurementError, match=r"edge_index offers 2, x offers 5.*batch_size="):
            measure(batches)
    found = measure_hessian(module, batches, batch_size=nodes_of, **settings)
    losses = [module.training_step(b, 0).item() for b in batches]
    assert found.num_samples == 14
    assert found.loss == pytest.approx((5 * losses[0] + 9 * losses[1]) / 14, rel=1e-12)
    alone = measure_hessian(module, batches[:1], batch_size=5, **settings)
    assert (alone.loss, alone.num_samples) == (pytest.approx(losses[0]), 5)


@pytest.mark.parametrize("batch_size", [None, nodes_of])
@pytest.mark.parametrize("count", [1, 2])
def test_a_monitor_asks_once_and_leaves_a_gap(batch_size: Any, count: int) -> None:
    monitor = HessianMonitor(
        every_n_train_steps=1, num_samples=14 if count == 2 else 1, num_steps=2, num_probes=2,
        num_layer_steps=0, figures=False, check=False, batch_size=batch_size,
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor],
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = torch.utils.data.DataLoader([graph(5), graph(9)], batch_size=None)
        trainer.fit(Network(), loader)
    said = [str(w.message) for w in caught if "batch_size=" in str(w.message)]
    if batch_size is None:
        assert len(said) == 1
        assert "edge_index offers 2, x offers 5" in said[0]
        assert not monitor.history
    else:
        assert not said
        assert [r.num_samples for _, r in monitor.history] == [14 if count == 2 else 5] * len(
            monitor.history
        )
        assert monitor.history

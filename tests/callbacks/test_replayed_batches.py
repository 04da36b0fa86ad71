"""Batches of the user's own classes, changed in place by a step that is replayed."""

import logging
import pathlib
import re
import sys
import threading
import types
import warnings
from collections import UserDict

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.utils.data import DataLoader

from lla_callbacks import HessianTraceRegularizer, LossLandscapeMonitor
from lla_callbacks.objective.muting import no_output

from .modules import data, differences, fit, monitor, outcome, plain_loss, small_net, steps


class Batch:
    """Is no container that anybody knows."""

    def __init__(self, rows, extra=None):
        self.x, self.y = (torch.stack(part) for part in list(zip(*rows, strict=True))[:2])
        self.calls = [0]
        self.again = self.calls
        self.extra = extra

    def __len__(self):
        return len(self.x)

    def to(self, device, **settings):
        return self


class Graph(UserDict):
    """A mapping with an object inside."""


def in_an_object(rows):
    return Batch(rows)


def in_a_list(rows):
    return [Batch(rows), {"other": Batch(rows)}]


def in_a_mapping(rows):
    return Graph(batch=Batch(rows))


def in_a_namespace(rows):
    return types.SimpleNamespace(batch=Batch(rows))


def packed(rows):
    return pack_sequence([x for x, *_ in rows]), torch.stack([y for _, y, _ in rows])


def found_in(batch):
    if isinstance(batch, tuple):  # the inputs are packed sequences
        return Batch(list(zip(unpack_sequence(batch[0]), batch[1], strict=True)))
    while not isinstance(batch, Batch):
        batch = (
            batch[0] if isinstance(batch, list) else getattr(batch, "data", vars(batch))["batch"]
        )
    return batch


class Changing(pl.LightningModule):
    """Doubles its inputs and counts, in the batch."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def training_step(self, batch, batch_idx):
        batch = found_in(batch)
        batch.x = 2 * batch.x
        batch.x.data.add_(0.1)
        batch.calls[0] += 1
        assert batch.again is batch.calls
        assert batch.calls[0] == 1
        return cross_entropy(self.net(batch.x), batch.y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def landscape(**settings):
    return LossLandscapeMonitor(
        planes=[], lines=["random"], line_points=3, figures=False, save_arrays=False,
        evaluation="loop", **settings,
    )  # fmt: skip


@pytest.mark.parametrize("collate", [in_an_object, in_a_list, in_a_mapping, in_a_namespace, packed])
@pytest.mark.parametrize("make", [monitor, landscape])
def test_a_batch_that_the_step_changes_is_a_new_one_each_time(tmp_path, make, collate):
    def run(watcher):
        return outcome(
            fit(tmp_path, watcher, Changing, lambda: DataLoader(data(), 4, collate_fn=collate))
        )

    # Whatever a mapping of one's own counts as its length, one batch is enough.
    watcher = make(every_n_train_steps=2, num_samples=1)
    assert differences(run(None), run(watcher)) == []
    assert steps(watcher) == [0, 2, 4]


def with_a_generator(rows):
    return Batch(rows, extra=(i for i in range(10)))


class Drawing(Changing):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * next(batch.extra)


def test_what_a_batch_holds_and_cannot_be_copied_is_refused_by_name(tmp_path):
    def run(watcher):
        loader = DataLoader(data(), 4, collate_fn=with_a_generator)
        return outcome(fit(tmp_path, watcher, Drawing, lambda: loader))

    without = run(None)
    with pytest.warns(UserWarning, match=r"the step uses batch\.extra \(generator\).*dataloader="):
        found = run(monitor())
    assert differences(without, found) == []


class Nested(Changing):
    """Its batches have tensors without a shape."""

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(torch.cat(batch[0].unbind())), batch[1])


def nested(rows):
    parts = [x[None] for x, *_ in rows]
    return torch.nested.nested_tensor(parts), torch.stack([y for _, y, *_ in rows])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_a_shape_are_held(tmp_path):
    def run(watchers):
        loader = DataLoader(data(), 4, collate_fn=nested)
        return outcome(fit(tmp_path, None, Nested, lambda: loader, callbacks=watchers))

    watchers = [make(every_n_train_steps=2, num_samples=4) for make in (monitor, landscape)]
    assert differences(run([]), run(watchers)) == []
    assert [steps(w) for w in watchers] == [[0, 2, 4], [0, 2, 4]]


# -- the regularizer's passes ---------------------------------------------------------------------


class Counting(Changing):
    """Keeps what a pass too many would change."""

    def __init__(self):
        super().__init__()
        self.box = types.SimpleNamespace(calls=0, seen=[])
        self.write = self.log

    def training_step(self, batch, batch_idx):
        self.box.calls += 1
        self.box.seen.append(float(batch.x.sum()))
        self.trainer.callback_metrics["mine"] = torch.tensor(float(self.box.calls))
        loss = super().training_step(batch, batch_idx)
        self.write("calls", float(self.box.calls), on_epoch=True, on_step=False, batch_size=4)
        return loss


@pytest.mark.parametrize("estimator", ["perturbation", "difference", "exact"])
def test_passes_of_the_regularizer_leave_no_trace(tmp_path, estimator):
    watcher = HessianTraceRegularizer(1e-4, estimator=estimator)
    loader = DataLoader(data(), 4, collate_fn=Batch)
    module = fit(tmp_path, watcher, Counting, lambda: loader).lightning_module
    assert module.box.calls == len(module.box.seen) == 4
    assert float(module.trainer.callback_metrics["calls"]) == 2.5  # of 1 to 4


def test_the_regularizer_refuses_what_its_passes_would_advance(tmp_path):
    loader = DataLoader(data(), 4, collate_fn=with_a_generator)
    with pytest.raises(RuntimeError, match=r"the step uses batch\.extra \(generator\)"):
        fit(tmp_path, HessianTraceRegularizer(1e-4), Drawing, lambda: loader)


# -- loggers that are asked -----------------------------------------------------------------------


def asking(module, batch):
    logger = module.logger
    assert isinstance(logger, TensorBoardLogger)
    assert re.search("version_0$", logger.log_dir)
    assert module.trainer.log_dir == logger.log_dir == logger.experiment.log_dir
    assert (logger.name, logger.version) == ("logs", 0)
    logger.experiment.add_scalar("own", 1.0, 1)
    logger.log_metrics({"own": 1.0}, step=1)
    logger.log_hyperparams({"a": 1})
    return cross_entropy(module.net(batch[0]), batch[1])


@pytest.mark.parametrize("own", [True, False])
def test_a_muted_logger_answers_as_the_real_one(tmp_path, own):
    class Step(Changing):
        def training_step(self, batch, batch_idx):
            return asking(self, batch)

    watcher = monitor(every_n_train_steps=2, loss=asking if own else None)
    logger = TensorBoardLogger(tmp_path, name="logs")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="HessianMonitor")
        fit(tmp_path, watcher, Step, logger=logger)
    assert steps(watcher) == [0, 2, 4]


class Chatty(Changing):
    """Tells of each step in every way there is."""

    def __init__(self):
        super().__init__()
        self.teller = logging.getLogger("chatty")

    def training_step(self, batch, batch_idx):
        print("step", batch_idx)
        self.print("again", batch_idx)
        self.teller.warning("step %d", batch_idx)
        logging.warning("root %d", batch_idx)
        logging.getLogger("another").error("again %d", batch_idx)
        path = pathlib.Path(self.trainer.default_root_dir) / "steps.txt"
        with open(path, "a") as file:
            file.write(f"{batch_idx}\n")
        count = path.with_name("count.txt")
        number = int(count.read_text()) if count.exists() else 0
        count.write_text(str(number + 1))
        torch.save(batch_idx, path.with_name("last.pt"))
        flag = path.with_name("flag.txt")
        if batch_idx == 2 and flag.exists():  # one that somebody raises, and the run takes down
            flag.unlink()
            number += 1
        loss = cross_entropy(self.net(batch[0]), batch[1])
        return loss * (1 + 0.1 * number)


@pytest.mark.parametrize("make", [monitor, landscape])
def test_what_a_step_prints_and_writes_is_there_once(tmp_path, capsys, caplog, make):
    def run(watcher, name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "flag.txt").write_text("up")
        found = outcome(fit(folder, watcher, Chatty))
        texts = {p.name: p.read_text() for p in folder.glob("*.txt")}
        said = [r.getMessage() for r in caplog.records if r.name in ("chatty", "root", "another")]
        caplog.clear()
        texts["last"] = torch.load(folder / "last.pt")
        return found, texts, said, capsys.readouterr().out

    plain = run(None, "plain")
    watcher = make(every_n_train_steps=2, num_samples=1)
    watched = run(watcher, "watched")
    assert differences(plain[0], watched[0]) == []
    assert watched[1:] == plain[1:]
    assert plain[1] == {"steps.txt": "0\n1\n2\n3\n", "count.txt": "4", "last": 3}
    assert steps(watcher) == [0, 2, 4]


def test_a_debugger_in_a_replayed_step_is_heard(capsys):
    with no_output():
        print("silent")
        exec("print('heard')", {"__name__": "pdb"})
    assert capsys.readouterr().out == "heard\n"


TRACKER = """
import functools
rows = []

def checked(function):
    calls = []
    @functools.wraps(function)
    def inner(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)
    return inner

def log(data, *, step=None):
    rows.append(("log", tuple(data)))

class Run:
    def __init__(self):
        self.summary, self.lock = {}, (i for i in range(3))

    @checked
    def log(self, data, step=None):
        rows.append(("run", tuple(data)))

    def value(self):
        return 1.0

run = Run()
log_alias = run.log
"""


def test_packages_that_track_experiments_hear_of_training_alone(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(str(folder))
    import wandb

    direct, held = wandb.log, wandb.run

    class Tracking(Changing):
        def __init__(self):
            super().__init__()
            self.run = held

        def training_step(self, batch, batch_idx):
            loss = plain_loss(self, batch)
            wandb.log({"a": 1}, step=1)
            direct({"b": 1})
            held.log({"c": 1})
            self.run.log({"d": 1})
            wandb.log_alias({"e": 1})
            thread = threading.Thread(target=wandb.log, args=({"f": 1},))
            thread.start()
            thread.join()
            return loss * held.value()

    try:
        watchers = [make(every_n_train_steps=2, num_samples=4) for make in (monitor, landscape)]
        fit(tmp_path, None, Tracking, callbacks=watchers)
        assert [name for _, (name,) in wandb.rows] == list("abcdef") * 4
        assert [steps(w) for w in watchers] == [[0, 2, 4], [0, 2, 4]]
        with no_output():
            thread = threading.Thread(target=wandb.log, args=({"g": 1},))
        thread.start()
        thread.join()
        assert wandb.rows[-1] == ("log", ("g",))
    finally:
        del sys.modules["wandb"]


def test_another_thread_is_heard_by_a_tracker(monkeypatch):
    rows, ready, go = [], threading.Event(), threading.Event()
    package = types.ModuleType("wandb")
    exec("def log(data, *, commit=True):\n    rows.append((data, commit))", vars(package))
    package.rows = rows
    monkeypatch.setitem(sys.modules, "wandb", package)

    def tell():
        ready.wait()
        package.log(1)
        go.set()

    thread = threading.Thread(target=tell)
    thread.start()
    with no_output():
        package.log(2)
        ready.set()
        go.wait()
    thread.join()
    assert rows == [(1, True)]

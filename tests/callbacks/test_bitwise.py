"""Training with the monitor and without it ends in the same bits."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from lla_callbacks.callbacks import replay, subject
from lla_callbacks.objective import copies, state

from .modules import (
    Order,
    Plain,
    Stateful,
    differences,
    fit,
    loader,
    monitor,
    outcome,
    plain_loss,
    steps,
)


def stateful_run(folder, watcher=None, workers=0, batch_size=4, persistent=False, **settings):
    """Train the module that keeps every kind of state and return what it leaves behind."""
    module = {k: settings.pop(k) for k in ("optimizer", "frozen_norm") if k in settings}

    def shuffled():
        return loader(
            20,
            shuffle=True,
            num_workers=workers,
            batch_size=batch_size,
            persistent_workers=persistent,
        )

    trainer = fit(
        folder,
        watcher,
        lambda: Stateful(**module),
        shuffled,
        val=loader,
        callbacks=[Order()],
        logger=TensorBoardLogger(folder, name="run", version=str(watcher is not None)),
        **{
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            **settings,
        },
    )
    return outcome(trainer)


_WITHOUT = {}


def run_without(folder, **settings):
    """Return what a run without a monitor leaves behind, which one run tells all tests."""
    known = repr(sorted(settings.items()))
    if known not in _WITHOUT:
        _WITHOUT[known] = stateful_run(folder, **settings)
    return _WITHOUT[known]


def changed(folder, watcher, **settings):
    return differences(run_without(folder, **settings), stateful_run(folder, watcher, **settings))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_module_ends_in_the_same_bits(tmp_path, optimizer, workers):
    watcher = monitor(every_n_train_steps=1)
    assert changed(tmp_path, watcher, optimizer=optimizer, workers=workers) == []
    assert steps(watcher) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("watching", "training"),
    [
        pytest.param({"num_samples": 12}, {}, id="late start"),
        pytest.param({"num_samples": 1000}, {}, id="start after an epoch"),
        pytest.param({"num_samples": 12, "mode": "eval"}, {}, id="late start, eval"),
        pytest.param({"mode": "eval"}, {}, id="eval"),
        pytest.param({"dropout": True}, {}, id="dropout"),
        pytest.param(
            {"microbatch_size": 2, "mode": "eval", "loss": plain_loss}, {}, id="microbatches"
        ),
        pytest.param({"num_samples": 12}, {"frozen_norm": True}, id="frozen norm"),
        pytest.param(
            {"num_samples": 12},
            {"accumulate_grad_batches": 1, "gradient_clip_val": None},
            id="no accumulation",
        ),
        pytest.param({}, {"gradient_clip_algorithm": "value"}, id="clipped by value"),
        pytest.param({"figures": True, "every_n_train_steps": 3}, {}, id="figures"),
        pytest.param(
            {"num_runs": 2, "layers": ["net.0", "net.4"], "eig_rtol": 0.1, "trace_rtol": 0.5},
            {},
            id="tolerances",
        ),
        pytest.param(
            {"layers": "blocks", "num_layer_steps": 3, "num_layer_probes": 6, "num_runs": 2},
            {},
            id="layers",
        ),
        pytest.param(
            {"num_layer_steps": 2, "figures": True, "every_n_train_steps": 3, "mode": "eval"},
            {},
            id="layers with figures, eval",
        ),
        pytest.param({"dataloader": loader(shuffle=True)}, {}, id="loader"),
        pytest.param(
            {"dataloader": loader(shuffle=True, num_workers=1)}, {"workers": 1}, id="workers"
        ),
        pytest.param({}, {"workers": 2, "persistent": True}, id="persistent workers"),
        pytest.param(
            {}, {"val_check_interval": 2, "num_sanity_val_steps": 2}, id="validation inside"
        ),
        pytest.param({}, {"precision": "bf16-mixed"}, id="bf16"),
    ],
)
def test_settings_end_in_the_same_bits(tmp_path, watching, training):
    watcher = monitor(**{"every_n_train_steps": 2, **watching})
    assert changed(tmp_path, watcher, **training) == []
    assert steps(watcher)[0] == 0
    assert steps(watcher)[-1] > 0


def test_two_monitors_end_in_the_same_bits(tmp_path):
    without = run_without(tmp_path)
    first, second = (monitor(every_n_train_steps=1, name=f"hessian{i}") for i in range(2))
    trainer = fit(
        tmp_path,
        second,
        Stateful,
        lambda: loader(20, shuffle=True),
        loader,
        callbacks=[Order(), first],
        logger=TensorBoardLogger(tmp_path, name="two"),
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
    )
    assert differences(without, outcome(trainer)) == []
    assert steps(first) == steps(second) == [0, 1, 2, 3, 4, 5, 6]


class Raising:
    """A loss that changes everything it can reach and then raises at one call."""

    def __init__(self, at):
        self.at = at
        self.calls = 0

    def __call__(self, module, batch):
        self.calls += 1
        module.calls += 100
        module.seen.append("the loss was here")
        module.ema.add_(1)
        module.net[1].running_mean.add_(1)
        module.losses.update(torch.ones(()))
        loss = cross_entropy(module.net(batch[0] + torch.rand(1)), batch[1])
        random.random()
        np.random.rand()
        module.eval()
        if self.calls == self.at:
            raise RuntimeError("the loss raises here")
        return loss


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("num_samples", [4, 12])
def test_exception_in_a_measurement_leaves_the_same_bits(tmp_path, at, num_samples):
    loss = Raising(at)
    without = run_without(tmp_path)
    watcher = monitor(every_n_train_steps=1, num_samples=num_samples, loss=loss)
    with pytest.warns(UserWarning, match="HessianMonitor: .*the loss raises here"):
        found = stateful_run(tmp_path, watcher)
    assert differences(without, found) == []
    assert loss.calls > at


def nothing_guarded(*args, **kwargs):
    @contextmanager
    def guard():
        yield

    return guard()


@contextmanager
def weights_left_behind(module, snapshot):
    if snapshot is not None:
        state._put(module, snapshot)
    yield


@pytest.mark.parametrize(
    ("owner", "guard", "without", "sign"),
    [
        (state, "preserved_buffers", nothing_guarded, "/state/net.1.num_batches_tracked"),
        (state, "_preserved_attributes", nothing_guarded, "/attributes/calls"),
        (state, "preserved_random_streams", nothing_guarded, "/state/net.0.weight"),
        (state, "preserved_modes", nothing_guarded, "/state/net.0.weight"),
        (subject, "weights_at", weights_left_behind, "/state/net.0.weight"),
    ],
    ids=["buffers", "attributes", "random", "modes", "weights"],
)
def test_comparison_sees_a_missing_guard(tmp_path, monkeypatch, owner, guard, without, sign):
    monkeypatch.setattr(owner, guard, without)
    # The self-check sees some of them too, and would leave a gap first.
    found = changed(tmp_path, monitor(every_n_train_steps=1, num_samples=12, check=False))
    assert any(path.startswith(sign) for path in found)


def test_comparison_sees_loggers_that_are_not_muted(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "muted_loggers", nothing_guarded)
    monkeypatch.setattr(copies, "muted", lambda logger: logger)
    found = changed(tmp_path, monitor(every_n_train_steps=1, num_samples=12))
    assert any(path.startswith("/scalars/direct") for path in found)


class Store(Plain):
    """Keeps a growing state of one kind, on which the loss depends."""

    def __init__(self, start, advance):
        super().__init__()
        self.store = start()
        self.advance = advance

    def training_step(self, batch, batch_idx):
        return plain_loss(self, batch) * (1 + 0.01 * float(self.advance(self.store)))


def grow_list(store):
    store.append(1)
    return len(store)


def grow_mapping(store):
    store["count"] = store.get("count", 0) + 1
    return store["count"]


def grow_set(store):
    store.add(len(store))
    return len(store)


def grow_array(store):
    store += 1
    return store[0]


def grow_metric(store):
    store[0].update(float(store[0].compute()) + 1)
    return store[0].compute()


def metric_in_a_list():
    metric = MeanMetric()
    metric.update(1.0)
    return [metric]


@pytest.mark.parametrize(
    ("start", "advance"),
    [
        pytest.param(list, grow_list, id="list"),
        pytest.param(lambda: {"inner": []}, lambda s: grow_list(s["inner"]), id="nested"),
        pytest.param(lambda: deque(maxlen=50), grow_list, id="deque"),
        pytest.param(dict, grow_mapping, id="dict"),
        pytest.param(OrderedDict, grow_mapping, id="OrderedDict"),
        pytest.param(lambda: defaultdict(int), grow_mapping, id="defaultdict"),
        pytest.param(Counter, grow_mapping, id="Counter"),
        pytest.param(set, grow_set, id="set"),
        pytest.param(lambda: np.zeros(1), grow_array, id="ndarray"),
        pytest.param(lambda: torch.zeros(1), grow_array, id="tensor"),
        pytest.param(
            lambda: torch.Generator().manual_seed(5),
            lambda g: torch.rand(1, generator=g),
            id="torch.Generator",
        ),
        pytest.param(lambda: random.Random(5), lambda g: g.random(), id="random.Random"),
        pytest.param(
            lambda: np.random.default_rng(5), lambda g: g.random(), id="numpy.random.Generator"
        ),
        pytest.param(
            lambda: np.random.RandomState(5), lambda g: g.rand(), id="numpy.random.RandomState"
        ),
        pytest.param(metric_in_a_list, grow_metric, id="metric in a list"),
    ],
)
def test_state_in_an_attribute_is_kept(tmp_path, start, advance):
    def run(watcher=None):
        return outcome(fit(tmp_path, watcher, lambda: Store(start, advance)))

    watcher = monitor(every_n_train_steps=1)
    assert differences(run(), run(watcher)) == []
    assert steps(watcher) == [0, 1, 2, 3, 4]


class Freezing(Plain):
    """Freezes its first layer after two batches, while the start is not measured yet."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net[0].requires_grad_(batch_idx < 2)


def test_layer_frozen_before_the_start_is_measured_keeps_its_weights(tmp_path):
    without = outcome(fit(tmp_path, None, Freezing))
    watcher = monitor(num_samples=16)
    assert differences(without, outcome(fit(tmp_path, watcher, Freezing))) == []
    assert steps(watcher)[0] == 0


def test_loader_that_training_shares_with_the_monitor_keeps_its_order(tmp_path):
    def run(watched):
        shared = loader(shuffle=True, generator=torch.Generator().manual_seed(2))
        watcher = monitor(dataloader=shared) if watched else None
        trainer = fit(tmp_path, watcher, Plain, lambda: shared, callbacks=[Order()])
        return outcome(trainer)

    assert differences(run(False), run(True)) == []


class Sharing(Plain):
    """Logs inside of the function that the user also gives as the monitor's loss."""

    def compute_loss(self, batch):
        loss = plain_loss(self, batch)
        self.log("shared", loss, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.compute_loss(batch)


def test_loss_that_logs_does_not_change_what_training_logged(tmp_path):
    def run(watcher=None):
        logger = TensorBoardLogger(tmp_path, name="run", version=str(watcher is not None))
        return outcome(fit(tmp_path, watcher, Sharing, logger=logger))

    watcher = monitor(every_n_train_steps=1, loss=lambda module, batch: module.compute_loss(batch))
    assert differences(run(), run(watcher)) == []
    assert steps(watcher) == [0, 1, 2, 3, 4]


class WithTarget(Plain):
    """Moves a second network slowly after the first one, within the step, as BYOL does."""

    def __init__(self):
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return (
            plain_loss(self, batch) + (self.net(batch[0]) - self.target(batch[0])).square().mean()
        )


class Clipped(Plain):
    """Keeps its weights small within the step, as a Wasserstein critic does."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.mul_(0.99)
        return plain_loss(self, batch)


def test_frozen_parameters_that_the_step_moves_are_kept(tmp_path):
    watcher = monitor(every_n_train_steps=1)
    without = outcome(fit(tmp_path, None, WithTarget))
    assert differences(without, outcome(fit(tmp_path, watcher, WithTarget))) == []
    assert steps(watcher) == [0, 1, 2, 3, 4]


# Such a step has no Hessian at the present weights: a warning and a gap are fine here.
@pytest.mark.filterwarnings("ignore:HessianMonitor")
@pytest.mark.parametrize("num_samples", [4, 12])
def test_weights_that_the_step_changes_itself_are_kept(tmp_path, num_samples):
    watcher = monitor(every_n_train_steps=1, num_samples=num_samples)
    without = outcome(fit(tmp_path, None, Clipped))
    assert differences(without, outcome(fit(tmp_path, watcher, Clipped))) == []

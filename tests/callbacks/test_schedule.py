"""When the monitor measures."""

import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lla_callbacks.callbacks import monitor as monitor_module
from lla_callbacks.callbacks import schedule
from lla_callbacks.callbacks.schedule import Budget, Schedule

from .modules import (
    Plain,
    differences,
    fit,
    loader,
    monitor,
    outcome,
    plain_loss,
    steps,
)


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (schedule, monitor_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


@pytest.mark.parametrize(
    ("every", "due"), [(None, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (5, [5]), (9, [])]
)
def test_schedule_counts_optimizer_steps(every, due):
    assert [n for n in range(1, 7) if Schedule(every_n_train_steps=every).after_step(n)] == due


@pytest.mark.parametrize(
    ("every", "due"), [(None, []), (1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3]), (9, [])]
)
def test_schedule_counts_epochs_from_zero(every, due):
    assert [n for n in range(6) if Schedule(every_n_epochs=every).after_epoch(n)] == due


@pytest.mark.parametrize("value", [0, -3, 1.0, "1", True])
@pytest.mark.parametrize("name", ["every_n_train_steps", "every_n_epochs"])
def test_schedule_refuses_what_is_no_positive_whole_number(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; give a whole number"):
        Schedule(**{name: value})


def test_budget_without_limit_allows_everything(clock):
    budget = Budget(None)
    budget.spend(1e9)
    assert budget.allows()


def test_budget_allows_what_fits_beside_the_training_so_far(clock):
    budget = Budget(0.25)
    budget.start()
    clock.now += 2
    budget.spend(2)
    # One more measurement of 2 s and the one at the end make 6 s: 24 s of training.
    clock.now += 23
    assert not budget.allows()
    assert budget.overhead == 2 / 23
    clock.now += 1
    assert budget.allows()
    assert budget.overhead == 2 / 24


def test_budget_expects_the_next_measurement_to_cost_as_much_as_the_last(clock):
    budget = Budget(0.5)
    clock.now += 9
    budget.spend(1)
    assert budget.allows()
    clock.now += 100
    budget.spend(100)
    assert not budget.allows()


def test_budget_begins_anew_with_training(clock):
    budget = Budget(0.25)
    budget.spend(100)
    clock.now += 200
    budget.start()
    clock.now += 1
    assert budget.spent == 0
    assert budget.overhead == 0
    assert budget.allows()


def test_overhead_is_undefined_before_training(clock):
    assert math.isnan(Budget(None).overhead)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_n_epochs": 1}, [0, 4, 8, 12, 16, 20]),
        ({"every_n_epochs": 2}, [0, 8, 16, 20]),
        ({"every_n_epochs": 9}, [0, 20]),
        ({"every_n_train_steps": 1}, [*range(21)]),
        ({"every_n_train_steps": 3}, [0, 3, 6, 9, 12, 15, 18, 20]),
        ({"every_n_train_steps": 4}, [0, 4, 8, 12, 16, 20]),
        ({"every_n_train_steps": 7, "every_n_epochs": 2}, [0, 7, 8, 14, 16, 20]),
        # Due twice at one step, and to be measured once.
        ({"every_n_train_steps": 4, "every_n_epochs": 1}, [0, 4, 8, 12, 16, 20]),
        ({"every_n_train_steps": 2, "every_n_epochs": 2}, [*range(0, 21, 2)]),
        ({"max_overhead": 1e9}, [0, 4, 8, 12, 16, 20]),
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_measurements_are_exactly_on_schedule(tmp_path, settings, expected, accumulate):
    watcher = monitor(**settings)
    fit(
        tmp_path,
        watcher,
        train=lambda: loader(16 * accumulate),
        max_epochs=5,
        accumulate_grad_batches=accumulate,
    )
    assert steps(watcher) == expected


@pytest.mark.parametrize("num_samples", [8, 12, 16])
def test_steps_due_before_the_batches_are_held_are_caught_up_once(tmp_path, num_samples):
    """The start is on the schedule all the same, since its weights are kept."""
    watcher = monitor(every_n_train_steps=1, num_samples=num_samples)
    fit(tmp_path, watcher, max_epochs=2)
    held = num_samples // 4
    assert steps(watcher) == [0, *range(held, 9)]


def test_steps_are_on_schedule_when_the_start_is_measured_late(tmp_path):
    watcher = monitor(every_n_train_steps=3, num_samples=16)
    fit(tmp_path, watcher, train=lambda: loader(40))
    # Step 3 passed while batches were still being held, and step 4 is no multiple of 3.
    assert steps(watcher) == [0, 6, 9, 10]


class Ticking(pl.Callback):
    """Lets one second pass per batch."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, *args):
        self.clock.now += 1


def costly(clock, seconds):
    """Return a loss that takes a time; a measurement on one batch evaluates it once.

    The very first pass, which sees what a measurement takes in memory, is free here.
    """
    calls = []

    def loss(module, batch):
        clock.now += seconds if calls else 0
        calls.append(1)
        return plain_loss(module, batch)

    return loss


@pytest.mark.parametrize(
    ("seconds", "settings", "expected"),
    [
        # Of three measurements of one second the last is the end's: 48 s of training.
        (1, {"max_overhead": 0.0625}, [0, 48, 63]),
        (1, {"max_overhead": 0.0625, "every_n_train_steps": 8}, [0, 48, 63]),
        (1, {"max_overhead": 0.125}, [0, 24, 32, 40, 48, 56, 63]),
        (1, {}, [0, 63]),
        (0.5, {}, [0, 38, 50, 63]),
        (1000, {}, [0, 63]),
        (0, {}, [0, 9, 18, 27, 36, 45, 54, 63]),
        # A schedule that the user wrote down is kept at any cost.
        (1000, {"every_n_train_steps": 30}, [0, 30, 60, 63]),
        (1000, {"every_n_epochs": 3}, [0, 27, 54, 63]),
    ],
    ids=str,
)
def test_overhead_postpones_but_never_drops_start_and_end(
    tmp_path, clock, seconds, settings, expected
):
    watcher = monitor(loss=costly(clock, seconds), **settings)
    fit(
        tmp_path,
        watcher,
        train=lambda: loader(36),
        callbacks=[Ticking(clock)],
        max_epochs=7,
    )
    assert steps(watcher) == expected


def test_logged_overhead_is_the_share_of_training_time(tmp_path, clock):
    watcher = monitor(loss=costly(clock, 3), every_n_epochs=9)
    trainer = fit(tmp_path, watcher, train=lambda: loader(48), callbacks=[Ticking(clock)])
    assert float(trainer.callback_metrics["hessian/seconds"]) == 3
    assert float(trainer.callback_metrics["hessian/overhead"]) == 2 * 3 / 12


@pytest.mark.parametrize("limit", [{"max_steps": 6}, {"max_epochs": 2, "limit_train_batches": 3}])
@pytest.mark.parametrize("num_samples", [4, 16])
def test_run_that_stops_early_is_measured_at_its_end(tmp_path, limit, num_samples):
    watcher = monitor(every_n_epochs=9, num_samples=num_samples)
    fit(tmp_path, watcher, **{"max_epochs": 9, **limit})
    assert steps(watcher) == [0, 6]


@pytest.mark.parametrize("num_samples", [8, 1000])
def test_run_that_stops_before_enough_samples_are_held_is_measured_on_those(tmp_path, num_samples):
    watcher = monitor(num_samples=num_samples)
    fit(tmp_path, watcher, train=lambda: loader(40), max_steps=3, max_epochs=None)
    assert steps(watcher) == [0, 3]
    assert [report.num_samples for _, report in watcher.history] == [min(num_samples, 12)] * 2


def test_run_stopped_by_a_callback_is_measured_at_its_end(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 6

    watcher = monitor(every_n_epochs=9)
    trainer = fit(tmp_path, watcher, callbacks=[Stop()], max_epochs=9)
    assert steps(watcher) == [0, trainer.global_step]
    assert trainer.global_step < 36


@pytest.mark.parametrize("num_samples", [17, 1000])
def test_epoch_with_fewer_samples_than_asked_for_is_held_once(tmp_path, num_samples):
    watcher = monitor(num_samples=num_samples, every_n_epochs=1)
    fit(tmp_path, watcher, max_epochs=3)
    assert steps(watcher) == [0, 4, 8, 12]
    assert [report.num_samples for _, report in watcher.history] == [16] * 4


class Stream(torch.utils.data.IterableDataset):
    """Samples whose number nobody knows beforehand."""

    def __iter__(self):
        yield from [loader().dataset[i] for i in range(16)]


def test_data_of_unknown_length_are_held_for_one_epoch(tmp_path):
    watcher = monitor(num_samples=1000, every_n_epochs=1)
    fit(
        tmp_path,
        watcher,
        train=lambda: torch.utils.data.DataLoader(Stream(), batch_size=4),
        max_epochs=2,
    )
    assert steps(watcher) == [0, 4, 8]
    assert [report.num_samples for _, report in watcher.history] == [16] * 3


def test_second_fit_begins_anew(tmp_path):
    watcher = monitor(every_n_epochs=1)
    trainer = fit(tmp_path, watcher)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, loader(16, shuffle=True))
    assert steps(watcher) == [4, 8, 12]


@pytest.mark.parametrize("fast", [True, 2])
def test_fast_dev_run_measures_and_writes_nothing(tmp_path, fast):
    watcher = monitor(num_steps=30, num_probes=30, figures=True, every_n_train_steps=1)
    trainer = fit(
        tmp_path,
        watcher,
        logger=TensorBoardLogger(tmp_path),
        fast_dev_run=fast,
        enable_checkpointing=True,
    )
    assert steps(watcher) == [*range(int(fast) + 1)]
    assert [report.num_steps for _, report in watcher.history] == [2] * (int(fast) + 1)
    assert "hessian/trace" in trainer.callback_metrics
    assert list(tmp_path.glob("**/*")) == []


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
def test_barebones_does_nothing_but_warn(tmp_path):
    without = outcome(fit(tmp_path))
    watcher = monitor(every_n_train_steps=1)
    with pytest.warns(UserWarning, match="HessianMonitor does nothing with Trainer.barebones"):
        trainer = fit(
            tmp_path,
            watcher,
            barebones=True,
            logger=None,
            enable_checkpointing=None,
            enable_progress_bar=None,
            enable_model_summary=None,
            log_every_n_steps=None,
        )
    assert watcher.history == []
    assert "hessian/trace" not in trainer.callback_metrics
    assert differences(without["state"], trainer.lightning_module.state_dict()) == []
    assert list(tmp_path.glob("**/*")) == []


def test_layers_are_checked_in_a_fast_dev_run_too(tmp_path):
    with pytest.raises(MisconfigurationException, match="layers contains 'nowhere'"):
        fit(tmp_path, monitor(layers=["nowhere"]), fast_dev_run=True)


class OneArgument(Plain):
    def training_step(self, batch):
        return plain_loss(self, batch)


class Renamed(Plain):
    def training_step(self, samples, number):
        assert isinstance(number, int)
        return plain_loss(self, samples)


class Variadic(Plain):
    def training_step(self, *args):
        batch, batch_idx = args
        assert isinstance(batch_idx, int)
        return plain_loss(self, batch)


class Dictionary(Plain):
    def training_step(self, batch, batch_idx):
        return {"loss": plain_loss(self, batch), "more": batch_idx}


class FromIterator(Plain):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return plain_loss(self, batch)


@pytest.mark.parametrize("make_module", [OneArgument, Renamed, Variadic, Dictionary])
@pytest.mark.parametrize("num_samples", [4, 12])
def test_every_form_of_the_training_step_gives_the_same_numbers(tmp_path, make_module, num_samples):
    plain, other = (monitor(every_n_epochs=1, num_samples=num_samples) for _ in range(2))
    fit(tmp_path, plain, Plain)
    fit(tmp_path, other, make_module)
    numbers = [[(s, r.loss, r.trace, r.lambda_max) for s, r in w.history] for w in (plain, other)]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 2


@pytest.mark.parametrize("num_samples", [4, 12])
@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")
def test_step_that_takes_the_iterator_is_measured_from_the_start(tmp_path, num_samples):
    without = outcome(fit(tmp_path, None, FromIterator))
    watcher = monitor(every_n_epochs=1, num_samples=num_samples)
    trainer = fit(tmp_path, watcher, FromIterator)
    plain = monitor(every_n_epochs=1, num_samples=num_samples)
    fit(tmp_path, plain, Plain)
    assert differences(without, outcome(trainer)) == []
    assert steps(watcher) == [0, 4]
    assert [r.trace for _, r in watcher.history] == [r.trace for _, r in plain.history]

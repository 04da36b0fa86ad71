"""When the monitor measures."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lla_callbacks.callbacks.schedule import Schedule

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

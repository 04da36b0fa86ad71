"""Trouble that once ended a run of one process costs one warning, and no more than its own part."""

import errno
import math
import socket

import pytest
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers import CSVLogger

from lla_callbacks import LossLandscapeMonitor
from lla_callbacks.callbacks import subject

from .modules import Plain, differences, fit, monitor, outcome, plain_loss, steps


def ours(record):
    return [str(w.message) for w in record if "Monitor" in str(w.message)]


def test_last_weights_that_cannot_be_kept_are_a_gap(tmp_path, monkeypatch, recwarn):
    kept = subject.take_snapshot

    def broken(module):
        if module.trainer.global_step == 4:
            raise MemoryError("no room for weights")
        return kept(module)

    monkeypatch.setattr(subject, "take_snapshot", broken)
    watcher = monitor(every_n_train_steps=2)
    trainer = fit(tmp_path, watcher, callbacks=[WeightAveraging()], max_steps=4)
    assert trainer.global_step == 4
    # What was measured before is there; the average is not taken for the last weights.
    assert steps(watcher) == [0, 2, 4]
    monitor_steps = monitor(every_n_train_steps=3)
    fit(tmp_path, monitor_steps, callbacks=[WeightAveraging()], max_steps=4)
    assert steps(monitor_steps) == [0, 3]
    said = ours(recwarn)
    assert any("keeping weights failed" in text and "no room for weights" in text for text in said)


class ThreeBetas(torch.optim.Adam):
    """Keeps three betas in its groups, as some Adams do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["betas"] = group["betas"][:2]
        found = super().step(closure)
        for group in self.param_groups:
            group["betas"] = (*group["betas"], 0.5)
        return found


class Unknown(Plain):
    def configure_optimizers(self):
        return ThreeBetas(self.parameters(), 0.01)


@pytest.mark.parametrize("late", [4, 12])
def test_an_optimizer_without_a_known_limit_costs_stability_alone(tmp_path, late):
    watcher = monitor(every_n_train_steps=2, num_samples=late)
    with pytest.warns(UserWarning, match=r"the stability limit failed.*Only stability") as record:
        trainer = fit(tmp_path, watcher, Unknown, max_epochs=2)
    assert len(ours(record)) == 1
    assert steps(watcher) == [0, *([2] if late == 4 else []), 4, 6, 8]
    assert all(math.isnan(r.criteria["stability"]) for _, r in watcher.history)
    without = outcome(fit(tmp_path, None, Unknown, max_epochs=2))
    assert differences(without, outcome(trainer)) == []


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Mute(Plain):
    def training_step(self, batch, batch_idx):
        if "log" in self.__dict__:
            raise MuteError
        return plain_loss(self, batch)


@pytest.mark.parametrize("kind", [monitor, LossLandscapeMonitor])
def test_an_exception_whose_text_cannot_be_made_is_a_gap(tmp_path, kind):
    watcher = kind(every_n_train_steps=2, num_samples=4)
    with pytest.warns(UserWarning, match=r"MuteError: \(its text cannot be made\)"):
        trainer = fit(tmp_path, watcher, Mute)
    assert trainer.global_step == 4


def test_a_predicate_that_raises_costs_the_layers_alone(tmp_path):
    def layers(path, module):
        raise KeyError(path)

    watcher = monitor(every_n_train_steps=2, layers=layers)
    with pytest.warns(UserWarning, match=r"layers= failed.*KeyError.*Mend the function") as record:
        fit(tmp_path, watcher)
    assert len(ours(record)) == 1
    assert steps(watcher) == [0, 2, 4]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free disk space"),
        (PermissionError(errno.EACCES, "Permission denied"), "a folder that can be written to"),
        (ConnectionResetError("by peer"), "server did not answer"),
        (TimeoutError("too slow"), "server did not answer"),
        (socket.gaierror(-2, "Name or service not known"), "server did not answer"),
        (ValueError("odd"), "What was meant for this file or logger is missing"),
    ],
)
def test_a_remedy_is_one_for_what_happened(tmp_path, error, remedy):
    class Broken(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(tag.startswith("hessian") for tag in metrics):
                raise error

    watcher = monitor(every_n_train_steps=2)
    with pytest.warns(UserWarning, match=f"logging failed.*{remedy}") as record:
        fit(tmp_path, watcher, logger=Broken(tmp_path))
    assert len(ours(record)) == 1
    assert ("Free disk space" in ours(record)[0]) == (remedy == "Free disk space")


def test_a_loss_of_ones_own_is_not_told_to_be_given(tmp_path):
    def loss(module, batch):
        raise ValueError("no luck")

    with pytest.warns(UserWarning, match="no luck") as record:
        fit(tmp_path, monitor(every_n_train_steps=2, loss=loss))
    assert "Give loss=" not in ours(record)[0]

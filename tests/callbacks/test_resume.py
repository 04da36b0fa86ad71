"""A run cut in two by a checkpoint has the curves of a run that was never cut."""

import os
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lla_callbacks import HessianMonitor, HessianTraceRegularizer, LossLandscapeMonitor
from lla_callbacks.report.plain import to_plain

from .modules import (
    Evaluated,
    Plain,
    data,
    differences,
    events,
    fit,
    loader,
    monitor,
    plain_loss,
    quiet_trainer,
    scalars,
    steps,
)

# Lightning's own, where the run that goes on writes no checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")

LANDSCAPE = {
    "plane_points": 3, "line_points": 5, "num_samples": 4, "figures": False, "evaluation": "loop",
    "planes": ["random", "trajectory"], "lines": ["top1", "update"],
}  # fmt: skip


def landscape(**settings):
    return LossLandscapeMonitor(**{**LANDSCAPE, **settings})


class Normed(Plain):
    """Has buffers, which a start that is measured late needs as well."""

    def __init__(self, optimizer="adam"):
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), 0.05)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class ResumableLoader(DataLoader):
    """Goes on at the batch where a checkpoint was written, as torchdata's stateful loader."""

    start = done = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.done = number + 1
                yield batch

    def state_dict(self):
        return {"start": self.done % len(self)}

    def load_state_dict(self, state):
        self.start = state["start"]


def resumable_loader():
    return ResumableLoader(data(), batch_size=4)


def train(folder, callbacks, name, make_module=Normed, train=resumable_loader, ckpt=None, **more):
    """Train for three epochs of four steps and return the Trainer."""
    pl.seed_everything(3, verbose=False)
    logger = TensorBoardLogger(folder, name="run", version=name)
    settings = {"max_epochs": 3, "logger": logger, "enable_checkpointing": True, **more}
    trainer = quiet_trainer(folder, callbacks, **settings)
    trainer.fit(make_module(), train(), ckpt_path=ckpt, weights_only=True)
    logger.finalize("success")
    return trainer


def every_step(folder):
    return ModelCheckpoint(folder / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)


def every_epoch(folder):
    return ModelCheckpoint(folder / "kept", filename="{step}", save_top_k=-1)


def history(watcher):
    """Return all numbers of all reports, save what they cost."""
    return _without_time([(step, to_plain(report)) for step, report in watcher.history])


def logged(trainer, least=-1):
    """Return what the monitor logged after a step, save what it cost."""
    found = scalars(events(trainer.logger.log_dir))
    return {
        tag: [(step, value) for step, value in pairs if step > least]
        for tag, pairs in found.items()
        if tag.startswith(("hessian", "landscape"))
        and not tag.endswith(("seconds", "overhead"))
        and any(step > least for step, _ in pairs)
    }


def _without_time(value):
    if isinstance(value, dict):
        return {k: _without_time(v) for k, v in value.items() if k != "seconds"}
    if isinstance(value, (list, tuple)):
        return [_without_time(v) for v in value]
    return value


CASES = [
    pytest.param(lambda: monitor(every_n_train_steps=3), "sgd", id="hessian"),
    pytest.param(lambda: monitor(every_n_epochs=1, num_samples=12), "adam", id="epochs"),
    pytest.param(
        lambda: monitor(every_n_train_steps=1, num_samples=1000),
        "adam",
        id="start in epoch 1",
    ),
    pytest.param(
        lambda: monitor(every_n_train_steps=4, num_layer_steps=2, num_runs=2, mode="eval"),
        "adam",
        id="layers",
    ),
    pytest.param(
        lambda: monitor(every_n_train_steps=2, dataloader=loader(shuffle=True)),
        "adam",
        id="loader",
    ),
    pytest.param(lambda: landscape(every_n_train_steps=3), "sgd", id="landscape"),
    pytest.param(
        lambda: landscape(every_n_epochs=1, num_samples=12, num_rays=2, convexity_points=3),
        "sgd",
        id="landscape, late start",
    ),
]


@pytest.mark.parametrize(("make", "optimizer"), CASES)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, make, optimizer):
    """Wherever the checkpoint was written: same steps, tags and values, to the bit."""
    whole = make()
    one = train(tmp_path, [whole, every_step(tmp_path)], "whole", lambda: Normed(optimizer))
    assert (steps(whole)[0], steps(whole)[-1]) == (0, 12)
    # While batches are held, at the last batch of an epoch, within one.
    for cut in (1, 4, 6):
        resumed = make()
        other = train(
            tmp_path, [resumed], f"from {cut}", lambda: Normed(optimizer),
            ckpt=tmp_path / "kept" / f"step={cut}.ckpt",
        )  # fmt: skip
        weights = [trainer.lightning_module.state_dict() for trainer in (one, other)]
        assert differences(*weights) == []
        assert differences(history(whole), history(resumed)) == []
        # What was measured before the checkpoint is not measured, nor logged, again.
        known = [step for step, _ in torch_history(tmp_path, cut, resumed)]
        assert known == steps(whole)[: len(known)]
        assert logged(other) == logged(one, max(known, default=-1))


def torch_history(folder, cut, watcher):
    """Return the history in a checkpoint."""
    state = torch.load(folder / "kept" / f"step={cut}.ckpt", weights_only=True)
    return state["callbacks"][watcher.state_key]["history"]

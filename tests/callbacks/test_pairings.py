"""Random pairings of what a run can have with what a monitor can do: bitwise the run without one.

A few in each run of the tests; `make bitwise` takes a thousand (`PAIRINGS=1000`, from seed
`FIRST=0`). Each is made from its number alone, so that one that fails can be run again.
"""

import os
import random
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import HessianMonitor, LossLandscapeMonitor

from .modules import Order, Stateful, differences, loader, outcome, quiet_trainer

FIRST, NUMBER = int(os.environ.get("FIRST", "0")), int(os.environ.get("PAIRINGS", "0"))
# Without an order: both monitors, with and without accumulation, validation within an epoch.
NUMBERS = range(FIRST, FIRST + NUMBER) if NUMBER else (0, 1, 3)

# -- what a module does in a hook, each in some way that a measurement could disturb ---------------


def noisy_data(self, batch):
    return [batch[0] + 0.01 * torch.randn_like(batch[0]), *batch[1:]]


def count(self, *args, **kwargs):
    self.calls += 1


def draw(self, *args, **kwargs):
    self.ema = self.ema + torch.rand(()) * random.random()


def scale_gradients(self, *args, **kwargs):
    for parameter in self.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.9)


def decay(self, *args, **kwargs):
    with torch.no_grad():
        for parameter in self.parameters():
            parameter.mul_(0.999)


def toggle(self, *args, **kwargs):
    self.net[3].train(not self.net[3].training)


def log_more(self, *args, **kwargs):
    self.log("more", torch.rand(()), on_step=True, on_epoch=True)


HOOKS = {
    "on_before_batch_transfer": [lambda self, batch, i: noisy_data(self, batch)],
    "on_after_batch_transfer": [lambda self, batch, i: noisy_data(self, batch)],
    "on_train_batch_start": [count, draw, toggle],
    "on_train_batch_end": [count, draw, decay],
    "on_train_epoch_start": [count, draw, toggle],
    "on_train_epoch_end": [count, draw, decay],
    "on_before_zero_grad": [count, draw],
    "on_before_backward": [count, draw],
    "on_after_backward": [count, scale_gradients],
    "on_before_optimizer_step": [count, scale_gradients],
    "on_train_start": [draw],
    "on_train_end": [count],
}


class Counted(Stateful):
    """Without scalars of its own in a logger that might not be TensorBoard's."""

    logs = True

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.calls += 1
        self.seen.append(index.tolist())
        logits = self.net(x + 0.1 * torch.randn_like(x))
        loss = cross_entropy(logits, y) * (1 + 0.01 * self.calls) + 0.01 * self.ema
        self.ema = 0.9 * self.ema + 0.1 * loss.detach()
        self.losses.update(loss.detach())
        self.accuracy(logits, y)
        if self.logs:
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss


class Clipped(Counted):
    """With hooks on gradients and on modules."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.net[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
        self.net[0].register_forward_hook(lambda module, inputs, output: 1.01 * output)
        self.net[4].register_full_backward_hook(lambda module, into, out: None)


class Normed(Counted):
    """With parametrized weights."""

    def __init__(self, **settings):
        super().__init__(**settings)
        nn.utils.parametrizations.spectral_norm(self.net[4])
        nn.utils.parametrizations.weight_norm(self.net[0])


class Scheduled(Counted):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


MODULES = [Counted, Clipped, Normed, Scheduled]
TRAINER = [
    {},
    {"accumulate_grad_batches": 2},
    {"gradient_clip_val": 0.5},
    {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    {"precision": "64-true"},
    {"precision": "bf16-mixed"},
    {"limit_train_batches": 2},
    {"val_check_interval": 2},
    {"max_steps": 5},
    {"overfit_batches": 2},
]
CALLBACKS = [
    lambda folder: [],
    lambda folder: [LearningRateMonitor("step")],
    lambda folder: [ModelCheckpoint(folder / "kept", every_n_train_steps=2)],
    lambda folder: [StochasticWeightAveraging(0.01, swa_epoch_start=1)],
    lambda folder: [GradientAccumulationScheduler({0: 1, 1: 2})],
]
COMMON = {
    "every_n_train_steps": [None, 2, 3],
    "every_n_epochs": [None, 1],
    "num_samples": [4, 10],
    "mode": ["batch", "eval", "recalibrate"],
    "engine": ["auto", "difference"],
    "precision": ["float32", "training"],
    "seed": [0, 3],
    "figures": [False, False, False, True],
    "microbatch_size": [None, None, 2],
}
HESSIAN = {
    "num_steps": [2, 3],
    "num_probes": [2],
    "track_every_n_train_steps": [None, 1],
    "layers": [None, "net.*"],
    "num_layer_steps": [0, 2],
}
SLICES = {
    "planes": [["random"], ["trajectory", "random"], []],
    "lines": [["top1"], ["gradient", "random"], ["update", "random"]],
    "evaluation": ["loop", "vmap"],
    "num_rays": [0, 0, 1],
    "plane_points": [3],
    "line_points": [3],
    "vectors": ["zero", "entry"],
}


def chosen(source, *tables):
    return {name: source.choice(values) for table in tables for name, values in table.items()}


def pairing(number):
    """Return a module class, the Trainer's settings and callbacks, and monitors, by a number."""
    source = random.Random(number)
    hooks = {name: source.choice(HOOKS[name]) for name in source.sample(sorted(HOOKS), 3)}
    kind = source.choice(MODULES)
    logger = source.choice([None, CSVLogger, TensorBoardLogger])
    settings = {
        "optimizer": source.choice(["adam", "sgd"]),
        "frozen_norm": source.random() < 0.3,
    }
    made = type(kind.__name__, (kind,), hooks)
    trainer, callbacks = source.choice(TRAINER), source.choice(CALLBACKS)
    if "accumulate_grad_batches" in trainer:
        callbacks = CALLBACKS[source.randrange(4)]
    if logger is None and callbacks is CALLBACKS[1]:
        callbacks = CALLBACKS[0]
    watched = []
    which = source.choice(["hessian", "slices", "both", "both"])
    first = source.random() < 0.5
    if which != "slices":
        watched.append((HessianMonitor, chosen(source, COMMON, HESSIAN)))
    if which != "hessian":
        watched.append((LossLandscapeMonitor, chosen(source, COMMON, SLICES)))
    return made, settings, trainer, callbacks, logger, watched, first


def run(folder, number, *, watch):
    kind, settings, more, callbacks, logger, watched, first = pairing(number)
    pl.seed_everything(number, verbose=False)
    module = kind(**settings)
    monitors = [make(**given) for make, given in watched] if watch else []
    own = [*callbacks(folder), Order()]
    trainer = quiet_trainer(
        folder,
        [*monitors, *own] if first else [*own, *monitors],
        **{"max_epochs": 2, "logger": logger(folder) if logger else False,
           "enable_checkpointing": callbacks is CALLBACKS[2], **more},
    )  # fmt: skip
    train = loader(12, shuffle="overfit_batches" not in more)
    if more.get("precision") == "64-true":
        module.double()
    trainer.fit(module, train, loader(4))
    found = outcome(trainer) if logger is TensorBoardLogger else without_files(trainer)
    # A callback's own state holds the monitors' names and the checkpoint's path.
    return found, monitors


def without_files(trainer):
    kept, trainer._loggers = trainer._loggers, []
    try:
        return outcome(trainer)
    finally:
        trainer._loggers = kept


@pytest.mark.parametrize("number", NUMBERS)
def test_a_run_with_monitors_is_bitwise_the_run_without(tmp_path, number):
    with warnings.catch_warnings(record=True) as caught:
        # What does not fit together is a gap, which says so; here it is about the run.
        warnings.simplefilter("always")
        try:
            without, _ = run(tmp_path / "without", number, watch=False)
        except RuntimeError as error:
            pytest.skip(f"this does not train without monitors either: {error}")
        found, monitors = run(tmp_path / "with", number, watch=True)
    assert differences(without, found) == [], pairing(number)
    gaps = [str(w.message) for w in caught if "leaves a gap" in str(w.message)]
    # What concerns both is told once.
    assert gaps or all(monitor.history for monitor in monitors), pairing(number)

"""Tiny networks, data and helpers that the tests of the callback share."""

import random

import lightning.pytorch as lightning_pl
import numpy as np
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lla_callbacks import HessianMonitor

# Small enough that a measurement takes milliseconds.
CHEAP = {"num_steps": 3, "num_probes": 2, "num_samples": 4, "figures": False}


def data(size=16):
    """Return samples with their index, so that the order in which they come is seen."""
    source = torch.Generator().manual_seed(7)
    x = torch.randn(size, 3, generator=source)
    return TensorDataset(x, (x.sum(1) > 0).long(), torch.arange(size))


def loader(size=16, **settings):
    return DataLoader(data(size), **{"batch_size": 4, **settings})


def small_net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def plain_loss(module, batch) -> torch.Tensor:  # the command line asks for the annotation
    return cross_entropy(module.net(batch[0]), batch[1])


def predictions(module, batch) -> tuple[torch.Tensor, torch.Tensor]:
    return module.net(batch[0]), batch[1]


class _PlainParts:
    """The body of a module of either namespace."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.lr = lr
        self.net = small_net()

    def training_step(self, batch, batch_idx):
        loss = plain_loss(self, batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class _EvaluatedParts(_PlainParts):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", plain_loss(self, batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", plain_loss(self, batch))


class Plain(_PlainParts, pl.LightningModule):
    """A module of ``pytorch_lightning``."""


class PlainOfLightning(_PlainParts, lightning_pl.LightningModule):
    """The same module of ``lightning.pytorch``."""


class Evaluated(_EvaluatedParts, pl.LightningModule):
    """A module of ``pytorch_lightning`` that validates and tests."""


class EvaluatedOfLightning(_EvaluatedParts, lightning_pl.LightningModule):
    """The same module of ``lightning.pytorch``."""


class _DataParts:
    def train_dataloader(self):
        return loader()


class Data(_DataParts, pl.LightningDataModule):
    """Data of ``pytorch_lightning``."""


class DataOfLightning(_DataParts, lightning_pl.LightningDataModule):
    """The same data of ``lightning.pytorch``."""


class Stateful(pl.LightningModule):
    """A training step that touches every kind of state that a measurement could disturb."""

    def __init__(self, optimizer="adam", frozen_norm=False):
        super().__init__()
        self.optimizer = optimizer
        self.frozen_norm = frozen_norm
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 2)
        )
        self.accuracy = MulticlassAccuracy(2)
        self.collection = MetricCollection(
            {"f1": MulticlassF1Score(2), "recent": MulticlassAccuracy(2, average="micro")}
        )
        self.losses = CatMetric()
        self.seen = []
        self.calls = 0
        self.ema = torch.zeros(())

    def on_train_epoch_start(self):
        if self.frozen_norm:
            self.net[1].eval()

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.calls += 1
        self.seen.append(index.tolist())
        noise = torch.randn_like(x) + float(np.random.randn()) + random.random()
        logits = self.net(x + 0.1 * noise)
        # The counter and the average change the loss, so that a lost update is seen.
        loss = cross_entropy(logits, y) * (1 + 0.01 * self.calls) + 0.01 * self.ema
        self.ema = 0.9 * self.ema + 0.1 * loss.detach()
        self.losses.update(loss.detach())
        self.accuracy(logits, y)
        self.collection(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.collection, on_step=True, on_epoch=True)
        self.log("ema", self.ema)
        if self.logger is not None:
            self.logger.experiment.add_scalar("direct", self.calls, self.calls)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), 0.05)
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Order(pl.Callback):
    """Notes which samples training gets, outside of the module."""

    def __init__(self):
        self.indices = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if isinstance(batch, list) and len(batch) == 3:
            self.indices.append(batch[2].tolist())


def quiet_trainer(folder, callbacks=(), namespace=pl, **settings):
    """Return a Trainer that writes below a folder and prints nothing."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        "callbacks": callbacks,
    }
    return namespace.Trainer(**{**defaults, **settings})


def fit(folder, monitor=None, make_module=Plain, train=None, val=None, callbacks=(), **settings):
    """Train from a fixed seed and return the Trainer."""
    pl.seed_everything(3, verbose=False)
    module = make_module()
    callbacks = [*callbacks, *([] if monitor is None else [monitor])]
    trainer = quiet_trainer(folder, callbacks, **settings)
    trainer.fit(module, loader() if train is None else train(), None if val is None else val())
    return trainer


def steps(monitor):
    """Return the optimizer steps at which a monitor measured."""
    return [step for step, _ in monitor.history]


def events(folder):
    """Read an event file back, with everything that was written."""
    accumulator = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(accumulator):
    """Return tag to pairs of step and value."""
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def outcome(trainer):
    """Return everything that a training run leaves behind, save what the monitor wrote."""
    module = trainer.lightning_module
    attributes = ("seen", "calls", "ema")
    found = {
        "state": module.state_dict(),
        "gradients": {n: p.grad for n, p in module.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "attributes": {name: getattr(module, name, None) for name in attributes},
        "names": sorted(module.__dict__),
        "modes": {name: m.training for name, m in module.named_modules()},
        "metrics": {
            name: {state: getattr(m, state) for state in m._defaults}
            for name, m in module.named_modules()
            if hasattr(m, "_defaults")
        },
        "callback_metrics": _not_ours(trainer.callback_metrics),
        "logged_metrics": _not_ours(trainer.logged_metrics),
        "progress_bar_metrics": _not_ours(trainer.progress_bar_metrics),
        "loops": trainer.fit_loop.state_dict(),
        "order": [c.indices for c in trainer.callbacks if isinstance(c, Order)],
        "global_step": trainer.global_step,
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }
    if trainer.logger is not None:
        trainer.logger.finalize("success")
        found["scalars"] = _not_ours(scalars(events(trainer.logger.log_dir)))
    return found


def _not_ours(values):
    ours = ("hessian", "landscape", "zz_hessian", "zz_landscape")
    return {tag: value for tag, value in values.items() if not tag.startswith(ours)}


def differences(a, b):
    """Return the paths at which two nested structures differ in at least one bit."""
    one, other = dict(_leaves(a)), dict(_leaves(b))
    paths = [*one, *(path for path in other if path not in one)]
    return [path for path in paths if one.get(path, "absent") != other.get(path, "absent")]


def _leaves(value, path=""):
    if isinstance(value, dict):
        yield path, sorted(map(str, value))
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        yield path, len(value)
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}/{i}")
    elif isinstance(value, torch.Tensor):
        # Bytes, so that NaN equals NaN and 0.0 differs from -0.0.
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield path, (str(value.dtype), tuple(value.shape), bits)
    elif isinstance(value, np.ndarray):
        yield path, (str(value.dtype), value.shape, value.tobytes())
    elif isinstance(value, float):
        yield path, value.hex()
    else:
        yield path, value


def monitor(**settings):
    """Return a monitor whose measurements are cheap, by default after every epoch."""
    if not {"every_n_epochs", "every_n_train_steps", "max_overhead"} & settings.keys():
        settings = {"every_n_epochs": 1, **settings}
    return HessianMonitor(**{**CHEAP, **settings})

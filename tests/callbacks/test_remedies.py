"""Every remedy that a monitor's warning or a refusal gives is tried in a Trainer."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn.functional import kl_div, nll_loss
from torch.utils.data import DataLoader

from lla_callbacks import HessianTraceRegularizer, LossLandscapeMonitor, PoisonedLoss
from lla_callbacks.callbacks import sink

from .modules import Plain, data, fit, loader, monitor, plain_loss, steps
from .test_failures import Manual, OnTables, Table
from .test_own_loader import Open


class Unrepeatable(Plain):
    """Its step cannot be replayed: it asks what only training knows."""

    def training_step(self, batch, batch_idx):
        if "log" in self.__dict__:  # muted, as in a replay
            raise KeyError("asks for something")
        return plain_loss(self, batch)


class Calling(Plain):
    """Starts another program at each step."""

    def training_step(self, batch, batch_idx):
        os.system(":")
        return plain_loss(self, batch)


class CallingLater(Plain):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        os.system(":")


class Greedy(Plain):
    """More than two samples beside training are more than there is memory for."""

    def training_step(self, batch, batch_idx):
        if "log" in self.__dict__ and len(batch[0]) > 2:
            raise MemoryError("as ordered")
        return plain_loss(self, batch)


class Refusing(CSVLogger):
    """Raises when it is given what a monitor measured."""

    error: Exception = OSError(errno.ENOSPC, "No space left on device")

    def log_metrics(self, metrics, step=None):
        if self.error is not None and any(tag.startswith("hessian") for tag in metrics):
            raise self.error


class WithoutFigures(TensorBoardLogger):
    """Its writer has no place for some things."""

    refused = "add_image"

    @property
    def experiment(self):
        writer = super().experiment
        setattr(writer, self.refused, self.refuse)
        return writer

    @staticmethod
    def refuse(*args, **kwargs):
        raise KeyError("no room")


class WithoutCharts(WithoutFigures):
    refused = "add_custom_scalars"


def failing(path: str, module: nn.Module) -> bool:
    raise KeyError(path)


def tables() -> DataLoader:
    return loader(collate_fn=Table.collate)


def raising() -> Any:
    raise KeyError("no batches")
    yield


class Divergent(Plain):
    def training_step(self, batch, batch_idx):
        return kl_div(self.net(batch[0]).log_softmax(1), self.net(batch[0]).softmax(1))


class Labelled(Plain):
    def training_step(self, batch, batch_idx):
        return nll_loss(self.net(batch[0]).log_softmax(1), batch[1])


class Bounded(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


class Dense(Plain):
    def __init__(self, sparse=False):
        super().__init__()
        self.table = nn.Embedding(3, 2, sparse=sparse)


class Sparse(Dense):
    def __init__(self):
        super().__init__(sparse=True)


Settings = dict[str, Any]
OPEN = Open()
# What fails, of which module and with which settings; what is said; and what mends it: "make",
# "train" and settings of the Trainer, and of the callback.
MONITORS: dict[str, tuple[Settings, str, dict[str, Settings]]] = {
    "step that cannot be replayed": (
        {"make": Unrepeatable},
        "Give loss=callable(module, batch) if the training step cannot be replayed here.",
        {"loss": {"loss": plain_loss}},
    ),
    "step that starts a program": (
        {"make": Calling},
        "Move that to a hook that is not replayed, such as on_train_batch_end, or give loss=",
        {"hook": {"make": CallingLater}, "loss": {"loss": plain_loss}},
    ),
    "memory": (
        {"make": Greedy},
        "Give dataloader= with smaller batches, or lower num_samples",
        {"dataloader": {"dataloader": loader(batch_size=2)}},
    ),
    "layers": (
        {"layers": failing},
        "Mend the function that was given",
        {"mended": {"layers": lambda path, module: True}},
    ),
    "batch": (
        {"make": OnTables, "train": tables},
        "Give dataloader= with batches of tensors in plain containers.",
        {"dataloader": {"dataloader": loader(), "loss": plain_loss}},
    ),
    "loader": (
        {"dataloader": raising()},
        "Mend the dataloader, or leave it out to hold training batches.",
        {"mended": {"dataloader": loader()}, "left out": {"dataloader": None}},
    ),
    "figures": (
        {"logger": WithoutFigures, "figures": True},
        "Set figures=False to do without.",
        {"figures": {"figures": False}},
    ),
    "charts": (
        {"logger": WithoutCharts},
        "Set custom_scalars=False to do without.",
        {"charts": {"custom_scalars": False}},
    ),
    "disk": ({"logger": Refusing}, "Free disk space.", {"freed": {"logger": CSVLogger}}),
    "run that ended early": (
        {"eig_rtol": 0.9, "num_steps": 12},
        "Leave out eig_rtol for them.",
        {"left out": {"eig_rtol": None}},
    ),
    "names": (
        {"beside": lambda: LossLandscapeMonitor(name="hessian", every_n_epochs=1)},
        "give one of them another name=",
        {"name": {"name": "other"}},
    ),
    "manual optimization": ({"make": Manual}, "loss=loss", {"loss": {"loss": plain_loss}}),
    "shared loader": (
        {"train": lambda: DataLoader(OPEN, 4), "dataloader": DataLoader(OPEN, 4)},
        "Give dataloader= a loader with a dataset of its own, or a list of batches.",
        {
            "own": {"dataloader": DataLoader(Open(), 4)},
            "list": {"dataloader": list(DataLoader(data(), 4))},
        },
    ),
}


def run(folder: Any, make_callback: Callable[..., Any], settings: Settings) -> tuple[Any, str]:
    """Train for two steps; return the callback and all that was said."""
    settings = dict(settings)
    logger, beside = settings.pop("logger", None), settings.pop("beside", None)
    make, train = settings.pop("make", Plain), settings.pop("train", loader)
    trained = {k: settings.pop(k) for k in ("precision",) if k in settings}
    callback = make_callback(**settings)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(
                folder, callback, make, train, limit_train_batches=2,
                logger=logger(folder) if logger else False,
                callbacks=[beside()] if beside else [], **trained,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a refusal
            said.append(str(error))
    ours = type(callback).__name__
    return callback, " ".join(said + [str(w.message) for w in caught if ours in str(w.message)])


@pytest.mark.parametrize("name", MONITORS)
def test_what_a_warning_says_to_do_ends_in_measurements(tmp_path, name):
    wrong, remedy, mended = MONITORS[name]
    said = run(tmp_path / "wrong", monitor, wrong)[1]
    assert remedy in said
    # Of another trouble than this one.
    assert "float64" not in said
    for way, settings in mended.items():
        watcher, said = run(tmp_path / way, monitor, {**wrong, **settings})
        assert (said, steps(watcher)) == ("", [0, 2]), way


OTHERS: dict[str, tuple[Callable[..., Any], Settings, str, list[Settings]]] = {
    "several evaluations": (
        HessianTraceRegularizer,
        {"make": Bounded},
        "Use a first-order optimizer",
        [{"make": Plain}],
    ),
    "coarse weights": (
        HessianTraceRegularizer,
        {"precision": "bf16-true"},
        "Train with precision='bf16-mixed'",
        [{"precision": "bf16-mixed"}],
    ),
    "sparse gradients": (
        HessianTraceRegularizer,
        {"make": Sparse},
        "Make it with sparse=False.",
        [{"make": Dense}],
    ),
    "poison that comes once": (
        PoisonedLoss,
        {"dataloader": iter(loader())},
        "give a DataLoader or a list of batches",
        [{"dataloader": loader()}, {"dataloader": list(loader())}],
    ),
    "nothing to reverse": (
        PoisonedLoss,
        {"make": Divergent, "dataloader": loader()},
        "Use cross_entropy of labels",
        [{"make": Labelled, "dataloader": loader()}],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_refusal_says_to_do_trains(tmp_path, name):
    kind, wrong, remedy, mended = OTHERS[name]

    def make(**settings: Any) -> Any:
        fixed = {"factor": 0.1} if kind is PoisonedLoss else {"strength": 1e-4}
        return kind(**fixed, **settings)

    try:
        said = run(tmp_path / "wrong", make, wrong)[1]
    except Exception as error:  # noqa: BLE001 - of the constructor
        said = str(error)
    assert remedy in said
    for number, settings in enumerate(mended):
        assert run(tmp_path / str(number), make, {**wrong, **settings})[1] == ""


# What is no advice, but says what is missing and when it comes back.
STATEMENTS = {"keeping weights", "the stability limit", "recording the path", "resuming",
              "storing the history", "keeping the state"}  # fmt: skip


def test_every_remedy_of_a_warning_is_tried():
    tried = [remedy for _, remedy, _ in MONITORS.values()]
    given = {what: text for what, text in sink.REMEDIES.items() if what not in STATEMENTS}
    # tests/callbacks/test_failures.py: a folder that cannot be written to.
    given.pop("saving arrays")
    assert [text for text in given.values() if not any(t in text for t in tried)] == []

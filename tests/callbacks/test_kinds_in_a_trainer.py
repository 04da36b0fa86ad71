"""Modules of several kinds inside a real Trainer, watched and unwatched alike."""

import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lla_callbacks import HessianMonitor
from tests.kinds import KINDS

from .modules import quiet_trainer

WATCHED = [
    "GPT-2, eager attention",
    "GPT-2, fused attention",
    "encoder layer",
    "compiled module",
    "compiled part",
    "checkpoints",
    "reentrant checkpoints",
    "LSTM",
    "embedding, sparse gradients",
    "weight norm, old form",
    "spectral norm, old form",
    "scripted module",
    "frozen and unused parameters",
]


class Wrapped(pl.LightningModule):
    """Trains any module of the list on a batch that is a dictionary or a pair."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.batches, self.loss = kind.build()
        self.own_loss = kind.name.startswith("GPT-2")

    def training_step(self, batch, batch_idx):
        if self.own_loss:
            return self.net(**batch).loss
        return self.loss(self.net, batch)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.05)

    def train_dataloader(self):
        return DataLoader(self.batches * 3, batch_size=None)


def trained(folder, module, callbacks):
    torch.manual_seed(3)
    trainer = quiet_trainer(folder, callbacks, max_epochs=1)
    with warnings.catch_warnings():
        # A compiler's and a scripter's own; the monitor's would be a failed measurement.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*HessianMonitor.*")
        trainer.fit(module)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def monitor():
    return HessianMonitor(every_n_train_steps=2, num_steps=3, num_probes=2, figures=False)


def compare(folder, make, tolerance=0.0):
    watcher = monitor()
    plain = trained(folder, make(), [])
    watched = trained(folder, make(), [watcher])
    assert plain.keys() == watched.keys()
    for name, value in plain.items():
        torch.testing.assert_close(watched[name], value, atol=tolerance, rtol=0, msg=name)
    assert watcher.report is not None
    assert math.isfinite(watcher.report.trace)
    assert watcher.report.trace != 0


@pytest.mark.parametrize("name", WATCHED)
def test_it_is_measured_and_trains_as_without(tmp_path, name):
    if name.startswith("GPT-2"):
        pytest.importorskip("transformers")
    (kind,) = [kind for kind in KINDS if kind.name == name]
    # Of the runs of a scripted module in one process, two unwatched ones differ by rounding.
    compare(tmp_path, lambda: Wrapped(kind), 1e-14 if name == "scripted module" else 0.0)


class Small(pl.LightningModule):
    # Nothing is logged: Lightning 2.6 and torch 2.13 fail on a compiled step that does.
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
        )

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self):
        source = torch.Generator().manual_seed(2)
        return DataLoader(
            [(torch.randn(4, generator=source), i % 3) for i in range(12)], batch_size=4
        )


def compiled_after(module):
    """Compile what is a part of a LightningModule already."""
    module.net.compile(backend="aot_eager")
    return module


@pytest.mark.parametrize(
    "change", [lambda module: torch.compile(module, backend="aot_eager"), compiled_after]
)
def test_a_compiled_lightning_module_is_measured(tmp_path, change):
    compare(tmp_path, lambda: change(Small()))

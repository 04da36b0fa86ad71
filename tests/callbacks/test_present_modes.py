"""Train and eval modes are those of the moment that is measured."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import HessianMonitor, measure_hessian

from .modules import loader

STEPS = 4


class Thawing(pl.LightningModule):
    """A batch norm that is frozen, or thawed, in the middle of training."""

    def __init__(self, frozen_first):
        super().__init__()
        torch.manual_seed(0)
        self.frozen_first = frozen_first
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def on_train_start(self):
        self.net[1].train(not self.frozen_first)

    def on_train_batch_start(self, batch, batch_idx):
        self.net[1].train((self.global_step < STEPS // 2) != self.frozen_first)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("frozen_first", [False, True])
def test_a_norm_that_is_frozen_or_thawed_later_is_measured_as_it_stands_now(tmp_path, frozen_first):
    monitor = HessianMonitor(
        every_n_train_steps=STEPS, num_steps=4, num_probes=4, num_samples=4, figures=False
    )
    module = Thawing(frozen_first)
    pl.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, callbacks=[monitor],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(module, loader())  # fmt: skip
    held = next(iter(loader()))
    by_mode = {
        # In eval mode only the norm differs from training here.
        mode: measure_hessian(
            module, [held], num_steps=4, num_probes=4, mode=mode,
            loss=lambda m, b: cross_entropy(m.net(b[0]), b[1]),
        ).trace
        for mode in ("batch", "eval")
    }  # fmt: skip
    frozen_now = not frozen_first
    assert by_mode["batch"] != pytest.approx(by_mode["eval"], rel=0.01)
    expected = by_mode["eval" if frozen_now else "batch"]
    assert monitor.history[-1][1].trace == pytest.approx(expected, rel=1e-4)

"""On which x axis curves stand, and which multiples of a schedule are met."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import LossLandscapeMonitor
from lla_callbacks.callbacks.schedule import Schedule

from .modules import differences, fit, monitor, outcome, small_net, steps


def first_loss(module, batch):
    return cross_entropy(module.net(batch[0]), batch[1])


class Two(pl.LightningModule):
    """Steps two optimizers at each batch, or the first one at every third only."""

    rarely = 1

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.critic = small_net(), nn.Linear(3, 1)

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.net, self.critic)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer, compute in (
            (second, lambda: self.critic(batch[0]).square().mean()),
            (first, lambda: first_loss(self, batch)),
        ):
            if optimizer is first and batch_idx % self.rarely:
                continue
            optimizer.zero_grad()
            loss = compute()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)


class Uneven(Two):
    rarely = 3


class Recorded(CSVLogger):
    """Notes the steps at which each tag is logged."""

    def __init__(self, folder):
        super().__init__(folder)
        self.at = {}

    def log_metrics(self, metrics, step=None):
        for tag in metrics:
            self.at.setdefault(tag, []).append(step)


@pytest.mark.parametrize("make_module", [Two, Uneven])
def test_curves_lie_over_those_of_the_step(tmp_path, make_module):
    logger = Recorded(tmp_path)
    watcher = monitor(every_n_train_steps=2, loss=first_loss)
    slices = LossLandscapeMonitor(
        every_n_train_steps=2, loss=first_loss, num_samples=4, planes=[], line_points=3,
        lines=["random", "update"], figures=False, evaluation="loop",
    )  # fmt: skip
    trainer = fit(tmp_path, watcher, make_module, callbacks=[slices], logger=logger, max_epochs=3)
    due = range(1, 13) if make_module is Two else (1, 3, 4, 5, 7, 8, 9, 11, 12)
    expected = [0, *due]
    # Weights after a batch's steps stand where the loss of the next batch does.
    assert logger.at["loss"] == list(range(12))
    assert logger.at["hessian/lambda_max"] == steps(watcher) == expected
    assert trainer.global_step == (24 if make_module is Two else 18)
    # The last update is that of one batch.
    assert [s for s, r in slices.history if "update" in r.lines] == [*due]


def test_a_multiple_that_was_jumped_over_is_met(tmp_path):
    watcher = monitor(every_n_train_steps=5, loss=first_loss)
    trainer = fit(tmp_path, watcher, Uneven, max_epochs=5)
    assert trainer.global_step == 30
    # Steps so far after each batch of an epoch: 2, 3, 4, 6.
    after, seen = [], 0
    for batch in range(20):
        now = seen + (1 if batch % 4 % 3 else 2)
        if now // 5 > seen // 5:
            after.append(batch + 1)
        seen = now
    assert steps(watcher) == [0, *after]
    assert differences(outcome(fit(tmp_path, None, Uneven, max_epochs=5)), outcome(trainer)) == []


@pytest.mark.parametrize(
    ("before", "now", "due"),
    [(4, 6, True), (5, 6, False), (4, 5, True), (3, 4, False), (4, 16, True)],
)
def test_a_schedule_counts_what_lies_between(before, now, due):
    assert Schedule(5).after_step(now, before) is due

"""A logger that lets the run wait is paid for by whoever made it wait."""

from __future__ import annotations

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from lla_callbacks import HessianMonitor

from .modules import steps
from .test_account import PRICE, clock, costly, overhead_of, watch

__all__ = ["clock"]


class Blocking(TensorBoardLogger):
    """Takes a while for whatever a monitor hands it, as a server far away."""

    def __init__(self, folder, clock, seconds):
        super().__init__(folder)
        self.clock, self.wait, self.waited = clock, seconds, 0.0

    def block(self):
        self.clock.now += self.wait
        self.waited += self.wait

    def log_metrics(self, metrics, step=None):
        if any(tag.startswith(("hessian", "landscape")) for tag in metrics):
            self.block()
        super().log_metrics(metrics, step)


def test_a_logger_that_blocks_is_booked_and_planned_around(tmp_path, clock):
    found = {}
    for seconds in (0.0, 2.0):
        watcher = HessianMonitor(loss=costly(clock, 0.01 * PRICE), figures=False)
        logger = Blocking(tmp_path / str(seconds), clock, seconds)
        _, ticking = watch(clock, tmp_path, watcher, train=200, logger=logger)
        account = watcher.account
        # Training is what its batches take: nothing of the waiting is taken for training.
        assert account.training == pytest.approx(200, abs=1)
        assert account.total >= logger.waited >= seconds * len(steps(watcher))
        found[seconds] = overhead_of(watcher, ticking=ticking), len(steps(watcher))
    assert found[0.0][0] <= 0.05
    assert found[0.0][1] == 10
    # That it blocks is known after the first time, so that fewer measurements follow.
    assert found[2.0][0] <= 0.05 + 2 / 200
    assert found[2.0][1] <= 6

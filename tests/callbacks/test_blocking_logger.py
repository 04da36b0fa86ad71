"""A logger that lets the run wait is paid for by whoever made it wait."""

from __future__ import annotations

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from .modules import steps
from .test_account import PRICE, clock, overhead_of, pair, watch

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

    @property
    def experiment(self):
        writer = super().experiment
        if not hasattr(writer, "draws"):
            writer.draws = writer.add_figure
            writer.add_figure = lambda *args, **kw: (self.block(), writer.draws(*args, **kw))
        return writer


@pytest.mark.parametrize("figures", [False, True])
def test_a_logger_that_blocks_is_booked_and_measured_around(tmp_path, clock, figures):
    found = {}
    for seconds in (0.0, 3.0):
        monitors = pair(clock, 0.01 * PRICE)
        for watcher in monitors:
            watcher.figures = watcher.sink.figures = figures
        logger = Blocking(tmp_path / str(seconds), clock, seconds)
        _, ticking = watch(clock, tmp_path, *monitors, train=400, logger=logger)
        assert monitors[0].account.total >= logger.waited
        found[seconds] = overhead_of(*monitors, ticking=ticking), len(steps(monitors[0]))
        # Training takes what its batches do: nothing of the waiting is taken for training.
        assert monitors[0].account.training == pytest.approx(400, abs=2)
    assert found[0.0][0] <= 0.05
    # What a logger takes is known once it was seen: two pictures and two rows of numbers.
    assert found[3.0][0] <= 0.05 + (2 + 2 * figures) * 3.0 / 400
    assert found[3.0][1] < found[0.0][1]

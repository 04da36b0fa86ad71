"""A replayed step is told the number that its batch had in training."""

import pytest
import pytorch_lightning as pl
from torch.nn.functional import cross_entropy

from lla_callbacks import HessianMonitor, LossLandscapeMonitor, measure_hessian

from .modules import Plain, loader, quiet_trainer

HELD = 8


class Numbered(Plain):
    """Weighs a batch by its number."""

    def training_step(self, batch, batch_idx):
        return (1 + batch_idx) * cross_entropy(self.net(batch[0]), batch[1])


def expected(module, numbers):
    """Return what is right: the same loss, with numbers that are part of the batches."""
    batches = list(zip(loader(), numbers, strict=False))
    return measure_hessian(
        module, batches, num_steps=4, num_probes=4,
        loss=lambda m, b: (1 + b[1]) * cross_entropy(m.net(b[0][0]), b[0][1]),
    )  # fmt: skip


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_each_held_batch_is_replayed_with_its_own_number(tmp_path, microbatch_size):
    sizes = {"num_samples": HELD, "figures": False, "microbatch_size": microbatch_size}
    sizes["every_n_epochs"] = 1
    watchers = [
        HessianMonitor(num_steps=4, num_probes=4, **sizes),
        LossLandscapeMonitor(
            planes=[], lines=["random"], line_points=5, evaluation="loop", **sizes
        ),
    ]
    pl.seed_everything(0, verbose=False)
    module = Numbered()
    trainer = quiet_trainer(tmp_path, watchers, max_steps=4, logger=False)
    trainer.fit(module, loader())
    right = expected(module, [0, 1])
    hessian, slices = (watcher.history[-1][1] for watcher in watchers)
    assert hessian.loss == pytest.approx(right.loss, rel=1e-5)
    assert slices.loss == pytest.approx(right.loss, rel=1e-5)
    assert hessian.trace == pytest.approx(right.trace, rel=1e-4)
    # Which is not what one number for all would give.
    assert right.loss != pytest.approx(expected(module, [0, 0]).loss, rel=0.05)

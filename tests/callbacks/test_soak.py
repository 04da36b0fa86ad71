"""Hundreds of measurements in one run leave nothing behind, and the last equals a fresh one."""

import gc
import os
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lla_callbacks import LossLandscapeMonitor, measure_hessian

from .modules import CHEAP, Plain, loader, monitor, plain_loss, quiet_trainer, steps

FIRINGS = 200


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tensors_in(value):
    """Yield the tensors of a report or a list of them, and those that they are views of."""
    if isinstance(value, torch.Tensor):
        yield value
        yield from () if value._base is None else (value._base,)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


class Held(pl.Callback):
    """Counts what could be left behind, early and late; reports are kept on purpose."""

    def __init__(self, *monitors):
        self.monitors = monitors
        self.counts, self.memory = {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        # Steps after which the same monitor has measured, and what it lends the others is there.
        if trainer.global_step in (FIRINGS // 4 + 2, FIRINGS - 8):
            gc.collect()
            objects = gc.get_objects()
            hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            self.memory[trainer.global_step] = resident()
            self.counts[trainer.global_step] = {
                "tensors": len(
                    {id(o) for o in objects if issubclass(type(o), torch.Tensor)}
                    - {id(t) for m in self.monitors for t in tensors_in(m.history)}
                ),
                "figures": sum(issubclass(type(o), Figure) for o in objects),
                "files": len(os.listdir("/proc/self/fd")),
                "hooks": sum(len(getattr(m, h)) for m in pl_module.modules() for h in hooks),
                "filters": len(warnings.filters),
                "attributes": len(pl_module.__dict__),
            }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts files as Linux does")
def test_two_hundred_measurements_leave_nothing_behind(tmp_path):
    every = monitor(every_n_train_steps=1)
    drawn = monitor(every_n_train_steps=FIRINGS // 4, figures=True, name="drawn")
    slices = LossLandscapeMonitor(
        every_n_train_steps=10, planes=["random"], lines=["top1"], plane_points=3, line_points=5,
        num_samples=4, figures=False,
    )  # fmt: skip
    held = Held(every, drawn, slices)
    loggers = [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")]
    trainer = quiet_trainer(
        tmp_path, [every, drawn, slices, held], max_steps=FIRINGS, max_epochs=-1, logger=loggers
    )
    torch.manual_seed(3)
    module = Plain()
    trainer.fit(module, loader())
    assert steps(every) == [*range(FIRINGS + 1)]
    (early, first), (late, last) = held.counts.items()
    assert first == last
    # Reports, and what the allocator and the loggers keep.
    assert held.memory[late] - held.memory[early] < 24 * 2**20
    # The last measurement is that of the same weights by themselves.
    direct = measure_hessian(
        module, [next(iter(loader()))], loss=plain_loss,
        num_steps=CHEAP["num_steps"], num_probes=CHEAP["num_probes"],
    )  # fmt: skip
    report = every.history[-1][1]
    assert (report.loss, report.trace, report.lambda_max) == (
        direct.loss, direct.trace, direct.lambda_max,
    )  # fmt: skip

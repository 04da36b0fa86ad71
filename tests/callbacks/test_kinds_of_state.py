"""Whatever a training step touches is as it was after a measurement, or named in a warning."""

import argparse
import re
import types
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from lla_callbacks import HessianMonitor, LossLandscapeMonitor

from .kinds_of_state import KINDS, Box, Counted, Module, Record, Slotted, Tally
from .modules import CHEAP, data, differences, fit, outcome, steps

MONITORS = [
    lambda: HessianMonitor(**CHEAP, every_n_train_steps=2, save_arrays=False),
    lambda: LossLandscapeMonitor(
        every_n_train_steps=2, planes=[], lines=["random"], line_points=3, num_samples=4,
        figures=False, save_arrays=False, evaluation="loop",
    ),
]  # fmt: skip


def left(trainer):
    """Return what a run leaves behind, the state of the kind included."""
    found = outcome(trainer)
    module = trainer.lightning_module
    found["own"] = {k: described(v) for k, v in vars(module).items() if k in ("s", "seen", "n")}
    found["stopped"] = trainer.should_stop
    found["rates"] = [g["lr"] for o in trainer.optimizers for g in o.param_groups]
    found["hooks"] = {n: len(m._forward_hooks) for n, m in module.named_modules()}
    found["parts"] = [n for n, _ in module.named_modules()]
    found["tallies"] = [c.n for c in trainer.callbacks if isinstance(c, Tally)]
    found["class"] = (Module.count, len(Module.history), Counted.total, len(Counted.seen))
    if trainer.datamodule is not None:
        found["drawn"] = (len(trainer.datamodule.drawn), trainer.datamodule.scale)
    return found


def described(value):
    if isinstance(value, (Box, Slotted, Record, argparse.Namespace, types.SimpleNamespace)):
        found = {k: getattr(value, k) for k in dir(value) if k[:1] != "_" and k != "one"}
        return {k: described(v) for k, v in found.items() if not callable(v)}
    if isinstance(value, (list, tuple)):
        return [described(v) for v in value]
    return value if isinstance(value, (int, float, str, bytes, torch.Tensor, bytearray)) else 0


def trained(folder, kind, watchers):
    """Train with these callbacks and return what is left behind, and the warnings."""
    Module.count, Counted.total = 0, 0
    Module.history.clear()
    Counted.seen.clear()
    settings = dict(kind.settings)
    callbacks = [make() for make in settings.pop("callbacks", [])] + watchers
    if "logger" in settings:
        settings["logger"] = settings["logger"](folder, name="logs", version=str(len(watchers)))
    make = kind.data or (lambda: DataLoader(data(), 4))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer = fit(folder, None, lambda: Module(kind), make, callbacks=callbacks, **settings)
    if trainer.logger is not None:
        trainer.loggers = []
    return left(trainer), [str(w.message) for w in record]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_touches_it_trains_as_without_monitors(tmp_path, name):
    without, _ = trained(tmp_path, KINDS[name], [])
    monitors = [make() for make in MONITORS]
    found, said = trained(tmp_path, KINDS[name], monitors)
    assert differences(without, found) == []
    ours = [m for m in said if "Monitor: " in m]
    if KINDS[name].refused:
        # Once for both monitors.
        assert len(ours) == 1
        pattern = rf"the step uses {KINDS[name].refused}.*loss=callable"
        assert all(re.search(pattern, m) for m in ours)
        assert [steps(m) for m in monitors] == [[], []]
    else:
        assert ours == []
        assert [steps(m) for m in monitors] == [[0, 2, 4], [0, 2, 4]]

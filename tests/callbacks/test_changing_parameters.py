"""Lazy layers, and parameters that are unfrozen in mid-run."""

import pytest
import torch
from pytorch_lightning.callbacks import BaseFinetuning
from torch import nn

from lla_callbacks import HessianTraceRegularizer, LossLandscapeMonitor

from .modules import Plain, differences, fit, monitor, outcome, steps


class Lazy(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def landscape(**settings):
    cheap = {
        "plane_points": 3, "line_points": 3, "num_samples": 4, "figures": False,
        "planes": ["trajectory"], "lines": ["random", "update"], "evaluation": "loop",
    }  # fmt: skip
    return LossLandscapeMonitor(**{**cheap, **settings})


@pytest.mark.parametrize("samples", [4, 12])
@pytest.mark.parametrize("make", [monitor, landscape])
def test_lazy_layers_are_measured_once_they_have_a_size(tmp_path, make, samples, recwarn):
    watcher = make(every_n_train_steps=2, num_samples=samples)
    trainer = fit(tmp_path, watcher, Lazy, max_epochs=2)
    assert steps(watcher) == ([2, 4, 6, 8] if samples == 4 else [4, 6, 8])
    assert [str(w.message) for w in recwarn if "Monitor" in str(w.message)] == []
    assert differences(outcome(fit(tmp_path, None, Lazy, max_epochs=2)), outcome(trainer)) == []


def test_layers_are_found_in_lazy_modules(tmp_path):
    watcher = monitor(every_n_train_steps=2, layers=["net.*"])
    fit(tmp_path, watcher, Lazy)
    assert [*watcher.history[0][1].layers] == ["net.0", "net.2"]


def test_lazy_layers_are_penalized_once_they_have_a_size(tmp_path):
    callback = HessianTraceRegularizer(1e-2, layers=["net.*"])
    trainer = fit(tmp_path, callback, Lazy, max_epochs=2)
    assert trainer.global_step == 8
    assert callback.comparison is not None
    plain = fit(tmp_path, None, Lazy, max_epochs=2)
    assert differences(outcome(plain)["state"], outcome(trainer)["state"])


class Thaw(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.05)


@pytest.mark.filterwarnings("ignore:.*does not require")
def test_a_path_begins_anew_where_others_are_trained(tmp_path, recwarn, capfd):
    watcher, spectrum = landscape(every_n_epochs=1), monitor(every_n_epochs=1)
    spectrum = monitor(every_n_epochs=1, track_every_n_train_steps=1)
    trainer = fit(tmp_path, watcher, callbacks=[Thaw(), spectrum], max_epochs=5)
    assert [str(w.message) for w in recwarn if "Monitor" in str(w.message)] == []
    assert [r.num_params for _, r in spectrum.history] == [10, 10, 10, 26, 26, 26]
    planes = {step: r.planes.get("trajectory") for step, r in watcher.history}
    assert planes[8].path.steps[0] == 0
    # Weights of the head alone are no points of a path of all.
    assert planes[20].path.steps[0] > 8
    plain = fit(tmp_path, None, callbacks=[Thaw()], max_epochs=5)
    assert differences(outcome(plain)["state"], outcome(trainer)["state"]) == []

"""Each private member of Lightning that is touched can go away."""

from types import SimpleNamespace

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch

from lla_callbacks import HessianMonitor
from lla_callbacks.callbacks.compat import adds_placeholder, own_hparams, prepared, step_of

from .modules import Data, Plain, loader, quiet_trainer


def hide(monkeypatch, owners, name):
    for owner in owners:
        for base in owner.__mro__:
            if name in vars(base):
                monkeypatch.delattr(base, name)


def test_a_monitor_keeps_its_state_key(monkeypatch):
    known = HessianMonitor(name="sharpness").state_key
    hide(monkeypatch, (pl.Callback, lightning_pl.Callback), "_generate_state_key")
    monitor = HessianMonitor(name="sharpness")
    assert not hasattr(monitor, "_generate_state_key")
    assert monitor.state_key == known == "HessianMonitor{'name': 'sharpness'}"


class Doubling(Plain):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [2 * batch[0], *batch[1:]]


class Tripling(Data):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [3 * batch[0], *batch[1:]]


@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`")
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("make_module", "make_data", "factor"),
    [(Plain, Data, 1), (Doubling, Data, 2), (Plain, Tripling, 3), (Doubling, Tripling, 3)],
)
def test_a_loader_goes_through_the_transfer_hooks(
    monkeypatch, tmp_path, hidden, make_module, make_data, factor
):
    seen = []

    class Looking(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            # Only here: the training loop itself calls what is hidden.
            with monkeypatch.context() as patch:
                if hidden:
                    hide(patch, (pl.LightningModule,), "_on_before_batch_transfer")
                assert hasattr(pl_module, "_on_before_batch_transfer") is not hidden
                batch = next(iter(loader()))
                seen.append((batch[0].clone(), prepared(trainer, pl_module, batch)[0]))

    trainer = quiet_trainer(tmp_path, [Looking()], max_steps=1)
    trainer.fit(make_module(), datamodule=make_data())
    [(plain, found)] = seen
    assert torch.equal(found, factor * plain)


@pytest.mark.parametrize(
    ("known", "present", "expected"),
    [
        ({}, (3, 3), 7),  # neither member: the Trainer's own count
        ({"_batches_that_stepped": 4}, (3, 3), 4),
        ({"_batches_that_stepped": 4}, (4, 3), 5),  # in the hooks at a batch's end
        ({"_batches_that_stepped": 4, "_should_accumulate": lambda: True}, (4, 3), 4),
    ],
)
def test_steps_are_those_that_loggers_count(known, present, expected):
    progress = SimpleNamespace(current=SimpleNamespace(processed=present[0], completed=present[1]))
    loop = SimpleNamespace(batch_progress=progress, **known)
    trainer = SimpleNamespace(global_step=7, fit_loop=SimpleNamespace(epoch_loop=loop))
    assert step_of(trainer) == expected


def test_hyperparameters_are_those_that_lightning_will_log():
    module = SimpleNamespace(
        _log_hyperparams=True, hparams_initial={"width": 3, "_class_path": "x"}
    )
    data = SimpleNamespace(_log_hyperparams=True, hparams_initial={"size": 2})
    assert own_hparams(SimpleNamespace(datamodule=data), module) == {"width": 3, "size": 2}
    module._log_hyperparams = False
    assert own_hparams(SimpleNamespace(), module) is None
    # Without the members nothing is taken for granted.
    assert own_hparams(SimpleNamespace(datamodule=None), SimpleNamespace()) is None
    assert not adds_placeholder(SimpleNamespace())
    assert adds_placeholder(SimpleNamespace(_default_hp_metric=True))

"""What people try, and the sentence that they get: as settings, when a fit starts, in a run."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import HessianMonitor, LossLandscapeMonitor

from .modules import Plain, fit, loader, monitor, plain_loss, quiet_trainer


def slices(**settings: Any) -> LossLandscapeMonitor:
    small = {"plane_points": 3, "line_points": 5, "evaluation": "loop", "num_samples": 4}
    return LossLandscapeMonitor(
        **{"planes": [], "lines": ["random"], "figures": False, "every_n_epochs": 1, **small,
           **settings}
    )  # fmt: skip


class WithAdam(Plain):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def ours(record: Any) -> list[str]:
    return [str(w.message) for w in record if "Monitor" in str(w.message)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_overhead": 5}, r"^max_overhead is 5; .*0\.05 for 5 %, at most 1"),
        ({"loss": nn.CrossEntropyLoss}, r"^loss is the class CrossEntropyLoss; give loss\(module"),
        ({"name": "../x"}, r"^name is '\.\./x'; give the first part of the tags .*without '/'"),
        ({"name": "a\x07b"}, r"^name is 'a\\x07b'; give .*or control characters"),
        ({"save_batches": "no"}, "^save_batches is 'no'; give True, False, or None"),
    ],
)
def test_a_slip_is_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    for kind in (HessianMonitor, LossLandscapeMonitor):
        with pytest.raises(ValueError, match=message) as caught:
            kind(**settings)
        assert str(caught.value).count("\n") == 0


def test_two_schedules_are_both_kept_and_that_is_said(tmp_path, caplog) -> None:
    watcher = monitor(every_n_epochs=1, every_n_train_steps=3)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, watcher, max_epochs=3)  # of four steps
    assert [step for step, _ in watcher.history] == [0, 3, 4, 6, 8, 9, 12]  # 12 once
    said = [r.message for r in caplog.records if "Both schedules are kept" in r.message]
    assert len(said) == 1
    assert "every 3 steps adds about" in said[0]
    assert "every epoch adds about" in said[0]


def test_moments_of_adam_without_adam_are_told_when_the_fit_starts(tmp_path, recwarn) -> None:
    watcher = slices(planes=["adam", "random"], lines=["adam_m", "random"])
    trainer = fit(tmp_path, watcher, max_epochs=2)
    assert trainer.global_step == 8
    assert ours(recwarn) == [
        "LossLandscapeMonitor: planes=['adam'], lines=['adam_m'] needs the moments of Adam, and "
        "SGD keeps none: left out. Give other directions, or train with Adam."
    ]
    assert set(watcher.report.slices) == {"plane_random", "line_random"}


def test_nothing_but_moments_of_adam_without_adam_is_told_once_too(tmp_path, recwarn) -> None:
    watcher = slices(planes=["adam"], lines=[])
    assert fit(tmp_path, watcher, max_epochs=2).global_step == 8
    (told,) = ours(recwarn)
    assert "planes=['adam'] needs the moments of Adam, and SGD keeps none" in told
    assert watcher.history == []
    assert watcher.report is None


def test_moments_of_adam_with_adam_are_there(tmp_path, recwarn) -> None:
    watcher = slices(planes=["adam"], lines=["adam_m"])
    fit(tmp_path, watcher, WithAdam, max_epochs=2)
    assert ours(recwarn) == []
    assert set(watcher.report.slices) == {"plane_adam", "line_adam_m"}


class Unrepeatable(Plain):
    """Its step cannot be replayed: it asks what only training knows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if "log" in self.__dict__:  # muted, as in a replay
            raise KeyError("asks for something")
        return plain_loss(self, batch)


def test_what_concerns_both_monitors_is_told_once(tmp_path, recwarn) -> None:
    fit(tmp_path, monitor(), Unrepeatable, callbacks=[slices()])
    told = ours(recwarn)
    assert len(told) == 1
    assert "a measurement failed and leaves a gap" in told[0]
    assert "Give loss=callable(module, batch)" in told[0]


def test_where_results_are_seen_is_told_once(tmp_path, caplog) -> None:
    from pytorch_lightning.loggers import TensorBoardLogger

    with caplog.at_level(logging.INFO):
        fit(tmp_path, monitor(figures=True), callbacks=[slices(figures=True)],
            logger=TensorBoardLogger(tmp_path))  # fmt: skip
    assert len([r for r in caplog.records if "to see it: tensorboard" in r.message]) == 1


@pytest.mark.parametrize("replayed", [True, False])
def test_a_loss_is_the_remedy_only_where_none_was_given(tmp_path, recwarn, replayed) -> None:
    def broken(module: Any, batch: Any) -> torch.Tensor:
        raise KeyError("asks for something")

    if replayed:
        fit(tmp_path, monitor(), Unrepeatable)
    else:
        fit(tmp_path, monitor(loss=broken))
    (told,) = ours(recwarn)
    assert ("Give loss=" in told) == replayed


class Once(torch.autograd.Function):
    """Has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def test_where_a_loss_was_given_another_one_is_asked_for(tmp_path, recwarn) -> None:
    def once(module: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(Once.apply(module.net(batch[0])), batch[1])

    fit(tmp_path, monitor(loss=once, engine="exact"))
    (told,) = ours(recwarn)
    assert "Give another loss=callable(module, batch) that avoids it" in told


def test_two_monitors_of_one_class_and_name_are_refused_by_lightning(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type"):
        quiet_trainer(tmp_path, [monitor(), monitor()])
    both = [monitor(name="train"), monitor(name="validation", dataloader=loader())]
    quiet_trainer(tmp_path, both).fit(Plain(), loader())
    assert all(math.isfinite(watcher.report.trace) for watcher in both)

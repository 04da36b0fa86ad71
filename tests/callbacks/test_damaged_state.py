"""Every entry of a real state, damaged in several ways: one warning and a fresh start, no more."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lla_callbacks import (
    HessianMonitor,
    HessianTraceRegularizer,
    LossLandscapeMonitor,
    PoisonedLoss,
)

from .modules import Plain, loader, quiet_trainer

MISSING = object()
EXTRA = "an entry that nobody knows"


def hessian() -> HessianMonitor:
    return HessianMonitor(
        every_n_train_steps=2, track_every_n_train_steps=1, num_steps=2, num_probes=2,
        num_samples=4, track_num_probes=2, figures=False,
    )  # fmt: skip


def landscape() -> LossLandscapeMonitor:
    return LossLandscapeMonitor(
        every_n_train_steps=2, plane_points=3, line_points=3, num_samples=4, figures=False,
        planes=["random", "trajectory"], lines=["update"], evaluation="loop",
    )  # fmt: skip


def regularizer() -> HessianTraceRegularizer:
    return HessianTraceRegularizer("auto")


def poison() -> PoisonedLoss:
    return PoisonedLoss(0.4, list(loader(8)))


MAKE: dict[str, Callable[[], Any]] = {
    "HessianMonitor": hessian,
    "LossLandscapeMonitor": landscape,
    "HessianTraceRegularizer": regularizer,
    "PoisonedLoss": poison,
}


def run(callback: Any, folder: Any, module: Any = None, steps: int = 3, **more: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    settings = {
        "max_steps": steps,
        "max_epochs": 2,
        "logger": False,
        "log_every_n_steps": 1,
        **more,
    }
    trainer = quiet_trainer(folder, [callback], **settings)
    trainer.fit(module or Plain(), loader())
    return trainer


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a state in the middle of a run, as checkpoints have it, by name of the callback."""
    found = {}
    for name, make in MAKE.items():

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == 3:
                    found[name] = copy.deepcopy(trainer.callbacks[0].state_dict())  # noqa: B023

        pl.seed_everything(0, verbose=False)
        folder = tmp_path_factory.mktemp("state")
        trainer = quiet_trainer(
            folder, [make(), Keep()], max_steps=4, logger=False, log_every_n_steps=1
        )
        trainer.fit(Plain(), loader())
    return found


def entries(state: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every entry of nested containers; of a list's entries, the first."""
    items: list[tuple[Any, Any]] = []
    if isinstance(state, dict):
        items = list(state.items())
    elif isinstance(state, (list, tuple)):
        items = list(enumerate(state))[:1]
    for key, value in items:
        yield (*at, key)
        yield from entries(value, (*at, key))


def at(state: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        state = state[key]
    return state


def put(state: Any, way: tuple[Any, ...], value: Any) -> Any:
    """Return a state in which one entry is another."""
    if not way:
        return value
    key, *rest = way
    inner = state[key]
    changed = dict(state) if isinstance(state, dict) else list(state)
    if value is MISSING and not rest:
        del changed[key]
    else:
        changed[key] = put(inner, tuple(rest), value)
    return tuple(changed) if isinstance(state, tuple) else changed


def damages(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"missing": MISSING, "None": None, "text": "x", "number": 7.5,
                             "list": [[]], "tensor": torch.ones(2, 2, 2)}  # fmt: skip
    if isinstance(value, Tensor):
        found["other shape"] = torch.cat([value.reshape(-1), value.reshape(-1)])
        found["of text"] = ["x"] * 3
    if isinstance(value, dict):
        found["extra"] = {**value, EXTRA: 1}
        found["empty"] = {}
    if isinstance(value, (bool, int)):
        found["huge"] = 10**30
    return found


def cases(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for way in entries(state):
        every = damages(at(state, way))
        if len(way) > 4:  # inside of a report: what a field can be, and how long
            every = {k: v for k, v in every.items() if k in ("None", "text", "other shape")}
        for kind, value in every.items():
            yield f"{'/'.join(map(str, way))}: {kind}", put(state, way, value)
    for kind, whole in {"None": None, "text": "x", "empty": {}, "list": [1]}.items():
        yield f"everything: {kind}", whole


def visible(callback: Any) -> str:
    """Return what a callback knows of its past, as text."""
    if isinstance(callback, HessianTraceRegularizer):
        return repr((callback.skipped, callback.comparison, callback._found.state()))
    if isinstance(callback, PoisonedLoss):
        return repr((callback.num_steps, callback.skipped, callback._position))
    return repr(
        (callback.history, callback.subject.held.batches, callback.subject.start,
         callback.timing.due, callback.timing.last_step, callback.timing.last_epoch,
         callback.record.state())
    )  # fmt: skip


def resumed(callback: Any, state: Any, trainer: Any, module: Any) -> list[str]:
    """Hand a state over as Lightning does, up to the start of training; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback.setup(trainer, module, "fit")
        callback.load_state_dict(state)
        if not isinstance(callback, (HessianTraceRegularizer, PoisonedLoss)):
            callback._begin(trainer)
            callback.run.resume(trainer, module)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("name", MAKE)
def test_a_damaged_state_is_taken_whole_or_not_at_all(
    name: str, states: dict[str, Any], tmp_path: Any
) -> None:
    module = Plain()
    trainer = quiet_trainer(tmp_path, [], logger=False)
    trainer.strategy._lightning_module = module
    fresh = MAKE[name]()
    resumed(fresh, {}, trainer, module)
    before = visible(fresh)
    taken, wrong, count = [], [], 0
    for what, damaged in cases(states[name]):
        count += 1
        callback = MAKE[name]()
        try:
            said = resumed(callback, damaged, trainer, module)
        except Exception as error:  # noqa: BLE001 - which is what is tested
            wrong.append(f"{what} ends the run: {type(error).__name__}: {error}")
            continue
        if len(said) > 1:
            wrong.append(f"{what}: {len(said)} warnings: {said}")
        elif said and "with other settings" not in said[0] and visible(callback) != before:
            wrong.append(f"{what} is taken by half: {said[0]}")
        elif not said and damaged:
            taken.append((what, damaged))
    assert not wrong, "\n".join(wrong)
    assert count > (30 if name == "PoisonedLoss" else 40)
    # What is taken in silence must serve: a few of them to the end of a run.
    assert len(taken) < count / 3, [what for what, _ in taken]
    for what, damaged in taken[:: max(1, len(taken) // 4)]:
        callback = MAKE[name]()
        callback.load_state_dict(damaged)
        callback.setup = lambda *args, **more: None  # which would forget what was loaded
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(callback, tmp_path)
        said = [str(w.message) for w in caught if name in str(w.message)]
        assert len(said) <= 1, (what, said)


def test_a_sound_state_is_taken_without_a_word(states: dict[str, Any], tmp_path: Any) -> None:
    module = Plain()
    trainer = quiet_trainer(tmp_path, [], logger=False)
    trainer.strategy._lightning_module = module
    for name, make in MAKE.items():
        callback = make()
        assert resumed(callback, states[name], trainer, module) == []
        if hasattr(callback, "history"):
            assert [step for step, _ in callback.history] == [0, 2]


@pytest.mark.parametrize("precisions", [("32-true", "64-true"), ("64-true", "32-true")])
@pytest.mark.parametrize("name", ["HessianMonitor", "LossLandscapeMonitor"])
def test_a_run_that_goes_on_in_another_precision_measures(
    name: str, precisions: tuple[str, str], tmp_path: Any, recwarn: pytest.WarningsRecorder
) -> None:
    first, second = MAKE[name](), MAKE[name]()
    trainer = run(first, tmp_path, precision=precisions[0])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = quiet_trainer(
        tmp_path, [second], precision=precisions[1], max_steps=7, max_epochs=4, logger=False
    )
    trainer.fit(Plain(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert [str(w.message) for w in recwarn if name in str(w.message)] == []
    assert [step for step, _ in second.history] == [0, 2, 3, 4, 6, 7]

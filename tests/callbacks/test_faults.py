"""Faults injected one by one: the run ends in the bits of a run without monitor, or as it would."""

import errno
import signal
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from lla_callbacks import LossLandscapeMonitor

from .modules import (
    Order,
    Plain,
    Stateful,
    differences,
    fit,
    loader,
    monitor,
    outcome,
    plain_loss,
    quiet_trainer,
    steps,
)

TRAINING = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}


def landscape(**settings):
    cheap = {
        "plane_points": 3, "line_points": 5, "num_samples": 4, "figures": False,
        "planes": ["random"], "lines": ["top1"], "evaluation": "loop",
    }  # fmt: skip
    if not {"every_n_epochs", "every_n_train_steps"} & settings.keys():
        settings = {"every_n_epochs": 1, **settings}
    return LossLandscapeMonitor(**{**cheap, **settings})


MONITORS = pytest.mark.parametrize("make", [monitor, landscape])


def trained(folder, watcher=None, make_module=Stateful, **settings):
    return fit(
        folder, watcher, make_module, lambda: loader(20, shuffle=True), loader,
        callbacks=[Order()], **{**TRAINING, **settings},
    )  # fmt: skip


_WITHOUT = {}


def left_without(folder, make_module=Stateful):
    """Return what a run without a monitor leaves behind, which one run tells all tests."""
    if make_module not in _WITHOUT:
        _WITHOUT[make_module] = outcome(trained(folder, None, make_module))
    return _WITHOUT[make_module]


def ours(record):
    return [str(w.message) for w in record if "Monitor: " in str(w.message)]


# -- in the user's own code -----------------------------------------------------------------------


# How many replays there were; kept by a library, since a replay's own globals are put back.
torch.replays = []


class Replayed(Stateful):
    """Its training step raises in a replay only, after it changed what it could."""

    error: BaseException = RuntimeError("as ordered")
    at = 1
    step: int | None = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        # A replay is told by the mute, which a real step does not see.
        if "log" in self.__dict__ and self.step in (None, self.trainer.global_step):
            torch.replays.append(1)
            if len(torch.replays) == self.at:
                raise self.error
        return loss


def replayed(error, at, step=None):
    """Return a class that raises at the given replay, of those at a step if one is given."""
    torch.replays.clear()
    return type("Replayed", (Replayed,), {"error": error, "at": at, "step": step})


ERRORS = {
    "error": RuntimeError("as ordered"),
    "memory": MemoryError("no more"),
    "cuda memory": torch.cuda.OutOfMemoryError("CUDA out of memory"),
    "assertion": AssertionError("as ordered"),
}


@MONITORS
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", ERRORS)
def test_step_that_fails_in_a_replay_only(tmp_path, make, kind, at):
    without = left_without(tmp_path)
    watcher = make(every_n_train_steps=3, num_samples=12 if at == 2 else 4)
    if "memory" in kind and watcher.name == "landscape" and at == 3:
        # By then the slice itself; before, a self-check that does without.
        watcher.check = False
    if "memory" in kind and watcher.name == "hessian":
        # Halved, or by differences, which need less: the measurement goes on.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outcome(trained(tmp_path, watcher, replayed(ERRORS[kind], at)))
        assert steps(watcher) == [0, 3, 6]
        # Memory that was short once is not short for good.
        assert watcher.history[-1][1].engine == "exact"
    else:
        with pytest.warns(UserWarning, match=r"Monitor: .* failed") as record:
            found = outcome(trained(tmp_path, watcher, replayed(ERRORS[kind], at)))
        assert len(ours(record)) == 1
    assert len(torch.replays) > at
    assert differences(without, found) == []


class Second(torch.autograd.Function):
    """The identity, whose derivative fails at one call: at one product with the Hessian."""

    at = calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Second.calls += 1
        return gradient * float("nan") if Second.calls == Second.at else gradient


class First(torch.autograd.Function):
    """The identity, whose derivative is derived by Second."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Second.apply(gradient)


class Last(torch.nn.Module):
    def forward(self, x):
        return First.apply(x)


class Fragile(Stateful):
    def __init__(self):
        super().__init__("sgd")  # whose stability takes no products
        self.net.append(Last())


PRODUCTS = 6


@pytest.mark.parametrize("at", [1, 5, PRODUCTS])
def test_product_that_is_not_finite(tmp_path, at):
    without = left_without(tmp_path, Fragile)
    # By default differences of gradients take over.
    watcher = monitor(every_n_train_steps=3, num_steps=3, num_probes=3, engine="exact")
    Second.calls, Second.at = 0, at
    with pytest.warns(UserWarning, match=r"HessianMonitor: a measurement failed.*finite") as record:
        found = outcome(trained(tmp_path, watcher, Fragile))
    assert len(ours(record)) == 1
    assert differences(without, found) == []
    # That measurement is a gap, whole and alone.
    assert steps(watcher) == [3, 6]
    assert watcher.report.num_matvecs == PRODUCTS
    Second.at = 0


def test_product_that_is_not_finite_costs_the_slices_that_need_it(tmp_path):
    without = left_without(tmp_path, Fragile)
    watcher = landscape(every_n_train_steps=3, engine="exact")
    Second.calls, Second.at = 0, 1
    with pytest.warns(UserWarning, match=r"LossLandscapeMonitor: line_top1 failed.*finite"):
        found = outcome(trained(tmp_path, watcher, Fragile))
    assert differences(without, found) == []
    assert [set(report.slices) for _, report in watcher.history] == [
        {"plane_random"}, {"plane_random", "line_top1"}, {"plane_random", "line_top1"},
    ]  # fmt: skip
    Second.at = 0


# -- on the way out -------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half(file, **arrays):
    file.write(b"half of it")
    full()


@MONITORS
def test_full_disk_leaves_no_half_file(tmp_path, make, monkeypatch):
    without = left_without(tmp_path)
    monkeypatch.setattr(np, "savez", half)
    watcher = make(every_n_train_steps=3)
    with pytest.warns(UserWarning, match=r"saving arrays failed.*No space.*Free disk") as record:
        trainer = trained(tmp_path, watcher, logger=TensorBoardLogger(tmp_path))
    assert len(ours(record)) == 1
    assert steps(watcher) == [0, 3, 6]
    assert [p for p in tmp_path.rglob("*") if p.suffix in (".npz", ".part")] == []
    trainer.loggers = []
    assert differences(_unlogged(without), _unlogged(outcome(trainer))) == []


class Refusing(TensorBoardLogger):
    """Raises at what a monitor writes, by numbers or by figures, and takes all else."""

    error = OSError(errno.ENOSPC, "No space left on device")

    def log_metrics(self, metrics, step=None):
        if any(tag.startswith(("hessian", "landscape")) for tag in metrics):
            raise self.error
        super().log_metrics(metrics, step)

    @property
    def experiment(self):
        writer = super().experiment
        writer.add_image = self.refuse
        return writer

    def refuse(self, *args, **kwargs):
        raise self.error


class Away(Refusing):
    error = ConnectionError("the server is away")


@MONITORS
@pytest.mark.parametrize("kind", [Refusing, Away])
def test_logger_that_raises_at_numbers_and_figures(tmp_path, make, kind):
    without = left_without(tmp_path)
    watcher = make(every_n_train_steps=3, figures=True)
    with pytest.warns(UserWarning, match=r"Monitor: (logging|drawing) failed") as record:
        trainer = trained(tmp_path, watcher, logger=kind(tmp_path))
    # One warning a cause and a place.
    assert sorted(m.split()[1] for m in ours(record)) == ["drawing", "logging"]
    assert steps(watcher) == [0, 3, 6]
    # Of slices a file each, and one of the report.
    assert len(list(tmp_path.rglob("*.npz"))) == 3 * (1 if make is monitor else 3)
    trainer.loggers = []
    assert differences(_unlogged(without), _unlogged(outcome(trainer))) == []


def _unlogged(found):
    """Leave out what depends on there being a logger."""
    return {
        key: value for key, value in found.items() if key not in ("logged_metrics", "attributes")
    }


# -- from outside ---------------------------------------------------------------------------------


class Stops(pl.Callback):
    """Raises in the hook and at the step in which a monitor was interrupted."""

    def __init__(self, hook, step, error):
        self.hook, self.step, self.error = hook, step, error

    def _maybe(self, hook, trainer):
        if hook == self.hook and trainer.global_step == self.step:
            raise self.error

    def on_train_batch_start(self, trainer, *_):
        self._maybe("on_train_batch_start", trainer)

    def on_train_batch_end(self, trainer, *_):
        self._maybe("on_train_batch_end", trainer)

    def on_train_epoch_end(self, trainer, *_):
        self._maybe("on_train_epoch_end", trainer)

    def on_train_end(self, trainer, *_):
        self._maybe("on_train_end", trainer)


@pytest.fixture
def _signals():
    # Lightning ignores further interrupts from then on.
    kept = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, kept)


def interrupted(folder, callback, make_module, error):
    """Train until the error ends it, and return what is left behind."""
    pl.seed_everything(3, verbose=False)
    module = make_module()
    trainer = quiet_trainer(folder, [Order(), callback], **TRAINING)
    try:
        trainer.fit(module, loader(20, shuffle=True), loader())
    except BaseException as caught:  # noqa: BLE001 - Lightning turns an interrupt into an exit
        ended = type(caught)
    else:
        ended = None
    found = outcome(trainer)
    return ended, found


STOPS = {"ctrl-c": KeyboardInterrupt, "exit": lambda: SystemExit(3)}
MOMENTS = [
    # Hook, step, settings under which the monitor measures there.
    pytest.param("on_train_batch_start", 0, {}, id="start"),
    pytest.param("on_train_batch_start", 1, {"num_samples": 12}, id="late start"),
    pytest.param("on_train_batch_end", 1, {"every_n_train_steps": 1, "num_samples": 8}, id="step"),
    pytest.param("on_train_epoch_end", 3, {"every_n_epochs": 1}, id="epoch"),
    pytest.param("on_train_end", 6, {"every_n_epochs": 9}, id="end"),
]


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("hook", "step", "settings"), MOMENTS)
@MONITORS
def test_interrupt_in_a_measurement_leaves_what_one_in_that_hook_leaves(
    tmp_path, make, hook, step, settings, stop
):
    error = STOPS[stop]
    plain = interrupted(tmp_path, Stops(hook, step, error()), Stateful, error)
    watcher = make(**settings)
    torch.replays.clear()
    found = interrupted(tmp_path, watcher, replayed(error(), 1, step), error)
    assert len(torch.replays) == 1
    assert found[0] is plain[0] is SystemExit
    assert differences(plain[1], found[1]) == []
    # Nothing that keeps the module alive, nothing half done.
    assert watcher.subject.modes is watcher.subject.start is None
    assert watcher.subject.held.batches == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watcher.state_dict()["last_step"] >= 0


def test_interrupt_between_products(tmp_path, monkeypatch):
    from lla_callbacks.linalg.hessian import HessianOperator

    calls, product = [], HessianOperator.product

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise SystemExit(3)
        return product(self, *args)

    plain = interrupted(tmp_path, Stops("on_train_batch_start", 0, SystemExit(3)), Stateful, None)
    monkeypatch.setattr(HessianOperator, "product", stops)
    found = interrupted(tmp_path, monitor(), Stateful, None)
    assert len(calls) == 3
    assert differences(plain[1], found[1]) == []


@pytest.mark.filterwarnings(
    "ignore:.*there is no last checkpoint available",
    "ignore:.*was called without a model",
    "ignore:Be aware that when using .ckpt_path.",
    "ignore:You're resuming from a checkpoint that",
)
def test_run_goes_on_from_the_checkpoint_of_an_interrupt(tmp_path):
    from pytorch_lightning.callbacks import OnExceptionCheckpoint

    def loss(module, batch):
        if module.trainer.global_step == 6 and stopping:
            raise SystemExit(3)
        return plain_loss(module, batch)

    stopping = True
    watcher = monitor(every_n_train_steps=2, loss=loss)
    callbacks = [OnExceptionCheckpoint(tmp_path, "stopped"), watcher]
    trainer = quiet_trainer(tmp_path, callbacks, max_epochs=2, enable_checkpointing=True)
    with pytest.raises(SystemExit, match="3"):
        trainer.fit(Plain(), loader())
    stopping = False
    resumed = monitor(every_n_train_steps=2, loss=loss)
    trainer = quiet_trainer(tmp_path, [resumed], max_epochs=2)
    trainer.fit(Plain(), loader(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    # The measurement that was interrupted is a gap; nothing else is.
    assert steps(resumed)[:4] == [0, 2, 4, 8]

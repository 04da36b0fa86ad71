"""Every switch of the Trainer that changes when hooks are called, with every callback."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lla_callbacks import HessianTraceRegularizer, LossLandscapeMonitor, measure_hessian

from .modules import (
    CHEAP,
    Evaluated,
    Plain,
    differences,
    events,
    fit,
    loader,
    monitor,
    outcome,
    plain_loss,
    quiet_trainer,
    scalars,
    steps,
)


def landscape(**settings):
    cheap = {
        "plane_points": 3, "line_points": 5, "num_samples": 4, "figures": False,
        "planes": ["random"], "lines": ["gradient"],
    }  # fmt: skip
    if not {"every_n_epochs", "every_n_train_steps"} & settings.keys():
        settings = {"every_n_epochs": 1, **settings}
    return LossLandscapeMonitor(**{**cheap, **settings})


def regularizer():
    return HessianTraceRegularizer(1e-3)


MONITORS = pytest.mark.parametrize("make", [monitor, landscape])


@MONITORS
@pytest.mark.parametrize("fast", [True, 2])
def test_fast_dev_run_measures_every_due_step_and_writes_nothing(tmp_path, make, fast):
    watcher = make(every_n_train_steps=1, figures=True)
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(tmp_path, watcher, logger=logger, fast_dev_run=fast, enable_checkpointing=True)
    assert steps(watcher) == [*range(int(fast) + 1)]
    assert f"{watcher.name}/loss" in trainer.callback_metrics
    assert list(tmp_path.glob("**/*")) == []


def test_fast_dev_run_penalizes_and_writes_nothing(tmp_path):
    trainer = fit(tmp_path, regularizer(), logger=TensorBoardLogger(tmp_path), fast_dev_run=True)
    assert trainer.callback_metrics["regularizer/strength"] == pytest.approx(1e-3)
    assert list(tmp_path.glob("**/*")) == []


@MONITORS
def test_overfit_batches_are_the_held_ones(tmp_path, make):
    watcher = make(every_n_train_steps=2, num_samples=1000)
    without = outcome(fit(tmp_path, overfit_batches=2, max_epochs=3))
    trainer = fit(tmp_path, watcher, overfit_batches=2, max_epochs=3)
    assert differences(without, outcome(trainer)) == []
    assert steps(watcher) == [0, 2, 4, 6]
    reports = [report for _, report in watcher.history]
    facts = [
        getattr(r, "num_samples", None) or r.planes["random"].facts.num_samples for r in reports
    ]
    assert facts == [8] * 4


@MONITORS
@pytest.mark.parametrize("limit", [3, 0.5])
def test_limited_epochs_are_on_schedule(tmp_path, make, limit):
    watcher = make(every_n_epochs=1, num_samples=1000)
    fit(tmp_path, watcher, limit_train_batches=limit, max_epochs=2)
    per_epoch = 3 if limit == 3 else 2
    assert steps(watcher) == [0, per_epoch, 2 * per_epoch]


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
@MONITORS
def test_barebones_does_nothing_but_warn(tmp_path, make):
    without = outcome(fit(tmp_path))["state"]
    watcher = make(every_n_train_steps=1)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    bare = dict.fromkeys((*off, "log_every_n_steps"), None)
    with pytest.warns(UserWarning, match="does nothing with Trainer.barebones"):
        trainer = fit(tmp_path, watcher, barebones=True, **bare)
    assert watcher.history == []
    assert watcher.state_dict() == {}
    assert differences(without, trainer.lightning_module.state_dict()) == []
    assert list(tmp_path.glob("**/*")) == []


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
def test_barebones_still_penalizes(tmp_path):
    penalized = outcome(fit(tmp_path, regularizer()))["state"]
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    bare = dict.fromkeys((*off, "log_every_n_steps"), None)
    trainer = fit(tmp_path, regularizer(), barebones=True, **bare)
    assert differences(penalized, trainer.lightning_module.state_dict()) == []


@MONITORS
@pytest.mark.parametrize("sanity", [0, 2])
def test_sanity_check_triggers_nothing(tmp_path, make, sanity):
    watcher = make(every_n_epochs=1)
    fit(tmp_path, watcher, Evaluated, val=loader, num_sanity_val_steps=sanity)
    assert steps(watcher) == [0, 4]


@MONITORS
def test_no_logger_leaves_no_file_and_the_values_in_python(tmp_path, make):
    watcher = make(figures=True)
    trainer = fit(tmp_path, watcher, logger=False)
    assert steps(watcher) == [0, 4]
    assert f"{watcher.name}/loss" in trainer.callback_metrics
    assert list(tmp_path.glob("**/*")) == []


@MONITORS
def test_several_loggers_get_the_same_values(tmp_path, make):
    watcher = make(figures=True)
    board, table = TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")
    fit(tmp_path, watcher, logger=[board, table])
    board.finalize("success")
    tag = f"{watcher.name}/loss"
    values = [value for _, value in scalars(events(board.log_dir))[tag]]
    written = [row[tag] for row in table.experiment.metrics if tag in row]
    assert values == pytest.approx(written or _rows(table, tag), rel=1e-6)
    assert len(values) == 2
    # Each keeps pictures and arrays in its own way, in its own folder.
    assert events(board.log_dir).Tags()["images"]
    for folder in (board.log_dir, table.log_dir):
        assert list((tmp_path / folder / watcher.name).glob("**/*.npz"))
    assert list(tmp_path.glob("table/**/*.png"))


def _rows(table, tag):
    import csv

    with open(f"{table.log_dir}/metrics.csv", newline="") as file:
        return [float(row[tag]) for row in csv.DictReader(file) if row.get(tag)]


@MONITORS
@pytest.mark.parametrize("accumulate", [2, 3])
def test_schedule_counts_optimizer_steps_under_accumulation(tmp_path, make, accumulate):
    watcher = make(every_n_train_steps=2)
    without = outcome(fit(tmp_path, accumulate_grad_batches=accumulate, max_epochs=3))
    trainer = fit(tmp_path, watcher, accumulate_grad_batches=accumulate, max_epochs=3)
    assert differences(without, outcome(trainer)) == []
    # Lightning steps on an epoch's last batch too.
    assert trainer.global_step == 6
    assert steps(watcher) == [0, 2, 4, 6]


# -- averaged weights ---------------------------------------------------------------------------


class Weights(pl.Callback):
    """Notes the weights after each step, in the order of the parameters."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._note(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._note(trainer, pl_module)

    def _note(self, trainer, module):
        self.seen[trainer.global_step] = {n: p.clone() for n, p in module.state_dict().items()}


def loss_at(weights):
    module = Plain()
    module.load_state_dict(weights)
    return plain_loss(module, next(iter(loader()))).item()


def averaging(name):
    """Return one of the callbacks that newer Lightnings have."""
    found = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    return getattr(found, name)


AVERAGING = {
    "ema": lambda: averaging("EMAWeightAveraging")(decay=0.5),
    "mean": lambda: averaging("WeightAveraging")(),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
}


@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:.*swa")
@pytest.mark.parametrize("first", [True, False], ids=["averaging first", "monitor first"])
@pytest.mark.parametrize("kind", AVERAGING)
@MONITORS
def test_training_weights_are_measured_whatever_averages(tmp_path, make, kind, first):
    """Also the last ones, though an average is in the module by then."""
    watcher, average, notes = make(every_n_train_steps=3), AVERAGING[kind](), Weights()
    order = [average, watcher] if first else [watcher, average]
    trainer = fit(tmp_path, None, Evaluated, val=loader, callbacks=[notes, *order], max_epochs=2)
    assert steps(watcher) == [0, 3, 6, 8]
    for step, report in watcher.history:
        assert report.loss == pytest.approx(loss_at(notes.seen[step]), rel=1e-6)
    average = trainer.lightning_module.state_dict()
    assert differences(notes.seen[8], average) != []
    plain = outcome(
        fit(tmp_path, None, Evaluated, val=loader, callbacks=[AVERAGING[kind]()], max_epochs=2)
    )
    assert differences(plain["state"], average) == []


def test_evaluation_after_averaging_measures_the_average(tmp_path):
    watcher = monitor()
    trainer = fit(tmp_path, None, Evaluated, callbacks=[AVERAGING["ema"](), watcher], val=loader)
    module = trainer.lightning_module
    quiet_trainer(tmp_path, [watcher]).validate(module, loader(), verbose=False)
    direct = measure_hessian(
        module, [next(iter(loader()))], loss=plain_loss,
        **{k: CHEAP[k] for k in ("num_steps", "num_probes")},
    )  # fmt: skip
    assert watcher.report.loss == pytest.approx(direct.loss, rel=1e-6)
    assert watcher.report.trace == pytest.approx(direct.trace, rel=1e-5)
    assert watcher.report.loss != pytest.approx(watcher.history[-1][1].loss, rel=1e-3)


@pytest.mark.parametrize("first", [True, False], ids=["averaging first", "monitor first"])
def test_averaging_run_resumes_with_its_monitor(tmp_path, first):
    def callbacks(watcher):
        pair = [AVERAGING["ema"](), watcher]
        return pair if first else pair[::-1]

    whole, before, after = (monitor(every_n_epochs=1) for _ in range(3))
    fit(tmp_path, None, callbacks=callbacks(whole), max_epochs=2)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    fit(tmp_path, None, callbacks=[*callbacks(before), Save()], max_epochs=1)
    torch.manual_seed(9)
    trainer = quiet_trainer(tmp_path, callbacks(after), max_epochs=2)
    trainer.fit(Plain(), loader(), ckpt_path=tmp_path / "0.ckpt")
    traces = [[(s, r.trace) for s, r in w.history] for w in (whole, after)]
    assert traces[0] == traces[1]

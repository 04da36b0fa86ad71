"""Stand-alone validation and test, and validation within a fit."""

import copy

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lla_callbacks import HessianMonitor, measure_hessian

from .modules import (
    CHEAP,
    Evaluated,
    Plain,
    differences,
    events,
    fit,
    loader,
    monitor,
    plain_loss,
    quiet_trainer,
    scalars,
    steps,
)

PRECISION = {"num_steps": 6, "num_probes": 4}


def evaluated():
    torch.manual_seed(11)
    return Evaluated()


def expected(module, batches, **settings):
    return measure_hessian(module, batches, **{**PRECISION, **settings})


@pytest.mark.parametrize("function", ["validate", "test"])
@pytest.mark.parametrize("inference", [True, False], ids=["inference mode", "no grad"])
def test_evaluation_measures_its_own_batches(tmp_path, function, inference):
    logger = TensorBoardLogger(tmp_path)
    watcher = monitor(**PRECISION, num_samples=8, figures=True)
    trainer = quiet_trainer(tmp_path, [watcher], logger=logger, inference_mode=inference)
    module = evaluated()
    before = copy.deepcopy(module.state_dict())
    (values,) = getattr(trainer, function)(module, loader(), verbose=False)
    report = expected(evaluated(), list(loader())[:2])
    logger.finalize("success")
    logged = scalars(events(logger.log_dir))
    assert watcher.history == []
    for name in ("lambda_max", "lambda_min", "trace", "loss"):
        right = getattr(report, name)
        assert getattr(watcher.report, name) == right
        assert values[f"hessian/{name}"] == pytest.approx(right, rel=1e-6)
        assert logged[f"hessian/{name}"] == [(0, pytest.approx(right, rel=1e-6))]
        assert float(trainer.callback_metrics[f"hessian/{name}"]) == pytest.approx(right)
    assert values[f"{'val' if function == 'validate' else 'test'}_loss"] > 0
    assert len(events(logger.log_dir).Images("hessian/density")) == 1
    assert len(list(tmp_path.glob("**/*.npz"))) == 1
    assert differences(before, module.state_dict()) == []


@pytest.mark.parametrize("function", ["validate", "test"])
def test_monitor_needs_no_argument_and_no_logger(tmp_path, function):
    trainer = quiet_trainer(tmp_path, [HessianMonitor()])
    (values,) = getattr(trainer, function)(evaluated(), loader(), verbose=False)
    report = measure_hessian(evaluated(), list(loader()))
    assert values["hessian/trace"] == pytest.approx(report.trace, rel=1e-6)
    assert values["hessian/kh05"] == pytest.approx(report.criteria["kh05"], rel=1e-5)
    assert list(tmp_path.glob("**/*")) == []


def test_evaluation_leaves_its_own_values_alone(tmp_path):
    without = quiet_trainer(tmp_path).validate(evaluated(), loader(), verbose=False)
    found = quiet_trainer(tmp_path, [monitor()]).validate(evaluated(), loader(), verbose=False)
    assert without[0]["val_loss"] == found[0]["val_loss"]
    assert {tag for tag in found[0] if not tag.startswith("hessian")} == {"val_loss"}


def test_evaluation_restores_modes_and_random_streams(tmp_path):
    def run(callbacks):
        module = evaluated()
        module.net[0].eval()
        torch.manual_seed(4)
        quiet_trainer(tmp_path, callbacks).validate(module, loader(shuffle=False), verbose=False)
        return {name: m.training for name, m in module.named_modules()}, torch.get_rng_state()

    assert differences(run([]), run([monitor()])) == []


@pytest.mark.parametrize("function", ["validate", "test"])
def test_given_batches_replace_those_of_the_evaluation(tmp_path, function):
    own = list(loader(24))[4:]
    watcher = monitor(**PRECISION, dataloader=own, num_samples=100)
    trainer = quiet_trainer(tmp_path, [watcher])
    (values,) = getattr(trainer, function)(evaluated(), loader(), verbose=False)
    assert values["hessian/trace"] == pytest.approx(expected(evaluated(), own).trace, rel=1e-6)


class OnLoaders(Evaluated):
    """Names the loader in its step, as Lightning wants for several of them."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", plain_loss(self, batch))


def test_several_loaders_are_measured_one_by_one(tmp_path):
    """Each by itself, since a mixture would be of none of them, with tags as Lightning has them."""
    logger = TensorBoardLogger(tmp_path)
    watcher = monitor(**PRECISION, num_samples=8, figures=True)
    trainer = quiet_trainer(tmp_path, [watcher], logger=logger)
    torch.manual_seed(11)
    found = trainer.validate(OnLoaders(), [loader(), loader(8)], verbose=False)
    right = [expected(evaluated(), list(part)[:2]) for part in (loader(), loader(8))]
    assert [report.trace for report in watcher.evaluated] == [r.trace for r in right]
    for k, report in enumerate(right):
        tag = f"hessian/trace/dataloader_idx_{k}"
        assert found[k][tag] == pytest.approx(report.trace, rel=1e-6)
    logger.finalize("success")
    accumulator = events(logger.log_dir)
    assert {t for t in accumulator.Tags()["images"] if "density" in t} == {
        f"hessian/dataloader_idx_{k}/density" for k in range(2)
    }
    names = sorted(str(p.relative_to(logger.log_dir)) for p in tmp_path.glob("**/*.npz"))
    assert names == [f"hessian/dataloader_idx_{k}/validate_00000000.npz" for k in range(2)]
    assert any(
        t.startswith("zz_hessian_errors/") and t.endswith("/dataloader_idx_1")
        for t in accumulator.Tags()["scalars"]
    )


def test_loaders_with_other_data_give_other_reports(tmp_path):
    shifted = DataLoader([[x + 2.0, y, i] for x, y, i in loader(8)], batch_size=None)
    watcher = monitor(**PRECISION, num_samples=8)
    torch.manual_seed(11)
    quiet_trainer(tmp_path, [watcher]).validate(OnLoaders(), [loader(8), shifted], verbose=False)
    right = [expected(evaluated(), list(loader(8))), expected(evaluated(), list(shifted))]
    assert [report.trace for report in watcher.evaluated] == [r.trace for r in right]
    assert right[0].trace != right[1].trace
    # With one loader nothing has another name.
    torch.manual_seed(11)
    (values,) = quiet_trainer(tmp_path, [watcher]).validate(evaluated(), loader(8), verbose=False)
    assert values["hessian/trace"] == pytest.approx(right[0].trace, rel=1e-6)
    assert len(watcher.evaluated) == 1


def test_failed_measurement_leaves_the_evaluation_its_values(tmp_path):
    def loss(module, batch):
        raise ZeroDivisionError("as ordered")

    trainer = quiet_trainer(tmp_path, [monitor(loss=loss)])
    with pytest.warns(UserWarning, match="HessianMonitor: a measurement failed.*as ordered"):
        (values,) = trainer.validate(evaluated(), loader(), verbose=False)
    assert {*values} == {"val_loss"}


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("interval", [1.0, 2])
def test_validation_inside_of_a_fit_triggers_nothing(tmp_path, sanity, interval):
    watcher = monitor(every_n_epochs=1)
    trainer = fit(
        tmp_path,
        watcher,
        Evaluated,
        # Other samples than those of training, to see which ones are measured.
        val=lambda: loader(24, shuffle=False, drop_last=True),
        num_sanity_val_steps=sanity,
        val_check_interval=interval,
        max_epochs=2,
    )
    assert steps(watcher) == [0, 4, 8]
    first = expected(
        trainer.lightning_module,
        list(loader())[:1],
        **{key: CHEAP[key] for key in ("num_steps", "num_probes")},
        optimizer=trainer.optimizers[0],
    )
    assert watcher.history[-1][1].trace == first.trace
    assert watcher.history[-1][1].criteria["stability"] == first.criteria["stability"]


def test_validation_after_a_fit_keeps_the_arrays_of_the_fit(tmp_path):
    """Both measure at the last step, and nothing else says what training ended with."""
    logger = TensorBoardLogger(tmp_path)
    watcher = monitor()
    trainer = fit(tmp_path, watcher, Evaluated, val=loader, logger=logger)
    (kept,) = tmp_path.glob("**/step_00000004.npz")
    before = kept.read_bytes()
    trainer.validate(trainer.lightning_module, loader(8), verbose=False)
    assert kept.read_bytes() == before


def test_history_of_a_fit_survives_a_test(tmp_path):
    watcher = monitor()
    trainer = fit(tmp_path, watcher, Evaluated, val=loader)
    trainer.test(trainer.lightning_module, loader(), verbose=False)
    assert steps(watcher)[:2] == [0, 4]


def test_predictions_trigger_nothing(tmp_path):
    class Predicting(Evaluated):
        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

    watcher = monitor()
    found = quiet_trainer(tmp_path, [watcher]).predict(Predicting(), loader())
    assert len(found) == 4
    assert watcher.history == []


class Preparing(Plain):
    """Prepares its batches on the device, as modules that augment or normalize there do."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y, index = batch
        return 3 * x + 1, y, index


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_given_batches_are_prepared_like_those_of_training(tmp_path, precision):
    own, given = monitor(num_samples=8), monitor(num_samples=8, dataloader=loader())
    for watcher in (own, given):
        fit(tmp_path, watcher, Preparing, precision=precision)
    numbers = [[(s, r.loss, r.trace) for s, r in w.history] for w in (own, given)]
    assert numbers[0] == numbers[1]
    assert steps(given) == [0, 4]

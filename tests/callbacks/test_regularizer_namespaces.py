"""The regularizer's flag: both namespaces, their command lines, bundles and the demo."""

import copy
import pickle
import runpy
import sys
import warnings
from pathlib import Path

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch
import yaml

import lla_callbacks
from lla_callbacks import HessianMonitor, HessianTraceRegularizer, LossLandscapeMonitor

from .by_hand import STRENGTH, Double, deviation, double_loader
from .modules import Plain, differences, events, loader, plain_loss, quiet_trainer, scalars
from .test_namespaces import BOTH, CLIS, command_line

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def regularizer_of(made):
    (found,) = [c for c in made.trainer.callbacks if isinstance(c, HessianTraceRegularizer)]
    return found


def trained(folder, namespace, make_module, callbacks):
    torch.manual_seed(5)
    trainer = quiet_trainer(folder, callbacks, namespace)
    trainer.fit(make_module(), loader())
    return trainer.lightning_module.state_dict()


@pytest.mark.parametrize("base", [pl.Callback, lightning_pl.Callback])
def test_regularizer_is_a_callback_of_either_namespace(base):
    assert isinstance(HessianTraceRegularizer(STRENGTH), base)


def test_namespaces_train_the_same(tmp_path):
    one, other = (
        trained(tmp_path, namespace, make, [HessianTraceRegularizer(STRENGTH)])
        for namespace, make, _ in (p.values for p in BOTH)
    )
    assert differences(one, other) == []
    assert differences(one, trained(tmp_path, pl, Plain, [])) != []


@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_command_line_switches_it_on(tmp_path, monkeypatch, cli, make_module, make_data):
    args = [
        "--trainer.callbacks+=lla_callbacks.HessianTraceRegularizer",
        "--trainer.callbacks.strength=0.01",
        "--trainer.callbacks.layers=[net.0]",
        "--trainer.callbacks.estimator=gauss_newton",
        "--trainer.callbacks.max_ratio=0.5",
    ]
    made = command_line(cli, make_module, make_data, tmp_path, monkeypatch, args)
    found = regularizer_of(made)
    assert (found.strength, found.layers, found.max_ratio) == (0.01, ["net.0"], 0.5)
    assert found.settings.estimator == "gauss_newton"
    made.trainer.fit(made.model, made.datamodule)
    assert made.trainer.callback_metrics["regularizer/strength"] > 0


@pytest.mark.parametrize("strength", [0.01, "auto"])
@pytest.mark.parametrize("layers", ["all", "middle", ["net.*"]], ids=str)
@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_file_switches_it_on(tmp_path, monkeypatch, cli, make_module, make_data, layers, strength):
    settings = {
        "strength": strength,
        "layers": layers,
        "every_n_train_steps": 2,
        "relative": True,
        "loss": f"{plain_loss.__module__}.plain_loss",
    }
    entry = {"class_path": "lla_callbacks.HessianTraceRegularizer", "init_args": settings}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    made = command_line(cli, make_module, make_data, tmp_path, monkeypatch, [f"--config={config}"])
    found = regularizer_of(made)
    made.trainer.fit(made.model, made.datamodule)
    assert (found.strength, found.layers, found.loss) == (strength, layers, plain_loss)
    assert (found.comparison is None) == (strength == "auto")  # still searching


@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_command_line_refuses_a_wrong_estimator(
    tmp_path, monkeypatch, capsys, cli, make_module, make_data
):
    args = [
        "--trainer.callbacks+=lla_callbacks.HessianTraceRegularizer",
        "--trainer.callbacks.strength=0.01",
        "--trainer.callbacks.estimator=hutchinson",
    ]
    with pytest.raises(SystemExit, match="2"):
        command_line(cli, make_module, make_data, tmp_path, monkeypatch, args)
    assert "estimator" in capsys.readouterr().err


@pytest.mark.parametrize("bundle", ["economy", "standard", "paper"])
@pytest.mark.parametrize(("namespace", "make_module", "make_logger"), BOTH)
def test_bundles_switch_it_on_and_off(tmp_path, namespace, make_module, make_logger, bundle):
    make = getattr(lla_callbacks, bundle)
    cheap = {"num_steps": 3, "num_probes": 2, "num_samples": 4, "figures": False}
    # Of the landscape monitor.
    cheap |= {"plane_points": 3, "line_points": 3, "num_rays": 1, "convexity_points": 0}

    def weights(**settings):
        return trained(tmp_path, namespace, make_module, make(**cheap, **settings))

    plain = trained(tmp_path, namespace, make_module, [])
    # Off, explicitly or by default: bitwise the same training.
    assert differences(plain, weights()) == []
    assert differences(plain, weights(trace_regularization=None)) == []
    assert differences(plain, weights(trace_regularization=0.0)) == []
    assert differences(plain, weights(trace_regularization=0.01)) != []
    settings = {"strength": 0.01, "every_n_train_steps": 3}
    kinds = [type(callback) for callback in make(trace_regularization=settings)]
    assert kinds == [HessianMonitor, LossLandscapeMonitor, HessianTraceRegularizer]
    assert make(trace_regularization=settings)[-1].schedule.every_n_train_steps == 3


@pytest.mark.parametrize(
    "duplicate", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_copy_trains_the_same(tmp_path, duplicate):
    weights = []
    original = HessianTraceRegularizer(STRENGTH)
    for callback in (original, duplicate(original)):
        torch.manual_seed(3)
        module = Double()
        quiet_trainer(tmp_path, [callback]).fit(module, double_loader())
        weights.append(module)
    assert deviation(*weights) == 0


def test_demo_takes_the_flag(tmp_path, monkeypatch):
    args = ["--max-epochs", "1", "--logs", str(tmp_path), "--trace-regularization", "1e-3"]
    monkeypatch.setattr(sys, "argv", [str(DEMO), *args])
    # Its flags are what this is about: pictures of nine points will do.
    standard, small = lla_callbacks.standard, {"plane_points": 3, "line_points": 5}
    small |= {"num_samples": 64, "num_steps": 5, "num_probes": 4}
    monkeypatch.setattr(lla_callbacks, "standard", lambda **given: standard(**{**given, **small}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(DEMO), run_name="__main__")
    assert list(tmp_path.glob("demo/*/events*"))
    (log,) = tmp_path.glob("demo/*")
    assert "regularizer/penalty" in scalars(events(log))

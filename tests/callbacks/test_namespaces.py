"""One class for both Lightning namespaces, their command lines and copies."""

import copy
import pickle
import sys
from pathlib import Path

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch
import yaml
from lightning.pytorch.cli import LightningCLI as CliOfLightning
from lightning.pytorch.loggers import TensorBoardLogger as LoggerOfLightning
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger

import lla_callbacks
from lla_callbacks import HessianMonitor, LossLandscapeMonitor

from .modules import (
    Data,
    DataOfLightning,
    Evaluated,
    EvaluatedOfLightning,
    Plain,
    PlainOfLightning,
    differences,
    events,
    loader,
    monitor,
    plain_loss,
    predictions,
    quiet_trainer,
    scalars,
    steps,
)

BOTH = [
    pytest.param(pl, Plain, TensorBoardLogger, id="pytorch_lightning"),
    pytest.param(lightning_pl, PlainOfLightning, LoggerOfLightning, id="lightning"),
]
CLIS = [
    pytest.param(LightningCLI, Plain, Data, id="pytorch_lightning"),
    pytest.param(CliOfLightning, PlainOfLightning, DataOfLightning, id="lightning"),
]


@pytest.mark.parametrize("base", [pl.Callback, lightning_pl.Callback])
def test_monitor_is_a_callback_of_either_namespace(base):
    assert isinstance(HessianMonitor(), base)


@pytest.mark.parametrize(("namespace", "make_module", "make_logger"), BOTH)
@pytest.mark.parametrize("listed", [True, False], ids=["in a list", "alone"])
def test_fit_logs_and_leaves_the_weights_alone(
    tmp_path, namespace, make_module, make_logger, listed
):
    def run(watcher):
        torch.manual_seed(5)
        logger = make_logger(tmp_path, version=str(watcher is None))
        callbacks = {} if watcher is None else {"callbacks": [watcher] if listed else watcher}
        trainer = quiet_trainer(tmp_path, namespace=namespace, logger=logger, **callbacks)
        trainer.fit(make_module(), loader(shuffle=True))
        return trainer

    watcher = monitor(every_n_train_steps=2, num_samples=8, figures=True)
    without, trainer = run(None), run(watcher)
    logged = scalars(events(trainer.logger.log_dir))
    assert [step for step, _ in logged["hessian/trace"]] == steps(watcher) == [0, 2, 4]
    assert len(events(trainer.logger.log_dir).Images("hessian/density")) == 3
    assert (
        differences(without.lightning_module.state_dict(), trainer.lightning_module.state_dict())
        == []
    )


def test_namespaces_find_the_same_numbers(tmp_path):
    found = []
    for namespace, make_module in [(pl, Plain), (lightning_pl, PlainOfLightning)]:
        torch.manual_seed(5)
        watcher = monitor(every_n_train_steps=2)
        quiet_trainer(tmp_path, [watcher], namespace).fit(make_module(), loader())
        found.append([(step, report.trace, report.lambda_max) for step, report in watcher.history])
    assert found[0] == found[1]
    assert len(found[0]) == 3


@pytest.mark.parametrize(
    ("namespace", "make_module"), [(pl, Evaluated), (lightning_pl, EvaluatedOfLightning)]
)
@pytest.mark.parametrize("function", ["validate", "test"])
def test_evaluation_works_in_either_namespace(tmp_path, namespace, make_module, function):
    trainer = quiet_trainer(tmp_path, [monitor()], namespace)
    (values,) = getattr(trainer, function)(make_module(), loader(), verbose=False)
    assert "hessian/trace" in values


class WritingDirectly:
    """A step that writes to its logger itself, as users do for images."""

    def training_step(self, batch, batch_idx):
        self.logger.experiment.add_scalar("direct", float(batch_idx), self.global_step)
        return plain_loss(self, batch)


class Writing(WritingDirectly, Plain):
    """In ``pytorch_lightning``."""


class WritingOfLightning(WritingDirectly, PlainOfLightning):
    """In ``lightning.pytorch``."""


@pytest.mark.parametrize(
    ("namespace", "make_module", "make_logger"),
    [(pl, Writing, TensorBoardLogger), (lightning_pl, WritingOfLightning, LoggerOfLightning)],
)
@pytest.mark.parametrize("derived", [False, True], ids=["Trainer", "a class of the user's"])
def test_direct_writes_are_muted(tmp_path, namespace, make_module, make_logger, derived):
    class Derived(namespace.Trainer):
        pass

    logger = make_logger(tmp_path)
    watcher = monitor(every_n_train_steps=1)
    trainer = (Derived if derived else namespace.Trainer)(
        max_epochs=1,
        logger=logger,
        callbacks=[watcher],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_module(), loader())
    logger.finalize("success")
    assert trainer.loggers == [logger]
    assert scalars(events(logger.log_dir))["direct"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert steps(watcher) == [0, 1, 2, 3, 4]


def command_line(cli, make_module, make_data, folder, monkeypatch, args, run=False):
    monkeypatch.setattr(sys, "argv", ["train"])
    # Lightning's command line calls what jsonargparse calls deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return cli(
        make_module,
        make_data,
        args=args,
        run=run,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults=quiet,
    )


def named_monitor(cli):
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, HessianMonitor)]
    return found


@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_command_line_makes_a_monitor_from_arguments(
    tmp_path, monkeypatch, cli, make_module, make_data
):
    args = [
        "--trainer.callbacks+=lla_callbacks.HessianMonitor",
        "--trainer.callbacks.every_n_train_steps=2",
        "--trainer.callbacks.num_steps=3",
        "--trainer.callbacks.num_probes=2",
        "--trainer.callbacks.num_samples=4",
        "--trainer.callbacks.layers=[net.0]",
        "--trainer.callbacks.mode=eval",
        "--trainer.callbacks.max_overhead=0.5",
    ]
    made = command_line(cli, make_module, make_data, tmp_path, monkeypatch, args)
    watcher = named_monitor(made)
    assert watcher.settings.num_steps == 3
    assert watcher.settings.layers == ["net.0"]
    assert watcher.mode == "eval"
    assert watcher.max_overhead == 0.5
    watcher.timing.is_bounded = False
    made.trainer.fit(made.model, made.datamodule)
    assert steps(watcher) == [0, 2, 4]
    assert [*watcher.history[0][1].layer_traces] == ["net.0"]


@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_command_line_makes_a_monitor_from_a_file(
    tmp_path, monkeypatch, cli, make_module, make_data
):
    settings = {
        "every_n_epochs": 1,
        "num_steps": 3,
        "num_probes": 2,
        "num_samples": 4,
        "loss": f"{plain_loss.__module__}.plain_loss",
        "name": "curvature",
    }
    entry = {"class_path": "lla_callbacks.HessianMonitor", "init_args": settings}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    made = command_line(cli, make_module, make_data, tmp_path, monkeypatch, [f"--config={config}"])
    watcher = named_monitor(made)
    made.trainer.fit(made.model, made.datamodule)
    assert watcher.loss is plain_loss
    assert steps(watcher) == [0, 4]
    assert "curvature/trace" in made.trainer.callback_metrics


@pytest.mark.parametrize(("given", "layers"), [("blocks", "blocks"), ("net.*", "net.*")])
@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_command_line_takes_a_grouping_or_one_pattern(
    tmp_path, monkeypatch, cli, make_module, make_data, given, layers
):
    args = [
        "--trainer.callbacks+=lla_callbacks.HessianMonitor",
        f"--trainer.callbacks.layers={given}",
    ]
    made = command_line(cli, make_module, make_data, tmp_path, monkeypatch, args)
    assert named_monitor(made).settings.layers == layers


@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_command_line_makes_a_landscape_monitor(tmp_path, monkeypatch, cli, make_module, make_data):
    accuracy = {"class_path": "torchmetrics.classification.MulticlassAccuracy"}
    settings = {
        "every_n_train_steps": 2,
        "planes": ["random", "trajectory"],
        "lines": ["top1"],
        "plane_points": 3,
        "line_points": 5,
        "num_rays": 2,
        "num_samples": 4,
        "metrics": {"accuracy": {**accuracy, "init_args": {"num_classes": 2}}},
        "predict": f"{predictions.__module__}.predictions",
    }
    entry = {"class_path": "lla_callbacks.LossLandscapeMonitor", "init_args": settings}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    made = command_line(cli, make_module, make_data, tmp_path, monkeypatch, [f"--config={config}"])
    (watcher,) = [c for c in made.trainer.callbacks if isinstance(c, LossLandscapeMonitor)]
    made.trainer.fit(made.model, made.datamodule)
    assert steps(watcher) == [0, 2, 4]
    assert set(watcher.report.slices) == {"plane_random", "plane_trajectory", "line_top1", "basin"}
    assert "accuracy" in watcher.report.planes["random"].metrics


def yaml_of_the_docs():
    """Return the file that docs/usage.md shows, as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "usage.md").read_text()
    return text.split("## In YAML")[1].split("```yaml\n")[1].split("```")[0]


@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_command_line_runs_the_file_of_the_docs(tmp_path, monkeypatch, cli, make_module, make_data):
    """All callbacks together, by ``python train.py fit --config config.yaml``."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml_of_the_docs())
    args = ["fit", f"--config={config}", "--trainer.max_epochs=1"]
    made = command_line(cli, make_module, make_data, tmp_path, monkeypatch, args, run=True)
    kinds = [HessianMonitor, LossLandscapeMonitor, lla_callbacks.HessianTraceRegularizer]
    found = [[c for c in made.trainer.callbacks if isinstance(c, kind)] for kind in kinds]
    assert [len(some) for some in found] == [1, 1, 1]
    assert made.trainer.global_step == 4
    assert steps(found[0][0]) == steps(found[1][0]) == [0, 4]
    assert made.trainer.callback_metrics["regularizer/strength"] > 0


@pytest.mark.parametrize(("cli", "make_module", "make_data"), CLIS)
def test_command_line_refuses_a_wrong_setting(
    tmp_path, monkeypatch, capsys, cli, make_module, make_data
):
    args = ["--trainer.callbacks+=lla_callbacks.HessianMonitor", "--trainer.callbacks.mode=train"]
    with pytest.raises(SystemExit, match="2"):
        command_line(cli, make_module, make_data, tmp_path, monkeypatch, args)
    assert "mode" in capsys.readouterr().err


@pytest.mark.parametrize("bundle", ["economy", "standard", "paper"])
@pytest.mark.parametrize(("namespace", "make_module", "make_logger"), BOTH)
def test_bundles_run_in_either_namespace(tmp_path, namespace, make_module, make_logger, bundle):
    small = {"plane_points": 3, "line_points": 5, "num_rays": 2, "convexity_points": 0}
    callbacks = getattr(lla_callbacks, bundle)(
        num_steps=3, num_probes=2, num_samples=4, figures=False, every_n_epochs=1, **small
    )
    trainer = quiet_trainer(tmp_path, callbacks, namespace)
    trainer.fit(make_module(), loader())
    assert steps(callbacks[0]) == [0, 4]
    assert callbacks[0].settings.num_steps == 3
    assert steps(callbacks[1]) == [0, 4]
    assert callbacks[1].settings.line_points == 5


def test_bundles_give_each_monitor_what_it_knows():
    hessian, landscape = lla_callbacks.standard(num_probes=5, lines=["gradient"], mode="eval")
    assert (hessian.settings.num_probes, landscape.settings.lines) == (5, ["gradient"])
    assert hessian.mode == landscape.mode == "eval"
    # A limit for both together, and none with a schedule.
    assert [m.max_overhead for m in lla_callbacks.economy()] == [0.02, 0.02]
    assert all(m.is_bounded for m in (*lla_callbacks.economy(), *lla_callbacks.standard()))
    for bundle in (lla_callbacks.economy, lla_callbacks.standard):
        assert not any(m.is_bounded for m in bundle(every_n_epochs=2))
    for wrong in ({"num_prbes": 5}, {"name": "a"}):
        with pytest.raises(TypeError, match=r"does not take .*HessianMonitor and LossLandscape"):
            lla_callbacks.economy(**wrong)


COPIES = [
    pytest.param(lambda watcher: pickle.loads(pickle.dumps(watcher)), id="pickle"),
    pytest.param(copy.deepcopy, id="deepcopy"),
]


@pytest.mark.parametrize("duplicate", COPIES)
def test_copy_of_a_fresh_monitor_measures_the_same(tmp_path, duplicate):
    original = monitor(every_n_train_steps=2, layers=["net.2"], loss=plain_loss, name="c")
    copied = duplicate(original)
    for watcher in (original, copied):
        torch.manual_seed(5)
        quiet_trainer(tmp_path, [watcher]).fit(Plain(), loader())
    assert copied.state_key == original.state_key
    assert steps(copied) == [0, 2, 4]
    assert [r.trace for _, r in copied.history] == [r.trace for _, r in original.history]


@pytest.mark.parametrize("duplicate", COPIES)
def test_copy_of_a_used_monitor_keeps_its_history(tmp_path, duplicate):
    watcher = monitor(num_samples=8)
    quiet_trainer(tmp_path, [watcher]).fit(Plain(), loader())
    copied = duplicate(watcher)
    assert steps(copied) == steps(watcher) == [0, 4]
    report, original = copied.history[0][1], watcher.history[0][1]
    assert report.lambda_max.residual == original.lambda_max.residual
    assert report.layer_traces == original.layer_traces
    assert torch.equal(report.nodes, original.nodes)


def test_used_monitor_holds_neither_module_nor_batches(tmp_path):
    """A monitor that is kept for its history must not keep the network in memory."""

    class Local(Plain):
        """A class in a function cannot be pickled, so that a reference to it is seen."""

    watcher = monitor(num_samples=8)
    quiet_trainer(tmp_path, [watcher]).fit(Local(), loader())
    # Lightning itself ties each callback to the module by these two.
    for name in ("log", "log_dict"):
        vars(watcher).pop(name, None)
    assert len(pickle.dumps(vars(watcher))) < 50_000


def test_checkpoint_with_a_monitor_loads_in_either_namespace(tmp_path):
    trainer = quiet_trainer(tmp_path, [monitor()])
    trainer.fit(Plain(), loader())
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    again = quiet_trainer(tmp_path, [monitor()], lightning_pl, max_epochs=2)
    again.fit(PlainOfLightning(), loader(), ckpt_path=tmp_path / "kept.ckpt")
    assert again.global_step == 8


def test_monitors_of_one_trainer_are_told_apart_by_name():
    first, second = HessianMonitor(name="train"), HessianMonitor(name="held_out")
    assert first.state_key != second.state_key

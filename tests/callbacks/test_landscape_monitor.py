"""The landscape monitor: bitwise unchanged training, exact tags, gaps instead of crashes."""

import re
import warnings

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lla_callbacks import HessianMonitor, LossLandscapeMonitor, LossPlane, loss_plane
from lla_callbacks.callbacks import landscape_monitor
from lla_callbacks.callbacks.sizers import SlicesSizer
from lla_callbacks.objective.objective import Objective
from lla_callbacks.slices.landscape_settings import PASSES_OF_REFINING, LandscapeSettings
from lla_callbacks.slices.quantity import Slices

from .modules import (
    Evaluated,
    Plain,
    Stateful,
    differences,
    events,
    fit,
    loader,
    outcome,
    plain_loss,
    quiet_trainer,
    scalars,
    steps,
)
from .test_bitwise import Raising, run_without, stateful_run
from .test_failures import Manual

# Small enough that a measurement takes milliseconds.
CHEAP = {
    "plane_points": 3, "line_points": 5, "num_samples": 4, "figures": False, "planes": ["random"],
    "lines": ["random"],
}  # fmt: skip
EVERYTHING = {
    "planes": ["random", "hessian", "hessian_ends", "adam", "trajectory", "gradient+update"],
    "lines": ["random", "top1", "top2", "bottom1", "gradient", "update", "adam_m", "pc1"],
    "convexity_points": 3,
    "num_rays": 2,
}

DRAWN = {"figures": True, "every_n_train_steps": 3}


def watch(**settings):
    return LossLandscapeMonitor(**{**CHEAP, **settings})


@pytest.mark.parametrize(
    ("optimizer", "mode"), [("adam", "batch"), ("sgd", "eval"), ("adam", "recalibrate")]
)
def test_training_ends_in_the_same_bits(tmp_path, optimizer, mode):
    with warnings.catch_warnings():
        if optimizer == "sgd":
            warnings.filterwarnings("ignore", ".*needs the moments of Adam.*")
        # By a clock of its own it would leave out slices on a busy machine.
        watcher = watch(every_n_train_steps=3, mode=mode, time_budget=None, **EVERYTHING)
        without = run_without(tmp_path, optimizer=optimizer)
        found = stateful_run(tmp_path, watcher, optimizer=optimizer)
    assert differences(without, found) == []
    assert steps(watcher) == [0, 3, 6]
    last = watcher.history[-1][1].slices
    known = {"plane_random", "plane_hessian", "plane_trajectory", "line_update", "convexity"}
    assert known <= set(last)
    assert ("plane_adam" in last) == (optimizer == "adam")


@pytest.mark.parametrize(
    "watching",
    [
        pytest.param({"num_samples": 12}, id="late start"),
        pytest.param({"evaluation": "vmap", "loss": plain_loss}, id="vmap"),
        pytest.param({**DRAWN, "mesh": True, "surface": True}, id="figures"),
        pytest.param({**DRAWN, "interpolate": True}, id="interpolated figures"),
        pytest.param(
            {**DRAWN, "refine": True, "plane_points": 7, "lines": [], "every_n_train_steps": 6},
            id="refined",
        ),
        pytest.param({"dropout": True}, id="dropout"),
        pytest.param({"time_budget": 1e-3}, id="no time"),
        pytest.param({"dataloader": loader(shuffle=True)}, id="loader"),
    ],
)  # fmt: skip
def test_settings_end_in_the_same_bits(tmp_path, watching):
    watcher = watch(**{"every_n_train_steps": 2, **watching})
    assert differences(run_without(tmp_path), stateful_run(tmp_path, watcher)) == []
    assert steps(watcher)[0] == 0


def test_slices_that_a_time_budget_cut_are_told_once(tmp_path, caplog):
    watcher = watch(
        every_n_train_steps=2, time_budget=1e-9, plane_points=5, line_points=7, planes=["random"],
        lines=["random"], convexity_points=3, num_rays=3,
    )  # fmt: skip
    with caplog.at_level("INFO"):
        fit(tmp_path, watcher)
    said = [r.message for r in caplog.records if "was over before" in r.message]
    (line,) = said
    assert re.fullmatch(
        r"LossLandscapeMonitor: time_budget=1e-09 s was over before all points were there: "
        r"plane_random has \d+ of 25 points; line_random has \d of 7 points; convexity has 1 of 9 "
        r"points; basin has 1 of 3 rays. Coarse pictures are drawn of them. Raise time_budget "
        r"\(None: no limit\), or ask for fewer points, slices or samples.", line
    )  # fmt: skip
    assert len(watcher.history) > 1
    text = watcher.report.summary()
    assert re.search(r"on \d+ of 25 points \(time_budget was over\)", text)
    assert re.search(r"on \d of 7 points \(time_budget was over\)", text)
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(tmp_path, watch(every_n_train_steps=2, num_rays=2))
    assert not [r for r in caplog.records if "was over before" in r.message]


def test_all_monitors_together_end_in_the_same_bits(tmp_path):
    without = run_without(tmp_path)
    watcher = watch(
        every_n_train_steps=1,
        metrics={"accuracy": MulticlassAccuracy(2)},
        predict=lambda m, b: (m.net(b[0]), b[1]),
    )
    trainer = fit(
        tmp_path, watcher, Stateful, lambda: loader(20, shuffle=True), loader,
        callbacks=[HessianMonitor(every_n_train_steps=2, num_steps=3, num_probes=2, num_samples=4)],
        logger=TensorBoardLogger(tmp_path, name="both"), max_epochs=2,
        accumulate_grad_batches=2, gradient_clip_val=0.5,
    )  # fmt: skip
    found = outcome(trainer)
    # The order of samples is noted by a callback that this run has not.
    assert [d for d in differences(without, found) if not d.startswith("/order")] == []


@pytest.mark.parametrize(
    ("at", "check", "lost"), [(1, False, 2), (5, False, 1), (9, False, 1), (5, True, 2)]
)
def test_an_exception_in_a_measurement_leaves_the_same_bits_and_a_gap(tmp_path, at, check, lost):
    without = run_without(tmp_path)
    loss = Raising(at)
    watcher = watch(every_n_train_steps=1, loss=loss, check=check)
    with pytest.warns(UserWarning, match=r"LossLandscapeMonitor: .*the loss raises here"):
        found = stateful_run(tmp_path, watcher)
    assert differences(without, found) == []
    assert loss.calls > at
    # The slice that it hit is missing, or all where the centre or the self-check was hit; no
    # other is.
    found = [len(report.slices) for _, report in watcher.history]
    assert 2 * 7 - sum(found) == lost


def test_the_event_file_holds_every_tag_step_and_picture(tmp_path):
    watcher = watch(
        every_n_train_steps=4, figures=True, mesh=True, scalars="all", lines=["random", "top1"],
        planes=["random", "trajectory"], num_rays=2, convexity_points=3, surface=True,
        metrics={"accuracy": MulticlassAccuracy(2)}, predict=lambda m, b: (m.net(b[0]), b[1]),
    )  # fmt: skip
    trainer = fit(tmp_path, watcher, logger=TensorBoardLogger(tmp_path, version="a"), max_epochs=2)
    trainer.logger.finalize("success")
    found = events(trainer.logger.log_dir)
    images = {
        "plane_random", "plane_random_accuracy", "plane_trajectory", "plane_trajectory_accuracy",
        "surface_random", "surface_trajectory", "lines", "convexity", "basin",
    }  # fmt: skip
    assert set(found.Tags()["images"]) == {f"landscape/{name}" for name in images}
    assert [e.step for e in found.Images("landscape/plane_random")] == [0, 4, 8]
    # A path of one or two points has no plane.
    assert [e.step for e in found.Images("landscape/plane_trajectory")] == [4, 8]
    picture = found.Images("landscape/plane_random")[0]
    assert picture.width >= 500
    assert picture.height >= 400
    logged = scalars(found)
    for tag in (
        "loss", "plane_random/loss_min", "plane_random/loss_max",
        "line_top1/curvature", "line_top1/curvature_error", "line_top1/eigenvalue",
        "line_top1/residual", "convexity/centre", "basin/effective_radius",
        "basin/effective_radius_sem", "basin/log10_volume", "basin/log10_volume_error",
    ):  # fmt: skip
        assert [step for step, _ in logged[f"landscape/{tag}"]] == [0, 4, 8], tag
    assert [step for step, _ in logged["zz_landscape_cost/seconds"]] == [0, 4, 8]
    # Before the pace of the run is known there is no share of it.
    assert [step for step, _ in logged["landscape/overhead"]] == [4, 8]
    assert "landscape/plane_trajectory/explained" in logged
    assert any("mesh_random" in tag for tag in found.Tags()["tensors"])
    folder = tmp_path / "lightning_logs" / "a" / "landscape"
    assert sorted(p.name for p in folder.iterdir()) == [
        "basin", "convexity", "line_random", "line_top1", "plane_random", "plane_trajectory",
        "report",
    ]  # fmt: skip
    saved = LossPlane.load(folder / "plane_random" / "step_00000008.npz")
    report = watcher.report.planes["random"]
    assert torch.equal(saved.loss, report.loss)
    assert torch.equal(saved.metrics["accuracy"], report.metrics["accuracy"])
    assert saved.facts == report.facts
    assert saved.figure().axes
    trajectory = LossPlane.load(folder / "plane_trajectory" / "step_00000008.npz")
    assert trajectory.path.steps.tolist() == list(range(9))


def test_the_centre_is_the_loss_of_the_held_batches(tmp_path):
    watcher = watch(every_n_train_steps=1)
    trainer = fit(tmp_path, watcher)
    module = trainer.lightning_module
    held = [next(iter(loader()))]
    expected = Objective(module, held, plain_loss)()
    plane = watcher.report.planes["random"]
    assert float(plane.loss[1, 1]) == expected == watcher.report.loss
    assert watcher.report.lines["random"].centre_loss == expected


def test_pictures_of_a_run_share_directions_and_scale(tmp_path):
    watcher = watch(every_n_train_steps=1, figures=True)
    drawn = []
    original = watcher.slices.figures

    def spy(result, history, moment):
        found = original(result, history, moment)
        drawn.append(found["plane_random"]())
        return found

    watcher.slices.figures = spy
    fit(tmp_path, watcher, logger=TensorBoardLogger(tmp_path))
    # The filled contours come first.
    scales = {f.axes[0].collections[0].get_clim() for f in drawn}
    assert len(drawn) == 5
    assert len(scales) == 1
    assert {r.planes["random"].facts.seed for _, r in watcher.history} == {0}


def test_reports_keep_no_vectors_and_the_monitor_neither_module_nor_batches(tmp_path):
    watcher = watch(every_n_train_steps=1, **EVERYTHING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*adam.*")
        fit(tmp_path, watcher, max_epochs=2)
    for _, report in watcher.history:
        for part in report.slices.values():
            assert all(d.vector.numel() == 0 for d in getattr(part, "directions", ()))
    assert not [v for v in vars(watcher).values() if isinstance(v, nn.Module)]
    assert watcher.slices.path.weights == []
    assert watcher.subject.held.batches == []


def test_what_cannot_be_had_is_said_once_and_the_rest_is_measured(tmp_path):
    watcher = watch(every_n_train_steps=1, planes=["random", "adam"])
    with pytest.warns(UserWarning, match=r"needs the moments of Adam, and SGD keeps none") as seen:
        fit(tmp_path, watcher, max_epochs=2)
    assert len([w for w in seen if "Adam" in str(w.message)]) == 1
    assert len(steps(watcher)) == 9
    assert all(set(r.planes) == {"random"} for _, r in watcher.history)


def test_stand_alone_validate_measures_on_its_batches(tmp_path):
    watcher = watch(lines=["top1"])
    trainer = quiet_trainer(tmp_path, [watcher], logger=TensorBoardLogger(tmp_path, version="v"))
    (found,) = trainer.validate(Evaluated(), loader(), verbose=False)
    assert found["landscape/loss"] == pytest.approx(watcher.report.loss)
    assert watcher.history == []
    assert watcher.report.lines["top1"].curvature == pytest.approx(
        found["landscape/line_top1/curvature"], rel=1e-5
    )


def test_fast_dev_run_runs_every_line_and_takes_no_time(tmp_path):
    watcher = LossLandscapeMonitor(num_rays=50, convexity_points=9, planes=["random", "hessian"])
    fit(tmp_path, watcher, fast_dev_run=1)
    assert watcher.report.planes["random"].loss.shape == (3, 3)
    assert watcher.report.convexity.ratio.shape == (3, 3)
    assert len(watcher.report.basin.radii) == 2


def test_planes_are_refined_and_their_costs_counted(tmp_path):
    watcher = watch(
        every_n_train_steps=4, refine=True, plane_points=7, figures=True, evaluation="loop",
        planes=["random", "gradient+random"],
    )  # fmt: skip
    trainer = fit(tmp_path, watcher, logger=TensorBoardLogger(tmp_path, version="r"))
    # What the part gives that training_step calls in the module's place.
    held = [next(iter(loader()))]
    axis = watcher.report.planes["random"].alphas
    module = trainer.lightning_module
    settings = {"alphas": axis, "betas": axis, "evaluation": "loop"}
    plain = loss_plane(module, held, refine=True, **settings)
    found = watcher.report.planes["random"]
    assert torch.equal(found.loss, plain.loss)
    assert torch.equal(found.fine.loss, plain.fine.loss)
    assert found.metrics == {}
    assert watcher.report.planes["gradient+random"].fine is not None
    # Said, drawn so, and saved.
    assert f"between them: {found.picture.words}" in watcher.report.summary()
    drawn = watcher.report.figures(4)["plane_random"]()
    notes = " ".join(" ".join(t.get_text().split()) for t in drawn.texts)
    assert "splines of the network's outputs" in notes
    file = tmp_path / "lightning_logs" / "r" / "landscape" / "plane_random" / "step_00000004.npz"
    assert torch.equal(LossPlane.load(file).fine.loss, found.fine.loss)
    more = [LandscapeSettings(refine=refine) for refine in (True, False)]
    passes = [s.passes_of_a_plane for s in more]
    assert passes == [pytest.approx((1 + PASSES_OF_REFINING) * 289), 289]
    assert Slices(more[0]).gradients > Slices(more[1]).gradients
    sizers = [SlicesSizer(Slices(s), dict.fromkeys(("lines", "plane_points", "line_points"), False))
              for s in more]  # fmt: skip
    # The first size that is too coarse to be refined costs the same.
    for refined, usual in zip(*(s._ladder(0) for s in sizers), strict=True):
        points = usual.plane_points
        assert refined.more - usual.more == round(PASSES_OF_REFINING * points**2) * (points >= 7)
    assert more[0].smallest().plane_points == 7


def test_a_plane_too_coarse_to_be_refined_says_so(tmp_path):
    watcher = watch(every_n_train_steps=4, refine=True, plane_points=5, evaluation="loop")
    with pytest.warns(UserWarning, match=r"not refined: there are 5 x 5 points\. Give 7 x 7 at"):
        fit(tmp_path, watcher)
    assert all(report.missing.keys() == {"refine"} for _, report in watcher.history)


def test_what_cannot_be_refined_is_one_gap_with_its_remedy_and_the_plane_is_there(tmp_path):
    def decayed(module, batch):
        return plain_loss(module, batch) + module.net[0].weight.square().sum()

    watcher = watch(
        every_n_train_steps=2, refine=True, plane_points=7, loss=decayed, evaluation="loop"
    )
    with pytest.warns(UserWarning, match="not refined: the loss is no function of the out") as told:
        fit(tmp_path, watcher)
    told = [t for t in told if "not refined" in str(t.message)]
    assert len(told) == 1
    assert "Give a loss that takes nothing else from the module, or refine=False." in str(
        told[0].message
    )
    assert steps(watcher) == [0, 2, 4]
    assert all(report.missing.keys() == {"refine"} for _, report in watcher.history)
    assert all(report.planes["random"].fine is None for _, report in watcher.history)


def test_parameters_in_shards_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(landscape_monitor, "shards_parameters", lambda *_: True)
    fit(tmp_path, watch())
    with pytest.raises(MisconfigurationException, match=r"refine=True\).*Give refine=False"):
        fit(tmp_path, watch(refine=True))


def test_a_logger_that_knows_no_images_gets_files(tmp_path):
    watcher = watch(every_n_train_steps=4, figures=True, mesh=True)
    fit(tmp_path, watcher, logger=CSVLogger(tmp_path, version="c"))
    folder = tmp_path / "lightning_logs" / "c"
    assert (folder / "figures" / "landscape" / "plane_random" / "step_00000004.png").exists()
    assert (folder / "landscape" / "line_random" / "step_00000004.npz").exists()


def test_a_full_disk_costs_the_files_and_nothing_else(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    watcher = watch(every_n_train_steps=2)
    with pytest.warns(UserWarning, match=r"saving arrays failed.*Free disk space"):
        fit(tmp_path, watcher, logger=TensorBoardLogger(tmp_path))
    assert steps(watcher) == [0, 2, 4]
    assert not list(tmp_path.rglob("*.part"))


def test_scalars_reach_callback_metrics(tmp_path):
    trainer = fit(tmp_path, watch(every_n_train_steps=2, num_rays=2))
    assert "landscape/basin/effective_radius" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"planes": "random"}, r"planes is 'random'; give a list"),
        ({"planes": ["up"]}, "planes: directions is 'up'"),
        ({"planes": ["random", "random"]}, "each name once"),
        ({"lines": ["hessian"]}, "lines: directions names 'hessian'"),
        ({"plane_points": 16}, "plane_points is 16; give an odd whole number"),
        ({"line_points": 2}, "line_points is 2; give an odd"),
        ({"convexity_points": 4}, "convexity_points is 4; give an odd"),
        ({"num_rays": -1}, "num_rays is -1"),
        ({"rise": 0}, "rise is 0"),
        ({"reach": -1.0}, r"reach is -1.0"),
        ({"normalization": "unit"}, "normalization is 'unit'"),
        ({"metrics": {"accuracy": "top1"}}, "of type str"),
        ({"mode": "train"}, "mode is 'train'"),
        ({"mode": "eval", "dropout": True}, "dropout is True"),
        ({"time_budget": -3}, "time_budget is -3"),
        ({"interpolate": "yes"}, "interpolate is 'yes'"),
        ({"refine": "yes"}, "refine is 'yes'"),
        ({"refine": True, "predict": plain_loss}, "predict is given.*refine=False or predict=None"),
        ({"cap": "10"}, "cap is '10'"),
        ({"planes": [], "lines": []}, "all empty"),
    ],
)
def test_bad_settings_fail_in_the_constructor(setting, message):
    with pytest.raises(ValueError, match=message):
        LossLandscapeMonitor(**setting)


def test_pages_need_plotly(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install plotly"):
        LossLandscapeMonitor(html=True)


def test_summary_says_what_was_found(tmp_path):
    watcher = watch(
        every_n_train_steps=4, planes=["random", "trajectory"], lines=["top1"], num_rays=3
    )
    fit(tmp_path, watcher, max_epochs=2)
    text = watcher.report.summary()
    for word in ("plane random", "path of training", "line top1", "eigenvalue", "effective radius"):
        assert word in text


def test_a_plain_module_is_left_untouched_by_everything(tmp_path):
    without = fit(tmp_path)
    watcher = watch(every_n_train_steps=1, **{**EVERYTHING, "planes": ["random", "trajectory"],
                                              "lines": ["update", "top1"]})  # fmt: skip
    found = fit(tmp_path, watcher)
    assert (
        differences(without.lightning_module.state_dict(), found.lightning_module.state_dict())
        == []
    )
    assert isinstance(found.lightning_module, Plain)


def test_manual_optimization_works_with_a_loss_and_is_refused_without(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"manual optimization.*\n.*loss(.|\n)*loss=loss"
    ):
        fit(tmp_path, watch(), Manual)
    watcher = watch(every_n_train_steps=2, loss=plain_loss)
    without = outcome(fit(tmp_path, None, Manual))
    assert differences(without, outcome(fit(tmp_path, watcher, Manual))) == []
    assert len(watcher.history) > 1


class TakesIterator(Plain):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return plain_loss(self, batch)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*", "ignore:.*batch_size.*")
@pytest.mark.parametrize("loss", [None, plain_loss])
def test_a_step_that_takes_the_iterator_is_measured(tmp_path, loss):
    watcher = watch(every_n_train_steps=2, loss=loss)
    hessian = HessianMonitor(
        every_n_train_steps=2, num_steps=2, num_probes=2, loss=loss, num_samples=4
    )
    without = outcome(fit(tmp_path, None, TakesIterator))
    assert differences(without, outcome(fit(tmp_path, watcher, TakesIterator))) == []
    fit(tmp_path, hessian, TakesIterator)
    assert len(watcher.history) > 1
    assert len(hessian.history) > 1


def test_a_fixed_cutoff_is_the_rim_of_every_firing(tmp_path):
    """And where the loss is not below it yet there is one warning and a gap."""
    settings = {"planes": [], "lines": ["random"], "line_points": 3, "num_rays": 2,
                "every_n_train_steps": 2, "num_samples": 8, "figures": False,
                "save_arrays": False}  # fmt: skip
    watching = LossLandscapeMonitor(cutoff=5.0, **settings)
    fit(tmp_path, watching)
    assert len(watching.history) > 2
    assert {report.basin.cutoff for _, report in watching.history} == {5.0}
    low = LossLandscapeMonitor(cutoff=1e-3, **settings)
    with pytest.warns(UserWarning, match="cutoff 0.001 is not above the loss") as caught:
        fit(tmp_path, low)
    assert len([w for w in caught if "cutoff" in str(w.message)]) == 1
    assert {report.basin for _, report in low.history} == {None}
    with pytest.raises(ValueError, match="cutoff is '5'"):
        LossLandscapeMonitor(cutoff="5")

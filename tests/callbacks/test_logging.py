"""What a run leaves in loggers, files, callback metrics and progress bars."""

import csv
import io
import math
import sys
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tqdm.auto import tqdm

from lla_callbacks import LossLandscapeMonitor

from .modules import Evaluated, Plain, events, fit, loader, monitor, plain_loss, scalars, steps

PNG = b"\x89PNG\r\n\x1a\n"
FEW = ["lambda_max", "lambda_min", "trace", "loss", "gradient_norm"]
SCALES = ["trace_times_norm2", "weight_norm"]
COUNTS = ["num_matvecs", "num_steps", "seconds"]
ENDS = [
    "lambda_max", "lambda_min", "lambda_max_beyond", "lambda_min_beyond", "trace",
    "filter_curvature",
]  # fmt: skip
BANDS = ["lambda_max", "lambda_min", "trace", "kh05"]
CRITERIA = [
    "kh05",
    "kh1",
    "negative_mass",
    "effective_dimension",
    "c_t",
    "r_e",
    "mainly_positive",
    "frobenius_norm",
    "stable_rank",
    "eigenvalue_ratio",
    "gradient_share",
    "stability",
]
# 12 batches, two of them an optimizer step, two epochs: 12 steps.
MEASURED = [0, 5, 10, 12]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train once with TensorBoard and return the monitor, the Trainer and the event file."""
    watcher = monitor(
        every_n_train_steps=5, num_steps=8, num_samples=8, figures=True, scalars="all"
    )
    folder = tmp_path_factory.mktemp("run")
    trainer = fit(
        folder,
        watcher,
        Plain,
        lambda: loader(48),
        logger=TensorBoardLogger(folder),
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    trainer.logger.finalize("success")
    return watcher, trainer, events(trainer.logger.log_dir)


def expected_tags(report):
    """Return every tag with a value for one report, spelled out."""
    values = report.criteria | {"filter_curvature": report.filter_curvature}
    errors = report.criteria_errors | {"filter_curvature": report.filter_curvature_sem}
    finite = [
        tag for tag in [*CRITERIA, "filter_curvature"]
        if math.isfinite(values[tag]) and (tag == "kh05" or not abs(values[tag]) <= errors[tag])
    ]  # fmt: skip
    edge = ["lambda_max_limit"] if report.criteria["stability"] > 0 < report.lambda_max else []
    few = {*FEW, *({"kh05", "stability"} & {*finite}), *edge}
    known = [tag for tag in CRITERIA if math.isfinite(report.criteria_errors[tag])]
    banded = [tag for tag in BANDS if tag != "kh05" or {"kh05"} <= {*finite} & {*known}]
    return {
        *(f"hessian/{tag}" for tag in few),
        *(f"hessian_criteria/{tag}" for tag in {*SCALES, *finite} - few),
        *(f"zz_hessian_cost/{tag}" for tag in COUNTS),
        *(f"zz_hessian_errors/{tag}" for tag in ENDS + known),
        *(f"zz_hessian_bands/{tag}_{end}" for tag in banded for end in ("lower", "upper")),
        *(
            f"hessian_layers/net.{i}/{tag}"
            for i in (0, 2)
            for tag in ("trace", "trace_sem", *SCALES)
        ),
    }


def test_measurements_happen_at_the_start_on_schedule_and_at_the_end(run):
    assert steps(run[0]) == MEASURED


@pytest.mark.parametrize("index", range(4))
def test_event_file_holds_exactly_the_tags_of_each_step(run, index):
    watcher, _, accumulator = run
    step, report = watcher.history[index]
    found = {
        tag
        for tag, values in scalars(accumulator).items()
        if tag.removeprefix("zz_").startswith("hessian") and step in dict(values)
    }
    # Before the pace of the run is known there is no share of it.
    assert found == expected_tags(report) | ({"hessian/overhead"} if step else set())


def test_event_file_holds_no_other_steps_and_none_twice(run):
    found = scalars(run[2])
    assert [step for step, _ in found["hessian/trace"]] == MEASURED
    assert {
        tag for tag, values in found.items() if len({s for s, _ in values}) != len(values)
    } == set()
    ours = {t: v for t, v in found.items() if t.removeprefix("zz_").startswith("hessian")}
    assert {s for v in ours.values() for s, _ in v} == {*MEASURED}


def test_event_file_holds_the_numbers_of_the_reports(run):
    watcher, _, accumulator = run
    found = scalars(accumulator)
    for tag, name in [("trace", "trace"), ("lambda_max", "lambda_max"), ("loss", "loss")]:
        reported = [np.float32(getattr(report, name)) for _, report in watcher.history]
        assert [np.float32(v) for _, v in found[f"hessian/{tag}"]] == reported
    upper = [np.float32(r.trace + 2 * r.trace_sem) for _, r in watcher.history]
    assert [np.float32(v) for _, v in found["zz_hessian_bands/trace_upper"]] == upper
    layer = [np.float32(r.layer_traces["net.2"].value) for _, r in watcher.history]
    assert [np.float32(v) for _, v in found["hessian_layers/net.2/trace"]] == layer


def test_measured_loss_is_that_of_the_held_batches_at_the_step(run):
    """The start is measured after a batch has passed, yet on the weights before it."""
    watcher, trainer, _ = run
    pl.seed_everything(3, verbose=False)
    at_start = Plain()
    batches = list(loader(48))[:2]
    for module, (step, report) in [
        (at_start, watcher.history[0]),
        (trainer.lightning_module, watcher.history[-1]),
    ]:
        loss = torch.stack([plain_loss(module, batch) for batch in batches]).mean()
        assert report.loss == pytest.approx(float(loss.detach()), rel=1e-6), step
        assert report.num_samples == 8


def test_stability_is_that_of_sgd_at_every_step_and_at_the_start(run):
    for _, report in run[0].history:
        assert report.criteria["stability"] == pytest.approx(0.1 / 2 * report.lambda_max)


@pytest.mark.parametrize(
    ("tag", "at"),
    [
        ("density", MEASURED),
        ("layer_traces", MEASURED),
        ("history", MEASURED[1:]),
        ("layer_history", MEASURED[1:]),
    ],
)
def test_event_file_holds_images(run, tag, at):
    images = run[2].Images(f"hessian/{tag}")
    assert [image.step for image in images] == at
    assert all(image.encoded_image_string.startswith(PNG) for image in images)
    assert all(len(image.encoded_image_string) > 5000 for image in images)
    assert all(image.width > 300 and image.height > 100 for image in images)


def test_event_file_holds_no_other_images(run):
    assert {*run[2].Tags()["images"]} == {
        f"hessian/{tag}" for tag in ("density", "layer_traces", "history", "layer_history")
    }


def test_event_file_holds_a_layout_of_tags_that_exist(run):
    stored = run[2].Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(stored[0].tensor_proto.string_val[0])
    assert len(stored) == 1
    assert [category.title for category in layout.category] == ["hessian"]
    margins = [series for c in layout.category[0].chart for series in c.margin.series]
    tags = {tag for m in margins for tag in (m.value, m.lower, m.upper)}
    assert len(margins) == 4
    assert tags <= {*run[2].Tags()["scalars"]}


def test_layout_is_left_out_on_request(tmp_path):
    watcher = monitor(custom_scalars=False)
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, watcher, logger=logger)
    assert "custom_scalars__config__" not in events(logger.log_dir).Tags()["tensors"]


@pytest.mark.parametrize("index", range(4))
def test_arrays_agree_with_the_scalars(run, index):
    watcher, trainer, accumulator = run
    step = MEASURED[index]
    folder = trainer.logger.log_dir
    with np.load(f"{folder}/hessian/step_{step:08d}.npz", allow_pickle=False) as arrays:
        logged = {tag: dict(values).get(step) for tag, values in scalars(accumulator).items()}
        for name in FEW:
            assert np.float32(arrays[name]) == np.float32(logged[f"hessian/{name}"])
        assert np.float32(arrays["trace_sem"]) == np.float32(logged["zz_hessian_errors/trace"])
        found = 0
        for name, (value, _) in zip(arrays["criteria_names"], arrays["criteria"], strict=True):
            tag = f"hessian/{name}" if name in ("kh05", "stability") else f"hessian_criteria/{name}"
            if logged.get(tag) is not None:
                found += 1
                assert np.float32(value) == np.float32(logged[tag])
        assert found > 5
        for name, (value, sem) in zip(arrays["layer_names"], arrays["layer_traces"], strict=True):
            assert np.float32(value) == np.float32(logged[f"hessian_layers/{name}/trace"])
            assert np.float32(sem) == np.float32(logged[f"hessian_layers/{name}/trace_sem"])
        assert arrays["weights"].sum() == pytest.approx(1)
        assert (arrays["nodes"] == watcher.history[index][1].nodes.numpy()).all()


def test_no_other_arrays_are_written(run, tmp_path):
    folder = tmp_path.__class__(run[1].logger.log_dir)
    assert sorted(p.name for p in folder.glob("**/*.npz")) == [
        f"step_{step:08d}.npz" for step in MEASURED
    ]


def test_arrays_are_left_out_on_request(tmp_path):
    fit(tmp_path, monitor(save_arrays=False), logger=TensorBoardLogger(tmp_path))
    assert list(tmp_path.glob("**/*.npz")) == []


def test_last_values_are_in_the_callback_metrics(run):
    watcher, trainer, accumulator = run
    last = watcher.history[-1][1]
    found = {t: float(v) for t, v in trainer.callback_metrics.items() if "hessian" in t}
    written = scalars(accumulator)
    assert found["hessian/trace"] == np.float32(last.trace)
    assert found["hessian/lambda_max"] == np.float32(last.lambda_max)
    # What comes last in the logs is nothing to stop by.
    assert {*found} == {t for t in expected_tags(last) if not t.startswith("zz_")} | {
        "hessian/overhead"
    }
    assert found["hessian/overhead"] == written["hessian/overhead"][-1][1]
    assert written["zz_hessian_cost/seconds"][-1][1] > 0
    assert found["hessian/overhead"] > 0


def test_values_stay_in_the_callback_metrics_through_validation(tmp_path):
    seen = []

    class Reader(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append("hessian/trace" in trainer.callback_metrics)

    fit(
        tmp_path,
        monitor(),
        Evaluated,
        val=loader,
        callbacks=[Reader()],
        max_epochs=2,
        num_sanity_val_steps=0,
    )
    assert seen == [True, True]


def test_name_is_the_first_part_of_every_tag(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, monitor(name="curvature", figures=True), logger=logger, max_steps=1)
    tags = events(logger.log_dir).Tags()
    ours = [tag for tag in tags["scalars"] + tags["images"] if "curvature" in tag]
    assert not [tag for tag in tags["scalars"] + tags["images"] if "hessian" in tag]
    assert {tag.split("/")[0] for tag in ours} == {
        "curvature",
        "curvature_layers",
        "zz_curvature_errors",
        "zz_curvature_bands",
    }
    assert len(list(tmp_path.glob("**/curvature/step_*.npz"))) == 2


def test_checkpoints_can_follow_the_trace(tmp_path):
    best = ModelCheckpoint(
        tmp_path / "kept",
        filename="{step}",
        monitor="hessian/trace",
        mode="min",
        every_n_train_steps=2,
        save_top_k=1,
    )
    watcher = monitor(every_n_train_steps=2)
    fit(
        tmp_path,
        watcher,
        train=lambda: loader(40),
        callbacks=[best],
        enable_checkpointing=True,
    )
    traces = {step: report.trace for step, report in watcher.history if step > 0}
    least = min(traces, key=traces.get)
    assert {*traces} == {2, 4, 6, 8, 10}
    assert float(best.best_model_score) == np.float32(traces[least])
    assert best.best_model_path.endswith(f"step={least}.ckpt")


@pytest.mark.parametrize("val", [None, loader], ids=["train only", "with validation"])
@pytest.mark.parametrize(("threshold", "epochs"), [(1e9, 1), (-1e9, 3)])
def test_training_can_stop_early_on_the_trace(tmp_path, val, threshold, epochs):
    # Any trace is below the large threshold, so that the first look at it ends the run.
    stop = EarlyStopping("hessian/trace", mode="min", stopping_threshold=threshold, patience=9)
    watcher = monitor(every_n_train_steps=1)
    module = Plain if val is None else Evaluated
    trainer = fit(tmp_path, watcher, module, val=val, callbacks=[stop], max_epochs=3)
    assert trainer.global_step == 4 * epochs
    if epochs == 3:
        at_epoch_ends = [report.trace for step, report in watcher.history if step in (4, 8, 12)]
        assert float(stop.best_score) == np.float32(min(at_epoch_ends))


def test_csv_logger_gets_scalars_and_figures(tmp_path):
    logger = CSVLogger(tmp_path)
    watcher = monitor(every_n_train_steps=2, figures=True)
    fit(tmp_path, watcher, logger=logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["hessian/trace"]]
    assert [int(row["step"]) for row in rows] == steps(watcher) == [0, 2, 4]
    assert [float(row["hessian/trace"]) for row in rows] == [r.trace for _, r in watcher.history]
    figures = sorted(tmp_path.glob("**/*.png"))
    assert {str(p.relative_to(logger.log_dir)) for p in figures} == {
        *(f"figures/hessian/density/step_{step:08d}.png" for step in (0, 2, 4)),
        *(f"figures/hessian/layer_traces/step_{step:08d}.png" for step in (0, 2, 4)),
        *(f"figures/hessian/history/step_{step:08d}.png" for step in (2, 4)),
        *(f"figures/hessian/layer_history/step_{step:08d}.png" for step in (2, 4)),
    }
    assert all(figure.read_bytes().startswith(PNG) for figure in figures)


class Recording(Logger):
    """A third-party logger that notes what it is given."""

    def __init__(self, experiment=None, save_dir=None):
        super().__init__()
        self.metrics = []
        self.figures = []
        self._experiment = experiment
        self._save_dir = save_dir

    name = "recording"
    version = "0"

    @property
    def experiment(self):
        return self._experiment

    @property
    def save_dir(self):
        return self._save_dir

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params):
        raise AssertionError("the monitor logs no hyperparameters")

    def measured(self):
        return [step for step, metrics in self.metrics if "hessian/trace" in metrics]


class ImageLogger(Recording):
    """Takes figures as Weights and Biases does."""

    def log_image(self, key, images, step=None):
        # Reading the pixels fails for an image whose file is closed or empty.
        self.figures += [(key, step, image.size, image.getpixel((0, 0))) for image in images]


class FigureExperiment:
    """Takes figures as MLflow and Comet do; the former by run and file name."""

    def __init__(self):
        self.calls = []

    def log_figure(self, *args, **kwargs):
        self.calls.append((args, kwargs))


class RunLogger(Recording):
    run_id = "run-7"


FIGURES = [
    ("hessian/density", 0),
    ("hessian/layer_traces", 0),
    ("hessian/density", 4),
    ("hessian/history", 4),
    ("hessian/layer_traces", 4),
    ("hessian/layer_history", 4),
]


def test_weights_and_biases_like_logger_gets_images(tmp_path):
    logger = ImageLogger()
    fit(tmp_path, monitor(figures=True), logger=logger, max_epochs=1)
    assert [(key, step) for key, step, _, _ in logger.figures] == FIGURES
    assert all(width > 300 and height > 100 for _, _, (width, height), _ in logger.figures)
    assert logger.measured() == [0, 4]


def test_mlflow_like_logger_gets_figures(tmp_path):
    logger = RunLogger(FigureExperiment())
    fit(tmp_path, monitor(figures=True), logger=logger)
    calls = logger.experiment.calls
    names = [f"{tag}/step_{step:08d}.png" for tag, step in FIGURES]
    assert [(args[0], args[2]) for args, _ in calls] == [("run-7", name) for name in names]
    assert all(callable(args[1].savefig) and not kwargs for args, kwargs in calls)
    assert logger.measured() == [0, 4]


def test_comet_like_logger_gets_figures(tmp_path):
    logger = Recording(FigureExperiment())
    fit(tmp_path, monitor(figures=True), logger=logger)
    calls = logger.experiment.calls
    assert [(kwargs["figure_name"], kwargs["step"]) for _, kwargs in calls] == FIGURES
    assert all(callable(kwargs["figure"].savefig) and not args for args, kwargs in calls)
    assert logger.measured() == [0, 4]


def test_logger_without_experiment_or_folder_gets_the_scalars(tmp_path):
    logger = Recording()
    fit(tmp_path, monitor(figures=True), logger=logger)
    assert logger.measured() == [0, 4]
    assert list(tmp_path.glob("**/*")) == []


def test_several_loggers_get_the_same(tmp_path):
    board, table, other = TensorBoardLogger(tmp_path), CSVLogger(tmp_path), ImageLogger()
    fit(tmp_path, monitor(figures=True), logger=[board, table, other])
    accumulator = events(board.log_dir)
    logged = [
        metrics["hessian/trace"] for _, metrics in other.metrics if "hessian/trace" in metrics
    ]
    assert [(key, step) for key, step, _, _ in other.figures] == FIGURES
    assert [v for _, v in scalars(accumulator)["hessian/trace"]] == [np.float32(v) for v in logged]
    assert len(accumulator.Images("hessian/density")) == 2
    assert len(list(tmp_path.glob("**/*.png"))) == len(FIGURES)
    for logger in (board, table):
        assert len(list(tmp_path.__class__(logger.log_dir).glob("hessian/*.npz"))) == 2


def test_without_logger_nothing_is_written_and_everything_is_measured(tmp_path):
    watcher = monitor(figures=True)
    trainer = fit(tmp_path, watcher, logger=False)
    assert steps(watcher) == [0, 4]
    assert float(trainer.callback_metrics["hessian/trace"]) == np.float32(
        watcher.history[-1][1].trace
    )
    assert list(tmp_path.glob("**/*")) == []


class Slow:
    """A loss that may take long enough for tqdm to draw, and notes the Trainer's bar."""

    def __init__(self, seconds=0.0):
        self.displays = []
        self.seconds = seconds

    def __call__(self, module, batch):
        self.displays.append(getattr(module.trainer.progress_bar_callback, "progress", None))
        time.sleep(self.seconds)
        return plain_loss(module, batch)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["bar after", "bar before"])
def test_rich_bar_shows_the_measurement_and_hides_it_again(tmp_path, leave, first):
    screen = io.StringIO()
    options = {"file": screen, "force_terminal": True, "width": 100}
    bar = RichProgressBar(refresh_rate=1, leave=leave, console_kwargs=options)
    loss = Slow()
    watcher = monitor(loss=loss, every_n_epochs=1, num_samples=4, check=False)
    fit(
        tmp_path,
        # The order of callbacks decides who starts and stops first.
        *([None] if first else [watcher]),
        make_module=Evaluated,
        val=loader,
        callbacks=[bar, watcher] if first else [bar],
        enable_progress_bar=True,
        max_epochs=2,
    )
    shown = screen.getvalue()
    assert steps(watcher) == [0, 4, 8]
    assert "Hessian" in shown
    assert "Epoch 1/1" in shown
    # What the last line break leaves on the screen is the training bar alone.
    assert "Hessian" not in shown.rpartition("Epoch 1/1")[2]
    displays = [display for display in loss.displays if display is not None]
    tasks = [task for display in displays for task in display.tasks]
    ours = [task for task in tasks if "Hessian" in task.description]
    # One pass a measurement, and one to see what it takes in memory.
    assert len(displays) == 4
    assert ours
    assert not any(task.visible for task in ours)
    assert not any(display.live.is_started for display in displays)


def test_tqdm_bar_shows_the_measurement_and_leaves_nothing(tmp_path, capsys):
    watcher = monitor(loss=Slow(0.6), check=False)
    fit(
        tmp_path,
        watcher,
        Evaluated,
        val=loader,
        callbacks=[TQDMProgressBar(refresh_rate=1)],
        enable_progress_bar=True,
    )
    shown = capsys.readouterr().out
    assert steps(watcher) == [0, 4]
    assert "Hessian" in shown
    assert "Epoch 0" in shown
    assert "Hessian" not in shown.rpartition("\n")[2].rpartition("\r")[2]
    assert len(tqdm._instances) == 0
    assert sys.stdout.writable()


def test_few_scalars_are_logged_and_all_can_be_stopped_by(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(tmp_path, monitor(every_n_train_steps=2), logger=logger)
    logger.finalize("success")
    ours = [tag for tag in scalars(events(logger.log_dir)) if "hessian" in tag]
    first = [tag for tag in ours if tag.startswith("hessian/")]
    assert {"hessian/lambda_max", "hessian/trace", "hessian/loss", "hessian/stability"} <= {*first}
    assert len(first) <= 9
    assert {tag.split("/")[0] for tag in ours if not tag.startswith("hessian/")} == {
        "hessian_layers", "zz_hessian_errors", "zz_hessian_bands",
    }  # fmt: skip
    assert sorted(ours)[: len(first)] == sorted(first)
    assert "hessian_criteria/stable_rank" in trainer.callback_metrics


def test_texts_say_each_measurement_and_what_changed(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    watcher = monitor(every_n_train_steps=2)
    fit(tmp_path, watcher, logger=logger)
    logger.finalize("success")
    found = events(logger.log_dir).Tensors("hessian/summary/text_summary")
    assert [event.step for event in found] == steps(watcher) == [0, 2, 4]
    texts = [event.tensor_proto.string_val[0].decode() for event in found]
    assert "| | now | step 2 | |" in texts[2]
    assert "| λmax |" in texts[0]
    assert all(
        watcher.history[k][1].summary().splitlines()[0] in text for k, text in enumerate(texts)
    )


class WithHparams(Plain):
    def __init__(self, width=3, **settings):
        super().__init__(**settings)
        self.save_hyperparameters("width")


def hparams_of(folder):
    """What TensorBoard's table reads of a run: the first record of each kind."""
    found = events(folder)
    tags = {"experiment": None, "session_start_info": None}
    for kind in tags:
        content = found.SummaryMetadata(f"_hparams_/{kind}").plugin_data.content
        tags[kind] = plugin_data_pb2.HParamsPluginData.FromString(content)
    metrics = [m.name.tag for m in tags["experiment"].experiment.metric_infos]
    return dict(tags["session_start_info"].session_start_info.hparams), metrics


@pytest.mark.parametrize(
    ("module", "placeholder", "known", "first"),
    [
        (WithHparams, True, {"width"}, "hp_metric"),
        (WithHparams, False, {"width"}, "hessian/lambda_max"),
        (Plain, True, {"curvature"}, "hessian/lambda_max"),
    ],
)
def test_the_table_has_final_values_beside_the_users_hyperparameters(
    tmp_path, module, placeholder, known, first
):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=placeholder)
    slices = LossLandscapeMonitor(num_samples=2, planes=[], lines=["random"], line_points=5)
    fit(tmp_path, monitor(), module, logger=logger, callbacks=[slices])
    logger.finalize("success")
    params, metrics = hparams_of(logger.log_dir)
    assert {*params} == known
    assert first in metrics
    assert ("hp_metric" in metrics) == (first == "hp_metric")
    assert {"hessian/lambda_max", "hessian/trace", "hessian/loss"} <= {*metrics}
    # Slices have no eigenvalues of their own.
    assert {m for m in metrics if m.startswith("landscape")} == {
        "landscape/loss", "landscape/overhead",
    }  # fmt: skip
    found = scalars(events(logger.log_dir))
    assert ("hp_metric" in found) == (module is WithHparams and placeholder)


class OwnMetrics(WithHparams):
    def on_train_start(self):
        self.logger.log_hyperparams(self.hparams, {"accuracy": 0.0})


def test_a_table_of_the_users_own_stays_as_it_is(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    fit(tmp_path, monitor(), OwnMetrics, logger=logger)
    logger.finalize("success")
    assert hparams_of(logger.log_dir)[1] == ["accuracy"]

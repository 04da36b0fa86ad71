"""What a monitor that looks at layers leaves in loggers, files and the log."""

import logging
import math

import numpy as np
import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from .modules import events, fit, loader, monitor, scalars, steps

LAYERS = ["net.0", "net.2"]
ALWAYS = ["trace", "trace_sem", "trace_times_norm2", "weight_norm"]
OF_SPECTRA = [
    "lambda_max",
    "lambda_max_residual",
    "lambda_min",
    "lambda_min_residual",
    "distance",
    "distance_error",
    "published_distance",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train once with every layer's spectrum and return the monitor and the event file."""
    watcher = monitor(
        every_n_train_steps=4,
        num_samples=8,
        num_steps=6,
        num_layer_steps=4,
        num_layer_probes=5,
        figures=True,
        scalars=["layers"],
    )
    folder = tmp_path_factory.mktemp("layers")
    trainer = fit(folder, watcher, train=lambda: loader(32), logger=TensorBoardLogger(folder))
    trainer.logger.finalize("success")
    return watcher, events(trainer.logger.log_dir), trainer.logger.log_dir


def test_event_file_holds_exactly_the_tags_of_every_layer(run):
    found = {tag for tag in scalars(run[1]) if tag.startswith("hessian_layers/")}
    assert found == {
        f"hessian_layers/{layer}/{tag}" for layer in LAYERS for tag in ALWAYS + OF_SPECTRA
    }


def test_event_file_holds_the_numbers_of_the_reports(run):
    watcher, accumulator, _ = run
    assert steps(watcher) == [0, 4, 8]
    found = scalars(accumulator)
    for layer in LAYERS:
        reported = [report.layers[layer] for _, report in watcher.history]
        for tag, values in {
            "trace_times_norm2": [m.trace * m.norm**2 for m in reported],
            "weight_norm": [m.norm for m in reported],
            "lambda_max": [m.spectrum.lambda_max for m in reported],
            "lambda_min_residual": [m.spectrum.lambda_min.residual for m in reported],
            "distance": [m.spectrum.distance for m in reported],
            "distance_error": [m.spectrum.distance_error for m in reported],
            "published_distance": [m.spectrum.published_distance for m in reported],
        }.items():
            logged = [np.float32(value) for _, value in found[f"hessian_layers/{layer}/{tag}"]]
            assert logged == [np.float32(value) for value in values], tag


def test_event_file_holds_the_layers_figures(run):
    _, accumulator, _ = run
    for tag, at in {
        "layer_traces": [0, 4, 8],
        "layer_densities": [0, 4, 8],
        "layer_distances": [0, 4, 8],
        "layer_history": [4, 8],
    }.items():
        images = accumulator.Images(f"hessian/{tag}")
        assert [image.step for image in images] == at
        assert all(len(image.encoded_image_string) > 5000 for image in images)


def test_arrays_hold_the_layers_spectra(run):
    watcher, _, folder = run
    with np.load(f"{folder}/hessian/step_00000004.npz", allow_pickle=False) as arrays:
        assert arrays["layer_names"].tolist() == LAYERS
        assert arrays["layer_run_sizes"].tolist() == [[4], [4]]
        report = watcher.history[1][1]
        assert arrays["num_block_matvecs"] == report.num_block_matvecs > 0
        for (value, error), layer in zip(
            arrays["layer_distance"], report.layers.values(), strict=True
        ):
            assert value == layer.spectrum.distance
            assert error == layer.spectrum.distance_error


def test_parameters_of_no_layer_are_said_once_before_training(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        watcher = monitor(every_n_train_steps=1, layers=["net.2"])
        fit(tmp_path, watcher)
        fit(tmp_path, monitor(layers="blocks"))
    said = [r.getMessage() for r in caplog.records if "belong to none" in r.getMessage()]
    assert said == [
        "HessianMonitor: 1 layers are told apart; 16 of 26 parameters belong to none "
        "(net.0.weight, net.0.bias)."
    ]
    assert watcher.report.unlayered == ("net.0.weight", "net.0.bias")


def test_a_predicate_chooses_layers(tmp_path):
    watcher = monitor(layers=lambda path, module: path.endswith("2"), num_layer_steps=2)
    fit(tmp_path, watcher)
    assert [*watcher.report.layers] == ["net.2"]
    assert watcher.report.layers["net.2"].spectrum.run_sizes == (2,)


def test_a_fast_dev_run_measures_every_layer_briefly(tmp_path):
    watcher = monitor(num_layer_steps=50, num_layer_probes=50, num_steps=50)
    fit(tmp_path, watcher, fast_dev_run=True)
    for layer in watcher.report.layers.values():
        assert layer.spectrum.run_sizes == (2,)
        assert layer.num_matvecs <= 4


def test_progress_counts_the_layers_products(tmp_path, monkeypatch):
    from contextlib import contextmanager

    from lla_callbacks.callbacks import firing

    seen = []

    @contextmanager
    def progress(trainer, text, total):
        counts = []
        yield counts.append
        seen.append((total, sum(counts)))

    monkeypatch.setattr(firing, "progress", progress)
    watcher = monitor(num_steps=4, num_layer_steps=3, num_layer_probes=6)
    fit(tmp_path, watcher)
    for (total, done), (_, report) in zip(seen, watcher.history, strict=True):
        assert total == 4 + 2 + 2 * (3 + 6)
        assert done == report.num_matvecs <= total
        assert math.isfinite(report.trace)

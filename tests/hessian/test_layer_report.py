"""Scalars, files, words and figures of layers. Of figures the drawn data are tested."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import LogNorm, SymLogNorm

from lla_callbacks import HessianReport, measure_hessian
from lla_callbacks.hessian.layer_figures import (
    LONGEST,
    layer_density_figure,
    layer_distance_figure,
    layer_history_figure,
)
from lla_callbacks.hessian.layer_measures import LayerMeasurement
from lla_callbacks.hessian.layer_names import short_names
from lla_callbacks.hessian.scalars import custom_scalars_layout, hessian_scalars
from tests.cases import CASES

NAMES = ["0", "2"]


@pytest.fixture(scope="module")
def plain() -> HessianReport:
    module, batches, loss = CASES[0].build()
    return measure_hessian(module, batches, loss=loss, num_steps=12, num_probes=5)


@pytest.fixture(scope="module")
def report() -> HessianReport:
    module, batches, loss = CASES[0].build()
    return measure_hessian(
        module, batches, loss=loss, num_steps=12, num_probes=5, num_layer_steps=6, num_runs=2
    )


def many(report: HessianReport, count: int) -> HessianReport:
    """Return a report of many layers, of which the first have the smallest traces."""
    layer = report.layers["2"]
    layers = {
        f"layer {i}": dataclasses.replace(layer, trace=float(i), trace_sem=0.1)
        for i in range(count)
    }
    return dataclasses.replace(report, layers=layers)


def traced(report: HessianReport, **traces: float) -> HessianReport:
    layers = {name: LayerMeasurement(value, 0.1, 0, 5, 1.0) for name, value in traces.items()}
    return dataclasses.replace(report, layers=layers)


def test_scalars_carry_each_layers_spectrum_where_there_is_one(
    report: HessianReport, plain: HessianReport
) -> None:
    values = hessian_scalars(report)
    spectrum = report.layers["0"].spectrum
    assert spectrum is not None
    assert values["hessian_layers/0/lambda_max"] == spectrum.lambda_max
    assert values["hessian_layers/0/lambda_min_residual"] == spectrum.lambda_min.residual
    assert values["hessian_layers/0/distance"] == spectrum.distance
    assert values["hessian_layers/0/distance_error"] == spectrum.distance_error
    assert values["hessian_layers/0/published_distance"] == spectrum.published_distance
    found = {tag for tag in hessian_scalars(plain) if tag.startswith("hessian_layers/0/")}
    assert found == {
        f"hessian_layers/0/{tag}"
        for tag in ("trace", "trace_sem", "trace_times_norm2", "weight_norm")
    }


def test_the_layouts_patterns_match_tags_that_exist(
    report: HessianReport, plain: HessianReport
) -> None:
    for found, spectra in ((report, True), (plain, False)):
        charts = custom_scalars_layout(layer_spectra=spectra)["hessian"]
        patterns = [tags[0] for kind, tags in charts.values() if kind == "Multiline"]
        by_layer = [pattern for pattern in patterns if "_layers/" in pattern]
        assert len(by_layer) == (3 if spectra else 1)
        for pattern in by_layer:
            assert len([tag for tag in hessian_scalars(found) if re.match(pattern, tag)]) == 2


def test_arrays_of_layers_come_back_from_the_file(report: HessianReport, tmp_path: Path) -> None:
    with np.load(report.save(tmp_path / "report.npz"), allow_pickle=False) as arrays:
        assert arrays["layer_names"].tolist() == NAMES
        assert arrays["layer_norms"].tolist() == [m.norm for m in report.layers.values()]
        assert arrays["layer_num_params"].tolist() == [25, 18]
        assert arrays["unlayered"].tolist() == []
        assert arrays["layer_run_sizes"].tolist() == [[6, 6], [6, 6]]
        nodes = np.split(arrays["layer_nodes"], [12])
        for found, layer in zip(nodes, report.layers.values(), strict=True):
            assert layer.spectrum is not None
            assert found.tolist() == layer.spectrum.nodes.tolist()
        top = arrays["layer_lambda_max"]
        assert top.shape == (2, 2)
        spectrum = report.layers["2"].spectrum
        assert spectrum is not None
        assert top[1].tolist() == [spectrum.lambda_max, spectrum.lambda_max.residual]
        assert arrays["layer_distance"][1].tolist() == [spectrum.distance, spectrum.distance_error]


def test_the_summary_names_the_sharpest_and_the_nearest_layer(report: HessianReport) -> None:
    spectra = {name: layer.spectrum for name, layer in report.layers.items() if layer.spectrum}
    sharpest = max(spectra, key=lambda name: spectra[name].lambda_max)
    nearest = min(spectra, key=lambda name: spectra[name].distance)
    assert f"sharpest is {sharpest}:" in report.summary()
    assert f"most like the whole is {nearest}: distance" in report.summary()
    assert "belong to no chosen layer" not in report.summary()


def test_the_layer_figure_draws_bars_with_error_bars(plain: HessianReport) -> None:
    figure = plain.layer_figure()
    (axes,) = figure.axes
    bars, lines = axes.collections
    widths = [path.vertices[1, 0] for path in bars.get_paths()]
    assert widths == [t.value for t in plain.layer_traces.values()]
    assert [t.get_text() for t in axes.get_yticklabels()] == NAMES
    for (left, right), trace in zip(lines.get_segments(), plain.layer_traces.values(), strict=True):
        assert right[0] - left[0] == pytest.approx(4 * trace.sem)
    figure.canvas.draw()


def test_many_layers_are_cut_to_the_largest_and_it_is_said(report: HessianReport) -> None:
    crowd = many(report, 50)
    expected = [f"layer {i}" for i in range(20, 50)]
    figures = [
        crowd.layer_figure(),
        crowd.layer_distance_figure(),
        layer_history_figure([(0, crowd), (1, crowd)]),
    ]
    for figure in figures:
        assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == expected
        assert "20 smaller layers not shown" in " ".join(figure._suptitle.get_text().split())
    panels = crowd.layer_density_figure()
    assert "38 smaller layers not shown" in " ".join(panels._suptitle.get_text().split())
    titles = [axes.get_title(loc="left") for axes in panels.axes]
    assert titles == [f"layer {i}" for i in range(38, 50)]


def test_long_names_keep_their_end(report: HessianReport) -> None:
    path = "model.backbone.encoder.layers.11.self_attn.out_proj"
    renamed = dataclasses.replace(report, layers={path: report.layers["0"]})
    (label,) = renamed.layer_figure().axes[0].get_yticklabels()
    assert label.get_text() == "…" + path[-31:]
    title = renamed.layer_density_figure().axes[0].get_title(loc="left")
    assert path.endswith(title.removeprefix("…"))


def test_names_that_are_drawn_tell_layers_apart() -> None:
    lora = [
        f"base_model.model.distilbert.transformer.layer.{i}.attention.{q}_lin.lora_{f}.default"
        for i in range(12)
        for q in "qv"
        for f in "AB"
    ]
    short = short_names([*lora, "base_model.model.classifier"])
    assert short[0] == "layer.0.q_lin.lora_A"
    assert short[-2:] == ["layer.11.v_lin.lora_B", "base_model.model.classifier"]
    assert len({*short}) == len(short)
    assert max(map(len, short)) <= LONGEST


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["conv1", "layer1.0.conv1", "linear"], ["conv1", "layer1.0.conv1", "linear"]),
        (["net.0", "net.2", "net.4"], ["net.0", "net.2", "net.4"]),
        (["a.b.weight", "a.c.weight"], ["b", "c"]),
        (["m.x", "m.x.y"], ["x", "x.y"]),
        (["one"], ["one"]),
        ([], []),
    ],
)
def test_names_lose_only_what_they_share(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_figures_say_what_belongs_to_no_layer() -> None:
    module, batches, loss = CASES[0].build()
    report = measure_hessian(module, batches, loss=loss, layers="2", num_steps=5, num_layer_steps=3)
    figures = [
        report.layer_figure(),
        report.layer_density_figure(),
        report.layer_distance_figure(),
        layer_history_figure([(0, report)]),
    ]
    for figure in figures:
        note = " ".join(figure._supxlabel.get_text().split())
        assert "25 of 43 parameters belong to no chosen layer" in note
        assert "8 samples" in note
        assert "batch statistics" in note
        assert "seed 0" in note
        figure.canvas.draw()


def test_the_history_maps_hold_every_layers_trace_and_eigenvalue(report: HessianReport) -> None:
    figure = layer_history_figure([(0, report), (10, report), (40, report)])
    traces, tops = (axes.collections[0] for axes in figure.axes[:2])
    spectra = [layer.spectrum for layer in report.layers.values() if layer.spectrum]
    for mesh, column in (
        (traces, [layer.trace for layer in report.layers.values()]),
        (tops, [float(s.lambda_max) for s in spectra]),
    ):
        cells = np.asarray(mesh.get_array()).reshape(2, 3)
        np.testing.assert_allclose(cells, np.transpose([column] * 3))
    assert "trace" in figure.axes[0].get_title(loc="left")
    assert "largest eigenvalue" in figure.axes[1].get_title(loc="left")
    # Cells reach halfway to the next step, and nowhere out of the run.
    assert np.unique(tops.get_coordinates()[..., 0]).tolist() == [0, 5, 25, 40]
    assert figure.axes[0].get_xlim() == (0, 40)
    figure.canvas.draw()


def test_the_history_map_is_signed_only_where_something_curves_down(plain: HessianReport) -> None:
    up = layer_history_figure([(0, traced(plain, a=1.0, b=20.0)), (1, traced(plain, a=2.0, b=5.0))])
    down = layer_history_figure([(0, traced(plain, a=1.0, b=-2.0))])
    assert isinstance(up.axes[0].collections[0].norm, LogNorm)
    signed = down.axes[0].collections[0].norm
    assert isinstance(signed, SymLogNorm)
    assert signed.vmin == -signed.vmax
    # Without spectra there is one map.
    assert len([axes for axes in up.axes if axes.get_title(loc="left")]) == 1


def test_what_is_unknown_is_hatched(plain: HessianReport) -> None:
    history = [(0, traced(plain, a=1.0, b=math.nan)), (5, traced(plain, a=2.0))]
    figure = layer_history_figure(history)
    axes = figure.axes[0]
    assert axes.patch.get_hatch()
    cells = np.ma.getmaskarray(axes.collections[0].get_array()).reshape(2, 2)
    assert cells.tolist() == [[False, False], [True, True]]
    figure.canvas.draw()


def test_the_density_panels_draw_a_share_of_all_eigenvalues(report: HessianReport) -> None:
    figure = layer_density_figure(report)
    assert [axes.get_title(loc="left") for axes in figure.axes] == NAMES
    line = figure.axes[0].get_lines()[0]
    assert np.nanmax(line.get_ydata()) <= 1
    assert {"the whole", "layer, up", "down"} <= {t.get_text() for t in figure.texts}
    figure.canvas.draw()


def test_the_distance_figure_draws_distances_with_errors(report: HessianReport) -> None:
    figure = layer_distance_figure(report)
    spectra = [layer.spectrum for layer in report.layers.values() if layer.spectrum]
    own, published = figure.axes
    assert own.lines[0].get_xdata().tolist() == [s.distance for s in spectra]
    assert published.lines[0].get_xdata().tolist() == [s.published_distance for s in spectra]
    for (left, right), s in zip(own.collections[0].get_segments(), spectra, strict=True):
        assert right[0] - left[0] == pytest.approx(4 * s.distance_error)
    figure.canvas.draw()


@pytest.mark.parametrize("draw", [layer_density_figure, layer_distance_figure])
def test_figures_of_spectra_ask_for_them(plain: HessianReport, draw) -> None:
    with pytest.raises(ValueError, match="give num_layer_steps"):
        draw(plain)


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e8])
def test_figures_survive_extreme_spectra(scale: float) -> None:
    module, batches, _ = CASES[1].build()
    report = measure_hessian(
        module, batches, loss=lambda m, b: scale * m(b[0]).square().sum(), num_steps=3,
        num_layer_steps=3,
    )  # fmt: skip
    figures = [
        report.layer_figure(),
        report.layer_density_figure(),
        report.layer_distance_figure(),
        layer_history_figure([(0, report), (1, report)]),
    ]
    for figure in figures:
        figure.canvas.draw()

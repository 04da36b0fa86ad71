"""Scalars, files, words and figures of a report. Of figures the drawn data are tested."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from lla_callbacks import HessianReport, measure_hessian
from lla_callbacks.hessian.criteria_of import FAR_GAP
from lla_callbacks.hessian.figures import history_figure
from lla_callbacks.hessian.scalars import FEW, NAMES, custom_scalars_layout, hessian_scalars
from lla_callbacks.hessian.step_words import numbers_of
from lla_callbacks.hessian.words import describe_change
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.report.step_words import step_text
from lla_callbacks.report.style import UP
from lla_callbacks.report.tiers import check_scalars, shown
from lla_callbacks.report.words import end_in_short, spanned, with_error
from tests.cases import CASES


@pytest.fixture(scope="module")
def report() -> HessianReport:
    module, batches, loss = CASES[0].build()
    return measure_hessian(module, batches, loss=loss, num_steps=12, num_probes=5)


def test_scalars_carry_values_errors_and_layers(report: HessianReport) -> None:
    values = hessian_scalars(report)
    assert values["hessian/lambda_max"] == report.lambda_max
    assert values["zz_hessian_errors/trace"] == report.trace_sem
    assert values["zz_hessian_errors/lambda_min"] == report.lambda_min.residual
    assert values["hessian/kh05"] == report.criteria["kh05"]
    assert values["hessian_layers/2/trace"] == report.layer_traces["2"].value
    assert values["hessian_layers/2/weight_norm"] == report.layers["2"].norm
    norm2 = report.trace * report.weight_norm**2
    assert values["hessian_criteria/trace_times_norm2"] == norm2
    half = values["zz_hessian_bands/trace_upper"] - values["hessian/trace"]
    assert half == pytest.approx(2 * report.trace_sem)
    assert all(math.isfinite(value) for value in values.values())
    # No optimizer was given: a gap, not a NaN.
    assert "hessian/stability" not in values
    assert all(
        tag.removeprefix("zz_").startswith("train_curvature")
        for tag in hessian_scalars(report, "train_curvature")
    )


def test_what_is_known_to_less_than_its_own_size_is_a_gap(report: HessianReport) -> None:
    tags = ("hessian_criteria/negative_mass", "hessian_criteria/filter_curvature")
    known = dataclasses.replace(
        report,
        criteria={**report.criteria, "negative_mass": 0.5},
        criteria_errors={**report.criteria_errors, "negative_mass": 0.1},
        filter_curvature=2.0, filter_curvature_sem=1.0,
    )  # fmt: skip
    assert {*tags} <= {*hessian_scalars(known)}
    unknown = dataclasses.replace(
        known,
        criteria={**report.criteria, "negative_mass": 0.01},
        criteria_errors={**report.criteria_errors, "negative_mass": 0.98, "kh05": 1e9},
        filter_curvature_sem=2.0, trace_sem=1e9,
    )  # fmt: skip
    values = hessian_scalars(unknown)
    assert not {*tags} & {*values}
    # What has a band says it by that.
    assert {"hessian/trace", "hessian/kh05"} <= {*values}


def test_the_optimizers_limit_is_what_lambda_max_would_be_at_the_edge(
    report: HessianReport,
) -> None:
    known = dataclasses.replace(report, criteria={**report.criteria, "stability": 0.25})
    assert hessian_scalars(known)["hessian/lambda_max_limit"] == 4 * float(report.lambda_max)
    assert "hessian/lambda_max_limit" not in hessian_scalars(report)


def test_few_scalars_are_shown_unless_more_are_asked_for(report: HessianReport) -> None:
    values = hessian_scalars(report)
    every = {*values}

    def chosen(*choice: str) -> set[str]:
        return {*shown(values, choice, "hessian", FEW)}

    few = chosen("few")
    assert {tag for tag in few if tag.startswith("hessian/")} == {
        f"hessian/{what}"
        for what in ("lambda_max", "lambda_min", "trace", "kh05", "loss", "gradient_norm")
    }
    assert {tag for tag in few if tag.startswith("hessian_layers/")} == {
        "hessian_layers/0/trace", "hessian_layers/2/trace",
    }  # fmt: skip
    # The others come last in any alphabet.
    rest = {tag for tag in few if not tag.startswith(("hessian/", "hessian_layers/"))}
    assert {tag.split("/")[0] for tag in rest} == {"zz_hessian_errors", "zz_hessian_bands"}
    assert chosen("all") == every
    criteria = chosen("criteria") - few
    assert {tag.split("/")[0] for tag in criteria} == {"hessian_criteria", "zz_hessian_errors"}
    assert "hessian_criteria/stable_rank" in criteria
    assert chosen("layers") - few == {
        tag for tag in every if tag.startswith("hessian_layers/") and not tag.endswith("/trace")
    }
    assert chosen("kh1", "trace") == {
        "hessian_criteria/kh1", "zz_hessian_errors/kh1", "hessian/trace", "zz_hessian_errors/trace",
        "zz_hessian_bands/trace_lower", "zz_hessian_bands/trace_upper",
    }  # fmt: skip


def test_many_layers_have_curves_on_request() -> None:
    values = {f"hessian_layers/block.{k}/trace": 1.0 for k in range(21)}
    assert not shown(values, ("few",), "hessian", FEW)
    assert len(shown(values, ("few", "layers"), "hessian", FEW)) == 21
    del values["hessian_layers/block.20/trace"]
    assert len(shown(values, ("criteria",), "hessian", FEW)) == 20


@pytest.mark.parametrize("wrong", ["most", (), ["few", "lambda"], 3, None, [1], {"all": 3, "x": 1}])
def test_a_choice_of_scalars_says_what_is_allowed(wrong: object) -> None:
    with pytest.raises(ValueError, match=r'scalars is .*; give "few".*lambda_max, lambda_min'):
        check_scalars(wrong, NAMES)
    assert check_scalars("few", NAMES) == ("few",)
    assert check_scalars(["criteria", "trace"], NAMES) == ("criteria", "trace")


def test_the_layout_names_tags_that_exist(report: HessianReport) -> None:
    values = hessian_scalars(report)
    for kind, tags in custom_scalars_layout()["hessian"].values():
        if kind == "Margin":
            assert set(tags) <= set(values)
            value, lower, upper = (values[tag] for tag in tags)
            assert lower <= value <= upper


def test_arrays_come_back_from_the_file(report: HessianReport, tmp_path: Path) -> None:
    path = report.save(tmp_path / "deep" / "report.npz")
    with np.load(path, allow_pickle=False) as arrays:
        assert float(arrays["trace"]) == report.trace
        assert float(arrays["lambda_max_residual"]) == report.lambda_max.residual
        assert arrays["nodes"].tolist() == report.nodes.tolist()
        named = dict(
            zip(arrays["layer_names"].tolist(), arrays["layer_traces"].tolist(), strict=True)
        )
        assert named == {k: [t.value, t.sem] for k, t in report.layer_traces.items()}
        criteria = dict(zip(arrays["criteria_names"].tolist(), arrays["criteria"], strict=True))
        assert criteria["kh05"][0] == report.criteria["kh05"]
        fields = {f.name for f in dataclasses.fields(report)} - {"criteria_errors", "layers"}
        assert fields <= set(arrays.files)


def test_a_report_is_frozen(report: HessianReport) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="trace"):
        report.trace = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.41, "12.35 +- 0.41"),
        (-0.0991291, 8e-7, "-0.0991291 +- 8e-07"),
        (2.115812, 3e-7, "2.11581 +- 3e-07"),
        (1234.5, 100.0, "1.23e+03 +- 1e+02"),
        (3.0, 0.0, "3"),
        (3.0, math.nan, "3"),
        (math.nan, 1.0, "undefined"),
        (0.0, 0.5, "0.00 +- 0.50"),
        (-2e-4, 0.061, "0.000 +- 0.061"),
    ],
)
def test_numbers_show_as_many_digits_as_their_error_allows(
    value: float, error: float, text: str
) -> None:
    assert with_error(value, error) == text


def test_the_summary_says_everything_in_words(report: HessianReport) -> None:
    text = report.summary()
    for part in ("largest eigenvalue", "smallest eigenvalue", "trace", "43 parameters", "KH05"):
        assert part in text
    assert "stability" not in text


@pytest.mark.parametrize(
    ("ratio", "error", "words"),
    [
        (-0.1, 0.02, "above -0.6, which Gabdullin 2025 calls mainly positive"),
        (-0.7, 0.02, "below -0.6, which Gabdullin 2025 calls mainly negative"),
        (-0.61, 0.02, "within its error of -0.6, above which Gabdullin 2025 says mainly positive"),
    ],
)
def test_the_side_of_the_threshold_is_told_where_it_is_known(
    report: HessianReport, ratio: float, error: float, words: str
) -> None:
    found = dataclasses.replace(
        report,
        criteria={**report.criteria, "c_t": ratio, "mainly_positive": float(ratio > -0.6)},
        criteria_errors={**report.criteria_errors, "c_t": error},
    )
    assert words in found.summary()


def test_an_end_that_is_open_does_not_read_like_a_value_with_an_error_bar(
    report: HessianReport,
) -> None:
    sure = dataclasses.replace(report, lambda_max=Eigenvalue(1.8612, 1e-4, 1e-3))
    line = sure.summary().splitlines()[1]
    assert line == (
        "  largest eigenvalue  1.86120 +- 0.00010  (the sharpest direction; the +- is its "
        "residual: how far it is off at most)"
    )
    known = dataclasses.replace(
        report,
        lambda_max=Eigenvalue(1.8612, 0.12, 0.4411),
        lambda_min=Eigenvalue(-0.271, 0.03, 0.14),
    )
    text = known.summary()
    assert "largest eigenvalue  1.86 to 2.30  (the sharpest direction; found at 1.86, with" in text
    assert "smallest eigenvalue -0.41 to -0.27  (below zero" in text
    assert "with 95 % certainty no higher than 2.30; a larger num_steps" in text
    assert "found at -0.27, with 95 % certainty no lower than -0.41; a" in text
    # More steps do not help a run that ended before those it had.
    early = dataclasses.replace(known, gaps={FAR_GAP: "eig_rtol=0.05 ended a run"}).summary()
    assert "no higher than 2.30; no eig_rtol narrows it" in early
    assert "1.86 +-" not in text
    headline = [t.get_text() for t in known.figure().texts]
    assert "λmax 1.86 to 2.30" in headline
    assert "λmin −0.41 to −0.27" in headline
    table = step_text(3, numbers_of(known), (1, numbers_of(report)), "")
    assert "| λmax | 1.86 to 2.30 |" in table
    # By how much it moved is told by how far it is open.
    higher = dataclasses.replace(known, lambda_max=Eigenvalue(2.2, 0.1, 0.2))
    assert "within its error" in step_text(
        4, {"λmax": numbers_of(higher)["λmax"]}, (3, numbers_of(known)), ""
    )
    assert "(residual 0.1, beyond 0.4)" in repr(known)


@pytest.mark.parametrize(
    ("value", "residual", "beyond", "sign", "text"),
    [
        (1.86, 0.12, 0.44, 1, "1.86 to 2.30"),
        (1.86, 0.12, 0.13, 1, "1.86 +- 0.12"),
        (1.86, 1e-7, 1e-4, 1, "1.86000 +- 1e-07"),
        (-3e-7, 1e-8, 2e-7, -1, "-5.00e-07 to -3.00e-07"),
        (6.2e6, 3e5, 8e5, 1, "6.20e+06 to 7.00e+06"),
        (1.86e-4, 1e-8, 2.5e-7, 1, "1.8600e-04 to 1.8625e-04"),
        (-2e-4, 1e-5, 0.59, -1, "-0.59 to -0.0002"),
        (12.0, 2.0, 31.0, 1, "12 to 43"),
        (1.5, 0.1, math.inf, 1, "1.5 to inf"),
    ],
)
def test_ends_in_words(value: float, residual: float, beyond: float, sign: int, text: str) -> None:
    assert spanned(Eigenvalue(value, residual, beyond), sign) == text


def moved(report: HessianReport, factor: float, stability: float) -> HessianReport:
    return dataclasses.replace(
        report,
        trace=report.trace * factor,
        trace_sem=0.01 * report.trace,
        lambda_max=Eigenvalue(report.lambda_max * factor, 0.0),
        criteria={**report.criteria, "stability": stability},
    )


def test_the_change_is_told_with_its_error(report: HessianReport) -> None:
    start = moved(report, 1.0, math.nan)
    fell = describe_change([(0, start), (9, moved(report, 1e-3, 0.5))])
    assert "the trace fell" in fell
    assert "Stability stayed below 1 wherever it was measured (highest 0.5)" in fell
    still = describe_change([(0, start), (9, moved(report, 1 + 1e-9, 1.5))])
    assert "did not move by more than its error" in still
    assert "above 1 at 1 of 2 measurements" in still
    assert describe_change([(0, report)]) == ""


def test_the_density_figure_draws_the_spectrum(report: HessianReport) -> None:
    figure = report.figure(title="a title")
    whole, larger = figure.axes
    low, high = whole.get_xlim()
    assert low < report.lambda_min < report.lambda_max < high
    assert whole.get_yscale() == larger.get_yscale() == larger.get_xscale() == "log"
    verticals = {line.get_xdata()[0] for line in whole.lines if len(set(line.get_xdata())) == 1}
    assert {float(report.lambda_max), float(report.lambda_min)} <= verticals
    texts = [t.get_text() for t in figure.texts]
    assert any(
        text.startswith("λmax") and end_in_short(report.lambda_max, 1) in text for text in texts
    )
    # Nothing is painted where no eigenvalue is.
    for curve in [line for line in whole.lines if len(line.get_xdata()) > 20]:
        x = np.asarray(curve.get_xdata())[np.isfinite(np.asarray(curve.get_ydata(), float))]
        assert float(report.lambda_min) <= x.min() <= x.max() <= float(report.lambda_max)
    # The smaller the size the more eigenvalues are larger, up to all that curve upwards.
    up = next(line for line in larger.lines if line.get_color() == UP)
    counts = np.asarray(up.get_ydata(), float)
    assert (np.diff(counts) >= 0).all()
    assert counts[-1] <= report.num_params
    note = figure._supxlabel.get_text()
    assert "8 samples" in note
    assert "batch statistics" in note
    assert "12 Lanczos steps" in note
    FigureCanvasAgg(figure).draw()


def test_the_history_figure_follows_the_extremes_within_the_run(report: HessianReport) -> None:
    history = [(0, report), (10, moved(report, 0.1, 0.5)), (40, moved(report, 2.0, 0.5))]
    figure = history_figure(history)
    axes = figure.axes[0]
    linear = 3e-3 * max(float(m.nodes.abs().max()) for _, m in history)
    (line,) = [line for line in axes.get_lines() if line.get_label() == "lambda_max"]
    np.testing.assert_allclose(
        linear * np.sinh(np.asarray(line.get_ydata(), float)), [m.lambda_max for _, m in history]
    )
    # Neither the axis nor a cell goes on where the run does not.
    assert axes.get_xlim() == (0, 40)
    assert axes.collections[0].get_coordinates()[0, :, 0].tolist() == [0, 5, 25, 40]
    FigureCanvasAgg(figure).draw()


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e8])
def test_figures_survive_extreme_spectra(scale: float) -> None:
    module = nn.Linear(3, 1, bias=False)
    report = measure_hessian(
        module, [torch.eye(3)], loss=lambda m, b: scale * m(b).square().sum(), num_steps=3
    )
    for figure in (
        report.figure(),
        report.layer_figure(),
        history_figure([(0, report), (1, report)]),
    ):
        FigureCanvasAgg(figure).draw()

"""What every result offers: files and back, plain dicts, plots on any axes, in a notebook."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import lla_callbacks as lla
from lla_callbacks import compare
from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.report.history import to_dataframe
from lla_callbacks.report.result import Result
from lla_callbacks.slices.report import LandscapeReport

BATCHES = [(torch.randn(8, 3), torch.randint(0, 2, (8,)))]
PNG = b"\x89PNG"


def loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def report(seed: int = 0, **more: Any) -> lla.HessianReport:
    return lla.measure_hessian(
        net(seed), BATCHES, loss=loss, num_steps=6, num_probes=3, num_layer_steps=3, **more
    )


def line(seed: int = 0) -> lla.LossLine:
    return lla.loss_line(net(seed), BATCHES, loss=loss, alphas=[-1.0, 0.0, 1.0])


def plane(seed: int = 0) -> lla.LossPlane:
    return lla.loss_plane(net(seed), BATCHES, loss=loss, alphas=[-1.0, 0, 1], betas=[-1.0, 0, 1])


def basin(seed: int = 0) -> lla.BasinRadii:
    return lla.basin_radii(net(seed), BATCHES, loss=loss, num_rays=3, rtol=0.3)


def convexity(seed: int = 0) -> lla.ConvexityMap:
    return lla.convexity_map(
        net(seed), BATCHES, loss=loss, alphas=[-1.0, 0.0], betas=[0.0, 1.0], num_steps=3
    )


def curve(seed: int = 0) -> lla.LossCurve:
    return lla.loss_curve(net(0), BATCHES, [net(seed), net(seed + 1)], t=[0.0, 0.5, 1], loss=loss)


def landscape(seed: int = 0) -> LandscapeReport:
    return LandscapeReport(
        planes={"random": plane(seed)}, lines={"random": line(seed)}, convexity=convexity(seed),
        basin=basin(seed), missing={"adam": ValueError("no Adam")}, loss=0.5, seconds=0.1,
        notes=("a note",),
    )  # fmt: skip


def barriers() -> lla.Barriers:
    return lla.barrier(net(0), BATCHES, [net(0), net(1)], loss=loss, points=5)


def relaxation() -> lla.Relaxation:
    return lla.relax(net(0), BATCHES, loss=loss, num_steps=3)


def comparison() -> lla.BasinComparison:
    return lla.compare_basins(
        *(
            lla.basin_radii(net(s), BATCHES, loss=loss, num_rays=3, rtol=0.3, cutoff=9.0)
            for s in (0, 1)
        )
    )


def minima_map() -> lla.MinimaMap:
    nets = {"a": [net(i) for i in range(3)], "b": [net(i) for i in range(3, 6)]}
    return lla.map_of_minima(nets, BATCHES, module=net(0))


def shift() -> lla.ShiftReport:
    with pytest.warns(UserWarning, match="fewer than 20"):
        return _shift()


def _shift() -> lla.ShiftReport:
    return lla.measure_shift(
        net(0), {"here": BATCHES, "there": [(2 * x, y) for x, y in BATCHES]}, loss=loss,
        num_steps=4, num_probes=3, num_samples=8,
    )  # fmt: skip


MADE: dict[str, Callable[[], Any]] = {
    "report": lambda: report(num_eigenvectors=2), "line": line, "plane": plane, "basin": basin,
    "convexity": convexity, "curve": curve, "landscape": landscape, "barriers": barriers,
    "relaxation": relaxation, "comparison": comparison, "map": minima_map, "shift": shift,
}  # fmt: skip


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {name: make() for name, make in MADE.items()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if is_dataclass(a):
        kept = [f.name for f in fields(a) if f.name != "vector"]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in kept)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Exception):
        return type(a) is type(b) and str(a) == str(b)
    return bool(a == b or (a != a and b != b))


@pytest.mark.parametrize("name", MADE)
def test_it_comes_back_from_its_file(name: str, made: dict[str, Any], tmp_path: Path) -> None:
    found, path = made[name], tmp_path / "deep" / "one.npz"
    found.save(path)
    again = type(found).load(path)
    assert same(found, again)
    assert repr(again) == repr(found)
    assert again.summary() == found.summary()
    if name in ("report", "barriers", "relaxation", "comparison", "map", "shift"):
        other = lla.MinimaMap if name != "map" else lla.Relaxation
        with pytest.raises(ValueError, match=f"holds a {type(found).__name__}; give one with a "):
            other.load(path)


def test_files_of_others_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"other\.npz holds no HessianReport that can be read"):
        lla.HessianReport.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"report/other\.npz does not exist; give the path"):
        LandscapeReport.load(tmp_path / "other.npz")


@pytest.mark.parametrize("name", MADE)
def test_it_is_a_dict_of_plain_things(name: str, made: dict[str, Any]) -> None:
    found = made[name].to_dict()
    assert json.loads(json.dumps(found)).keys() == found.keys()
    text = json.dumps(found)
    assert '"vector"' not in text
    assert '"vectors"' not in text
    assert "state_dict" not in text
    if name == "report":
        assert found["lambda_max"] == float(made[name].lambda_max)
        assert found["lambda_max_residual"] == made[name].lambda_max.residual
        assert found["layers"]["2"]["spectrum"]["lambda_max_residual"] > 0
        assert len(found["eigenvectors"]["values"]) == 2
    if name == "barriers":
        assert list(found["lines"]) == ["0/1"]


@pytest.mark.parametrize("name", MADE)
def test_it_draws_itself_on_any_axes(name: str, made: dict[str, Any]) -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    drawn, axes = made[name].plot(ax=right)
    assert drawn is figure
    assert axes is right
    assert not left.has_data()
    assert right.has_data()
    own, axes = made[name].plot()
    assert axes in own.axes
    assert own._repr_png_().startswith(PNG)
    with pytest.raises(ValueError, match="ax is of type str; give axes of matplotlib, or None"):
        made[name].plot("left")


@pytest.mark.parametrize("name", MADE)
def test_it_shows_itself_in_a_notebook(name: str, made: dict[str, Any]) -> None:
    found = made[name]
    assert found._repr_png_().startswith(PNG)
    html = found._repr_html_()
    assert html.count("data:image/png;base64,") == (4 if name == "landscape" else 1)
    assert "<pre" in html
    assert "<LossLine" not in html
    if hasattr(found, "figure"):
        assert found.figure()._repr_png_().startswith(PNG)


def test_every_public_result_is_one(made: dict[str, Any]) -> None:
    results = {type(found) for found in made.values()}
    frozen = {
        kind
        for name in lla.__all__
        if isinstance(kind := getattr(lla, name), type) and is_dataclass(kind)
    }
    assert {k for k in frozen if issubclass(k, Result)} == results
    # Permutations and control points, to be applied, with files of their own; and no result.
    assert frozen - results == {lla.Alignment, lla.Curve, lla.Moment}


def test_a_history_is_a_table(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    history = [(0, made["report"]), (10, report(1))]
    table = to_dataframe(history)
    assert table.index.name == "step"
    assert table.index.tolist() == [0, 10]
    assert table["trace"].tolist() == [r.trace for _, r in history]
    assert table["lambda_max_residual"][10] == history[1][1].lambda_max.residual
    assert table["criteria/kh05"][0] == history[0][1].criteria["kh05"]
    assert table["layers/2/trace_sem"][0] == history[0][1].layers["2"].trace_sem
    assert "nodes" not in table
    assert to_dataframe([]).empty
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_dataframe needs pandas: pip install pandas\."):
        to_dataframe(history)


SAME: dict[str, Callable[[int], Any]] = {
    "report": report, "line": line, "plane": plane, "basin": basin, "convexity": convexity,
    "curve": curve, "landscape": landscape,
}  # fmt: skip


def test_a_run_with_one_measurement_is_compared_with_its_error(made: dict[str, Any]) -> None:
    found = made["report"]
    figure = compare([(3, found)], [(3, found)])
    for axes, error in zip(figure.axes, (None, found.trace_sem), strict=True):
        lines = [c for c in axes.collections if isinstance(c, LineCollection)]
        assert len(lines) == 2
        if error is not None:
            (low, high) = lines[0].get_segments()[0][:, 1]
            assert high - low == pytest.approx(4 * error)


@pytest.mark.parametrize("name", SAME)
def test_results_of_one_kind_are_compared(name: str, made: dict[str, Any]) -> None:
    figure = compare(made[name], SAME[name](5), names=["here", "there"], title="Both")
    assert figure._repr_png_().startswith(PNG)  # type: ignore[attr-defined]
    texts = [t.get_text() for axes in figure.axes for t in axes.texts]
    for axes in figure.axes:
        legend = axes.get_legend()
        texts += [] if legend is None else [t.get_text() for t in legend.get_texts()]
        texts.append(axes.get_title(loc="left"))
    assert any("here" in text for text in texts)
    assert any("there" in text for text in texts)
    if name in ("plane", "convexity", "landscape"):
        scales = {axes.collections[0].get_clim() for axes in figure.axes[:2]}
        assert len(scales) == 1


def test_runs_are_curves_with_their_errors(made: dict[str, Any]) -> None:
    runs = [[(0, made["report"]), (7, report(s))] for s in (3, 4)]

    class Monitor:
        history = runs[1]

    figure = compare(runs[0], Monitor(), names=["sgd", "adam"])
    left, right = figure.axes
    drawn = [line.get_ydata().tolist() for line in left.lines]  # type: ignore[union-attr]
    assert drawn == [[float(m.lambda_max) for _, m in run] for run in runs]
    assert [line.get_label() for line in left.lines] == ["sgd", "adam"]
    assert len(right.collections) == 2


def test_what_does_not_compare_is_refused_by_name(made: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"several kinds, HessianReport, LossLine; give results"):
        compare(made["report"], made["line"])
    with pytest.raises(ValueError, match=r"several kinds, HessianReport, list; give results"):
        compare(made["report"], [(0, made["report"])])
    with pytest.raises(ValueError, match=r"histories are of several kinds, HessianReport, Landsc"):
        compare([(0, made["report"])], [(0, made["landscape"])])
    with pytest.raises(ValueError, match="there is 1 result to compare; give two or more"):
        compare(made["report"])
    with pytest.raises(ValueError, match="MinimaMap cannot be laid over each other; give reports"):
        compare(made["map"], made["map"])
    with pytest.raises(ValueError, match="histories of LandscapeReport cannot be laid"):
        compare([(0, made["landscape"])], [(0, made["landscape"])])
    with pytest.raises(ValueError, match=r"int cannot be laid over each other; give"):
        compare(1, 2)
    with pytest.raises(ValueError, match=r"names is \['a'\]; give 2 names, one for each"):
        compare(made["report"], made["report"], names=["a"])
    with pytest.raises(ValueError, match="a history is empty: nothing was measured yet; give"):
        compare([], [])


def test_a_report_without_a_density_says_so(made: dict[str, Any]) -> None:
    empty = torch.empty(0, dtype=torch.float64)
    values = {f.name: getattr(made["report"], f.name) for f in fields(HessianMeasurement)}
    values |= {"nodes": empty, "weights": empty, "run_sizes": (), "gaps": {"density": "off by 9 %"}}
    found = lla.HessianReport(**values)
    _, axes = found.plot()
    assert [t.get_text() for t in axes.texts] == ["off by 9 %"]
    assert math.isnan(found.training_steps)

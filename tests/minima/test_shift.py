"""One network on several sets of data."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lla_callbacks import measure_hessian, measure_shift
from lla_callbacks.minima.statistics import partial_spearman, spearman

from .minima_cases import accuracy, data, loss, net

FAST = {"loss": loss, "num_steps": 4, "num_probes": 3}


def noisy(scale, seed=4, size=60):
    x, y = data(size)
    return x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)), y


SETS = {f"noise {s}": [noisy(s)] for s in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)}


@pytest.fixture(scope="module")
def found():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measure_shift(trained(), SETS, num_samples=50, **FAST)


def trained():
    module = net(norm=True)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(module, data(60)).backward()
        optimizer.step()
    return module.eval()


def test_every_set_is_measured_by_itself_on_exactly_so_many_samples(found):
    module = trained()
    for name, [(x, y)] in SETS.items():
        part = x[:50], y[:50]
        alone = measure_hessian(module, [part], mode="eval", **FAST)
        row = found.sets[name]
        assert row.values["trace"] == alone.trace
        assert row.values["kh05"] == pytest.approx(alone.criteria["kh05"], rel=0, nan_ok=True)
        assert row.errors["trace"] == alone.trace_sem
        with torch.no_grad():
            assert row.loss == pytest.approx(float(cross_entropy(module(part[0]), part[1])))
            certain = float(module(part[0]).softmax(1).amax(1).mean())
        assert row.accuracy == pytest.approx(accuracy(module, part), abs=1e-12)
        assert row.confidence == pytest.approx(certain)
        assert row.num_samples == 50
        assert row.num_wrong == round(50 * (1 - row.accuracy))


def test_batches_are_cut_to_the_same_number():
    x, y = noisy(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = measure_shift(trained(), {"a": [(x[:50], y[:50])]}, num_samples=50, **FAST)
        parts = measure_shift(
            trained(), {"a": [(x[:32], y[:32]), (x[32:], y[32:])]}, num_samples=50, **FAST
        )
    a, b = whole.sets["a"].values, parts.sets["a"].values
    assert a["trace"] == pytest.approx(b["trace"], rel=1e-9)
    assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1e-12)


def test_rank_correlations_and_what_the_loss_leaves(found):
    columns = {n: found.column(n) for n in ("trace", "accuracy", "loss")}
    plain = found.rank_correlation("trace")
    assert plain.value == pytest.approx(spearman(columns["trace"], columns["accuracy"]))
    assert plain.low <= plain.value <= plain.high
    assert plain.num_sets == 6
    rest = found.rank_correlation("trace", given="loss")
    expected = partial_spearman(columns["trace"], columns["accuracy"], columns["loss"])
    assert rest.value == pytest.approx(expected, nan_ok=True)
    assert found.rank_correlation("trace") == plain
    with pytest.raises(ValueError, match="'sharpness' is not measured; there are loss"):
        found.rank_correlation("sharpness")


def test_the_loss_of_noisier_sets_is_higher(found):
    assert found.rank_correlation("loss").value < -0.8


def test_few_wrong_samples_are_warned_about(found):
    assert "noise 0.0" in found.few_wrong
    with pytest.warns(UserWarning, match="fewer than 20 of 50 samples are wrong in noise 0.0"):
        measure_shift(trained(), {"noise 0.0": SETS["noise 0.0"]}, num_samples=50, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = data(60)
        measure_shift(trained(), {"flipped": [(x, 1 - y)]}, num_samples=50, **FAST)


def test_rows_table_figure_and_file(found, tmp_path):
    rows = json.loads(json.dumps(found.rows))
    assert [row["set"] for row in rows] == list(SETS)
    assert rows[1]["trace_error"] == found.sets["noise 0.5"].measurement.trace_sem
    table = found.table()
    assert table.count("\n| noise") == 6
    assert "beyond what the loss says" in table
    figure = found.figure()
    assert sum(axes.get_visible() for axes in figure.axes) == 6
    assert "fewer than 20 wrong" in figure.get_supxlabel()
    with np.load(found.save(tmp_path / "shift.npz")) as stored:
        assert stored["trace"].tolist() == [row["trace"] for row in rows]


def test_the_module_is_left_as_it_was():
    module = trained().train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure_shift(module, {"a": SETS["noise 0.0"]}, num_samples=20, **FAST)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(m.training for m in module.modules())


@pytest.mark.parametrize(
    ("loaders", "settings", "words"),
    [
        ({}, {}, "with one set at least"),
        ([data()], {}, "dict of name to batches"),
        ({"a": data(24)}, {}, r"the set 'a' is one batch.*\[batch\]"),
        ({"small": [data(24)]}, {"num_samples": 30}, "'small' has 24 samples, fewer than"),
        ({"a": [data(24)]}, {"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_settings_that_are_not_allowed(loaders, settings, words):
    with pytest.raises(ValueError, match=words):
        measure_shift(net(), loaders, **{"num_samples": 20, **FAST, **settings})


def test_a_set_without_labels_has_no_accuracy():
    def squares(module, batch):
        return (module(batch[0]) - batch[1]).square().mean()

    x = data(30)[0]
    found = measure_shift(
        torch.nn.Linear(3, 1).double(), {"a": [(x, x[:, :1])]}, loss=squares, num_samples=30,
        num_steps=3, num_probes=2,
    )  # fmt: skip
    assert math.isnan(found.sets["a"].accuracy)
    assert found.rows[0]["accuracy"] is None

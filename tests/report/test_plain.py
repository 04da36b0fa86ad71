"""Results in plain containers: everything comes back, and nothing but plain data is stored."""

import io
import math
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import loss_line, loss_plane, measure_hessian
from lla_callbacks.hessian.report import HessianReport
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.linalg.errors import NonFiniteError, NotYetError
from lla_callbacks.report.plain import from_plain, pack, to_plain, unpack

MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def batches():
    source = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, generator=source), torch.arange(8) % 2)]


def stored(plain):
    """Return what comes back from a file that is read without any class."""
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def report():
    return measure_hessian(MODEL, batches(), loss=loss, num_steps=5, num_layer_steps=3, num_runs=2)


FORMS = pytest.mark.parametrize(("form", "back"), [(to_plain, from_plain), (pack, unpack)])


@FORMS
def test_hessian_report_comes_back_whole(report, tmp_path, form, back):
    again = back(stored(form(report)))
    assert type(again) is HessianReport
    for field in fields(report):
        one, other = getattr(report, field.name), getattr(again, field.name)
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
    assert again.lambda_max.residual == report.lambda_max.residual
    assert again.layers["0"].spectrum.lambda_min == report.layers["0"].spectrum.lambda_min
    assert torch.equal(again.layers["2"].spectrum.nodes, report.layers["2"].spectrum.nodes)
    assert again.summary() == report.summary()
    # Every number that a file holds is the same, NaN included.
    paths = [r.save(tmp_path / f"{i}.npz") for i, r in enumerate((report, again))]
    with np.load(paths[0]) as a, np.load(paths[1]) as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


@FORMS
@pytest.mark.parametrize("make", [loss_line, loss_plane])
def test_slices_come_back_whole(make, form, back):
    found = make(MODEL, batches(), loss=loss, directions="random")
    again = back(stored(form(found)))
    assert type(again) is type(found)
    assert torch.equal(again.loss, found.loss)
    assert torch.equal(again.evaluated, found.evaluated)
    assert again.facts == found.facts
    assert again.directions[0].label == found.directions[0].label


@dataclass(frozen=True)
class Foreign:
    """No class of this package."""

    value: int = 1


def test_numbers_are_stored_as_plain_ones():
    plain = to_plain({"a": np.float64(0.5), "b": np.int64(3), "c": np.bool_(True), 2: (True, None)})
    assert plain == {"a": 0.5, "b": 3, "c": True, 2: (True, None)}
    assert [type(value) for value in plain.values()] == [float, int, bool, tuple]
    whole = to_plain({"x": Eigenvalue(1.0, 0.3, 0.4, 0.2)})["x"]
    assert type(whole) is dict
    read = from_plain(whole)
    assert (read, read.residual, read.beyond, read.arithmetic) == (1.0, 0.3, 0.4, 0.2)
    # A file from before the arithmetic was asked.
    old = from_plain({key: value[:3] for key, value in whole.items()})
    assert (old, old.residual, old.beyond) == (1.0, 0.3, 0.4)
    assert math.isnan(old.arithmetic)
    assert stored(plain) == plain


def test_errors_keep_their_class_and_text():
    for error in (
        NotYetError("not yet"),
        NonFiniteError("bad.", "Mend it."),
        ZeroDivisionError("z"),
    ):
        again = from_plain(stored(to_plain(error)))
        assert (type(again), str(again)) == (type(error), str(error))
    assert type(from_plain({"__error__": ("exit", "os")})) is RuntimeError


def test_packed_form_has_one_tensor_a_dtype(report):
    assert list(pack(report)["tensors"]) == ["float64"]
    odd = {"a": torch.tensor(3.0), "b": torch.zeros(0, 2), "c": torch.tensor([True]), "d": 1}
    again = unpack(stored(pack(odd)))
    assert [tuple(again[key].shape) for key in "abc"] == [(), (0, 2), (1,)]
    assert again["c"].dtype is torch.bool


def test_a_slice_of_a_large_tensor_brings_only_itself():
    large = torch.zeros(100_000)
    assert to_plain(large[:3]).untyped_storage().nbytes() == 12
    assert to_plain(large).data_ptr() == large.data_ptr()


def test_what_has_no_plain_form_is_refused():
    with pytest.raises(TypeError, match="a Linear cannot be stored in a checkpoint"):
        to_plain({"x": [nn.Linear(1, 1)]})


@pytest.mark.parametrize(
    "name", ["landscape.measures:measure", "landscape.state:nn", "no.such:Thing", "version:x"]
)
def test_a_checkpoint_names_no_code_but_results(name):
    with pytest.raises(ValueError, match="is no result of"):
        from_plain({"__class__": name})


def test_classes_outside_of_the_package_do_not_come_back():
    with pytest.raises(ValueError, match="is no result of"):
        from_plain(to_plain(Foreign()))


def test_a_report_with_other_fields_is_refused(report):
    plain = to_plain(report)
    with pytest.raises(TypeError, match="bogus"):
        from_plain({**plain, "bogus": 1})
    assert from_plain(to_plain(replace(report, seed=5))).seed == 5

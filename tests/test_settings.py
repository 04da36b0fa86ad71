"""Every argument of every public function and constructor, against a list of wrong values.

What is refused names the argument as it was given. What is accepted is listed, argument by
argument, and nothing else is: a new argument without a check fails here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lla_callbacks import (
    HessianMonitor,
    HessianTraceRegularizer,
    LossLandscapeMonitor,
    MeasurementError,
    Monitor,
    Spectrum,
    basin_radii,
    convexity_map,
    economy,
    hessian_operator,
    interpolate,
    loss_line,
    loss_plane,
    measure_hessian,
    paper,
    standard,
)

NET = nn.Linear(2, 2).double()
X, Y = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.long)


def loss(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


WRONG: dict[str, Any] = {
    "None": None,
    "text": "x",
    "empty text": "",
    "number as text": "0.5",
    "bytes": b"x",
    "True": True,
    "np.True_": np.True_,
    "zero": 0,
    "one": 1,
    "negative": -1,
    "huge": 10**30,
    "half": 0.5,
    "minus half": -0.5,
    "1.5": 1.5,
    "1e300": 1e300,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "complex": 1j,
    "list": [],
    "list of numbers": [1, 2],
    "tuple of text": ("x",),
    "dict": {},
    "set": {1},
    "object": object(),
    "no repr": Broken(),
    "class": nn.CrossEntropyLoss,
    "criterion": nn.CrossEntropyLoss(),
    "function of none": lambda: None,
    "array": np.ones(3),
    "tensor": torch.ones(3),
    "outside": "../../x",
    "with slash": "a/b",
    "control": "a\nb\x07",
}

# Values of the list that an argument takes, by its name: which numbers, else what they are.
COUNTS = {"one"}
FRACTIONS = {"half"}
FLAGS = {"True", "np.True_"}
POSITIVE = {"one", "half", "1.5", "1e300"}
ACCEPTED: dict[str, set[str]] = {
    "every_n_epochs": {"None", *COUNTS},
    "every_n_train_steps": {"None", *COUNTS},
    "track_every_n_train_steps": {"None", *COUNTS},
    "track_num_probes": {"zero"},
    "track_eig_rtol": {"None", *FRACTIONS},
    "layers": {"None", "text", "number as text", "tuple of text", "outside", "with slash",
               "control"},
    "num_probes": set(),
    "num_steps": set(),
    "num_runs": COUNTS,
    "num_layer_steps": {"zero"},
    "num_layer_probes": {"zero"},
    "num_eigenvectors": {"zero", "one"},
    "num_samples": COUNTS,
    "mode": set(),
    "matrix": set(),
    # Patterns are asked of a module, which a constructor has not.
    "parameters": {"None", "text", "number as text", "tuple of text", "outside", "with slash",
                   "control"},
    "dropout": FLAGS,
    "loss": {"None"},
    "dataloader": {"None"},
    "seed": {"zero", "one"},
    "max_overhead": {"None", "one", "half"},
    "eig_rtol": {"None", *FRACTIONS},
    "trace_rtol": {"None", *FRACTIONS},
    "microbatch_size": {"None", *COUNTS},
    "batch_size": {"None", *COUNTS},
    "max_memory": {"None", *COUNTS},
    "engine": set(),
    "check": FLAGS,
    "jacobian": set(),
    "precision": set(),
    "figures": FLAGS,
    "save_arrays": FLAGS,
    "save_batches": {"None", *FLAGS},
    "custom_scalars": FLAGS,
    "scalars": set(),
    "name": {"text", "number as text"},
    "quantities": set(),
    "planes": {"list"},
    "lines": {"list"},
    "metrics": {"None", "dict"},
    "predict": {"None"},
    "plane_points": set(),
    "line_points": set(),
    "reach": POSITIVE,
    "normalization": set(),
    "vectors": set(),
    "convexity_points": {"zero"},
    "num_rays": {"zero", "one"},
    "rise": POSITIVE,
    "interpolate": FLAGS,
    "cap": {"None", "zero", "one", "negative", "half", "minus half", "1.5", "1e300", "huge"},
    "surface": FLAGS,
    "mesh": FLAGS,
    "html": FLAGS,
    "time_budget": {"None", *POSITIVE, "huge"},
    "evaluation": set(),
    # of the regularizer
    "strength": {"zero", *POSITIVE, "huge"},
    "estimator": set(),
    "start_step": {"zero", "one"},
    "ramp_steps": {"zero", "one"},
    "relative": FLAGS,
    "max_ratio": {"None", *POSITIVE, "huge"},
    "target_ratio": {"None"},
    "scale_by_interval": FLAGS,
    "trace_regularization": {"None", "zero", *POSITIVE, "huge"},
    # of the functions
    "module": set(),
    "batches": set(),
    "optimizer": {"None"},
    "chunk_size": COUNTS,
    "directions": set(),
    "alphas": {"None", "list of numbers"},
    "betas": {"None", "list of numbers"},
    "checkpoints": {"list"},
    "refine": FLAGS,
    "file": {"None", "text", "number as text", "outside", "with slash", "control"},
    "start": set(),
    "end": set(),
    "rtol": FRACTIONS,
    "cutoff": {"None", "one", "half", "1.5", "1e300", "huge"},
    "max_radius": POSITIVE,
}  # fmt: skip
for numbers in ("reach", "rise", "max_radius"):
    ACCEPTED[numbers] = {*POSITIVE, "huge"}

# What only some take, by owner and argument.
PARTICULAR: dict[tuple[str, str], set[str]] = {
    ("HessianTraceRegularizer", "every_n_train_steps"): COUNTS,
    ("HessianTraceRegularizer", "num_probes"): COUNTS,
    ("HessianTraceRegularizer", "layers"): ACCEPTED["layers"] - {"None"} | {"None"},
    ("basin_radii", "num_rays"): COUNTS,
    ("interpolate", "end"): {"None"},
    ("measure_hessian", "num_steps"): {"None"},
    ("measure_hessian", "layers"): {"None"},  # others name no module here
    **{
        (name, "parameters"): {"None"}
        for name in ("measure_hessian", "hessian_operator", "loss_line", "loss_plane",
                     "convexity_map", "basin_radii")
    },
    **{
        (name, "num_samples"): {"None", *COUNTS}
        for name in ("measure_hessian", "hessian_operator", "loss_line", "loss_plane",
                     "interpolate", "convexity_map", "basin_radii")
    },
    # Sizes that a monitor chooses by itself, and a rim that no loss is known for yet.
    **{
        (name, argument): ACCEPTED[argument] | {"None"}
        for name in ("Monitor", "HessianMonitor", "LossLandscapeMonitor", "economy", "standard",
                     "paper")
        for argument in ("num_samples", "num_steps", "num_probes", "planes", "lines",
                         "plane_points", "line_points")
    },
    **{
        (name, "cutoff"): ACCEPTED["cutoff"] | {"zero", "negative", "minus half"}
        for name in ("LossLandscapeMonitor", "economy", "standard", "paper")
    },
    ("economy", "lines"): {"None"},  # its planes are none, so that nothing would be left
    **{(name, "loss"): set() for name in ("measure_hessian", "hessian_operator", "loss_line",
                                          "loss_plane", "interpolate", "convexity_map",
                                          "basin_radii")},
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 2).double()


FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "measure_hessian": (measure_hessian, {"num_steps": 2, "num_probes": 2}),
    "hessian_operator": (hessian_operator, {}),
    "loss_line": (loss_line, {"alphas": [-1.0, 0.0, 1.0]}),
    "loss_plane": (loss_plane, {"alphas": [0.0], "betas": [0.0]}),
    "interpolate": (interpolate, {"start": net(), "alphas": [0.0]}),
    "convexity_map": (convexity_map, {"alphas": [0.0], "betas": [0.0], "num_steps": 2}),
    "basin_radii": (basin_radii, {"num_rays": 1, "rtol": 0.5}),
}
CONSTRUCTORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Monitor": (Monitor, {"quantities": [Spectrum()]}),
    "HessianMonitor": (HessianMonitor, {}),
    "LossLandscapeMonitor": (LossLandscapeMonitor, {}),
    "HessianTraceRegularizer": (HessianTraceRegularizer, {"strength": 1e-3}),
    "economy": (economy, {}),
    "standard": (standard, {}),
    "paper": (paper, {}),
}
OWNERS = CONSTRUCTORS | FUNCTIONS


def arguments(owner: str) -> list[str]:
    made, _ = OWNERS[owner]
    # Whether units can be permuted depends on the module: tests/alignment.
    names = [name for name in inspect.signature(made).parameters if name != "align"]
    if "overrides" in names:  # of a bundle: those of the monitors, less what tells them apart
        names.remove("overrides")
        for kind in (HessianMonitor, LossLandscapeMonitor):
            names += [n for n in inspect.signature(kind).parameters if n != "name"]
    return list(dict.fromkeys(names))


def call(owner: str, **given: Any) -> Any:
    made, settings = OWNERS[owner]
    if owner in FUNCTIONS:
        settings = {"module": net(), "batches": [(X, Y)], "loss": loss, **settings}
    return made(**{**settings, **given})


def accepted(owner: str, argument: str) -> set[str]:
    if (owner, argument) in PARTICULAR:
        return PARTICULAR[owner, argument]
    return ACCEPTED[argument]


# What is allowed follows one of these.
SAYS = ("give", "a line takes one", "the layers are")


def complaint(
    call: Callable[..., Any], owner: str, argument: str, label: str, *, fits: bool, unfit: bool
) -> str:
    """Return what is wrong with how a value is taken or refused; empty if nothing is.

    ``fits``: it is allowed; ``unfit``: it may be refused in other words.
    """
    where = f"{owner}({argument}={label})"
    try:
        call(owner, **{argument: WRONG[label]})
    except (ValueError, TypeError) as error:
        text = str(error)
        if fits:
            return f"{where} is refused: {text}"
        if not unfit and (argument not in text or not any(w in text for w in SAYS)):
            return f"{where} is refused unclearly: {type(error).__name__}: {text}"
    except MeasurementError as error:
        return "" if fits or argument in str(error) else f"{where}: {error}"
    except Exception as error:  # noqa: BLE001 - which is what is tested
        return f"{where} ends in {type(error).__name__}: {error}"
    else:
        if not fits:
            return f"{where} is taken."
    return ""


def complaints(
    owner: str,
    names: list[str],
    call: Callable[..., Any],
    accepted: Callable[[str, str], set[str]],
    unfit: Collection[tuple[str, str, str]] = (),
) -> str:
    """Return what is wrong with how every value is taken or refused, a line each."""
    found = [
        complaint(call, owner, name, label, fits=label in accepted(owner, name),
                  unfit=(owner, name, label) in unfit)
        for name in names for label in WRONG
    ]  # fmt: skip
    return "\n".join(text for text in found if text)


# The planes here have one point.
@pytest.mark.filterwarnings("ignore:refine=True has no effect")
@pytest.mark.usefixtures("among_files")
@pytest.mark.parametrize("owner", OWNERS)
def test_every_argument_refuses_what_is_wrong_by_its_name(owner: str) -> None:
    wrong = complaints(owner, arguments(owner), call, accepted)
    assert not wrong, wrong


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.asarray, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(kind: Callable[[Any], Any]) -> None:
    found = HessianMonitor(
        every_n_train_steps=kind(3), num_probes=kind(4), num_samples=kind(8), seed=kind(1)
    )
    assert found.schedule.every_n_train_steps == 3
    assert found.settings.num_probes == 4
    # Plain ones from then on, which checkpoints and messages hold.
    assert {type(n) for n in (found.settings.num_probes, found.num_samples, found.seed)} == {int}


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.asarray, torch.tensor, int])
def test_a_number_with_digits_may_be_any_number(kind: Callable[[Any], Any]) -> None:
    found = HessianTraceRegularizer(kind(1), max_ratio=kind(2))
    assert (found.strength, found.max_ratio) == (1.0, 2.0)
    assert type(found.strength) is float


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ((X, Y), r"batches is one batch, of type tuple; give .*\[batch\]"),
        ([X, Y], "batches is one batch, of type list"),
        (X, "batches is one batch, of type Tensor"),
        ({"x": X}, "batches is one batch, of type dict"),
        (TensorDataset(X, Y), r"batches is a TensorDataset.*DataLoader\(dataset"),
        ([], "batches is empty: there is no batch to measure on"),
        (iter([]), r"batches.* is empty.*generator that was read once is at its end"),
        ("train", "batches is of type str; give an iterable of batches"),
        ([(X, Y), 3], "batches holds 3, which is no batch"),
    ],
)
def test_one_batch_is_not_taken_for_many(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_hessian(net(), batches, loss=loss)


def test_batches_that_are_tensors_are_batches() -> None:
    found = measure_hessian(
        net(), [X, 2 * X], loss=lambda m, b: m(b).square().mean(), num_steps=2, num_probes=2
    )
    assert found.num_samples == 6


@pytest.mark.parametrize("function", [measure_hessian, loss_line, basin_radii])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda found: found.item(), "the loss returned float.*return a scalar tensor"),
        (lambda found: None, "returned None.*return a scalar tensor"),
        (lambda found: found.expand(3), r"shape \(3,\): return a scalar"),
        (lambda found: found.long(), r"torch\.int64: return a floating-point scalar"),
    ],
)
def test_a_loss_that_is_no_scalar_tensor_is_told(
    function: Callable[..., Any], returned: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError, MeasurementError), match=message):
        function(net(), [(X, Y)], loss=lambda m, b: returned(loss(m, b)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.CrossEntropyLoss, r"loss is the class CrossEntropyLoss; give loss\(module, batch\)"),
        (nn.CrossEntropyLoss(), r"compares outputs with targets; .*criterion\(module\(batch"),
        (nn.functional.cross_entropy, r"compares outputs with targets; .*criterion"),
        (lambda batch: batch, r"loss takes \(batch\); give loss\(module, batch\)"),
    ],
)
def test_what_is_no_loss_of_module_and_batch_is_told(given: Any, message: str) -> None:
    for refuse in (
        lambda: HessianMonitor(loss=given),
        lambda: HessianTraceRegularizer(1e-3, loss=given),
        lambda: measure_hessian(net(), [(X, Y)], loss=given),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_messages_name_the_argument_that_was_given() -> None:
    with pytest.raises(ValueError, match=r"^track_num_probes is 3; give an even number"):
        HessianMonitor(track_num_probes=3)
    with pytest.raises(ValueError, match=r"^track_every_n_train_steps is 0; give"):
        HessianMonitor(track_every_n_train_steps=0)
    with pytest.raises(ValueError, match="give track_num_probes for the traces, track_eig_rtol"):
        HessianMonitor(track_num_probes=0, track_eig_rtol=None)
    with pytest.raises(ValueError, match=r"^max_overhead is 5; .*0\.05 for 5 %, at most 1"):
        HessianMonitor(max_overhead=5)


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "a\\b", "a\x00", "a\n", " a", "a" * 200, "é" * 61]
)
def test_a_name_is_one_folder_beside_the_logs(name: str) -> None:
    with pytest.raises(ValueError, match=r"name is .*; give the first part of the tags"):
        LossLandscapeMonitor(name=name)

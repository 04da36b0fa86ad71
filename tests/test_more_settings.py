"""As ``test_settings.py``, for curves, minima, alignment, and for what trains on purpose."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lla_callbacks
from lla_callbacks import (
    FastGeometricEnsembling,
    ModeConnection,
    PoisonedLoss,
    aligned,
    barrier,
    basin_radii,
    compare_basins,
    connect,
    loss_curve,
    map_of_minima,
    measure_shift,
    relax,
    reversed_binary_cross_entropy,
    reversed_cross_entropy,
)
from tests import test_settings
from tests.test_settings import (
    ACCEPTED,
    COUNTS,
    FLAGS,
    POSITIVE,
    X,
    Y,
    complaints,
    loss,
    net,
)

BATCHES = [(X, Y)]
OTHER = nn.Linear(2, 2).double()
HIDDEN = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
MEASURED = {"module": net(), "batches": BATCHES, "loss": loss}
NETWORKS = [net(), OTHER, net()]
BASIN = basin_radii(net(), BATCHES, loss=loss, num_rays=1, rtol=0.5)
LOGITS = torch.tensor([[1.0, 2.0], [0.0, 1.0]])

OWNERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "aligned": (
        aligned,
        {"module": HIDDEN, "start": HIDDEN, "end": HIDDEN, "batch": X},
    ),
    "barrier": (barrier, {**MEASURED, "checkpoints": NETWORKS[:2], "points": 3}),
    "compare_basins": (compare_basins, {"a": BASIN, "b": BASIN}),
    "connect": (connect, {**MEASURED, "start": net(), "end": OTHER, "epochs": 1}),
    "loss_curve": (loss_curve, {**MEASURED, "curve": NETWORKS[:2], "t": [0.0, 1.0]}),
    "map_of_minima": (map_of_minima, {"checkpoints": NETWORKS, "batches": BATCHES}),
    "measure_shift": (
        measure_shift,
        {"module": net(), "loaders": {"one": BATCHES}, "loss": loss, "num_samples": 3,
         "num_steps": 2, "num_probes": 2},
    ),
    "relax": (relax, {**MEASURED, "num_steps": 1}),
    "reversed_binary_cross_entropy": (
        reversed_binary_cross_entropy, {"logits": LOGITS, "targets": torch.ones(2, 2)},
    ),
    "reversed_cross_entropy": (
        reversed_cross_entropy, {"logits": LOGITS, "targets": torch.tensor([0, 1])},
    ),
    "FastGeometricEnsembling": (
        FastGeometricEnsembling, {"cycle": 2, "lr_max": 0.1, "lr_min": 0.01},
    ),
    "ModeConnection": (ModeConnection, {"start": net(), "end": OTHER}),
    "PoisonedLoss": (PoisonedLoss, {"factor": 0.1, "dataloader": BATCHES}),
}  # fmt: skip

# What an argument takes of the wrong values, where it is not as in the other table.
FILES = {"text", "number as text", "outside", "with slash", "control"}
TAKEN: dict[str, set[str]] = {
    "groups": {"None"},
    "restarts": {"None", *COUNTS},
    "bends": COUNTS,
    "epochs": COUNTS,
    "lr": {*POSITIVE, "huge"},
    "momentum": {"zero", "half"},
    "weight_decay": {"zero", *POSITIVE, "huge"},
    "scale_steps": FLAGS,
    "straight": FLAGS,
    "t": {"None"},
    "values": {"None", "array", "tensor"},  # of three checkpoints
    "values_name": FILES,
    "path": {"None", "empty text"},  # the set that a list is
    "perplexity": {"None", *POSITIVE, "huge"},
    "held_out": {"None"},
    "ignore_index": {"zero", "one", "negative"},
    "cycle": COUNTS,
    "lr_max": {*POSITIVE, "huge"},
    "lr_min": {"zero"},
    "directory": {"None", *FILES},
    "factor": {"zero", "half"},
    "live": FLAGS,
    "num_samples": {"None", *COUNTS},
    "checkpoints": set(),
    "dropout": FLAGS,
}
# And where one owner takes another than the rest.
PARTICULAR: dict[tuple[str, str], set[str]] = {
    **{(name, "loss"): set() for name in ("barrier", "connect", "loss_curve", "measure_shift",
                                          "relax")},
    ("loss_curve", "dropout"): set(),  # off by definition where statistics are estimated anew
    ("map_of_minima", "module"): {"None"},
    ("measure_shift", "num_samples"): COUNTS,
    ("measure_shift", "batch_size"): {"None"},  # there would be too few samples
    ("relax", "num_steps"): COUNTS,
    ("FastGeometricEnsembling", "start"): {"zero", "one", "huge", "half"},
    ("FastGeometricEnsembling", "num_samples"): {"zero", *COUNTS},
    ("ModeConnection", "start"): {*FILES, "criterion"},  # looked at where there is a module
    ("ModeConnection", "end"): {*FILES, "criterion"},
    ("ModeConnection", "num_samples"): COUNTS,
    ("ModeConnection", "max_overhead"): {"one", "half"},
    ("PoisonedLoss", "dataloader"): set(),
}  # fmt: skip
# Tensors that are of the right kind and do not fit this network.
UNFIT = {("aligned", "batch", "tensor"), ("measure_shift", "batch_size", "one"),
         ("reversed_cross_entropy", "logits", "tensor"),
         ("reversed_cross_entropy", "targets", "tensor")}  # fmt: skip


def taken(owner: str, argument: str) -> set[str]:
    if (owner, argument) in PARTICULAR:
        return PARTICULAR[owner, argument]
    return TAKEN.get(argument, ACCEPTED.get(argument, set()))


def arguments(owner: str) -> list[str]:
    # Whether units can be permuted depends on the module: tests/alignment.
    return [n for n in inspect.signature(OWNERS[owner][0]).parameters if n != "align"]


def call(owner: str, **given: Any) -> Any:
    made, settings = OWNERS[owner]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(**{**settings, **given})


@pytest.mark.usefixtures("among_files")
@pytest.mark.parametrize("owner", OWNERS)
def test_every_argument_refuses_what_is_wrong_by_its_name(owner: str) -> None:
    wrong = complaints(owner, arguments(owner), call, taken, UNFIT)
    assert not wrong, wrong


def test_every_public_callable_is_in_a_table() -> None:
    callables = {
        name
        for name in lla_callbacks.__all__
        if callable(getattr(lla_callbacks, name))
        and (not name[0].isupper() or hasattr(getattr(lla_callbacks, name), "on_train_start"))
    }
    # It takes any number of results: tests/report. Films have their own: tests/page/test_film.py.
    callables -= {"compare", "animate"}
    assert callables == set(OWNERS) | set(test_settings.OWNERS)

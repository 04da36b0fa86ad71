"""The settings that all monitors share, each checked and named as the user gave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lla_callbacks.objective.checks import (
    batches_of,
    check_loss,
    flag,
    number,
    one_of,
    seed_of,
    tag_of,
    whole,
)
from lla_callbacks.objective.counting import batch_size_of
from lla_callbacks.objective.objective import check_engine, check_mode
from lla_callbacks.objective.precision import check_precision
from lla_callbacks.objective.self_check import Jacobian

_SHARE = "a positive share of training time, such as 0.05 for 5 %, at most 1, or None"


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a monitor's settings as plain Python values.

    Raises:
        ValueError: Naming the first setting that is not allowed, what was given, what is allowed.
    """
    found = dict(settings)
    for name in ("dropout", "check", "figures", "save_arrays", "save_batches", "custom_scalars"):
        found[name] = flag(name, found[name])
    found["num_samples"] = whole("num_samples", found["num_samples"], 1)
    for name, unit in {"microbatch_size": "", "max_memory": " byte"}.items():
        found[name] = whole(name, found[name], 1, none=True, other=f"{unit}, or None")
    check_engine(found["engine"])
    check_precision(found["precision"])
    check_mode(found["mode"], found["dropout"])
    check_loss(found["loss"])
    one_of("jacobian", found["jacobian"], Jacobian)
    found["max_overhead"] = number(
        "max_overhead", found["max_overhead"], _SHARE, above=0, most=1, none=True
    )
    found["seed"] = seed_of("seed", found["seed"])
    found["batch_size"] = batch_size_of("batch_size", found["batch_size"])
    batches_of("dataloader", found["dataloader"], none=True)
    tag_of("name", found["name"])
    return found

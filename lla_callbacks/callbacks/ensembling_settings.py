"""What fast geometric ensembling is told, checked."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

Unit = Literal["epochs", "steps"]


def check_ensembling(
    cycle: Any,
    lr_max: Any,
    lr_min: Any,
    start: Any,
    cycle_unit: Any,
    num_samples: Any,
    predict: Any,
) -> None:
    """Raise a ValueError, which says what is allowed, for a setting that is not."""
    _check_whole("cycle", cycle, 1)
    if cycle_unit not in get_args(Unit):
        raise ValueError(f"cycle_unit is {cycle_unit!r}; give one of {', '.join(get_args(Unit))}.")
    if cycle_unit == "steps" and cycle % 2:
        raise ValueError(
            f"cycle is {cycle}; give an even number of steps, so that one has the lowest rate."
        )
    for name, value in {"lr_max": lr_max, "lr_min": lr_min}.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not (0 <= value < math.inf)
        ):
            raise ValueError(f"{name} is {value!r}; give a finite number of at least 0.")
    if lr_max < lr_min or lr_max == 0:
        raise ValueError(
            f"lr_max is {lr_max} and lr_min {lr_min}; give a positive highest rate and a "
            "lowest one that is not above it."
        )
    whole = isinstance(start, int) and not isinstance(start, bool)
    if not (whole and start >= 0) and not (isinstance(start, float) and 0 <= start < 1):
        raise ValueError(
            f"start is {start!r}; give a share of the run from 0 to below 1 (a float), or a "
            "number of optimizer steps (an int)."
        )
    _check_whole("num_samples", num_samples, 0)
    if predict is not None and not callable(predict):
        raise ValueError(
            f"predict is {predict!r}; give predict(module, batch) -> (outputs, targets)."
        )


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}.")

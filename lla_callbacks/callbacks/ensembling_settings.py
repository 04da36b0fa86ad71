"""What fast geometric ensembling is told, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lla_callbacks.objective.checks import (
    MOST_WORK,
    function_of,
    number,
    one_of,
    shown,
    whole,
)

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
    whole("cycle", cycle, 1, MOST_WORK)
    one_of("cycle_unit", cycle_unit, Unit)
    if cycle_unit == "steps" and cycle % 2:
        raise ValueError(
            f"cycle is {cycle}; give an even number of steps, so that one has the lowest rate."
        )
    for name, value in {"lr_max": lr_max, "lr_min": lr_min}.items():
        number(name, value, "a finite number of at least 0", least=0)
    if lr_max < lr_min or lr_max == 0:
        raise ValueError(
            f"lr_max is {lr_max} and lr_min {lr_min}; give a positive highest rate and a "
            "lowest one that is not above it."
        )
    fitting = isinstance(start, int) and not isinstance(start, bool) and start >= 0
    if not fitting and not (isinstance(start, float) and 0 <= start < 1):
        raise ValueError(
            f"start is {shown(start)}; give a share of the run from 0 to below 1 (a float), or a "
            "number of optimizer steps (an int)."
        )
    whole("num_samples", num_samples, 0)
    function_of("predict", predict, "predict(module, batch) -> (outputs, targets)", 2)


def folder(directory: Any) -> Path | None:
    """Return where members are written, None for nowhere."""
    if directory is None:
        return None
    if not isinstance(directory, (str, Path)) or not str(directory):
        raise TypeError(f"directory is {shown(directory)}; give the path of a folder, or None.")
    return Path(directory)

"""Numbers as a page holds them: few digits, and null for what is not there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

# Digits of what is drawn: a screen shows a thousandth at most.
DIGITS = 4


def short(value: Any, digits: int = DIGITS) -> float | None:
    """Return a number with few digits; None if it is not finite."""
    number = float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None


def shorts(values: Iterable[Any], digits: int = DIGITS) -> list[float | None]:
    """Return several."""
    return [short(value, digits) for value in np.asarray(values, dtype=float).ravel()]


def banded(value: Any, below: Any, above: Any) -> list[Any]:
    """Return a value and the ends of its band; both ends are the value where no error is known."""
    v, b, a = float(value), float(below), float(above)
    low = v - b if math.isfinite(b) else v
    high = v + a if math.isfinite(a) else v
    return [short(v, 6), short(low, 6), short(high, 6)]

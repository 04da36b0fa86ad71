"""How values are drawn: as they are, by their logarithm, or by it on either side of zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.ticker import MaxNLocator

_ROUND = MaxNLocator(8, steps=[1, 2, 5, 10])
# Of the largest magnitude, what may be drawn linearly around 0 at least.
LEAST = 1e-3
# Decades between both sides of zero from which on a linear scale shows one side only.
WIDE = 1.0
# Contours of a picture, at most, and as few as ask for finer ones.
MOST_LINES, FEW_LINES = 12, 3


@dataclass(frozen=True)
class Scale:
    """From values to what is drawn, and back.

    Attributes:
        kind: ``"linear"``; ``"log"``, for positive values; ``"symlog"``: linear near 0 and
            logarithmic on either side, ``asinh(v / threshold)``.
        threshold: Where it turns from one to the other.
    """

    kind: Literal["linear", "log", "symlog"] = "linear"
    threshold: float = 1.0

    @property
    def words(self) -> str:
        """Return what follows the name of the quantity."""
        return {"linear": "", "log": " (log scale)", "symlog": " (log scale about 0)"}[self.kind]

    def draw(self, values: np.ndarray) -> np.ndarray:
        """Return values as they are drawn; logarithms of what is not positive are NaN."""
        if self.kind == "log":
            positive = np.where(values > 0, values, np.nan)
            return np.asarray(np.log10(positive))
        return np.asarray(np.arcsinh(values / self.threshold) if self.kind == "symlog" else values)

    def value(self, drawn: float) -> float:
        """Return the value behind what is drawn."""
        if self.kind == "log":
            return float(10.0**drawn)
        return self.threshold * math.sinh(drawn) if self.kind == "symlog" else drawn

    def place(self, value: float) -> float:
        """Return where one value is drawn."""
        return float(self.draw(np.array(value, dtype=float)))

    def ticks(self, low: float, high: float) -> list[float]:
        """Return five to ten round values between two ends, which are as drawn."""
        if self.kind != "symlog":
            return tick_values(low, high, self.kind == "log")
        ends = self.value(low), self.value(high)
        reach = max(map(abs, ends))
        first = math.floor(math.log10(self.threshold))
        powers = [10.0**k for k in range(first, math.floor(math.log10(reach)) + 1)]
        found = [0.0]
        # From large to small, as long as labels have room.
        for factors in ((1,), (5, 2)):
            for value in (s * f * p for p in reversed(powers) for f in factors for s in (1, -1)):
                far = [abs(self.place(value) - self.place(v)) for v in found]
                if ends[0] <= value <= ends[1] and min(far) >= 0.09 * (high - low):
                    found.append(value)
        return sorted(v for v in found if ends[0] <= v <= ends[1])

    def lines(self, low: float, high: float) -> tuple[list[float], list[float]]:
        """Return values of contours: those of every picture, and finer ones of this one.

        The first are the same for all pictures of all runs: 1, 2 and 5 times the powers of ten,
        and where these are too many, the powers alone. The finer ones are there where few of the
        first are in the picture.
        """
        ends = self.value(low), self.value(high)
        reach = max(map(abs, ends)) or 1.0
        least = self.threshold if self.kind == "symlog" else reach * LEAST
        if self.kind == "log":
            least = max(ends[0], 1e-307)
        exponents = range(math.floor(math.log10(least)), math.floor(math.log10(reach)) + 1)
        every = [s * f * 10.0**k for k in exponents for f in (1, 2, 5) for s in (-1, 1)]
        fixed = sorted(v for v in [*every, 0.0] if ends[0] < v < ends[1])
        if self.kind == "linear":
            # Even contours: what is drawn is not a logarithm.
            return [v for v in self.ticks(low, high) if ends[0] < v < ends[1]], []
        if len(fixed) > MOST_LINES:
            fixed = [v for v in fixed if v == 0 or round(math.log10(abs(v)), 9) % 1 == 0]
        if len(fixed) > MOST_LINES:
            fixed = fixed[:: math.ceil(len(fixed) / MOST_LINES)]
        fine = []
        if len(fixed) < FEW_LINES:
            fine = [float(v) for v in _ROUND.tick_values(*ends) if ends[0] < v < ends[1]]
        return fixed, [v for v in fine if v not in fixed]


def scale_of(values: np.ndarray, *, is_loss: bool = True) -> Scale:
    """Return how finite values are drawn.

    By the logarithm where none is negative and some are positive; where a loss changes its sign,
    or is negative, by it on either side of zero, if the values reach over more than a decade.
    """
    if not values.size or not is_loss:
        return Scale()
    low, high = float(values.min()), float(values.max())
    if low >= 0:
        return Scale("log") if high > 0 else Scale()
    sizes = sorted((abs(low), abs(high)))
    if sizes[1] / max(sizes[0], 1e-300) < 10.0**WIDE:
        return Scale()
    return Scale("symlog", max(sizes[0] / 3, LEAST * sizes[1]))


def tick_values(low: float, high: float, logarithmic: bool) -> list[float]:
    """Return five to ten round values between two ends, which are logarithms if so said."""
    if not logarithmic:
        return [float(v) for v in _ROUND.tick_values(low, high) if low <= v <= high]
    if high - low > 3.5:
        stride = max(1, math.ceil((high - low) / 10))
        first = math.ceil(low / stride - 1e-9) * stride
        return [10.0**k for k in range(first, math.floor(high + 1e-9) + 1, stride)]
    ends = 10.0**low, 10.0**high
    if high - low > 0.7:
        powers = range(math.floor(low), math.floor(high) + 1)
        return [v for k in powers for d in (1, 2, 5) if ends[0] <= (v := d * 10.0**k) <= ends[1]]
    return [float(v) for v in _ROUND.tick_values(*ends) if ends[0] <= v <= ends[1]]

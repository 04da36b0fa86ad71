"""The slope of a loss by its values beside that by its gradient, and when they differ."""

from __future__ import annotations

from dataclasses import dataclass

# Relative deviation that is never complained of. The gradient itself is rounded too.
FLOOR = 1e-3
# Multiple of the errors that are seen which a deviation must exceed.
SAFETY = 4.0


@dataclass(frozen=True)
class Slope:
    """The loss's slope along a direction at one step, beside the gradient's.

    Attributes:
        step: Of the nearer two of four points.
        found: Slope by values.
        expected: Slope by the gradient.
        cut: How far the slope by values is off since it is cut off after a term.
        rounding: How far it is off by rounding.
        unevenness: The fourth difference of the values, in units of what rounding makes of it.
    """

    step: float
    found: float
    expected: float
    cut: float
    rounding: float
    unevenness: float

    @property
    def allowed(self) -> float:
        """How far the two may be apart."""
        return self.cut + self.rounding

    @property
    def size(self) -> float:
        """The larger of the two."""
        return max(abs(self.found), abs(self.expected))

    @property
    def deviation(self) -> float:
        """How far they are apart."""
        return abs(self.found - self.expected)

    @property
    def relative(self) -> float:
        """The same as a share of the larger one."""
        return self.deviation / self.size if self.size else 0.0

    @property
    def deviates(self) -> bool:
        """Whether that is more than what explains itself."""
        return self.deviation > SAFETY * self.allowed + FLOOR * self.size

    @property
    def tells(self) -> bool:
        """Whether a deviation of a tenth would have been seen."""
        return SAFETY * self.allowed <= 0.1 * self.size

"""Extreme eigenvalues with their residuals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lla_callbacks.linalg.lanczos import LanczosRun

# Of itself: an extreme eigenvalue that is known so well is a number, whatever its residual is.
CLOSED = 1e-3
# How many residuals far an end is open at least: closer than that the two say the same.
OPEN = 1.5


class Eigenvalue(float):
    """An eigenvalue that carries its residual, and is a plain number otherwise.

    Attributes:
        residual: ``||H u - lambda u||``, and what the engine and the arithmetic are worth besides:
            a true eigenvalue lies within it.
        beyond: How much further out the extreme one may still lie, where that was judged; never
            less than the residual. In 95 of 100 runs from noise it lies no further; see
            :attr:`~lla_callbacks.linalg.lanczos.LanczosRun.beyond`.
        arithmetic: The part of ``residual`` that another rounding of the weights is worth, beside
            the ten roundings that every residual holds; see
            :mod:`~lla_callbacks.hessian.arithmetic`. 0 in float64. NaN, and not in the residual,
            where it was not asked or memory did not suffice.
    """

    residual: float
    beyond: float
    arithmetic: float

    def __new__(
        cls, value: float, residual: float, beyond: float = 0.0, arithmetic: float = math.nan
    ) -> Eigenvalue:
        """Return the eigenvalue with its residual."""
        made = super().__new__(cls, value)
        made.residual = residual
        made.beyond = max(beyond, residual)
        made.arithmetic = arithmetic
        return made

    @property
    def is_open(self) -> bool:
        """Whether it is an end of the spectrum from within, and no more: see ``beyond``."""
        return self.beyond > OPEN * self.residual and self.beyond > CLOSED * abs(self)

    def __getnewargs__(self) -> tuple[float, float, float, float]:  # type: ignore[override]
        return float(self), self.residual, self.beyond, self.arithmetic

    def with_arithmetic(self, worth: float) -> Eigenvalue:
        """Return the eigenvalue with what the arithmetic is worth in its errors; NaN adds none."""
        known = 0.0 if math.isnan(worth) else worth
        residual, beyond = self.residual + known, self.beyond + known
        return Eigenvalue(float(self), residual, beyond, worth)

    def __repr__(self) -> str:
        further = f", beyond {self.beyond:.1g}" if self.is_open else ""
        return f"{float(self):.6g} (residual {self.residual:.1g}{further})"


def extremes(runs: Sequence[LanczosRun], rtol: float = 0.0) -> tuple[Eigenvalue, Eigenvalue]:
    """Return the smallest and the largest Ritz value of all runs.

    A Ritz value never lies outside of the spectrum, so the outermost one is the best.

    Args:
        runs: The runs.
        rtol: Where they ended early; see :func:`end_of`.
    """
    return (
        end_of(min(runs, key=lambda run: float(run.values[0])), 0, rtol),
        end_of(max(runs, key=lambda run: float(run.values[-1])), -1, rtol),
    )


def end_of(run: LanczosRun, position: int, rtol: float = 0.0) -> Eigenvalue:
    """Return the outermost Ritz value of a run.

    Args:
        run: The run.
        position: 0 or -1.
        rtol: Where it ended early: the share of the largest eigenvalue that it resolved. Of what
            is smaller it cannot know, so that much further out the extreme may lie.
    """
    resolved = 0.0 if run.broke_down else rtol * float(run.values.abs().max())
    beyond = max(run.beyond[position], resolved)
    return Eigenvalue(float(run.values[position]), float(run.residuals[position]), beyond)

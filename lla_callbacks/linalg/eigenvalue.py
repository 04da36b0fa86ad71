"""Extreme eigenvalues with their residuals."""

from __future__ import annotations

from collections.abc import Sequence

from lla_callbacks.linalg.lanczos import LanczosRun


class Eigenvalue(float):
    """An eigenvalue that carries its residual, and is a plain number otherwise.

    Attributes:
        residual: ``||H u - lambda u||``: a true eigenvalue lies within it.
    """

    residual: float

    def __new__(cls, value: float, residual: float) -> Eigenvalue:
        """Return the eigenvalue with its residual."""
        made = super().__new__(cls, value)
        made.residual = residual
        return made

    def __getnewargs__(self) -> tuple[float, float]:  # type: ignore[override]
        return float(self), self.residual

    def __repr__(self) -> str:
        return f"{float(self):.6g} (residual {self.residual:.1g})"


def extremes(runs: Sequence[LanczosRun]) -> tuple[Eigenvalue, Eigenvalue]:
    """Return the smallest and the largest Ritz value of all runs.

    A Ritz value never lies outside of the spectrum, so the outermost one is the best.
    """
    lowest = min(runs, key=lambda run: float(run.values[0]))
    highest = max(runs, key=lambda run: float(run.values[-1]))
    return (
        Eigenvalue(float(lowest.values[0]), float(lowest.residuals[0])),
        Eigenvalue(float(highest.values[-1]), float(highest.residuals[-1])),
    )

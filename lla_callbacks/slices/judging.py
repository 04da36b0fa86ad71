"""How far a surface through points is off between them, as the points themselves tell."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# An error shrinks by this much at most, and at least, when the spacing is halved: what held-out
# points show of a smooth loss (1/16) is not trusted for one that may have a sharp minimum.
MOST_GAIN, LEAST_GAIN = 1 / 4, 2 / 3
# On top, so that the estimate is rarely exceeded (docs/benchmarks/planes.md).
SAFETY = 2.0

# From indices of rows and columns that are used, and of those that are asked, to losses there.
Guess = Callable[[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], np.ndarray]


def held_out(guess: Guess, loss: np.ndarray, stride: int) -> np.ndarray:
    """Return what is erred through every so manieth point, at those in the middle between.

    In decades of the loss, or in the loss itself where it is not positive everywhere.

    Args:
        guess: Draws losses through some of the points.
        loss: At the points, shape ``(n, m)``.
        stride: See above.
    """
    coarse = _every(loss.shape[0], stride), _every(loss.shape[1], stride)
    fine = _every(loss.shape[0], stride // 2), _every(loss.shape[1], stride // 2)
    found, there = guess(coarse, fine), loss[np.ix_(*fine)]
    if loss.min() > 0:
        with np.errstate(invalid="ignore", divide="ignore"):
            found, there = np.log10(found), np.log10(there)
    new = ~np.isin(fine[0], coarse[0])[:, None] | ~np.isin(fine[1], coarse[1])
    return np.asarray(np.abs(found - there)[new])


def estimated(guess: Guess, loss: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Return the mean error between all points, from above, and that of the worst twentieth.

    What every second row and column erred is continued to half the spacing by how it fell from
    twice the spacing, but by a quarter at most, and doubled.

    Args:
        guess: See :func:`held_out`.
        loss: Likewise.
        errors: Of every second row and column.
    """
    share = 1.0
    if min(loss.shape) >= 9:
        before = float(held_out(guess, loss, 4).mean())
        gain = float(errors.mean()) / before if before > 0 else 0.0
        share = SAFETY * min(max(gain, MOST_GAIN), LEAST_GAIN)
    return share * float(errors.mean()), share * float(np.quantile(errors, 0.95))


def _every(count: int, stride: int) -> np.ndarray:
    return np.array(sorted({*range(0, count, stride), count - 1}))

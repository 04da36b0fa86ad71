"""How far out the extreme eigenvalue may lie of which a Lanczos run has seen little."""

from __future__ import annotations

import math
from collections.abc import Sequence

# In how many of all random starts the extreme eigenvalue may lie further out than is said.
DOUBT = 0.05
# Bisections: of a bracket no wider than the spectrum that is some 1e-9 of it.
BISECTIONS = 30


def reach(
    diagonal: Sequence[float],
    off_diagonal: Sequence[float],
    edge: float,
    dim: float,
    *,
    doubt: float = DOUBT,
) -> float:
    """Return how much higher than the largest Ritz value an eigenvalue may lie.

    A start vector that has the share ``w`` of its square along an eigenvector of ``lambda`` has
    ``w sum_j p_j(lambda)^2 <= 1`` for the run's own orthonormal polynomials ``p_0 ... p_k``
    (Christoffel, Markov): they grow so fast beyond the Ritz values that an eigenvalue far out would
    have been seen, unless the start vector has next to nothing of it. A random one has less than
    ``pi doubt^2 / (2 dim)`` with probability ``doubt`` at most. So where the sum is the inverse of
    that the bound is (van Dorsselaer, Hochstenbach and van der Vorst 2000, who use ``p_k`` alone).
    It holds for ``1 - doubt`` of all random starts, whatever the spectrum.

    Args:
        diagonal: ``alpha`` of the run, ``k`` of them.
        off_diagonal: ``beta``, ``k`` of them, the next vector's the last; all positive.
        edge: Its largest Ritz value.
        dim: Number of entries of the random start vector.
        doubt: In which share of random starts the answer may be wrong.
    """
    limit = 2 * dim / (math.pi * doubt**2)

    def is_outside(value: float) -> bool:
        before, now, total = 0.0, 1.0, 1.0
        last = 0.0
        for alpha, beta in zip(diagonal, off_diagonal, strict=True):
            before, now = now, ((value - alpha) * now - last * before) / beta
            last = beta
            total += now * now
            if total > limit:
                return True
        return False

    # Beyond all Ritz values every polynomial grows, so there is one place to find.
    low, high = 0.0, max(*off_diagonal, abs(edge))
    while not is_outside(edge + high):
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_outside(edge + middle) else (middle, high)
    return high

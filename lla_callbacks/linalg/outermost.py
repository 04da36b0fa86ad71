"""How far out the extreme eigenvalue may lie of which a Lanczos run has seen little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# In how many of all random starts the extreme eigenvalue may lie further out than is said.
DOUBT = 0.05
# Bisections: of a bracket no wider than the spectrum that is some 1e-9 of it.
BISECTIONS = 30
# Of a sum, beyond which nothing is doubted and nothing is added: no number overflows on the way.
LIMIT = 1e100


@dataclass(frozen=True)
class Seen:
    """What a Lanczos run with noise in its start vector has seen of the whole spectrum.

    Attributes:
        diagonal: ``alpha`` of the run, ``k`` of them.
        off_diagonal: ``beta``, ``k`` of them, the next vector's the last; all positive.
        count: Number of entries that the start vector would have were it all noise.
    """

    diagonal: tuple[float, ...]
    off_diagonal: tuple[float, ...]
    count: float

    def mirrored(self) -> Seen:
        """Return what was seen, the other end up."""
        return replace(self, diagonal=tuple(-alpha for alpha in self.diagonal))

    def log_doubt(self, value: float) -> float:
        """Return the logarithm of how likely an eigenvalue there went unseen, 0 at most."""
        before, now, total, last = 0.0, 1.0, 1.0, 0.0
        for alpha, beta in zip(self.diagonal, self.off_diagonal, strict=True):
            before, now = now, ((value - alpha) * now - last * before) / beta
            last = beta
            total = min(total + now * now, LIMIT)
            if total == LIMIT:
                break
        return min(0.0, 0.5 * math.log(2 * self.count / (math.pi * total)))


def reach(seen: Sequence[Seen], edge: float, *, doubt: float = DOUBT) -> float:
    """Return how much higher than the largest Ritz value an eigenvalue may lie.

    A start vector that has the share ``w`` of its square along an eigenvector of ``lambda`` has
    ``w sum_j p_j(lambda)^2 <= 1`` for the run's own orthonormal polynomials ``p_0 ... p_k``
    (Christoffel, Markov): they grow so fast beyond the Ritz values that an eigenvalue far out would
    have been seen, unless the start vector has next to nothing of it. A random one has less than
    ``pi doubt^2 / (2 count)`` with probability ``doubt`` at most. So where the sum is the inverse
    of that the bound is (van Dorsselaer, Hochstenbach and van der Vorst 2000, who use ``p_k``
    alone). It holds for ``1 - doubt`` of all random starts, whatever the spectrum. Of several runs
    with noise of their own all would have to have missed it: their doubts multiply.

    Args:
        seen: By each run.
        edge: The largest Ritz value.
        doubt: In which share of random starts the answer may be wrong.

    Returns:
        How much; infinite where what was seen is not finite.
    """
    least = math.log(doubt)

    def is_outside(value: float) -> bool:
        return sum(one.log_doubt(value) for one in seen) < least

    # Beyond all Ritz values every polynomial grows, so there is one place to find.
    low, high = 0.0, max(*seen[0].off_diagonal, abs(edge))
    while not is_outside(edge + high):
        low, high = high, 2 * high
        if not math.isfinite(high):  # of numbers that are none
            return math.inf
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_outside(edge + middle) else (middle, high)
    return high

"""The trace penalty as scalars by tag."""

from __future__ import annotations

import math

from lla_callbacks.penalty.penalty import Comparison


def regularizer_scalars(
    comparison: Comparison, *, strength: float, seconds: float, skipped: int
) -> dict[str, float]:
    """Return the trace penalty of one step, in ``regularizer/``; what is not finite is left out.

    Args:
        comparison: Penalty and loss, after a limit on their ratio.
        strength: Factor of the trace before that limit.
        seconds: What the extra passes took.
        skipped: Number of penalties left out so far.
    """
    values = {
        "regularizer/penalty": comparison.penalty,
        "regularizer/ratio": comparison.ratio,
        "regularizer/cosine": comparison.cosine,
        "regularizer/strength": comparison.factor * strength,
        "regularizer/seconds": seconds,
        "regularizer/skipped": float(skipped),
    }
    if comparison.factor * strength:
        values["regularizer/trace"] = comparison.penalty / (comparison.factor * strength)
    return {tag: value for tag, value in values.items() if math.isfinite(value)}

"""Comparisons in words."""

from __future__ import annotations

import math

from lla_callbacks.minima.basins import BasinRatio
from lla_callbacks.minima.shift import RankCorrelation


def ratio_in_words(ratio: BasinRatio) -> str:
    """Return the ratio of two radii with its interval, or as the bound that it is."""
    if ratio.bound == "unknown":
        return "unknown (rays of both are open)"
    words = f"{ratio.ratio:.3g}"
    if ratio.bound != "equal":
        return f"{ratio.bound} {words}"
    low, high = ratio.interval
    return f"{words} [{low:.3g}, {high:.3g}]" if math.isfinite(low) else words


def volume_in_words(ratio: BasinRatio) -> str:
    """Return the difference of volumes as what it is: a multiple of the logarithm of the ratio."""
    if ratio.bound == "unknown":
        return "unknown"
    n = ratio.a.dim
    words = f"{n:,} x log10({ratio.ratio:.3g}) = {ratio.log10_volume_difference:,.0f} orders"
    if ratio.bound != "equal":
        return f"{ratio.bound} {words}"
    low, high = ratio.log10_volume_interval
    return f"{words} [{low:,.0f}, {high:,.0f}]" if math.isfinite(low) else words


def correlation_in_words(found: RankCorrelation) -> str:
    """Return a correlation with its interval."""
    if not math.isfinite(found.value):
        return "undefined"
    words = f"{found.value:+.2f}"
    return f"{words} [{found.low:+.2f}, {found.high:+.2f}]" if math.isfinite(found.low) else words

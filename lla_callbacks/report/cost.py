"""What watching cost, as scalars."""

from __future__ import annotations

import math


def cost_scalars(name: str, seconds: float, overhead: float) -> dict[str, float]:
    """Return what a firing cost in all, and the share of training time so far."""
    values = {f"{name}/seconds": seconds, f"{name}/overhead": overhead}
    return {tag: value for tag, value in values.items() if math.isfinite(value)}

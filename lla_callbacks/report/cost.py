"""What watching cost, as scalars."""

from __future__ import annotations

import math

from lla_callbacks.report.tiers import last_group


def steps_of(number: float) -> str:
    """Return a number of training steps with two digits, ``about 12 steps of yours``."""
    if not math.isfinite(number):
        return "an unknown number of your steps"
    if number < 1:
        return "less than one step of yours"
    digits = max(0, math.floor(math.log10(number)) - 1)
    rounded = round(number / 10**digits) * 10**digits
    return "about one step of yours" if rounded == 1 else f"about {rounded:,.0f} steps of yours"


def in_steps(number: float) -> str:
    """Return what a measurement took as a last line of a summary; empty where it is unknown."""
    if not math.isfinite(number):
        return ""
    return f"\n  cost                {steps_of(number)} (training on one batch each)"


def cost_scalars(name: str, seconds: float, overhead: float) -> dict[str, float]:
    """Return what a firing cost in all, and the share of training time so far."""
    values = {f"{last_group(name, 'cost')}/seconds": seconds, f"{name}/overhead": overhead}
    return {tag: value for tag, value in values.items() if math.isfinite(value)}

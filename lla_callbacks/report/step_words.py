"""One measurement as a text for TensorBoard: what changed since the last one, then all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.report.words import end_in_short, in_short

# A quantity's name to its value and error.
Numbers = Mapping[str, tuple[float, float]]


def step_text(step: int, now: Numbers, before: tuple[int, Numbers] | None, summary: str) -> str:
    """Return a measurement in Markdown.

    Args:
        step: Of the measurement.
        now: What it found.
        before: Step and numbers of the last one, if there was one.
        summary: Everything in sentences.
    """
    head = f"**Step {step}**"
    lines = [head, "", "| | now |", "|---|---|"]
    if before is not None:
        lines = [head, "", f"| | now | step {before[0]} | |", "|---|---|---|---|"]
    for name, (value, error) in now.items():
        if not math.isfinite(value):
            continue
        row = [name, _shown(name, value, error)]
        if before is not None:
            earlier, its_error = before[1].get(name, (math.nan, math.nan))
            known = math.isfinite(earlier)
            row += (
                [_shown(name, earlier, its_error), change(value, error, earlier, its_error)]
                if (known)
                else ["", ""]
            )
        lines.append(f"| {' | '.join(row)} |")
    # Four spaces: as it is, in letters of one width.
    return "\n".join([*lines, "", *(f"    {line}" for line in summary.splitlines())])


def _shown(name: str, value: float, error: float) -> str:
    """Return a number in short; an eigenvalue is one of the ends of a spectrum."""
    if isinstance(value, Eigenvalue):
        return end_in_short(value, -1 if name == "λmin" else 1)
    return in_short(value, error)


def change(now: float, error: float, before: float, its_error: float) -> str:
    """Return how a number moved, if by more than both errors.

    Those of an end of a spectrum are bounds, which add up, and others are standard errors.
    """
    errors = [e if math.isfinite(e) else 0.0 for e in (error, its_error)]
    spread = sum(errors) if isinstance(now, Eigenvalue) else 2 * math.hypot(*errors)
    if now == before or abs(now - before) <= spread:
        return "within its error" if spread else "the same"
    if now * before <= 0:
        return "changed its sign" if now * before < 0 else ("rose" if now > before else "fell")
    share = abs(now / before)
    direction = "rose" if now > before else "fell"
    if now < 0:  # what is -9 after -10 rose, and is smaller
        direction += " towards zero" if now > before else " further below zero"
    if share >= 2 or share <= 0.5:
        return f"{direction}: {share:.2g} times as large"
    return f"{direction} by {abs(share - 1):.0%}"

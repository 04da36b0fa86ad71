"""What a measurement found and what changed, as TensorBoard's text page shows it."""

from __future__ import annotations

import math

import pytest

from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.report.step_words import change, step_text

NAN = math.nan


@pytest.mark.parametrize(
    ("now", "error", "before", "its_error", "text"),
    [
        (11.0, 0.1, 10.0, 0.1, "rose by 10%"),
        (10.1, 0.1, 10.0, 0.1, "within its error"),
        (30.0, 0.0, 10.0, 0.0, "rose: 3 times as large"),
        (1.0, NAN, 10.0, 0.1, "fell: 0.1 times as large"),
        (-1.0, 0.0, 1.0, 0.0, "changed its sign"),
        (0.0, 0.0, 1.0, 0.0, "fell"),
        (2.0, 0.0, 2.0, 0.0, "the same"),
        (-9.0, 0.1, -10.0, 0.1, "rose towards zero by 10%"),
        (-30.0, 0.1, -10.0, 0.1, "fell further below zero: 3 times as large"),
        # Ranges: -0.0076 to -0.0065 after -0.0122 to -0.0104, and two that touch.
        (Eigenvalue(-0.0065, 1e-4, 0.0011), 0.0011, -0.0104, 0.0018, "rose towards zero by 38%"),
        (Eigenvalue(-0.0080, 1e-4, 0.0011), 0.0011, -0.0104, 0.0018, "within its error"),
    ],
)
def test_a_change_is_told_where_it_is_more_than_errors(
    now: float, error: float, before: float, its_error: float, text: str
) -> None:
    assert change(now, error, before, its_error) == text


def test_a_text_has_what_changed_as_a_table_and_then_everything() -> None:
    first = {"trace": (10.0, 0.5), "stability": (NAN, NAN)}
    second = {"trace": (20.0, 0.5), "stability": (0.5, 0.0)}
    text = step_text(7, second, (3, first), "All of it.\n  in two lines")
    assert text.splitlines() == [
        "**Step 7**", "", "| | now | step 3 | |", "|---|---|---|---|",
        "| trace | 20.00 ± 0.50 | 10.00 ± 0.50 | rose: 2 times as large |",
        "| stability | 0.5 |  |  |", "", "    All of it.", "      in two lines",
    ]  # fmt: skip
    assert "step" not in step_text(3, first, None, "").replace("**Step 3**", "")

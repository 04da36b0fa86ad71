"""Results of one run, step by step, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lla_callbacks.report.result import numbers_of

if TYPE_CHECKING:
    from pandas import DataFrame


def to_dataframe(history: Sequence[tuple[int, Any]]) -> DataFrame:
    """Return a table with a row a step and a column a number.

    Parts of a result are joined by ``/``: ``criteria/kh05``, ``layers/0.weight/trace``. What is no
    single number is left out.

    Args:
        history: Pairs of step and result, as ``monitor.history`` holds them.

    Raises:
        ImportError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe needs pandas: pip install pandas.") from error
    rows = [numbers_of(result) for _, result in history]
    index = pandas.Index([step for step, _ in history], name="step", dtype="int64")
    return pandas.DataFrame(rows, index=index)

"""Copies of many small containers at once, without a step of Python for each."""

from __future__ import annotations

import gc
import sys
from typing import Any

from lla_callbacks.objective.rules import ATOMS

# Fewer members than this are not worth the looks. Choice.
MANY = 64
_COPIED: dict[type, Any] = {list: list.copy, dict: dict.copy, set: set.copy}
_ROWS = frozenset({*_COPIED, tuple, frozenset}) | ATOMS
# References to a member that nobody else has.
_ALONE = max(map(sys.getrefcount, [[]]))


def rows_of(table: list[Any], *, alone: bool) -> list[Any] | None:
    """Return copies of the members of a list that hold what cannot change, and nothing else.

    ``None`` if some hold anything else, or are of other classes.

    Args:
        table: The list.
        alone: Whether none may be referred to from elsewhere, so that nobody asks which copy is
            of which.
    """
    kinds = set(map(type, table))
    if len(table) < MANY or kinds <= ATOMS or not kinds <= _ROWS:
        return None
    if type in kinds or not set(map(type, gc.get_referents(*table))) <= ATOMS:
        return None
    if alone and any(
        count > _ALONE and type(row) in _COPIED
        for count, row in zip(map(sys.getrefcount, table), table, strict=True)
    ):
        return None
    enabled = gc.isenabled()
    # So many new containers would have all of Python's looked through, several times.
    gc.disable()
    try:
        return [_COPIED[type(row)](row) if type(row) in _COPIED else row for row in table]
    finally:
        if enabled:
            gc.enable()

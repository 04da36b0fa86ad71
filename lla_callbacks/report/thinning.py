"""A long history in bounded room: all of what is recent, evenly less of what is old."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

# Entries in memory and checkpoints, of which so many are the last ones without a gap (choice: a
# curve of 400 points has more of them than a figure has room for).
MOST, RECENT = 400, 100
# Points of a history that are drawn.
DRAWN = 200


def evenly(places: Sequence[float], count: int) -> list[int]:
    """Return the indices of at most ``count`` places, as even as there are, both ends included.

    Args:
        places: Ascending numbers.
        count: 2 or more.
    """
    if len(places) <= count:
        return list(range(len(places)))
    first, last = places[0], places[-1]
    found = set()
    for k in range(count):
        wanted = first + (last - first) * k / (count - 1)
        i = min(bisect_left(places, wanted), len(places) - 1)
        nearer = i > 0 and wanted - places[i - 1] < places[i] - wanted
        found.add(i - 1 if nearer else i)
    return sorted(found)


def thin(history: list[tuple[int, Any]]) -> None:
    """Drop entries of a history in place, where it is longer than ``MOST``.

    The last ``RECENT`` stay. Of the older ones about half stay, evenly over their steps, so that
    it is done once in so many entries; what is done rests on the list alone, so that a resumed
    run does the same.

    Args:
        history: Pairs of step and result, steps ascending.
    """
    if len(history) > MOST:
        older = history[:-RECENT]
        kept = evenly([step for step, _ in older], max(2, (MOST - RECENT) // 2))
        history[:-RECENT] = [older[i] for i in kept]


def drawn(history: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Return the part of a history that a figure shows, evenly over its steps."""
    return [history[i] for i in evenly([step for step, _ in history], DRAWN)]

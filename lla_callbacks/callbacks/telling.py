"""What a user is told in a shell: above the bars, and once for all monitors of a Trainer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_utilities.core import rank_zero


@contextmanager
def above_bars() -> Iterator[None]:
    """Let a line be written above tqdm's bars, which are drawn again below it.

    Without this a warning begins in the middle of the line of a bar. Rich's displays do that by
    themselves.
    """
    bars: Any = sys.modules.get("tqdm")
    if bars is None:
        yield
        return
    with bars.tqdm.external_write_mode():
        yield


def rank_zero_warn(text: str) -> None:
    """Warn in the first process, above the bars."""
    with above_bars():
        rank_zero.rank_zero_warn(text, stacklevel=6)


def rank_zero_info(text: str) -> None:
    """Log a line in the first process, above the bars."""
    with above_bars():
        rank_zero.rank_zero_info(text)


class Said:
    """What monitors of one Trainer have told so far, so that each thing is told once."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}

    def is_new(self, owner: str, text: str) -> bool:
        """Return whether no other monitor has told this; it counts as told from then on."""
        return self._owners.setdefault(text, owner) == owner

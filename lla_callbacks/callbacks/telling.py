"""What a user is told in a shell: above the bars, and once for all monitors of a Trainer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning_utilities.core import rank_zero


@contextmanager
def above_bars(logger: logging.Logger | None = None) -> Iterator[None]:
    """Let a line be written above tqdm's bars or a display of Rich, which is drawn again below it.

    Without this a warning begins in the middle of the line of a bar. A display of Rich takes what
    goes to ``sys.stderr``, as a warning does; a handler of a log holds the stream that was there
    before.

    Args:
        logger: Where the line goes, if that is a log.
    """
    bars: Any = sys.modules.get("tqdm")
    with ExitStack() as stack:
        if bars is not None:
            stack.enter_context(bars.tqdm.external_write_mode())
        if logger is not None:
            stack.enter_context(_through_rich(logger))
        yield


@contextmanager
def _through_rich(logger: logging.Logger) -> Iterator[None]:
    """Let handlers of a log write where a display of Rich has its own."""
    # Of each stream that a display stands in for: what it was, and the display's.
    stood_in = [
        (getattr(stream, "rich_proxied_file", None), stream) for stream in (sys.stderr, sys.stdout)
    ]
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    at: logging.Logger | None = logger
    while at is not None:
        for handler in at.handlers:
            if not isinstance(handler, logging.StreamHandler):
                continue
            for before, display in stood_in:
                if before is not None and handler.stream is before:
                    moved.append((handler, before))
                    handler.setStream(display)
                    break
        at = at.parent if at.propagate else None
    try:
        yield
    finally:
        for handler, before in moved:
            handler.setStream(before)


def rank_zero_warn(text: str) -> None:
    """Warn in the first process, above the bars."""
    with above_bars():
        rank_zero.rank_zero_warn(text, stacklevel=6)


def rank_zero_info(text: str) -> None:
    """Log a line in the first process, above the bars."""
    with above_bars(rank_zero.log):
        rank_zero.rank_zero_info(text)


class Said:
    """What monitors of one Trainer have told so far, so that each thing is told once."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}

    def is_new(self, owner: str, text: str) -> bool:
        """Return whether no other monitor has told this; it counts as told from then on."""
        return self._owners.setdefault(text, owner) == owner

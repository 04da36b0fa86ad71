"""Signals wait while the guard changes or restores something, and are delivered right after."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Code that must not be left half done.
_SHIELDED: set[CodeType] = set()
_LIBRARY = contextlib.__file__


def shielded(function: Function) -> Function:
    """Mark a function as one that signals must not cut short, for use in :func:`held_back`.

    Of a generator (below ``@contextmanager``) that is what comes before and after its ``yield``,
    not what happens meanwhile.
    """
    _SHIELDED.add(function.__code__)
    return function


@contextmanager
def held_back() -> Iterator[None]:
    """Within this context, SIGINT and SIGTERM wait until no shielded function is running.

    The signals' handlers are Python functions (Ctrl-C raises KeyboardInterrupt, Lightning has
    its own for SIGTERM), which Python calls between any two instructions of the main thread. Ours
    looks at where that is: inside of a shielded function, or of ``contextlib``, which enters and
    leaves them, the signal is noted for later; anywhere else, as in the user's own step, the
    handler that was there before is called at once. A flag instead would itself be set between
    two instructions, and leave a gap on either side.

    Signals without a Python handler, such as a SIGTERM that kills, are left alone.
    """
    if _held.depth or threading.current_thread() is not threading.main_thread():
        _held.depth += _is_main()
        try:
            yield
        finally:
            _held.depth -= _is_main()
        return
    _held.depth = 1
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler):
            _held.previous[number] = handler
            signal.signal(number, _handle)
    try:
        yield
    finally:
        previous, _held.previous = _held.previous, {}
        _held.depth = 0
        # SIGINT last: its handler raises, and may do so from the moment it is back.
        for held, handler in reversed(previous.items()):
            signal.signal(held, handler)
        _deliver(previous)


def deliver() -> None:
    """Call the handlers of the signals that waited, at a moment when nothing is half done."""
    if _held.waiting and _is_main():
        _deliver(_held.previous)


class _Held:
    """What is held at present, in the main thread."""

    depth = 0

    def __init__(self) -> None:
        self.previous: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.waiting: list[int] = []


_held = _Held()


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(number: int, frame: FrameType | None) -> None:
    there = frame
    while there is not None:
        if there.f_code in _SHIELDED or there.f_code.co_filename == _LIBRARY:
            if number not in _held.waiting:
                _held.waiting.append(number)
            return
        there = there.f_back
    handler = _held.previous.get(number)
    if handler is not None:
        handler(number, frame)


def _deliver(previous: dict[int, Callable[[int, FrameType | None], Any]]) -> None:
    waiting, _held.waiting = _held.waiting, []
    for number in waiting:
        handler = previous.get(number)
        if handler is not None:
            handler(number, None)

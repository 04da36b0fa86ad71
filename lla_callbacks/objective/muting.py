"""Silence for ``self.log`` under all of its names, and for whatever else a replay would write."""

from __future__ import annotations

import builtins
import inspect
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch

from lla_callbacks.objective.disk import Disk
from lla_callbacks.objective.interrupts import shielded
from lla_callbacks.objective.inventory import Inventory
from lla_callbacks.objective.switches import switches
from lla_callbacks.objective.trackers import silence, speak

_NAMES = ("log", "log_dict")


@contextmanager
@shielded
def no_logging(held: Inventory) -> Iterator[None]:
    """Within this context ``log`` and ``log_dict`` of a LightningModule do nothing.

    They may have been kept elsewhere, as ``self.write = self.log``, in a partial or a closure, or
    be called as ``LightningModule.log(self, ...)``. All of these lead to one function, so it is
    that function which does nothing meanwhile: its code is exchanged, not its name.
    """
    kinds = set(map(type, held.modules))
    functions = {f for kind in kinds for f in _functions(kind)}
    saved = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions]
    try:
        for f, _, _, _ in saved:
            f.__defaults__ = f.__kwdefaults__ = None
            f.__code__ = _silence.__code__
        yield
    finally:
        for f, code, defaults, keywords in saved:
            f.__code__ = code
            f.__defaults__, f.__kwdefaults__ = defaults, keywords


@lru_cache(maxsize=1024)
def _functions(kind: type) -> tuple[FunctionType, ...]:
    """Return the functions of a class, and of those it derives from, that log."""
    if not hasattr(kind, "training_step"):
        return ()
    found = (vars(base).get(name) for base in kind.__mro__ for name in _NAMES)
    # One that closes over something takes no other code; those are overrides, which end here.
    return tuple(f for f in found if isinstance(f, FunctionType) and not f.__closure__)


def _silence(*args: Any, **kwargs: Any) -> None:
    """Stand in for what logs."""


@contextmanager
def no_output() -> Iterator[None]:
    """Within this context the calling thread, and those it starts, print, log and write nothing.

    What is done to files is in memory, or undone, and forgotten
    (:class:`~lla_callbacks.objective.disk.Disk`). Packages that track experiments, W&B and its
    like, hear nothing. A debugger in the user's code prints, and warnings are heard. Environment
    variables and switches of the process are put back.

    Raises:
        RefusedError: If the step calls another program.
    """
    if _Quiet.is_worn():  # within another one
        yield
        return
    real, save, start = io.open, torch.save, threading.Thread.start
    handle = logging.Logger.handle
    stdout, stderr, thread = sys.stdout, sys.stderr, threading.get_ident()
    # Compared in the form that it is kept in, which takes no time.
    environment: Any = getattr(os.environ, "_data", os.environ)
    variables = environment.copy()
    # By identity, and held: another thread must not come to have it.
    started: dict[int, threading.Thread] = {}
    is_over = False

    def is_mine() -> bool:
        if is_over:  # for who keeps a stand-in, such as a module that was first imported inside
            return False
        own = threading.get_ident() == thread
        return own or (bool(started) and id(threading.current_thread()) in started)

    def begun(self: threading.Thread) -> None:
        if is_mine():
            started[id(self)] = self
        start(self)

    disk = Disk(is_mine)

    def opened(*args: Any, **kwargs: Any) -> Any:
        return disk.opened(*args, **kwargs) if disk.is_asked else real(*args, **kwargs)

    def saved(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        # It writes files past Python.
        if isinstance(f, (str, os.PathLike)) and is_mine():
            with disk.opened(f, "wb") as file:
                save(obj, file, *args, **kwargs)
        else:
            save(obj, f, *args, **kwargs)

    def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
        if not is_mine():
            handle(logger, record)

    restore_switches = switches()
    trackers: list[Any] = []
    try:
        silence(is_mine, trackers)
        sys.stdout, sys.stderr = _Quiet(stdout, is_mine), _Quiet(stderr, is_mine)
        logging.Logger.handle = handled  # type: ignore[assignment, method-assign]
        threading.Thread.start = begun  # type: ignore[method-assign]
        builtins.open = io.open = opened
        torch.save = saved
        disk.enter()
        yield
    finally:
        is_over = True
        # First what cannot fail.
        torch.save = save
        builtins.open = io.open = real
        threading.Thread.start = start  # type: ignore[method-assign]
        logging.Logger.handle = handle  # type: ignore[method-assign]
        sys.stdout, sys.stderr = stdout, stderr
        disk.leave()
        speak(trackers)
        restore_switches()
        if environment != variables:
            _put_back(variables)
    if disk.refusals:
        # Also where the step caught it.
        raise disk.refusals[0]


def _put_back(variables: Any) -> None:
    """Let the environment be what it was."""
    before = {os.fsdecode(k): os.fsdecode(v) for k, v in variables.items()}
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({k: v for k, v in before.items() if os.environ.get(k) != v})


class _Quiet(io.TextIOBase):
    """A standard output that lets nothing through but a debugger's words, and warnings.

    Args:
        real: The output.
        is_mine: Whether the calling thread's words are kept back.
    """

    def __init__(self, real: Any, is_mine: Callable[[], bool]) -> None:
        self._real, self._is_mine = real, is_mine

    @staticmethod
    def is_worn() -> bool:
        """Return whether standard output is one of these."""
        return type(sys.stdout) is _Quiet

    def write(self, text: str) -> int:
        """Take a text."""
        if not self._is_mine() or _is_heard():
            return int(self._real.write(text) or 0)
        return len(text)

    def flush(self) -> None:
        """Pass on what was let through."""
        self._real.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _is_heard() -> bool:
    frame: Any = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[-1] in _HEARD:
            return True
        frame = frame.f_back
    return False


_HEARD = frozenset({"bdb", "pdb", "debugger", "pudb", "pydevd", "warnings"})

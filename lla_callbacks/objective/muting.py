"""Silence for ``self.log`` under all of its names, and for whatever else a replay would write."""

from __future__ import annotations

import builtins
import inspect
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lla_callbacks.objective.interrupts import shielded

_NAMES = ("log", "log_dict")


@contextmanager
@shielded
def no_logging(module: nn.Module) -> Iterator[None]:
    """Within this context ``log`` and ``log_dict`` of a LightningModule do nothing.

    They may have been kept elsewhere, as ``self.write = self.log``, in a partial or a closure, or
    be called as ``LightningModule.log(self, ...)``. All of these lead to one function, so it is
    that function which does nothing meanwhile: its code is exchanged, not its name.
    """
    kinds: set[Any] = {type(m) for m in module.modules()}
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
    """Within this context the calling thread prints nothing, logs nothing, and writes no files.

    Files that are opened for writing are in memory, and forgotten; what is read is what is on
    disk. A debugger in the user's code prints. Environment variables are put back.
    """
    real, save, handle = io.open, torch.save, logging.Logger.handle
    stdout, thread = sys.stdout, threading.get_ident()
    # Compared in the form that it is kept in, which takes no time.
    environment: Any = getattr(os.environ, "_data", os.environ)
    variables = environment.copy()

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        if not writes or isinstance(file, int) or threading.get_ident() != thread:
            return real(file, mode, *args, **kwargs)
        return _in_memory(real, file, mode, *args, **kwargs)

    def saved(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        # It writes files past Python.
        silent = isinstance(f, (str, os.PathLike)) and threading.get_ident() == thread
        save(obj, io.BytesIO() if silent else f, *args, **kwargs)

    def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
        if threading.get_ident() != thread:
            handle(logger, record)

    try:
        sys.stdout = _Quiet(stdout, thread)
        logging.Logger.handle = handled  # type: ignore[assignment, method-assign]
        builtins.open = io.open = opened
        torch.save = saved
        yield
    finally:
        if environment != variables:
            _put_back(variables)
        torch.save = save
        builtins.open = io.open = real
        logging.Logger.handle = handle  # type: ignore[method-assign]
        sys.stdout = stdout


def _put_back(variables: Any) -> None:
    """Let the environment be what it was."""
    before = {os.fsdecode(k): os.fsdecode(v) for k, v in variables.items()}
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({k: v for k, v in before.items() if os.environ.get(k) != v})


def _in_memory(real: Any, file: Any, mode: str, *args: Any, **kwargs: Any) -> Any:
    """Return a file in memory that stands for one on disk."""
    content = b""
    if "r" in mode or "a" in mode:
        try:
            with real(file, "rb") as there:
                content = there.read()
        except FileNotFoundError:
            if "r" in mode:
                raise
    elif "x" in mode and os.path.exists(file):
        raise FileExistsError(file)
    memory = io.BytesIO(content)
    if "a" in mode:
        memory.seek(0, io.SEEK_END)
    if "b" in mode:
        memory.name = file
        return memory
    names = ("buffering", "encoding", "errors", "newline")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return io.TextIOWrapper(memory, **{k: v for k, v in given.items() if k in names[1:]})


class _Quiet(io.TextIOBase):
    """A standard output that lets nothing through but a debugger's words.

    Args:
        real: The output.
        thread: Whose words are kept back.
    """

    def __init__(self, real: Any, thread: int) -> None:
        self._real, self._thread = real, thread

    def write(self, text: str) -> int:
        """Take a text."""
        if threading.get_ident() != self._thread or _is_debugged():
            return int(self._real.write(text) or 0)
        return len(text)

    def flush(self) -> None:
        """Pass on what was let through."""
        self._real.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _is_debugged() -> bool:
    frame: Any = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[-1] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return False


_DEBUGGERS = frozenset({"bdb", "pdb", "debugger", "pudb", "pydevd"})

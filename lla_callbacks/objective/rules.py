"""What is copied, what stays itself, and what cannot be copied, by class."""

from __future__ import annotations

import enum
import io
import itertools
import logging
import queue
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lla_callbacks.objective.shadows import is_shadowed
from lla_callbacks.objective.stand_ins import is_logger

# What cannot change is never copied.
ATOMS = frozenset({
    type(None), bool, int, float, complex, str, bytes, type, range, slice, type(Ellipsis),
    type(NotImplemented), torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format, types.ModuleType, property, types.CodeType,
})  # fmt: skip
# Torch's own handles, which hold no state of the user's.
_ATOMIC_MODULES = ("torch.nn.parallel", "torch.distributed", "torch.jit", "torch._dynamo")
_ATOMIC = (
    "torch._C", "torch._dynamo", "torch._inductor", "torch._ops", "torch.jit", "torch.fx",
    "torch.cuda", "torch.distributed", "torch.autograd", "torch.classes", "torch.nn.utils",
    "inspect",
)  # fmt: skip
# A new lock is as good as a copy: nobody else holds it.
LOCKS: dict[type, Callable[[], Any]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
}
_REFUSED: tuple[type, ...] = (
    types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, io.FileIO,
    io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper, queue.Queue,
    queue.SimpleQueue,
    *(k for k in vars(itertools).values() if isinstance(k, type)),
)  # fmt: skip


def is_atomic(value: Any, kind: type) -> bool:
    """Return whether something is no state of the user's: classes, enums, torch's own handles."""
    if isinstance(value, (type, enum.Enum, np.generic, logging.Logger, np.dtype)):
        return True
    if value is sys.stdout or value is sys.stderr or value is sys.stdin:
        return True
    if issubclass(kind, nn.Module):
        return kind.__module__.startswith(_ATOMIC_MODULES)
    return kind.__module__.startswith(_ATOMIC)


def is_machinery(kind: type) -> bool:
    """Return whether a class is of modules, optimizers, loggers or parts of a Trainer."""
    return issubclass(kind, (nn.Module, torch.optim.Optimizer)) or (
        is_shadowed(kind) or is_logger(kind)
    )


def is_refused(kind: type) -> bool:
    """Return whether a class cannot be copied, or its copies would do what only one may do."""
    if issubclass(kind, _REFUSED) or _is_shared(kind):
        return True
    # Whatever it does at its end, closing or deleting something, a copy would do as well.
    return hasattr(kind, "__del__") and not issubclass(kind, (io.StringIO, io.BytesIO))


def _is_shared(kind: type) -> bool:
    """Return whether objects of a class are shared with other threads or processes."""
    top = kind.__module__.split(".")[0]
    if kind.__module__ == "multiprocessing.context":
        return False
    if top == "threading":
        return not issubclass(kind, threading.local)
    return top in ("multiprocessing", "concurrent", "asyncio", "socket", "subprocess", "sqlite3")


def maps_itself(kind: type) -> bool:
    """Return whether an object of a class, a graph batch say, maps its own tensors."""
    if issubclass(kind, nn.Module) or kind.__module__.startswith("pandas"):
        return False
    return callable(getattr(kind, "apply", None))

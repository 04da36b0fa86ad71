"""What is copied, what stays itself, and what cannot be copied, by class."""

from __future__ import annotations

import datetime
import enum
import io
import itertools
import logging
import queue
import sys
import threading
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from lla_callbacks.objective.shadows import is_shadowed
from lla_callbacks.objective.stand_ins import is_logger
from lla_callbacks.objective.trackers import TRACKERS

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
# What C hands on to C, such as to closures of torch.compile: Python sees nothing in it.
_CAPSULE = type(datetime.datetime_CAPI)
_CONSTANT = (type, enum.Enum, np.generic, logging.Logger, np.dtype, _CAPSULE)
_DEFINITIONS = (types.FunctionType, type, types.ModuleType)
_STREAMS = ("stdout", "stderr", "stdin", "__stdout__", "__stderr__", "__stdin__")
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

# What stands for nothing at all.
MISSING: Any = object()
LIBRARIES = frozenset({
    "torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "numpy",
    "transformers", "peft", "lla_callbacks", *sys.stdlib_module_names,
})  # fmt: skip
# Packages whose objects may hold state of a step's; of others, nothing is known.
_OF_STATE = frozenset({
    "builtins", "collections", "random", "itertools", "queue", "io", "array", "argparse", "types",
    "threading", "functools", "weakref", "logging", "multiprocessing", "concurrent", "sqlite3",
    "socket", "csv", "thread", "torch", "numpy", "torchmetrics",
})  # fmt: skip


@lru_cache(maxsize=4096)
def is_of_the_user(module: str) -> bool:
    """Return whether a module, by its name, is no library's and not installed."""
    top = module.split(".")[0]
    if top in LIBRARIES:
        return False
    package = sys.modules.get(top)
    files = [getattr(package, "__file__", None) or "", *getattr(package, "__path__", ())]
    return not any("site-packages" in file or "dist-packages" in file for file in files)


def may_change(value: Any) -> bool:
    """Return whether a global may be some state of a step's: no function, no class, no constant.

    Objects of installed packages stay what they are but for modules, tensors and generators:
    some must not be copied, and others cost too much.
    """
    kind = type(value)
    if value is MISSING or kind in ATOMS or kind is object or isinstance(value, _DEFINITIONS):
        return False
    if kind is types.MethodType:
        return may_change(value.__self__)
    if issubclass(kind, (nn.Module, torch.Tensor)) or is_shadowed(kind) or is_logger(kind):
        return True
    module = str(kind.__module__)
    top = module.split(".")[0].lstrip("_")
    if top in ("torch", "numpy") and callable(value):
        return False
    return top in _OF_STATE or is_of_the_user(module)


def is_atomic(value: Any, kind: type) -> bool:
    """Return whether something is no state of the user's: classes, enums, torch's own handles."""
    if kind is object or isinstance(value, _CONSTANT):
        return True
    if any(value is getattr(sys, name, None) for name in _STREAMS):
        return True
    if issubclass(kind, nn.Module):
        return kind.__module__.startswith(_ATOMIC_MODULES)
    # A run of W&B, say, which is silent meanwhile.
    tracks = kind.__module__.split(".")[0] in TRACKERS and not is_logger(kind)
    return tracks or kind.__module__.startswith(_ATOMIC)


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

"""Switches of the process, such as determinism: a step that turns one turns it once."""

from __future__ import annotations

import decimal
import gc
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def switches() -> Callable[[], None]:
    """Note the switches of the process; return what puts back those that were turned since.

    Of torch: cuDNN, determinism, oneDNN, precision of products, anomaly mode, threads, autocast; of
    numpy: floating-point errors; of Python: filters of warnings, the garbage collector, limit of
    recursion, search path, precision of decimals; which figures are open in pyplot.
    """
    before = [read() for read in _READ]
    filters, path = warnings.filters[:], sys.path[:]
    # Figures that pyplot knows, if anybody uses it; muted loggers close none.
    pyplot: Any = sys.modules.get("matplotlib._pylab_helpers")
    figures: Any = pyplot.Gcf.figs.copy() if pyplot else ()

    def restore() -> None:
        now = [read() for read in _READ]
        if now != before:
            for value, old, put in zip(now, before, _PUT, strict=True):
                if value != old:
                    put(old)
        if warnings.filters != filters:
            warnings.filters[:] = filters  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]
        if sys.path != path:
            sys.path[:] = path
        if pyplot and list(pyplot.Gcf.figs) != list(figures):
            pyplot.Gcf.figs.clear()
            pyplot.Gcf.figs.update(figures)

    return restore


def _set_determinism(enabled: bool) -> None:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _set_warn_only(warn_only: bool) -> None:
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _precision_of_decimals() -> int:
    return decimal.getcontext().prec


def _set_precision_of_decimals(digits: int) -> None:
    decimal.getcontext().prec = digits


def _found() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return how each switch is read and set, of those that this release of torch has."""
    core: Any = torch._C
    names = [
        ("_get_cudnn_enabled", "_set_cudnn_enabled"),
        ("_get_cudnn_benchmark", "_set_cudnn_benchmark"),
        ("_get_cudnn_deterministic", "_set_cudnn_deterministic"),
        ("_get_mkldnn_enabled", "_set_mkldnn_enabled"),
        ("_get_float32_matmul_precision", "_set_float32_matmul_precision"),
    ]
    found = [
        (getattr(core, read), getattr(core, put))
        for read, put in names
        if hasattr(core, read) and hasattr(core, put)
    ]
    found += [
        (torch.are_deterministic_algorithms_enabled, _set_determinism),
        (torch.is_deterministic_algorithms_warn_only_enabled, _set_warn_only),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (torch.get_num_threads, torch.set_num_threads),
        (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        (sys.getrecursionlimit, sys.setrecursionlimit),
        (_precision_of_decimals, _set_precision_of_decimals),
    ]
    for kind in ("cpu", "cuda"):
        found.append((
            lambda kind=kind: torch.is_autocast_enabled(kind),
            lambda on, kind=kind: torch.set_autocast_enabled(kind, on),
        ))  # fmt: skip
    if np.__version__ < "2":  # a context variable since, of which a pass has its own
        found.append((np.geterr, lambda value: np.seterr(**value)))
    return found


_READ, _PUT = zip(*_found(), strict=True)

"""What is free goes back to the system while a large graph is made and walked, on Linux.

The C library keeps what was freed, in pieces between what is still in use, and takes new memory for
whatever fits none of them. A gradient's graph of a ResNet-20, made and walked, held 1.6 GiB so, of
which 0.9 were in use (docs/benchmarks/engines.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Bytes that graphs take or give between two trims; each takes some milliseconds.
STEP = 64 * 2**20


@cache
def trimmer() -> Callable[[int], Any] | None:
    """Return the C library's function that gives back what is free, ``None`` if there is none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        # Only glibc has it.
        return None


def give_back() -> None:
    """Give back what is free now."""
    trim = trimmer()
    if trim is not None:
        trim(0)


@contextmanager
def trimmed() -> Iterator[None]:
    """Give free memory back from time to time while graphs are made and walked inside.

    Graphs that are made inside do so wherever they are walked. Raises torch's RuntimeError about
    saved tensor hooks where a function refuses these.
    """
    trim = trimmer()
    if trim is None:
        yield
        return
    passed = STEP

    def note(tensor: Tensor) -> Tensor:
        nonlocal passed
        passed += tensor.numel() * tensor.element_size()
        if passed > STEP:
            trim(0)
            passed = 0
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, note):
        yield

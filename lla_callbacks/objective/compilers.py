"""Who asks for a file in the middle of a pass: the step, or a compiler that makes its kernels."""

from __future__ import annotations

import sys
from typing import Any

_COMPILERS = (
    "torch._inductor", "torch._dynamo", "torch._functorch", "torch.utils.cpp_extension", "triton",
    "numba", "cupy", "pycuda", "jax",
)  # fmt: skip
_STANDARD = sys.stdlib_module_names | {__name__.split(".")[0]}


def is_by_a_compiler() -> bool:
    """Return whether the first caller that is not of Python's own library is a compiler."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.split(".")[0] not in _STANDARD:
            return name.startswith(_COMPILERS)
        frame = frame.f_back
    return False

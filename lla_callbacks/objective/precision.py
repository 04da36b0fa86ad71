"""In which arithmetic curvature is computed: float32 by default, whatever training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.objective.checks import one_of
from lla_callbacks.objective.policy import put_aside
from lla_callbacks.objective.sharded import is_sharded

Precision = Literal["float32", "training"]

# Formats whose digits do not suffice for second derivatives.
HALF = (torch.float16, torch.bfloat16)
# Names the parameter that a float32 copy stands for.
ORIGINAL = "_lla_callbacks_original"


def check_precision(precision: str) -> None:
    """Raise a ValueError for a precision that does not exist."""
    one_of("precision", precision, Precision)


@contextmanager
def at_precision(
    module: nn.Module, precision: Precision, copies: dict[int, Tensor] | None = None
) -> Iterator[None]:
    """Let a module have float32 parameters and buffers inside, where it has halves.

    Copies take the places of half-precision parameters and buffers, and the originals, to the
    bit and as the same objects, come back on leaving: optimizers and wrappers notice nothing.
    float32 and float64 stay as they are, and with ``"training"`` everything does. A
    ``MixedPrecisionPolicy`` of FSDP2 has no effect meanwhile, but for ``"training"``.

    Args:
        module: The module.
        precision: See above.
        copies: By the originals' identity, for who comes again and needs the same copies.

    Raises:
        MeasurementError: If the halves are sharded.
    """
    halves = any(t.dtype in HALF for t in (*module.parameters(), *module.buffers()))
    if halves and precision == "float32" and is_sharded(module):
        raise MeasurementError(
            "half-precision parameters that fully_shard has spread cannot be widened.",
            "Keep float32 parameters, with MixedPrecisionPolicy for training.",
        )
    wide = {dtype: torch.float32 for dtype in HALF} if precision == "float32" else {}
    with (
        put_aside(module, full=precision == "float32"),
        _at_dtypes(module, wide, {} if copies is None else copies),
    ):
        yield


@contextmanager
def in_double(module: nn.Module) -> Iterator[None]:
    """Let a module compute in float64 inside, as far as its own code lets it."""
    dtypes = {dtype: torch.float64 for dtype in (*HALF, torch.float32)}
    default = torch.get_default_dtype()
    with _at_dtypes(module, dtypes, {}):
        # What a forward pass makes itself is made so.
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


@contextmanager
def _at_dtypes(
    module: nn.Module, dtypes: dict[torch.dtype, torch.dtype], copies: dict[int, Tensor]
) -> Iterator[None]:
    """Let copies of other dtypes take the places of parameters and buffers inside."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for m in module.modules() if dtypes else ():
            for store in (m._parameters, m._buffers):
                for name, tensor in store.items():
                    if tensor is not None and tensor.dtype in dtypes:
                        saved.append((store, name, tensor))
                        if id(tensor) not in copies:
                            copies[id(tensor)] = _at_dtype(tensor, dtypes[tensor.dtype])
                        store[name] = copies[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for store, name, tensor in saved:
            store[name] = tensor


@contextmanager
def autocast_inside(*, off: bool, note: Callable[[torch.dtype], object]) -> Iterator[None]:
    """Watch the autocast regions that a loss opens itself, and turn them off if asked to.

    Turning autocast off around a loss does not reach the regions that it opens. Those of
    scripted modules, which enter them in compiled code, are not seen.

    Args:
        off: Whether they have no effect.
        note: Called with the dtype of each region that has one.
    """
    kind: Any = torch.amp.autocast_mode.autocast
    enter = kind.__enter__

    def entered(self: Any) -> Any:
        if not self._enabled:
            return enter(self)
        if not off:
            note(self.fast_dtype)
            # Casts of weights are kept until the outermost region ends, which is ours.
            torch.clear_autocast_cache()
            return enter(self)
        # As it was for whoever keeps the region and enters it again elsewhere.
        self._enabled = False
        try:
            return enter(self)
        finally:
            self._enabled = True

    kind.__enter__ = entered
    try:
        yield
    finally:
        kind.__enter__ = enter


def original_of(tensor: Tensor) -> Tensor:
    """Return the parameter that a copy stands for, or the tensor itself."""
    found: Tensor = getattr(tensor, ORIGINAL, tensor)
    return found


def widened_half(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor as float32, any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


def _at_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    copy = tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
    setattr(copy, ORIGINAL, original_of(tensor))
    return copy

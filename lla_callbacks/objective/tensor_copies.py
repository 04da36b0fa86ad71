"""Copies of tensors: lazy where they are large, and sharing memory where the originals do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.objective.interrupts import shielded
from lla_callbacks.objective.precision import HALF

# From here on a copy waits until one side is written: below, a real one is as fast.
LAZY_BYTES = 2**16


def separate(tensor: Tensor) -> Tensor:
    """Return a detached copy, which takes memory only once it or the original is written.

    torch keeps count of who shares the memory (copy on write), below ``.data``, views and
    numpy, so that whatever writes gets its own copy first: the frozen base of a fine-tuned
    network costs nothing, and cannot be changed through its copy. Memory that is not torch's
    own (mapped, shared, of numpy) is copied at once, and so are tensors of other classes and
    devices, and all with a torch that has no ``_lazy_clone``.
    """
    bare = tensor.detach()
    plain = type(bare) is Tensor and bare.layout is torch.strided
    large = plain and bare.numel() * bare.element_size() >= LAZY_BYTES
    if large and bare.device.type in ("cpu", "cuda") and _lazy is not None:
        try:
            found: Tensor = _lazy(bare)
            return found
        except RuntimeError:  # also NotImplementedError: a layout without a storage
            pass
    return bare.clone()


@contextmanager
@shielded
def restored_values(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the values of tensors back that stay in their places, where they were written.

    For tensors of classes of their own, such as quantized weights, which are never built anew.
    """
    parts = [part for tensor in tensors for part in plain_parts(tensor)]
    saved = [(part, separate(part)) for part in parts]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, value in saved:
                if differ(part, value):
                    part.copy_(value)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal to the bit: NaN equals itself and -0.0 is not 0.0."""
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    # One contiguous dimension: scalars and other memory formats cannot be viewed as bytes.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def differ(part: Tensor, value: Tensor) -> bool:
    """Return whether a tensor was written since a copy was made by :func:`separate`."""
    # Memory that is still shared was not written.
    address = getattr(torch._C, "_data_address", None)
    if address is not None and address(part) == address(value):
        return False
    return not same_bits(part, value)


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the ordinary tensors that a tensor of whatever class consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in plain_parts(getattr(tensor, name))]
    # .data: whoever holds the graph does not see a new version.
    with torch._C.DisableTorchFunctionSubclass():
        bare = tensor.data
    return [bare] if type(bare) is Tensor and bare.layout is torch.strided else []


def tensor_below(array: Any) -> Tensor | None:
    """Return a tensor of an array's memory, where that is a tensor's, as of ``weight.numpy()``."""
    base = array
    while type(base) is type(array):
        base = base.base
    if type(base) not in _PLAIN or base.layout is not torch.strided:
        return None
    size = base.element_size()
    if array.itemsize != size or any(step < 0 or step % size for step in array.strides):
        return None
    shift = (array.__array_interface__["data"][0] - base.data_ptr()) // size
    steps = [step // size for step in array.strides]
    found = base.detach().as_strided(array.shape, steps, base.storage_offset() + shift)
    return found if found.numpy().dtype == array.dtype else None


class Storages:
    """Which copy stands for which memory, so that views of one tensor stay views of one copy.

    Args:
        pairs: Gives tensors and what stands for them; the same object: itself.
        widen: Whether half-precision tensors are copied as float32.
    """

    def __init__(
        self, pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]], *, widen: bool = False
    ) -> None:
        self._pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = pairs
        self._widen = widen
        # Address of a storage -> the tensor whose storage stands for it, the original's dtype.
        self._known: dict[int, tuple[Tensor, torch.dtype]] = {}
        # Addresses must not be used again meanwhile.
        self._alive: list[Any] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a detached copy; of memory that is known already, a view of its copy."""
        if self._pairs is not None:
            pairs, self._pairs = self._pairs, None
            for original, substitute in pairs():
                self._note(original, substitute)
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            return self._widened(separate(tensor))
        try:
            storage = tensor.untyped_storage()
            key = storage._cdata
        except (RuntimeError, NotImplementedError):  # such as inside of vmap
            return self._widened(separate(tensor))
        if key not in self._known:
            whole = storage.nbytes() == tensor.numel() * tensor.element_size()
            if whole:
                copied = self._widened(separate(tensor))
                self._note(tensor, copied)
                return copied
            flat = _view(storage, tensor, 0, (storage.nbytes() // tensor.element_size(),), (1,))
            self._note(flat, self._widened(separate(flat)))
        substitute, dtype = self._known[key]
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        target = substitute.untyped_storage()
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        fits = (last + 1) * substitute.element_size() <= target.nbytes()
        if tensor.dtype != dtype or not (fits or tensor.numel() == 0):
            return self._widened(separate(tensor))
        return _view(target, substitute, offset, size, stride)

    def _note(self, original: Tensor, substitute: Tensor) -> None:
        if type(original) not in _PLAIN or type(substitute) not in _PLAIN:
            return
        try:
            storage = original.untyped_storage()
            substitute.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return
        if original.storage_offset() != substitute.storage_offset() or (
            original.stride() != substitute.stride()
        ):
            # What was a part of something else is whole in its copy.
            return
        self._alive.append(storage)
        self._known.setdefault(storage._cdata, (substitute, original.dtype))

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self._widen and tensor.dtype in HALF else tensor


def _view(storage: Any, like: Tensor, offset: Any, size: Any, stride: Any) -> Tensor:
    """Return a tensor over a storage that is no view in autograd's eyes."""
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        return empty.set_(storage, offset, size, stride)


_PLAIN = (Tensor, torch.nn.Parameter)
_lazy: Any = getattr(torch, "_lazy_clone", None)

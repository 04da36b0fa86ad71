"""Between parameters by name and one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class ParameterSpace:
    """The order in which named parameters are laid out in one flat vector.

    A tensor that carries several names (tied weights) is laid out once, under its first
    name. Vectors are float64 if a parameter is, else float32: a bfloat16 model gets
    float32 vectors, since Lanczos in bfloat16 has no digits left.

    Args:
        parameters: Name to tensor; the order of the mapping is the order of the vector.

    Attributes:
        names: Names in order.
        tensors: Tensors in order.
        dim: Length of the flat vector.
        dtype: Of flat vectors.
        precision: The coarsest dtype among the parameters: that of the arithmetic.
        slices: Name to the slice of the flat vector.

    Raises:
        ValueError: If there is no parameter, or they live on several devices.
        TypeError: If a parameter is not a real floating-point tensor.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        unique: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in parameters.items():
            unique.setdefault(id(tensor), (name, tensor))
        if not unique:
            raise ValueError(
                "there is no trainable parameter: unfreeze at least one "
                "(requires_grad=True), or choose layers that have some."
            )
        self.names = tuple(name for name, _ in unique.values())
        self.tensors = tuple(tensor for _, tensor in unique.values())
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if not tensor.is_floating_point():
                raise TypeError(
                    f"parameter {name!r} is {tensor.dtype}; only real floating-point "
                    "parameters have a Hessian here: freeze it (requires_grad=False)."
                )
        devices = {tensor.device for tensor in self.tensors}
        if len(devices) > 1:
            raise ValueError(
                f"parameters live on several devices {sorted(map(str, devices))}: move "
                "the module to one."
            )
        self.device = devices.pop()
        self.precision = max(
            (tensor.dtype for tensor in self.tensors), key=lambda dtype: torch.finfo(dtype).eps
        )
        wide = any(tensor.dtype == torch.float64 for tensor in self.tensors)
        self.dtype = torch.float64 if wide else torch.float32
        self.slices: dict[str, slice] = {}
        stop = 0
        for name, tensor in zip(self.names, self.tensors, strict=True):
            self.slices[name] = slice(stop, stop + tensor.numel())
            stop += tensor.numel()
        self.dim = stop

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return one vector ``(dim,)``; ``None`` (an unused parameter) becomes zeros."""
        parts = [
            like.new_zeros(like.numel(), dtype=self.dtype)
            if tensor is None
            else tensor.detach().reshape(-1).to(self.dtype)
            for tensor, like in zip(tensors, self.tensors, strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return tensors shaped and typed like the parameters, from a vector ``(dim,)``."""
        return tuple(
            vector[self.slices[name]].reshape(like.shape).to(like.dtype)
            for name, like in zip(self.names, self.tensors, strict=True)
        )

    def index(self, names: Iterable[str]) -> Tensor:
        """Return the positions of some parameters in the flat vector, ascending."""
        chosen = set(names)
        unknown = chosen - set(self.names)
        if unknown:
            raise KeyError(f"no parameter is named {sorted(unknown)}.")
        parts = [
            torch.arange(self.slices[name].start, self.slices[name].stop)
            for name in self.names
            if name in chosen
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)

"""Between parameters by name and one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class ParameterSpace:
    """The order in which named parameters are laid out in one flat vector.

    Parameters that are spread over processes (distributed tensors) are laid out whole, the same
    vector in every process. A tensor that carries several names (tied weights) is laid out once,
    under its first name. Vectors are float64 if a parameter is, else float32: a bfloat16 model gets
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

    def zeros(self) -> Tensor:
        """Return a flat vector of zeros."""
        return torch.zeros(self.dim, dtype=self.dtype, device=self.device)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return one vector ``(dim,)``; ``None`` (an unused parameter) becomes zeros."""
        parts = [
            torch.zeros(like.numel(), dtype=self.dtype, device=self.device)
            if tensor is None
            else whole(tensor.detach()).reshape(-1).to(self.dtype)
            for tensor, like in zip(tensors, self.tensors, strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return tensors shaped and typed like the parameters, from a vector ``(dim,)``."""
        return tuple(
            spread_like(vector[self.slices[name]].reshape(like.shape).to(like.dtype), like)
            for name, like in zip(self.names, self.tensors, strict=True)
        )

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return the flat pieces of a vector ``(dim,)``, one a parameter, in order."""
        return torch.split(vector, [t.numel() for t in self.tensors])

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


def is_spread(tensor: Tensor) -> bool:
    """Return whether a tensor is one of torch's distributed ones, spread over processes."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its entries, gathered from the processes it is spread over."""
    if not is_spread(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, sharing its memory."""
    if not is_spread(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, the same in every process, spread over them as another one is."""
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = like.device_mesh  # type: ignore[attr-defined]
    # Every process has all of it, so nothing needs to be sent.
    everywhere = distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    return everywhere.redistribute(mesh, like.placements)  # type: ignore[attr-defined]

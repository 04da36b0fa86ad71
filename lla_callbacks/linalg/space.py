"""Between parameters by name and one flat vector, as far as this process holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lla_callbacks.linalg.distributed import (
    is_spread,
    local_part,
    of_part,
    part_like,
    spread_like,
    whole,
)
from lla_callbacks.linalg.shards import Shards, everyone
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.linalg.vectors import Vectors

__all__ = ["ParameterSpace", "is_spread", "local_part", "spread_like", "whole"]


class ParameterSpace:
    """The order in which named parameters are laid out in one flat vector.

    Of parameters that are spread over processes (distributed tensors) each process lays out what it
    has of them, in the same order. A tensor that carries several names (tied weights) is laid out
    once, under its first name. Vectors are float64 if a parameter is, else float32: a bfloat16
    model gets float32 vectors, since Lanczos in bfloat16 has no digits left.

    Args:
        parameters: Name to tensor; the order of the mapping is the order of the vector.

    Attributes:
        names: Names in order.
        tensors: Tensors in order.
        dim: Entries of all parameters, in all processes.
        length: Entries of them here: of flat vectors. The same, unless parameters are spread.
        is_spread: Whether any parameter is spread over processes.
        dtype: Of flat vectors.
        precision: The coarsest dtype among the parameters: that of the arithmetic.
        slices: Name to the slice of the flat vector.
        starts: Name to the place where the parameter begins among all entries.

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
        self.starts: dict[str, int] = {}
        self.is_spread = any(map(is_spread, self.tensors))
        stop = place = 0
        for name, tensor in zip(self.names, self.tensors, strict=True):
            self.starts[name] = place
            place += tensor.numel()
            self.slices[name] = slice(stop, stop + local_part(tensor).numel())
            stop = self.slices[name].stop
        self.dim, self.length = place, stop
        self._held: tuple[Share | None, Vectors] | None = None

    def zeros(self) -> Tensor:
        """Return a flat vector of zeros."""
        return torch.zeros(self.length, dtype=self.dtype, device=self.device)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return one vector ``(length,)``; ``None`` (an unused parameter) becomes zeros."""
        parts = [
            torch.zeros(local_part(like).numel(), dtype=self.dtype, device=self.device)
            if tensor is None
            else part_like(tensor.detach(), like).reshape(-1).to(self.dtype)
            for tensor, like in zip(tensors, self.tensors, strict=True)
        ]
        return torch.cat(parts)

    def add_to(self, vector: Tensor, tensors: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add tensors times a number to a vector ``(length,)``, where it stands."""
        parts = [
            (name, part_like(tensor.detach(), like).reshape(-1).to(self.dtype))
            for name, tensor, like in zip(self.names, tensors, self.tensors, strict=True)
            if tensor is not None
        ]
        # Nothing is added where there is no memory for all of it.
        for name, part in parts:
            vector[self.slices[name]].add_(part, alpha=weight)

    def unflatten(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return tensors shaped, typed and spread like the parameters, from ``(length,)``."""
        return tuple(
            of_part(vector[self.slices[name]].to(like.dtype), like)
            for name, like in zip(self.names, self.tensors, strict=True)
        )

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return the flat pieces of a vector ``(length,)``, one a parameter, in order."""
        return torch.split(vector, [local_part(t).numel() for t in self.tensors])

    def restricted(self, names: Iterable[str]) -> ParameterSpace:
        """Return the layout of some parameters alone, in the same order."""
        chosen = set(names)
        return ParameterSpace(
            {n: t for n, t in zip(self.names, self.tensors, strict=True) if n in chosen}
        )

    def vectors(self, share: Share | None = None) -> Vectors:
        """Return how flat vectors are held, as the parameters lie: whole, or in their shards.

        Args:
            share: The processes, which are those of the shards if they are all there are.
        """
        if not self.is_spread:
            return Vectors(self.dim)
        if self._held is None or self._held[0] is not share:
            self._held = share, Shards(self.tensors, everyone(share, self.device))
        return self._held[1]

    def scattered(self, vector: Tensor) -> Tensor:
        """Return what this process has, ``(length,)``, of a whole vector ``(dim,)``."""
        if not self.is_spread:
            return vector
        whole_parts = torch.split(vector, [t.numel() for t in self.tensors])
        return torch.cat(
            [
                local_part(spread_like(part.reshape(like.shape).to(like.device), like)).reshape(-1)
                for part, like in zip(whole_parts, self.tensors, strict=True)
            ]
        )

    def gathered(self, vector: Tensor) -> Tensor:
        """Return a whole vector ``(dim,)`` from what each process has; one exchange a parameter."""
        if not self.is_spread:
            return vector
        parts = zip(self.split(vector), self.tensors, strict=True)
        return torch.cat([whole(of_part(part, like)).reshape(-1) for part, like in parts])

    def index(self, names: Iterable[str]) -> Tensor:
        """Return the positions of some parameters in the flat vector here, ascending."""
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

    def place(self, names: Iterable[str]) -> slice | Tensor:
        """Return the same positions, as a range where they are one: it takes no memory."""
        chosen = set(names)
        found = [self.slices[name] for name in self.names if name in chosen]
        joined = all(a.stop == b.start for a, b in pairwise(found))
        if chosen <= self.slices.keys() and found and joined:
            return slice(found[0].start, found[-1].stop)
        return self.index(chosen).to(self.device)

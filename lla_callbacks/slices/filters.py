"""The filters of a network's parameters: norms, scaling, and directions orthogonal in each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.distributed import local_part
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.filters import (
    filters_as_rows,
    filters_as_tensor,
    transposed_groups,
)


class Filters:
    """Splits flat vectors into filters and scales each to the norm of the weights' filter.

    A filter is what makes one output: a slice along the first dimension of a parameter
    (an output channel, an output neuron, a row of an embedding), along the output channels of
    a transposed convolution. A fused projection of attention has one filter a row.

    All arithmetic is in float64 on the CPU.

    Args:
        module: Owner of the parameters.
        space: Their layout.
        normalization: ``"filter"``, ``"layer"`` (the tensor is the filter), ``"weight"`` or
            ``"none"``.
        vectors: ``"zero"``, ``"tensor"`` or ``"entry"``: what a filter of a one-dimensional
            parameter is.
    """

    # Whether parameters are taken one by one, and nothing is held of all.
    streams = False

    def __init__(
        self, module: nn.Module, space: ParameterSpace, normalization: str, vectors: str
    ) -> None:
        self.space = space
        self.normalization = normalization
        self.vectors = vectors
        # Copies: rays are scaled while the live weights are somewhere else.
        self._weights = [local_part(tensor).detach().cpu().clone() for tensor in space.tensors]
        self._groups = transposed_groups(module)

    def num_moved(self) -> int:
        """Return how many parameters a direction moves: the dimension that it is drawn from."""
        still = self.vectors == "zero" and self.normalization in ("filter", "layer")
        return sum(t.numel() for t in self.space.tensors if t.ndim > 1 or not still)

    def drawn(self, seed: int, *keys: int) -> Any:
        """Return entries of N(0, 1), drawn on the CPU by seed and keys: what scaling takes."""
        source = generator(seed, *keys)
        return torch.randn(self.space.dim, generator=source, dtype=torch.float64)

    def scaled(self, direction: Any) -> Tensor:
        """Return a direction, flat or :meth:`drawn`, scaled to the weights, flat."""
        result = torch.zeros(self.space.length, dtype=torch.float64)
        for where, weights, rows in self._parts(direction):
            self._put(result, where, self._scale(rows, weights))
        return result

    def orthogonal_to(self, first: Any, second: Any) -> Tensor:
        """Return ``second`` scaled, and orthogonal to ``scaled(first)``.

        With ``u`` and ``v`` the filters of the two, ``v - <v, u> / <u, u> u`` is orthogonal to
        ``u``, and stays so however the filters are scaled. Filters with one entry have
        no room for that: they add ``+-||w||^2`` to the inner product. Their signs are chosen so
        that these nearly cancel, and the other filters are turned by one common angle that
        cancels the rest, their norms unchanged.
        """
        if self.normalization == "none":
            first, second = self.scaled(first), self.scaled(second)
            square, product = self._inner(first, first), self._inner(second, first)
            left: Tensor = second - product / square * first if square > 0 else second
            return left
        result = torch.zeros(self.space.length, dtype=torch.float64)
        # What does not fit into one process as a whole is computed twice.
        held = None if self.streams else list(self._turned(first, second))
        rest = total = 0.0
        for where, _, u, v, alone in held or self._turned(first, second):
            if alone:
                v, rest = _balanced(u, v, rest)
                self._put(result, where, v)
            else:
                total += float((u * u).sum())
        angle = max(-1.0, min(1.0, -rest / total)) if total else 0.0
        for where, weights, u, v, alone in held or self._turned(first, second):
            if not alone:
                if angle:
                    v = self._scale(v + _slope(angle) * u, weights)
                self._put(result, where, v)
        return result

    def _turned(
        self, first: Any, second: Any
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor, bool]]:
        """Yield name, weights and both vectors, the second one turned, and if it could not be.

        As rows of filters, which cannot be turned where they have one entry.
        """
        for (where, weights, u), (_, _, v) in zip(
            self._parts(first), self._parts(second), strict=True
        ):
            u, v = self._scale(u, weights), self._scale(v, weights)
            if u.shape[1] == 1 and self.normalization != "weight":
                yield where, weights, u, v, True
                continue
            squares = (u * u).sum(1, keepdim=True)
            v = v - (v * u).sum(1, keepdim=True) / squares.clamp(min=1e-300) * u
            if self.normalization != "weight":
                v = self._scale(v, weights)
            yield where, weights, u, v, False

    def _inner(self, a: Tensor, b: Tensor) -> float:
        return float(a @ b)

    def _whole(self, vector: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield weights and vector of each parameter, float64, shaped as it is."""
        for name, weights in zip(self.space.names, self._weights, strict=True):
            values = vector[self.space.slices[name]].double().cpu()
            yield weights.double(), values.reshape(weights.shape)

    def _parts(self, vector: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, weights and vector of each parameter that moves, as rows of filters."""
        for name, tensor, (weights, values) in zip(
            self.space.names, self.space.tensors, self._whole(vector), strict=True
        ):
            if weights.ndim <= 1 and self.normalization in ("filter", "layer"):
                if self.vectors == "zero":
                    continue
                shape = (1, -1) if self.vectors == "tensor" else (-1, 1)
                yield name, weights.reshape(shape), values.reshape(shape)
            elif self.normalization == "filter":
                groups = self._groups.get(id(tensor))
                yield name, filters_as_rows(weights, groups), filters_as_rows(values, groups)
            else:
                yield name, weights.reshape(1, -1), values.reshape(1, -1)

    def _scale(self, rows: Tensor, weights: Tensor) -> Tensor:
        if self.normalization == "none":
            return rows
        if self.normalization == "weight":
            return rows * weights
        lengths = rows.norm(dim=1, keepdim=True)
        # A filter of zeros stays where it is.
        scaled: Tensor = rows * (weights.norm(dim=1, keepdim=True) / lengths.clamp(min=1e-300))
        return scaled

    def _put(self, result: Tensor, name: str, rows: Tensor) -> None:
        where = self.space.slices[name]
        tensor = self.space.tensors[self.space.names.index(name)]
        groups = self._groups.get(id(tensor))
        if groups is not None and self.normalization == "filter":
            rows = filters_as_tensor(rows, tensor.shape, groups)
        result[where] = self._here(rows, tensor)

    def _here(self, values: Tensor, parameter: Tensor) -> Tensor:
        """Return what this process has of a parameter's values, flat."""
        return values.reshape(-1)


def _balanced(u: Tensor, v: Tensor, rest: float) -> tuple[Tensor, float]:
    """Return ``v`` with signs that keep the inner product with ``u`` near zero, and that product.

    Largest first, each against the sum so far.
    """
    products = (u * v).reshape(-1).abs()
    signs = torch.ones_like(products)
    for i in torch.argsort(products, descending=True).tolist():
        signs[i] = -1.0 if rest > 0 else 1.0
        rest += float(signs[i] * products[i])
    # With v = s |v| sign(u) the product is s |u v|.
    return (signs * v.reshape(-1).abs() * torch.sign(u.reshape(-1))).reshape(v.shape), rest


def _slope(cosine: float) -> float:
    """Return t such that ``v + t u`` has this cosine with ``u``, for orthogonal ``|u| = |v|``."""
    return cosine / math.sqrt(max(1e-12, 1 - cosine * cosine))

"""The filters of a network's parameters: norms, scaling, and directions orthogonal in each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

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

    def __init__(
        self, module: nn.Module, space: ParameterSpace, normalization: str, vectors: str
    ) -> None:
        self.space = space
        self.normalization = normalization
        self.vectors = vectors
        # Copies: rays are scaled while the live weights are somewhere else.
        self._weights = [tensor.detach().cpu().clone() for tensor in space.tensors]
        self._groups = transposed_groups(module)

    def num_moved(self) -> int:
        """Return how many parameters a direction moves: the dimension that it is drawn from."""
        return sum(w.numel() for _, w, _ in self._parts(torch.ones(self.space.dim)) if w.numel())

    def scaled(self, direction: Tensor) -> Tensor:
        """Return a direction, shape ``(dim,)``, scaled to the weights."""
        result = torch.zeros(self.space.dim, dtype=torch.float64)
        for where, weights, rows in self._parts(direction):
            self._put(result, where, self._scale(rows, weights))
        return result

    def orthogonal_to(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ``second`` scaled, and orthogonal to ``scaled(first)``.

        With ``u`` and ``v`` the filters of the two, ``v - <v, u> / <u, u> u`` is orthogonal to
        ``u``, and stays so however the filters are scaled. Filters with one entry have
        no room for that: they add ``+-||w||^2`` to the inner product. Their signs are chosen so
        that these nearly cancel, and the other filters are turned by one common angle that
        cancels the rest, their norms unchanged.
        """
        if self.normalization == "none":
            first, second = self.scaled(first), self.scaled(second)
            square = first @ first
            return second - (second @ first) / square * first if square > 0 else second
        result = torch.zeros(self.space.dim, dtype=torch.float64)
        turned = []
        single: list[tuple[str, Tensor, Tensor]] = []
        for (where, weights, u), (_, _, v) in zip(
            self._parts(first), self._parts(second), strict=True
        ):
            u, v = self._scale(u, weights), self._scale(v, weights)
            if u.shape[1] == 1 and self.normalization != "weight":
                single.append((where, u, v))
                continue
            squares = (u * u).sum(1, keepdim=True)
            v = v - (v * u).sum(1, keepdim=True) / squares.clamp(min=1e-300) * u
            if self.normalization != "weight":
                v = self._scale(v, weights)
            turned.append((where, weights, u, v))
        rest = 0.0
        for where, u, v in single:
            v, rest = _balanced(u, v, rest)
            self._put(result, where, v)
        total = sum(float((u * u).sum()) for _, _, u, _ in turned)
        angle = max(-1.0, min(1.0, -rest / total)) if total else 0.0
        for where, weights, u, v in turned:
            if angle:
                v = self._scale(v + _slope(angle) * u, weights)
            self._put(result, where, v)
        return result

    def _parts(self, vector: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, weights and vector of each parameter that moves, as rows of filters."""
        for name, tensor, saved in zip(
            self.space.names, self.space.tensors, self._weights, strict=True
        ):
            weights = saved.double()
            values = vector[self.space.slices[name]].double().cpu().reshape(weights.shape)
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
        if groups is None or self.normalization != "filter":
            result[where] = rows.reshape(-1)
        else:
            result[where] = filters_as_tensor(rows, tensor.shape, groups).reshape(-1)


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

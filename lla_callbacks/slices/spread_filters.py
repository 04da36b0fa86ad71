"""Filters of parameters that are spread over processes, one parameter whole at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.distributed import of_part, part_like, whole
from lla_callbacks.linalg.probes import generator, normal_pieces
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.slices.filters import Filters


class Noise:
    """Entries of N(0, 1) of each parameter in turn: the numbers that one draw of all would give.

    Args:
        shapes: Of the parameters.
        seed: Fixes the draw, with the keys.
        keys: See above.
    """

    def __init__(self, shapes: Sequence[torch.Size], seed: int, *keys: int) -> None:
        self._shapes = shapes
        self._key = (seed, *keys)

    def __iter__(self) -> Iterator[Tensor]:
        pieces = normal_pieces(sum(s.numel() for s in self._shapes), generator(*self._key))
        left = torch.empty(0, dtype=torch.float64)
        for shape in self._shapes:
            parts, missing = [left[: shape.numel()]], shape.numel() - len(left)
            left = left[shape.numel() :]
            while missing > 0:
                piece = next(pieces)
                parts.append(piece[:missing])
                left, missing = piece[missing:], missing - len(piece)
            yield torch.cat(parts).reshape(shape)


class SpreadFilters(Filters):
    """Filters whose directions are flat as the parameters' parts are in this process.

    The numbers are those of one process: entries are drawn as it would, and norms of filters are of
    whole parameters, which are gathered one by one.
    """

    streams = True

    def drawn(self, seed: int, *keys: int) -> Noise:
        """Return entries of N(0, 1), drawn on the CPU by seed and keys: what scaling takes."""
        return Noise([tensor.shape for tensor in self.space.tensors], seed, *keys)

    def _inner(self, a: Tensor, b: Tensor) -> float:
        return self.space.vectors().inner(a, b)

    def _whole(self, vector: Any) -> Iterator[tuple[Tensor, Tensor]]:
        def gathered(part: Tensor, like: Tensor) -> Tensor:
            return whole(of_part(part.to(like.device), like)).cpu().double()

        likes = self.space.tensors
        if isinstance(vector, Tensor):
            parts = self.space.split(vector)
            vector = (gathered(part, like) for part, like in zip(parts, likes, strict=True))
        for saved, like, values in zip(self._weights, likes, vector, strict=True):
            yield gathered(saved, like), values

    def _here(self, values: Tensor, parameter: Tensor) -> Tensor:
        values = values.reshape(parameter.shape).to(parameter.device)
        return part_like(values, parameter).cpu().reshape(-1)


def filters_of(
    module: nn.Module, space: ParameterSpace, normalization: str, vectors: str
) -> Filters:
    """Return the filters of a module's parameters, wherever these are."""
    kind = SpreadFilters if space.is_spread else Filters
    return kind(module, space, normalization, vectors)

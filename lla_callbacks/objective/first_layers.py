"""First layers at weights that move along directions: known everywhere once known at a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.linalg.recorded import Program, Step, storage_of
from lla_callbacks.objective.families import Offsets

_ADDMM, _MM = torch.ops.aten.addmm.default, torch.ops.aten.mm.default
# Products of a shorter sum cost hardly more than adding up what they are made of.
LEAST_INPUTS = 64
_DTYPES = (torch.float32, torch.float64)


@dataclass
class _Layer:
    """One product of constants with moving weights.

    Attributes:
        slot: Where the program expects its result.
        start: The result at the saved weights.
        moves: What each direction adds, ``None`` for nothing.
        row: The result at the beginning of the present row.
    """

    slot: int
    start: Tensor
    moves: list[Tensor | None]
    row: Tensor


class FirstLayers:
    """Products ``x (W + sum_k c_k D_k) + b + sum_k c_k d_k`` by ``x W + b`` and ``x D_k + d_k``.

    The input of a first layer is the same at every point. So its result is an affine function of
    the coordinates: a point costs an addition of results, in place of a product and of placing
    its weights. Values agree to rounding; a sum of rounded products is about as near to the truth
    as the product with a rounded sum.

    Args:
        program: The operations of a pass. Those that are found here are taken out of it.
        family: From coordinates to weights.
        most_bytes: What the results may take.
    """

    def __init__(self, program: Program, family: Offsets, most_bytes: float) -> None:
        self._layers: list[_Layer] = []
        self._row: tuple[float, ...] | None = None
        for step in program.steps:
            variants = _variants(step, family)
            if variants is None:
                continue
            size = step.args[-1].shape[1] * step.args[-2].shape[0] * step.args[-1].element_size()
            most_bytes -= size * (len(variants) + 1)
            if most_bytes < 0:
                break
            start, *moves = [None if v is None else step.func(*v, **step.kwargs) for v in variants]
            assert start is not None
            self._layers.append(_Layer(step.made[0], start, moves, start))
            program.take_out(step)

    def __bool__(self) -> bool:
        return bool(self._layers)

    def at(self, point: Sequence[float]) -> dict[int, Tensor]:
        """Return the results at a point, by the program's slots; each may be written into."""
        row, c = tuple(point[:-1]), point[-1]
        if row != self._row:
            for layer in self._layers:
                layer.row = layer.start
                for a, move in zip(row, layer.moves, strict=False):
                    if a != 0.0 and move is not None:
                        layer.row = torch.add(layer.row, move, alpha=a)
            self._row = row
        found = {}
        for layer in self._layers:
            move = layer.moves[-1]
            if c == 0.0 or move is None:
                found[layer.slot] = layer.row.clone()
            else:
                found[layer.slot] = torch.add(layer.row, move, alpha=c)
        return found


def _variants(step: Step, family: Offsets) -> list[list[Tensor] | None] | None:
    """Return a product's arguments at the saved weights and for each direction.

    ``None`` if the step is no product of a constant with weights that move.
    """
    if step.func not in (_ADDMM, _MM) or step.taken:
        return None
    factors = step.args[-2:]
    if factors[1].shape[0] < LEAST_INPUTS or factors[0].dtype not in _DTYPES:
        return None
    found = [family.variants(t) for t in step.args]
    if sum(v is not None for v in found[-2:]) != 1:
        return None
    moved = {storage_of(t) for t in family.moved}
    if any(v is None and storage_of(t) in moved for t, v in zip(step.args, found, strict=True)):
        return None  # it moves, too, and how is not known: as it lies in memory, say
    moving = next(v for v in found[-2:] if v is not None)
    result: list[list[Tensor] | None] = []
    for k in range(len(moving)):
        own = [t if v is None else v[k] for t, v in zip(step.args, found, strict=True)]
        if k and len(own) == 3 and found[0] is None:
            own[0] = torch.zeros_like(own[0])
        # A direction in which none of them moves adds nothing.
        still = k and not any(bool(v[k].any()) for v in found if v is not None)
        result.append(None if still else own)
    return result

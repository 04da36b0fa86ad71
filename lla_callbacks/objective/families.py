"""Weights that depend on a few coordinates: along directions, between two ends, or listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lla_callbacks.linalg.recorded import storage_of
from lla_callbacks.linalg.space import ParameterSpace, local_part
from lla_callbacks.objective.evaluation import Statistics

# Bytes that the weights at the present row of a plane may take, kept for the whole row.
ROW_BYTES = 256 * 2**20
_NONE: frozenset[int] = frozenset()


class Family(Protocol):
    """Weights that depend on a few coordinates."""

    space: ParameterSpace

    @property
    def moved(self) -> list[Tensor]:
        """The tensors that :meth:`place` writes other numbers into."""

    def place(self, point: Sequence[float]) -> None:
        """Write the weights of a point into the parameters."""

    def stack(self, points: Tensor) -> dict[str, Tensor]:
        """Return the weights of several points, one more dimension in front.

        Those that are left out stand where they are.
        """

    def statistics(self, point: Sequence[float]) -> Statistics | None:
        """Return the running statistics that belong to a point; None: the module's own."""

    def restore(self) -> None:
        """Write the weights back that were there at first, to the bit."""


class Offsets:
    """``weights + sum_k c_k direction_k``: always from the saved weights, never by increments.

    Points of one row share all coordinates but the last, and the weights at the row's start are
    kept: each point is then one addition, with the roundings of all of them in turn.

    Args:
        space: Layout of the flat vectors; its tensors are the live parameters.
        directions: Flat vectors.
    """

    def __init__(self, space: ParameterSpace, directions: Sequence[Tensor]) -> None:
        self.space = space
        # What this process has of each: torch moves no distributed tensors beside others.
        # Through .data: a graph that the user still holds does not see a new version.
        self._live = [local_part(tensor).data for tensor in space.tensors]
        self._saved = [live.clone() for live in self._live]
        self._in_turn = any(live.device.type != "cpu" for live in self._live)
        self.turn(directions)

    def turn(self, directions: Sequence[Tensor]) -> None:
        """Take other directions."""
        space = self.space
        self._parts = [local_parts(space, vector) for vector in directions]
        # Tensors in which a direction is zero need not be touched.
        self._moves = [
            [i for i, part in enumerate(parts) if bool(part.any())] for parts in self._parts
        ]
        last = set(self._moves[-1]) if self._moves else set()
        self._rest = [i for i in range(len(self._live)) if i not in last]
        # Coordinates of the present row, and the weights at its start, those that it moves.
        self._row: tuple[float, ...] | None = None
        self._start = list(self._saved)
        self._own: dict[int, Tensor] = {}
        # What moves, in one, once many points are asked for at once.
        self._together: tuple[list[int], Tensor, list[Tensor]] | None = None

    @property
    def live(self) -> list[Tensor]:
        """The parameters, what this process has of them."""
        return self._live

    @property
    def moved(self) -> list[Tensor]:
        """The tensors that :meth:`place` writes other numbers into."""
        if not self._moves:
            return self._live
        return [self._live[i] for i in sorted({i for moves in self._moves for i in moves})]

    def variants(self, view: Tensor) -> list[Tensor] | None:
        """Return what a view of moving weights is at the saved ones and in each direction.

        ``None`` if it is of none, or of more than one.
        """
        for i, live in enumerate(self._live):
            if storage_of(view) != storage_of(live):
                continue
            shift = view.storage_offset() - live.storage_offset()
            reach = sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
            if not live.is_contiguous() or shift < 0 or shift + reach >= live.numel():
                continue
            if view.dtype != live.dtype or not any(i in moves for moves in self._moves):
                return None
            same = [t.contiguous() for t in (self._saved[i], *(p[i] for p in self._parts))]
            return [
                t.as_strided(view.shape, view.stride(), t.storage_offset() + shift) for t in same
            ]
        return None

    def place(self, point: Sequence[float]) -> None:
        """Write the weights of a point into the parameters."""
        self.place_partly(point, _NONE)

    def place_partly(self, point: Sequence[float], but: frozenset[int]) -> None:
        """Write the weights of a point into the parameters, but for some that are not read.

        Args:
            point: The coordinates.
            but: Numbers of tensors that may stand anywhere.
        """
        if self._in_turn or not self._moves:
            self._place_in_turn(point)
            return
        row, c = tuple(point[:-1]), point[-1]
        if row != self._row and not self._begin(row):
            self._place_in_turn(point)
            return
        parts, start, live = self._parts[-1], self._start, self._live
        moves = self._moves[-1] if c != 0.0 else ()
        for i in moves:
            if i not in but:
                torch.add(start[i], parts[i], alpha=c, out=live[i])
        for i in self._rest if moves else range(len(live)):
            if i not in but:
                live[i].copy_(start[i])

    def _place_in_turn(self, point: Sequence[float]) -> None:
        """Place a point by few and large operations, of which a device has one launch each."""
        torch._foreach_copy_(self._live, self._saved)
        for c, parts, moves in zip(point, self._parts, self._moves, strict=True):
            if c != 0.0 and moves:
                torch._foreach_add_(
                    [self._live[i] for i in moves], [parts[i] for i in moves], alpha=c
                )

    def _begin(self, row: tuple[float, ...]) -> bool:
        """Let the start be that of another row; return whether there is room for it."""
        self._row = None
        wanted = {i for moves in self._moves[:-1] for i in moves}
        if wanted - self._own.keys():
            size = sum(self._saved[i].numel() * self._saved[i].element_size() for i in wanted)
            if size > ROW_BYTES:
                return False
            self._own = {i: torch.empty_like(self._saved[i]) for i in wanted}
        self._start = list(self._saved)
        for c, parts, moves in zip(row, self._parts, self._moves, strict=False):
            for i in moves if c != 0.0 else ():
                torch.add(self._start[i], parts[i], alpha=c, out=self._own[i])
                self._start[i] = self._own[i]
        self._row = row
        return True

    def stack(self, points: Tensor) -> dict[str, Tensor]:
        """Return the weights of several points that move, one more dimension in front."""
        if self._together is None:
            self._together = self._in_one()
        moved, start, parts = self._together
        value = start.repeat(len(points), 1)
        for k, part in enumerate(parts):
            value.addcmul_(points[:, k, None].to(value.device, value.dtype), part)
        split = torch.split(value, [self._saved[i].numel() for i in moved], dim=1)
        return {
            self.space.names[i]: part.view(-1, *self._saved[i].shape).to(self._saved[i].dtype)
            for i, part in zip(moved, split, strict=True)
        }

    def _in_one(self) -> tuple[list[int], Tensor, list[Tensor]]:
        """Return which tensors move, what they are, flat, and the directions of these."""
        moved = sorted({i for moves in self._moves for i in moves}) or [0]

        def flat(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([tensors[i].reshape(-1) for i in moved])[None]

        return moved, flat(self._saved), [flat(parts) for parts in self._parts]

    def statistics(self, point: Sequence[float]) -> Statistics | None:
        """Return None: the module's own running statistics."""
        return None

    def restore(self) -> None:
        """Write the weights back that were there at first, to the bit."""
        torch._foreach_copy_(self._live, self._saved)


class Segment(Offsets):
    """``(1 - t) start + t end``, exact at both ends.

    Args:
        space: Layout of the flat vectors.
        start: Weights at ``t = 0``, flat.
        end: Weights at ``t = 1``, flat.
        ends: Running statistics at either end, if they are to go along; a variance that is
            extrapolated below zero is taken as zero.
    """

    def __init__(
        self,
        space: ParameterSpace,
        start: Tensor,
        end: Tensor,
        ends: tuple[Statistics, Statistics] = ((), ()),
    ) -> None:
        super().__init__(space, [])
        self._start, self._end = local_parts(space, start), local_parts(space, end)
        self._ends = ends

    def place(self, point: Sequence[float]) -> None:
        """Write the weights of a point into the parameters."""
        torch._foreach_copy_(self._live, self._start)
        torch._foreach_lerp_(self._live, self._end, point[0])

    def statistics(self, point: Sequence[float]) -> Statistics | None:
        """Return the statistics between those of the ends, None without any."""
        between = [
            (m, torch.lerp(mean, end_mean, point[0]), torch.lerp(var, end_var, point[0]).clamp(0))
            for (m, mean, var), (_, end_mean, end_var) in zip(*self._ends, strict=True)
        ]
        return between or None

    def stack(self, points: Tensor) -> dict[str, Tensor]:
        """Return the weights of several points, one more dimension in front."""
        return {
            name: torch.stack([torch.lerp(a, b, t) for t in points[:, 0].tolist()])
            for name, a, b in zip(self.space.names, self._start, self._end, strict=True)
        }


class Listed(Offsets):
    """Given weights, by their number.

    Args:
        space: Layout of the flat vectors.
        weights: Flat weights.
    """

    def __init__(self, space: ParameterSpace, weights: Sequence[Tensor]) -> None:
        super().__init__(space, [])
        self._weights = weights

    def place(self, point: Sequence[float]) -> None:
        """Write weights number ``point[0]`` into the parameters."""
        chosen = self._weights[int(point[0])].to(self.space.device)
        torch._foreach_copy_(self._live, local_parts(self.space, chosen))


def local_parts(space: ParameterSpace, vector: Tensor) -> list[Tensor]:
    """Return tensors from a flat vector, of each what this process has."""
    return [local_part(tensor) for tensor in space.unflatten(vector)]

"""The orthonormal rows that a Lanczos run keeps, in full precision or in half of the memory.

Half of it is float16, eleven bits, of rows times the root of their length, so that entries are of
the order of one (those of random signs are kept without error). Rounded so, rows are off by at most
2^-11 of themselves entry by entry, 2e-4 of their norm, which is less than the root of float32's
eps: to that level a basis may lose its orthogonality, and T is still the projection of the operator
to rounding (Simon 1984, theorem 4). bfloat16 has eight bits and is beyond it. What an operator is
multiplied with is never rounded, and what rounding costs all the same is measured as a run goes
(:attr:`~lla_callbacks.linalg.lanczos.LanczosRun.stray`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.linalg.accumulation import widened
from lla_callbacks.linalg.vectors import Vectors

HALF = torch.float16
# Entries that are widened at once: 6 MiB for a basis of 24, small beside any that is larger.
PIECE = 2**16


@dataclass(frozen=True, eq=False)
class Basis:
    """Rows ``q_j``, each kept as ``scale q_j``.

    Attributes:
        kept: Shape ``(k, length)``.
        dtype: In which rows are computed with.
        scale: What they are kept times.
    """

    kept: Tensor
    dtype: torch.dtype
    scale: float = 1.0

    @classmethod
    def empty(cls, depth: int, like: Tensor, vectors: Vectors, *, half: bool) -> Basis:
        """Return room for some rows.

        Args:
            depth: How many.
            like: A vector, for dtype, device and length.
            vectors: How vectors are held.
            half: Whether rows of float32 are kept in half of their memory.
        """
        if not half or like.dtype != torch.float32:
            return cls(like.new_empty(depth, vectors.length), like.dtype)
        kept = like.new_empty(depth, vectors.length, dtype=HALF)
        # No entry of a unit vector times this overflows.
        scale = min(math.sqrt(vectors.dim), 0.9 * torch.finfo(HALF).max)
        return cls(kept, like.dtype, scale)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def device(self) -> torch.device:
        """Where it is kept."""
        return self.kept.device

    @property
    def is_half(self) -> bool:
        """Whether rows are rounded."""
        return self.kept.dtype != self.dtype

    @property
    def rounding(self) -> float:
        """Bound of what a row is off by, as a share of its norm."""
        return torch.finfo(self.kept.dtype).eps / 2 if self.is_half else 0.0

    @property
    def rows(self) -> Tensor:
        """All of it in full precision, shape ``(k, length)``; a copy where it is not kept so."""
        return self.kept.to(self.dtype) / self.scale if self.is_half else self.kept

    def row(self, k: int) -> Tensor:
        """Return one row in full precision, shape ``(length,)``."""
        return self.kept[k].to(self.dtype).div_(self.scale) if self.is_half else self.kept[k]

    def write(self, k: int, row: Tensor) -> None:
        """Keep a row."""
        if not self.is_half:
            self.kept[k] = row
            return
        for to, piece in zip(
            torch.split(self.kept[k], PIECE), torch.split(row, PIECE), strict=True
        ):
            to.copy_(piece * self.scale)

    def first(self, count: int) -> Basis:
        """Return the first rows, which stay where they are."""
        return Basis(self.kept[:count], self.dtype, self.scale)

    def pieces(self) -> Iterator[Tensor]:
        """Yield some entries of all rows at a time, in full precision: ``(k, PIECE)`` at most.

        Each is valid until the next one.
        """
        for piece in widened(torch.split(self.kept, PIECE, dim=1), self.dtype):
            yield piece.div_(self.scale) if self.is_half else piece

    def combined(self, small: Tensor) -> Tensor:
        """Return ``sum_j small_j q_j``, ``(length, ...)`` for ``(k, ...)``."""
        small = small.to(self.device, self.dtype)
        if not self.is_half:
            return self.kept.T @ small
        found = small.new_empty(self.kept.shape[1], *small.shape[1:])
        for to, piece in zip(torch.split(found, PIECE), self.pieces(), strict=True):
            torch.matmul(piece.T, small, out=to)
        return found

    def take_out(self, small: Tensor, vector: Tensor) -> None:
        """Take ``sum_j small_j q_j`` out of a vector ``(length,)``, where it stands."""
        if not self.is_half:
            vector.sub_(self.combined(small))
            return
        small = small.to(self.device, self.dtype)
        for to, piece in zip(torch.split(vector, PIECE), self.pieces(), strict=True):
            to.sub_(piece.T @ small)

    def coordinates(self, vectors: Vectors, vector: Tensor) -> Tensor:
        """Return ``q_j' v`` for all rows, ``(k,)``: float64, on the CPU."""
        return vectors.coordinates(self.kept, vector) / self.scale

    def taken_out(self, vectors: Vectors, vector: Tensor) -> tuple[Tensor, float]:
        """Take the part along the rows out of a vector, twice, where it stands.

        Returns:
            The coefficients of what was taken out, ``(k,)``, float64 on the CPU, and the norm of
            what is left.
        """
        return vectors.orthogonalise(self.kept, vector, self.scale)

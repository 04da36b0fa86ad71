"""Long vectors, whole in one process or in pieces over several, and what all of their pieces say.

What is done entry by entry (sums, multiples, a basis times small coefficients) is local and needs
nothing of this. Inner products and their like are sums over the entries that a process answers
for, and one sum over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lla_callbacks.linalg import accumulation
from lla_callbacks.linalg.probes import drawn_signs, rademacher
from lla_callbacks.linalg.sharing import Alone, Share

# Vectors of fewer entries stay whole in every process: there is no memory to be gained, and each
# inner product would wait for the others (a sum of a few numbers takes 0.2 to 1 ms by gloo).
LEAST_CUT = 2**18

Index = slice | Tensor


class Vectors:
    """Vectors that lie whole in each process, the same in all.

    Args:
        dim: Entries of a vector.

    Attributes:
        dim: The same.
        length: Entries that this process holds: vectors have shape ``(length,)``.
        share: The processes that hold the pieces.
    """

    def __init__(self, dim: int) -> None:
        self.dim = self.length = dim
        self.share: Share = Alone()

    def inner(self, a: Tensor, b: Tensor, *, wide: bool = False) -> float:
        """Return the inner product of two vectors; ``wide``: all of it in float64."""
        return accumulation.inner(a, b, wide=wide)

    def norm(self, vector: Tensor) -> float:
        """Return the Euclidean norm of a vector."""
        return accumulation.norm(vector)

    def norms(self, vector: Tensor, parts: Sequence[Index]) -> list[float]:
        """Return the norms of some of a vector's entries, given by positions in this process."""
        return [accumulation.norm(vector[part]) for part in parts]

    def coordinates(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Return ``rows @ vector`` for rows ``(k, length)``: ``(k,)``, float64, on the CPU."""
        return accumulation.coordinates(rows, vector)

    def orthogonalised(self, rows: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, float]:
        """See :func:`~lla_callbacks.linalg.accumulation.orthogonalised`."""
        left = vector.clone()
        return left, *self.orthogonalise(rows, left)

    def orthogonalise(
        self, rows: Tensor, vector: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, float]:
        """See :func:`~lla_callbacks.linalg.accumulation.orthogonalise`."""
        return accumulation.orthogonalise(rows, vector, scale)

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return ``rows @ columns``, ``(j, length)`` by ``(length, k)``: float64, on the CPU."""
        found: Tensor = rows.double() @ columns.double()
        return found.cpu()

    def orthonormal(self, columns: Tensor) -> Tensor:
        """Return orthonormal columns that span the same, each up to its sign."""
        basis: Tensor = torch.linalg.qr(columns.double())[0]
        return basis.to(columns)

    def sums(self, vector: Tensor, parts: Sequence[Index], scale: Tensor | None = None) -> Tensor:
        """Return sums of a vector's entries: of all, of each part and, last, of all times a scale.

        Float64, on the CPU; one exchange.

        Args:
            vector: Shape ``(length,)``.
            parts: Positions in this process.
            scale: Shape ``(length,)``; without it there is no last sum.
        """
        found = [accumulation.total(vector)]
        found += [accumulation.total(vector[part]) for part in parts]
        if scale is not None:
            found.append(accumulation.inner(vector, scale))
        return torch.tensor(found, dtype=torch.float64)

    def extent(self, vector: Tensor) -> tuple[float, float]:
        """Return the smallest and the largest entry."""
        return float(vector.min()), float(vector.max())

    def largest(self, vector: Tensor) -> float:
        """Return the largest magnitude of an entry."""
        low, high = self.extent(vector)
        return max(abs(low), abs(high))

    def finite(self, vectors: Tensor) -> bool:
        """Return whether all entries of vectors ``(length, ...)`` are finite."""
        if vectors.numel() == 0:
            return True
        # Both are NaN if any entry is, and no second vector is made.
        low, high = torch.aminmax(vectors)
        return math.isfinite(float(torch.maximum(-low, high)))

    def agreed(self, yes: bool) -> bool:
        """Return whether all processes say yes."""
        return yes

    def rademacher(
        self, source: torch.Generator, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return independent signs: the same vector, however many processes hold it."""
        return rademacher(self.dim, source, dtype=dtype, device=device)

    def cut(self, whole: Tensor) -> Tensor:
        """Return this process's piece of vectors ``(n, ...)`` that it has as its parameters lie."""
        return whole

    def joined(self, pieces: Tensor) -> Tensor:
        """Return vectors as the parameters lie, from this process's pieces; one exchange."""
        return pieces

    def summed(self, values: Tensor, share: Share) -> Tensor:
        """Return the piece of the sum over processes of what each has, as its parameters lie.

        The values are used up. Whoever calls has met the others before.
        """
        return values if share.size == 1 else share.exchange(values, used_up=True)

    def local(self, part: Index) -> Index:
        """Return which positions of a piece stand for some positions as the parameters lie."""
        return part


class Pieces(Vectors):
    """Vectors of which each process holds some entries.

    Args:
        dim: Entries in all processes.
        length: Entries in this one.
        share: The processes.
        counted: The ranges of this process's entries that it answers for, ascending; ``None``:
            all. Entries that several processes hold count in one of them.
    """

    def __init__(
        self, dim: int, length: int, share: Share, counted: Sequence[slice] | None = None
    ) -> None:
        super().__init__(dim)
        self.length = length
        self.share = share
        self._counted = counted

    def inner(self, a: Tensor, b: Tensor, *, wide: bool = False) -> float:
        """Return the inner product of two vectors; ``wide``: all of it in float64."""
        pairs = zip(self._own(a), self._own(b.to(a.device)), strict=True)
        mine = [accumulation.inner(x, y, wide=wide) for x, y in pairs]
        return float(self._added(torch.tensor([sum(mine)], dtype=torch.float64))[0])

    def norm(self, vector: Tensor) -> float:
        """Return the Euclidean norm of a vector."""
        square = self.inner(vector, vector)
        if not accumulation.SMALL < square < accumulation.LARGE:
            square = self.inner(vector, vector, wide=True)
        return math.sqrt(square)

    def norms(self, vector: Tensor, parts: Sequence[Index]) -> list[float]:
        """Return the norms of some of a vector's entries, given by positions in this process."""
        vector = self._masked(vector)
        squares = [accumulation.norm(vector[part]) ** 2 for part in parts]
        found: list[float] = self._added(torch.tensor(squares, dtype=torch.float64)).sqrt().tolist()
        return found

    def coordinates(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Return ``rows @ vector`` for rows ``(k, length)``: ``(k,)``, float64, on the CPU."""
        mine = torch.zeros(len(rows), dtype=torch.float64)
        for part, x in zip(self._own(rows), self._own(vector), strict=True):
            mine += accumulation.coordinates(part, x)
        return self._added(mine)

    def orthogonalise(
        self, rows: Tensor, vector: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, float]:
        """See :func:`~lla_callbacks.linalg.accumulation.orthogonalise`."""
        coefficients, _ = accumulation.orthogonalise(
            rows, vector, scale, counted=self._counted, added=self._added
        )
        return coefficients, self.norm(vector)

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return ``rows @ columns``, ``(j, length)`` by ``(length, k)``: float64, on the CPU."""
        mine = torch.zeros(len(rows), columns.shape[1], dtype=torch.float64)
        for part, x in zip(self._own(rows), self._own(columns.T), strict=True):
            mine += super().products(part, x.T)
        return self._added(mine)

    def orthonormal(self, columns: Tensor) -> Tensor:
        """Return orthonormal columns that span the same, each up to its sign."""
        rows = columns.T.double()
        made = rows.clone()
        for i, row in enumerate(rows):
            left, _, size = self.orthogonalised(made[:i], row) if i else (row, None, self.norm(row))
            made[i] = left / size
        return made.T.to(columns)

    def sums(self, vector: Tensor, parts: Sequence[Index], scale: Tensor | None = None) -> Tensor:
        """Return sums of entries: of all, of each part and, last, of all times a scale."""
        return self._added(super().sums(self._masked(vector), parts, scale))

    def extent(self, vector: Tensor) -> tuple[float, float]:
        """Return the smallest and the largest entry."""
        mine = torch.zeros(3, self.share.size, dtype=torch.float64)
        if vector.numel():
            ends = (float(vector.min()), float(vector.max()), 1.0)
            mine[:, self.share.rank] = torch.tensor(ends, dtype=torch.float64)
        low, high, held = self._added(mine.reshape(-1)).reshape(3, -1)
        return float(low[held > 0].min()), float(high[held > 0].max())

    def finite(self, vectors: Tensor) -> bool:
        """Return whether all entries of vectors ``(length, ...)`` are finite."""
        return self.agreed(super().finite(vectors))

    def agreed(self, yes: bool) -> bool:
        """Return whether all processes say yes."""
        nays = self._added(torch.tensor([float(not yes)], dtype=torch.float64))
        return float(nays[0]) == 0

    def _added(self, mine: Tensor) -> Tensor:
        return self.share.total(mine)

    def _own(self, tensor: Tensor) -> list[Tensor]:
        if self._counted is None:
            return [tensor]
        return [tensor[..., where] for where in self._counted]

    def _masked(self, vector: Tensor) -> Tensor:
        """Return a vector with zeros where another process answers."""
        if self._counted is None:
            return vector
        found = torch.zeros_like(vector)
        for where in self._counted:
            found[where] = vector[where]
        return found


class CutVectors(Pieces):
    """Vectors of weights that every process has whole, cut into one range for each process.

    Args:
        dim: Entries of a vector.
        share: The processes.
    """

    def __init__(self, dim: int, share: Share) -> None:
        self.size = -(-dim // share.size)
        self.start = min(dim, share.rank * self.size)
        super().__init__(dim, min(dim, self.start + self.size) - self.start, share)

    def rademacher(
        self, source: torch.Generator, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return independent signs: the same vector, however many processes hold it."""
        piece = torch.empty(self.length, dtype=dtype, device=device)
        for start, signs in drawn_signs(self.dim, source):
            low = max(start, self.start)
            high = min(start + len(signs), self.start + self.length)
            if low < high:
                piece[low - self.start : high - self.start] = signs[low - start : high - start]
        return piece

    def cut(self, whole: Tensor) -> Tensor:
        """Return this process's piece of whole vectors, shape ``(dim, ...)``."""
        # A copy, so that the whole need not be kept.
        return whole[self.start : self.start + self.length].clone()

    def joined(self, pieces: Tensor) -> Tensor:
        """Return whole vectors; one exchange."""
        return self.share.joined(pieces, self.dim)

    def summed(self, values: Tensor, share: Share) -> Tensor:
        """Return the piece of the sum over processes of what each has; used up."""
        return self.cut(share.exchange(values, used_up=True))

    def local(self, part: Index) -> Index:
        """Return which positions of a piece stand for some positions of the whole."""
        if isinstance(part, slice):
            start, stop, _ = part.indices(self.dim)
            low = min(max(start - self.start, 0), self.length)
            return slice(low, max(low, min(stop - self.start, self.length)))
        here = part - self.start
        return here[(here >= 0) & (here < self.length)]


def vectors_of(dim: int, share: Share | None) -> Vectors:
    """Return how vectors of weights are held that every process has whole."""
    if share is None or share.size == 1 or dim < LEAST_CUT:
        return Vectors(dim)
    return CutVectors(dim, share)

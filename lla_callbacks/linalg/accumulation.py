"""Norms, inner products and sums of long vectors, piece by piece, the pieces added in float64.

A sum of n float32 numbers in a row is off by up to n eps: torch's ``vector_norm`` on the CPU by
7e-4 at 1e7 entries and 1e-2 at 1e8. Pieces that fit a cache are added up in the vector's own
arithmetic, where n is small, and their sums in float64, which costs nothing that can be measured
(docs/benchmarks/accumulation.md) and no copy of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Entries in a piece. On the CPU 24 rows of one (3 MiB) were the fastest to orthogonalise against.
# Other devices add up as trees, which loses nothing, and pay for each call.
PIECE = 2**15
PIECE_ELSEWHERE = 2**22
# Squares within these sums are far from where float32 ends.
SMALL, LARGE = 1e-30, 1e30


def inner(a: Tensor, b: Tensor, *, wide: bool = False) -> float:
    """Return the inner product of two vectors, shape ``(n,)``; ``wide``: all of it in float64."""
    parts = (widened(_pieces(v), torch.float64 if wide else v.dtype) for v in (a, b.to(a.device)))
    pairs = zip(*parts, strict=True)
    return _added([x.dot(y) for x, y in pairs])


def norm(vector: Tensor) -> float:
    """Return the Euclidean norm of a vector, shape ``(n,)``."""
    square = inner(vector, vector)
    if not SMALL < square < LARGE:
        square = _added([x.double().dot(x.double()) for x in _pieces(vector)])
    return math.sqrt(square)


def norm_of(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of several tensors together."""
    return math.hypot(*(norm(t.detach().reshape(-1)) for t in tensors))


def total(vector: Tensor) -> float:
    """Return the sum of a vector's entries, shape ``(n,)``, each added in float64."""
    return _added([x.sum() for x in widened(_pieces(vector), torch.float64)])


def coordinates(rows: Tensor, vector: Tensor) -> Tensor:
    """Return ``rows @ vector`` for rows ``(k, n)``: shape ``(k,)``, float64, on the CPU."""
    pairs = zip(widened(_pieces(rows), vector.dtype), _pieces(vector), strict=True)
    return _together([part @ x for part, x in pairs], len(rows))


def orthogonalised(
    rows: Tensor,
    vector: Tensor,
    *,
    counted: Sequence[slice] | None = None,
    added: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Return what :func:`orthogonalise` leaves of a vector, and what it returns."""
    left = vector.clone()
    return left, *orthogonalise(rows, left, counted=counted, added=added)


def orthogonalise(
    rows: Tensor,
    vector: Tensor,
    scale: float = 1.0,
    *,
    counted: Sequence[slice] | None = None,
    added: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, float]:
    """Take a vector's part along orthonormal rows out of it, where it stands, by Gram-Schmidt.

    Twice; the second time is done while a piece is at hand, so that the rows are read three times
    and not four.

    Args:
        rows: Orthonormal but for the scale, shape ``(k, n)``; of another dtype, perhaps.
        vector: Shape ``(n,)``.
        scale: Norm of the rows.
        counted: Ranges of entries that count in inner products, ascending; ``None``: all.
        added: Adds up inner products ``(k,)`` over the processes that hold the pieces of longer
            rows and vectors.

    Returns:
        The coefficients of what was taken out, shape ``(k,)``, float64 on the CPU; and the norm of
        what is left, NaN where it is a piece.
    """
    kept = [
        (part, x, counts)
        for where, counts in _ranges(vector.numel(), counted)
        for part, x in zip(_pieces(rows[:, where]), _pieces(vector[where]), strict=True)
    ]

    def parts(*, all_of_them: bool = True) -> Iterator[tuple[Tensor, Tensor, bool]]:
        chosen = [triple for triple in kept if all_of_them or triple[2]]
        wide = widened((part for part, _, _ in chosen), vector.dtype)
        for part, (_, x, counts) in zip(wide, chosen, strict=True):
            yield part, x, counts

    products = [part @ x for part, x, _ in parts(all_of_them=False)]
    first = _together(products, len(rows), added) / scale
    taken, corrections = (first / scale).to(vector), []
    for part, x, counts in parts():
        x.addmv_(part.T, taken, alpha=-1)
        if counts:
            corrections.append(part @ x)
    second = _together(corrections, len(rows), added) / scale
    taken = (second / scale).to(vector)
    for part, x, _ in parts():
        x.addmv_(part.T, taken, alpha=-1)
    return first + second, norm(vector) if added is None else math.nan


def _ranges(size: int, counted: Sequence[slice] | None) -> list[tuple[slice, bool]]:
    """Return all entries as ranges, each with whether it counts."""
    if counted is None:
        return [(slice(0, size), True)]
    found, start = [], 0
    for where in counted:
        found += [(slice(start, where.start), False), (where, True)]
        start = where.stop
    found.append((slice(start, size), False))
    return [(where, counts) for where, counts in found if where.start < where.stop]


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of a tensor, cut along its last dimension."""
    size = PIECE if tensor.device.type == "cpu" else PIECE_ELSEWHERE
    return torch.split(tensor, size, dim=-1)


def _added(numbers: Sequence[Tensor]) -> float:
    return float(torch.stack(list(numbers)).sum(dtype=torch.float64))


def _together(
    parts: Sequence[Tensor], count: int, added: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    if parts:
        mine = torch.stack(list(parts)).sum(dim=0, dtype=torch.float64).cpu()
    else:
        mine = torch.zeros(count, dtype=torch.float64)
    return mine if added is None else added(mine)


def widened(pieces: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield tensors of about one shape in some dtype, each valid until the next one.

    Others than those of that dtype go through one buffer. A new tensor for each would be scattered
    over the heap by whatever small is made in between: a whole basis, widened, was seen to stay.
    """
    buffer: Tensor | None = None
    for piece in pieces:
        if piece.dtype == dtype:
            yield piece
            continue
        if buffer is None or buffer.shape != piece.shape:
            buffer = torch.empty(piece.shape, dtype=dtype, device=piece.device)
        yield buffer.copy_(piece)

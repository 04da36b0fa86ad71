"""The traces of A (whole and per block) and of A^2, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lla_callbacks.linalg.lanczos import ROUNDING, LanczosRun
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.student import widened_sem
from lla_callbacks.linalg.vectors import Index

# Coordinates that are multiplied at once: 6 MiB for a basis of 24, small beside any that is larger.
PIECE = 2**16


@dataclass(frozen=True)
class TraceEstimate:
    """A trace with its uncertainty.

    Attributes:
        value: Estimate of ``tr A``.
        sem: Its standard error, widened by Student's law for the few probes behind it so that two
            of them cover 95 %: by 7.0 for two probes, 1.43 for five, 1.06 for 24. Never below the
            rounding error.
        num_probes: Independent random vectors behind it.
        blocks: Block name to ``(value, sem)`` of the trace over that block's coordinates.
            The blocks' values add up to ``value`` if the blocks cover every coordinate.
        scaled: The same of ``sum_i scale_i a_ii``, where a scale was given; else NaN.
        square: Estimate of ``tr A^2 = ||A||_F^2``, from the norms of the same products.
        square_sem: Its standard error.
    """

    value: float
    sem: float
    num_probes: int
    square: float
    square_sem: float
    blocks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scaled: tuple[float, float] = (math.nan, math.nan)


class TraceEstimator:
    """Hutchinson's estimator with the part that a Lanczos run already knows taken out.

    With ``P = I - Q Q'`` for the run's basis ``Q``,

        ``A = P A P + (Q Q' A + A Q Q' - Q T Q')``,

    where the bracket's diagonal follows from ``A Q = Q T + beta q e_k'`` without another
    product, and ``diag(P A P)`` is estimated by ``z * (P A P z)`` over Rademacher probes
    ``z`` that are independent of ``Q`` (Lin 2017, section 3; Meyer et al. 2021, Hutch++,
    section 2, with a Krylov basis in place of a sketch). The outliers of the spectrum,
    which make the plain estimator noisy, lie in ``Q``. Without a run ``P = I``: the plain
    estimator.

    Args:
        operator: ``A``.
        blocks: Block name to positions (a slice or a 1-D integer tensor) in vectors as the operator
            holds them.
        known: A Lanczos run whose start vector no probe will repeat.
        scale: Weights of the diagonal's entries in one more sum, held as vectors are.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        blocks: Mapping[str, Index],
        known: LanczosRun | None = None,
        *,
        scale: Tensor | None = None,
    ) -> None:
        self._operator = operator
        self._vectors = operator.vectors
        self._known = known
        # Row 0 is the whole, then come the blocks, and last the scaled sum.
        # Vectors meet where the run keeps its basis.
        self._home = operator.device if known is None else known.basis.device
        self._blocks = {
            name: index if isinstance(index, slice) else index.to(self._home)
            for name, index in blocks.items()
        }
        self._scale = None if scale is None else scale.to(self._home, operator.dtype)
        rows = 1 + len(self._blocks) + (scale is not None)
        self._exact = torch.zeros(rows, dtype=torch.float64)
        self._samples: list[Tensor] = []
        self._squares: list[float] = []
        self._exact_square = 0.0
        self._rounding = 0.0
        if known is not None:
            self._exact = self._sums(_known_diagonal(known))
            self._exact[0] = known.diagonal.sum()
            self._exact_square = float(
                (known.diagonal**2).sum() + 2 * (known.off_diagonal**2).sum() + known.next_norm**2
            )
            # As each eigenvalue's, and at worst all err in one direction: long sums inside of a
            # model were seen to be off by 3 eps in 16 eigenvalues alike.
            self._rounding = ROUNDING * known.eps * float(known.values.norm())

    @property
    def num_probes(self) -> int:
        """Probes used so far."""
        return len(self._samples)

    @property
    def samples(self) -> Tensor:
        """What each probe alone says of the whole and of each block, ``(num_probes, 1 + blocks)``.

        Unbiased each, float64, on the CPU.
        """
        return self._exact + torch.stack(self._samples)

    @property
    def rounding(self) -> float:
        """Rounding error of the part that is known."""
        return self._rounding

    def add_probe(self, source: torch.Generator) -> None:
        """Draw one probe and spend one product on it."""
        probe = self._operator.rademacher(source)
        self._add(probe, self._operator @ self._project(probe))

    def add_run(self, run: LanczosRun, start: Tensor) -> None:
        """Use the first step of another Lanczos run as a probe, at no further product.

        ``A P z = A z - A Q Q'z`` needs none, since ``A Q`` is known.

        Args:
            run: A run from another start vector than the known one's.
            start: Its start vector, a Rademacher vector drawn independently.
        """
        product = run.first_product
        if self._known is not None:
            inside = self._vectors.coordinates(self._known.basis, start.to(self._home)).to(product)
            product = (
                product
                - self._known.basis.T @ self._known.project(inside)
                - self._known.next_vector * (self._known.next_norm * inside[-1])
            )
        self._add(start, product)

    def _project(self, vector: Tensor) -> Tensor:
        if self._known is None:
            return vector.to(self._home)
        basis, inside = self._known.basis, vector.to(self._home)
        return inside - basis.T @ self._vectors.coordinates(basis, inside).to(inside)

    def _add(self, probe: Tensor, product: Tensor) -> None:
        self._samples.append(self._sums(probe.to(self._home) * self._project(product)))
        self._squares.append(self._vectors.inner(product, product))

    def _sums(self, diagonal: Tensor) -> Tensor:
        """Return the sum over everything and over each block, float64, on the CPU."""
        return self._vectors.sums(diagonal, list(self._blocks.values()), self._scale)

    def estimate(self) -> TraceEstimate:
        """Return the estimate from the probes so far; a sem is NaN below two probes."""
        count = self.num_probes
        if count == 0:
            raise ValueError("an estimate needs at least one probe.")
        samples = torch.stack(self._samples)
        squares = torch.tensor(self._squares, dtype=torch.float64)
        mean = self._exact + samples.mean(dim=0)
        # Few probes say little of their own variance: two errors cover 95 % all the same.
        share = widened_sem(1.0, count) / math.sqrt(count)
        rounding = torch.full_like(mean, self._rounding)
        if self._scale is not None:
            rounding[-1] *= self._vectors.largest(self._scale)
        sem = (_variance(samples) * share**2 + rounding**2).sqrt()
        pairs = list(zip(mean.tolist(), sem.tolist(), strict=True))
        square = self._exact_square + float(squares.mean())
        square_rounding = 2 * self._rounding * math.sqrt(square)
        return TraceEstimate(
            value=pairs[0][0],
            sem=pairs[0][1],
            num_probes=count,
            square=square,
            square_sem=math.sqrt(float(_variance(squares)) * share**2 + square_rounding**2),
            blocks=dict(zip(self._blocks, pairs[1:], strict=False)),
            scaled=(math.nan, math.nan) if self._scale is None else (pairs[-1][0], pairs[-1][1]),
        )


def _variance(samples: Tensor) -> Tensor:
    """Return the unbiased variance over the first dimension, NaN for one sample."""
    if len(samples) < 2:
        return torch.full_like(samples[0], math.nan)
    return samples.var(dim=0)


def _known_diagonal(run: LanczosRun) -> Tensor:
    """Return the diagonal of ``Q Q'A + A Q Q' - Q T Q'``, shape ``(dim,)``."""
    # In pieces: the image of a basis is never held beside it.
    pieces = torch.split(run.basis, PIECE, dim=1)
    diagonal = torch.cat([(piece * run.project(piece)).sum(dim=0) for piece in pieces])
    # What A Q has outside of the basis enters twice: from Q Q'A and from A Q Q'.
    return diagonal + 2 * run.next_norm * run.basis[-1] * run.next_vector

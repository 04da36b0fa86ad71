"""The traces of A (whole and per block) and of A^2, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lla_callbacks.linalg.basis import PIECE
from lla_callbacks.linalg.lanczos import ROUNDING, LanczosRun
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.student import widened_sem
from lla_callbacks.linalg.vectors import Index


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
        scale: Weights of the diagonal's entries in one more sum, held as vectors are; or what makes
            them, each time they are needed, so that they are not held while there is a product.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        blocks: Mapping[str, Index],
        known: LanczosRun | None = None,
        *,
        scale: Tensor | Callable[[], Tensor] | None = None,
    ) -> None:
        self._operator = operator
        self._vectors = operator.vectors
        self._known = known
        # Row 0 is the whole, then come the blocks, and last the scaled sum.
        # Vectors meet where the run keeps its basis.
        self._home = operator.device if known is None else known.kept.device
        self._blocks = {
            name: index if isinstance(index, slice) else index.to(self._home)
            for name, index in blocks.items()
        }
        self._scale_of = scale
        if isinstance(scale, Tensor):
            self._scale_of = scale.to(self._home, operator.dtype)
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
            # A rounded basis misses what its last vector's rounding has of the next, twice.
            self._rounding = math.hypot(self._rounding, 2 * known.stray)

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
        vector = self._project(probe)
        # Signs are kept in an octet each while there is a product.
        probe = probe.to(self._home, torch.int8)
        product = self._operator @ vector
        # Not held beside what is made of the product.
        del vector
        self._add(probe, product)

    def add_run(self, run: LanczosRun, start: Tensor) -> None:
        """Use the first step of another Lanczos run as a probe, at no further product.

        ``A P z = A z - A Q Q'z`` needs none, since ``A Q`` is known.

        Args:
            run: A run from another start vector than the known one's.
            start: Its start vector, a Rademacher vector drawn independently.
        """
        product = run.first_product
        assert product is not None, "a run that feeds a trace keeps its first product"
        if self._known is not None:
            known = self._known
            inside = known.kept.coordinates(self._vectors, start.to(self._home))
            product = product - known.kept.combined(known.project(inside))
            product.sub_(known.next_vector, alpha=known.next_norm * float(inside[-1]))
        self._add(start.to(self._home), product)

    def _project(self, vector: Tensor) -> Tensor:
        """Return ``P v``, another tensor."""
        vector = vector.to(self._home)
        if self._known is None:
            return vector.clone()
        kept = self._known.kept
        along = kept.combined(kept.coordinates(self._vectors, vector))
        return torch.sub(vector, along, out=along)

    def _add(self, probe: Tensor, product: Tensor) -> None:
        """Add what a probe says; its product is used up, but for a plain estimate."""
        self._squares.append(self._vectors.inner(product, product))
        product = product.to(self._home)
        if self._known is None:
            product = product.clone()
        else:
            kept = self._known.kept
            kept.take_out(kept.coordinates(self._vectors, product), product)
        # In pieces, since octets are widened on the way.
        for to, signs in zip(*(torch.split(v, PIECE) for v in (product, probe)), strict=True):
            to.mul_(signs)
        self._samples.append(self._sums(product))

    def _sums(self, diagonal: Tensor) -> Tensor:
        """Return the sum over everything and over each block, float64, on the CPU."""
        return self._vectors.sums(diagonal, list(self._blocks.values()), self._scale())

    def _scale(self) -> Tensor | None:
        """Return the weights of one more sum, where there are some."""
        if self._scale_of is None or isinstance(self._scale_of, Tensor):
            return self._scale_of
        return self._scale_of().to(self._home, self._operator.dtype)

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
        scale = self._scale()
        if scale is not None:
            rounding[-1] *= self._vectors.largest(scale)
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
            scaled=(math.nan, math.nan) if scale is None else (pairs[-1][0], pairs[-1][1]),
        )


def _variance(samples: Tensor) -> Tensor:
    """Return the unbiased variance over the first dimension, NaN for one sample."""
    if len(samples) < 2:
        return torch.full_like(samples[0], math.nan)
    return samples.var(dim=0)


def _known_diagonal(run: LanczosRun) -> Tensor:
    """Return the diagonal of ``Q Q'A + A Q Q' - Q T Q'``, shape ``(dim,)``."""
    # In pieces: the image of a basis is never held beside it.
    diagonal = torch.empty_like(run.next_vector)
    long = (torch.split(vector, PIECE) for vector in (diagonal, run.next_vector))
    for to, following, piece in zip(*long, run.kept.pieces(), strict=True):
        torch.sum(piece * run.project(piece), dim=0, out=to)
        # What A Q has outside of the basis enters twice: from Q Q'A and from A Q Q'.
        to += 2 * run.next_norm * piece[-1] * following
    return diagonal

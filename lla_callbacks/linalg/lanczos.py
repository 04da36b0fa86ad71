"""Lanczos tridiagonalisation with full re-orthogonalisation, and its Ritz pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lla_callbacks.linalg.basis import Basis
from lla_callbacks.linalg.heap import give_back
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.outermost import Seen, reach

# Margin over one eps for the rounding of a product.
ROUNDING = 10
# A Ritz value that is asked for by its place must have been there at this share of the steps
# already. A pair whose residual is small is some eigenpair, which need not be the one of that
# place: of spectra with two close outliers the third was taken for the second in 33 to 45 of 100
# runs by residuals alone, and in none or 1 so (docs/benchmarks/coverage.md).
SETTLED_SINCE = 0.6
# How many times as far out as its residual the extreme eigenvalue may still lie of one that counts
# as found.
# Of spectra with two close outliers another one was taken for the largest in 2 to 7 of 60 runs by
# residuals alone, and in 0 to 2 so, at one product more (docs/benchmarks/coverage.md).
FURTHER = 2.0


@dataclass(frozen=True)
class LanczosRun:
    """The factorisation ``A Q = Q T + beta q e_k'`` after ``k`` steps.

    Where the operator's vectors are in pieces, ``dim`` stands for the entries of this process.

    Attributes:
        diagonal: ``alpha``, shape ``(k,)``, float64 on the CPU.
        off_diagonal: ``beta`` between basis vectors, shape ``(k - 1,)``, float64, CPU.
        kept: ``Q``, its basis vectors as rows, perhaps in half of their memory. They and all
            other vectors are on the operator's device, or on the CPU.
        next_vector: ``q``, the unit vector that would come next, shape ``(dim,)``; zeros
            after a breakdown.
        next_norm: ``beta``, its coefficient; 0 after a breakdown.
        first_product: ``A z`` of the start vector ``z`` as given, shape ``(dim,)``; ``None`` where
            it was not to be kept.
        start_norm: ``||z||``.
        eps: Relative rounding of the operator's products.
        broke_down: Whether an invariant subspace was found. The Ritz pairs are then exact
            eigenpairs, and the quadrature is exact for this start vector.
        stray: Norm of what the factorisation holds beside: whatever had to be taken out of products
            that lay along earlier basis vectors, since these are kept rounded. 0 where they are
            not. Part of every residual.
        noise: Size of the random signs in the start vector's entries (perhaps with zeros where the
            operator has none); 0 where there was no noise in it. Beside them there may be
            whatever does not depend on them.
        earlier: What runs of the same operator with other noise have seen.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    kept: Basis
    next_vector: Tensor
    next_norm: float
    first_product: Tensor | None
    start_norm: float
    eps: float
    broke_down: bool
    stray: float = 0.0
    noise: float = 0.0
    earlier: tuple[Seen, ...] = ()

    @property
    def num_steps(self) -> int:
        """Depth ``k`` that was reached."""
        return self.diagonal.numel()

    @property
    def basis(self) -> Tensor:
        """``Q`` in the operator's dtype, shape ``(k, dim)``; a copy where it is kept rounded."""
        return self.kept.rows

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        tridiagonal = torch.diag(self.diagonal)
        if self.num_steps > 1:
            tridiagonal += torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        return values, vectors

    @property
    def values(self) -> Tensor:
        """Ritz values, ascending, shape ``(k,)``: quadrature nodes too."""
        return self._eigh[0]

    @property
    def weights(self) -> Tensor:
        """Quadrature weights of the nodes, shape ``(k,)``, non-negative, sum 1.

        ``sum_j w_j f(theta_j)`` approximates ``z' f(A) z / ||z||^2`` and is exact for
        polynomials up to degree ``2 k - 1`` (Golub and Meurant 2010, theorem 6.2).
        """
        return self._eigh[1][0] ** 2

    @property
    def residuals(self) -> Tensor:
        """``||A u - theta u||`` of each Ritz pair, shape ``(k,)``.

        An eigenvalue lies within the residual of each Ritz value (Parlett 1998, theorem
        4.5.1). The value is ``beta |s_k|`` (ibid., section 13.2), never below ``10 eps``
        times the largest Ritz value in magnitude: products of deep networks were seen to be
        off by up to two eps, against float64. :attr:`stray` comes on top.
        """
        rounding = ROUNDING * self.eps * self.values.abs().max()
        return (self.next_norm * self._eigh[1][-1].abs()).clamp(min=rounding) + self.stray

    def settled(self, place: int, rtol: float, history: Sequence[Tensor] | None = None) -> bool:
        """Return whether the Ritz value at a place is the eigenvalue of that place, to ``rtol``.

        Args:
            place: An index of ``values``.
            rtol: Of its residual, as a share of itself; and of how far it may have moved since
                :data:`SETTLED_SINCE` of the steps.
            history: Ritz values after each step, where they are at hand.
        """
        if self.broke_down:
            return True
        least = max(place + 1, -place)
        then = int(SETTLED_SINCE * self.num_steps)
        if then <= least:
            return False
        value, rounding = float(self.values[place]), float(self.values.abs().max()) * self.eps
        tolerance = max(rtol * abs(value), ROUNDING * rounding)
        before = history[then - 1] if history is not None else self.at_depth(then).values
        moved = abs(float(before[place]) - value)
        near = float(self.residuals[place]) <= tolerance and moved <= tolerance
        return near and (place not in (0, -1) or self._ends_there(place, tolerance))

    def is_largest(self, rtol: float) -> bool:
        """Return whether the largest Ritz value is the largest eigenvalue, to ``rtol``.

        Its residual says that it is some eigenvalue; that none is larger follows, in 95 of 100
        runs, from :attr:`beyond` of a run with :attr:`noise`, and cannot be known without.

        Args:
            rtol: Of its residual, as a share of the largest Ritz value in magnitude.
        """
        scale = float(self.values.abs().max())
        small = float(self.residuals[-1]) <= rtol * scale
        return self.broke_down or (small and self._ends_there(-1, rtol * scale))

    def _ends_there(self, place: int, tolerance: float) -> bool:
        """Return whether no eigenvalue is known to be possible far outside of an end."""
        return not self.noise or self.beyond[0 if place == 0 else 1] <= FURTHER * tolerance

    def at_depth(self, num_steps: int) -> LanczosRun:
        """Return this run as it was after fewer steps, at no product."""
        return replace(
            self,
            diagonal=self.diagonal[:num_steps],
            off_diagonal=self.off_diagonal[: num_steps - 1],
            kept=self.kept.first(num_steps),
            next_vector=self.kept.row(num_steps),
            next_norm=float(self.off_diagonal[num_steps - 1]),
            broke_down=False,
        )

    @property
    def seen(self) -> tuple[Seen, ...]:
        """What this run with :attr:`noise` and earlier ones have seen of the spectrum."""
        if not self.noise or self.broke_down:
            return self.earlier
        # What is beside the noise makes it no less likely that some of an eigenvector is there.
        count = (self.start_norm / self.noise) ** 2
        beta = (*self.off_diagonal.tolist(), self.next_norm)
        return (Seen(tuple(self.diagonal.tolist()), beta, count), *self.earlier)

    @cached_property
    def beyond(self) -> tuple[float, float]:
        """How much further out than the outermost Ritz values an eigenvalue may still lie.

        Each Ritz pair has an eigenvalue within its residual, so one may lie as far out as any pair
        less settled than the outermost reaches: ``theta_0 - min_j (theta_j - r_j)`` below and
        ``max_j (theta_j + r_j) - theta_k`` above. At least the outermost's own residual. That alone
        is an estimate and no bound. Of a run with :attr:`noise` it is also at least what 95 of 100
        start vectors would have seen (:func:`~lla_callbacks.linalg.outermost.reach`): at each end
        a bound with that probability, at any depth.
        """
        values, residuals = self.values, self.residuals
        below = max(float(residuals[0]), float(values[0] - (values - residuals).min()))
        above = max(float(residuals[-1]), float((values + residuals).max() - values[-1]))
        if not self.noise or self.broke_down:
            return below, above
        seen = self.seen
        lower = reach([one.mirrored() for one in seen], -float(values[0])) + self.stray
        upper = reach(seen, float(values[-1])) + self.stray
        return max(below, lower), max(above, upper)

    def project(self, rows: Tensor) -> Tensor:
        """Return ``T @ rows`` for rows of shape ``(k, ...)``, without forming ``T``."""
        shape = (-1, *[1] * (rows.ndim - 1))
        result = self.diagonal.to(rows).reshape(shape) * rows
        off = self.off_diagonal.to(rows).reshape(shape)
        result[:-1] += off * rows[1:]
        result[1:] += off * rows[:-1]
        return result

    def pair(self, which: int) -> LanczosRun:
        """Return one Ritz pair as a run of one step: ``A u = theta u + r``.

        The residual vector ``r = beta s_k q`` is orthogonal to ``u``, as a next vector is.
        """
        vector = self.vectors([which])[:, 0]
        last = float(self._eigh[1][-1, which])
        return LanczosRun(
            diagonal=self.values[which].reshape(1),
            off_diagonal=self.off_diagonal[:0],
            kept=Basis(vector[None], vector.dtype),
            next_vector=self.next_vector if last >= 0 else -self.next_vector,
            next_norm=self.next_norm * abs(last),
            first_product=float(self.values[which]) * vector
            + self.next_norm * last * self.next_vector,
            start_norm=1.0,
            eps=self.eps,
            broke_down=self.broke_down,
            stray=self.stray,
        )

    def forgotten(self) -> LanczosRun:
        """Return what is left without any vector as long as the basis's: values and weights."""
        # Not parts of what there is, which would hold it.
        none = self.next_vector.new_empty(0)
        rows = replace(self.kept, kept=self.kept.kept.new_empty(len(self.kept), 0))
        return replace(self, kept=rows, next_vector=none, first_product=none)

    def rotated(self, coordinates: Tensor, which: list[int]) -> Tensor:
        """Return the coordinates along Ritz vectors of what has some along the basis, ``(k,)``."""
        return self._eigh[1][:, which].T @ coordinates

    def vectors(self, which: Tensor | list[int]) -> Tensor:
        """Return Ritz vectors as columns, ``(dim, len(which))``, indexed like ``values``."""
        return self.kept.combined(self._eigh[1][:, which])


def lanczos(
    operator: SymmetricOperator,
    start: Tensor,
    num_steps: int,
    *,
    rtol: float | None = None,
    which: str | Sequence[int] = "both",
    basis_device: torch.device | str | None = None,
    half: bool = False,
    keep_product: bool = True,
    noise: float = 0.0,
    earlier: tuple[Seen, ...] = (),
) -> LanczosRun:
    """Return the Lanczos factorisation of an operator from a start vector.

    One product a step. Each new vector is orthogonalised twice against all earlier ones
    ("twice is enough", Parlett 1998, section 6.9), so that no ghost eigenvalues appear
    and the Ritz values at both ends are algebraic extremes; memory is ``num_steps``
    vectors, each process's own pieces of them where they are in pieces. The small problem is
    solved in float64 on the CPU.

    Args:
        operator: ``A``.
        start: ``z``, shape ``(dim,)``, not zero.
        num_steps: Largest depth; never more than ``dim`` steps are done.
        rtol: Stop as soon as the residuals of the extreme Ritz pairs named by ``which``
            are at most ``rtol`` times the largest Ritz value in magnitude. ``None`` runs
            to full depth, which quantities that depend on the depth need.
        which: ``"both"`` ends, or ``"max"`` alone, which must be the largest as far as can be told
            (:meth:`LanczosRun.is_largest`). Or the places of Ritz values, such as
            ``(-1, -2, 0)``: each must then have a residual of at most ``rtol`` times *itself*
            (or rounding), and must have stood there for a while (:data:`SETTLED_SINCE`).
        basis_device: Where the basis is kept and orthogonalised; ``None``: on the operator's
            device. On the CPU it leaves that device's memory to the products.
        half: Keep a basis of float32 in half of its memory; see
            :mod:`~lla_callbacks.linalg.basis`. What is multiplied is not rounded, nor is what the
            three terms of the recurrence take out.
        keep_product: Whether the product with the start vector is wanted later.
        noise: Size of the random signs in the start vector; see :class:`LanczosRun`.
        earlier: What earlier runs with other noise have seen.

    Raises:
        ValueError: If ``num_steps < 1`` or the start vector is zero or not finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; give 1 or more.")
    if isinstance(which, str) and which not in ("both", "max"):
        raise ValueError(f"which is {which!r}; give 'both', 'max' or places.")
    dim, vectors = operator.shape[0], operator.vectors
    home = operator.device if basis_device is None else torch.device(basis_device)
    start = start.to(home, operator.dtype)
    start_norm = vectors.norm(start)
    if not 0 < start_norm < float("inf"):
        raise ValueError(f"the start vector has norm {start_norm}; give a finite non-zero one.")
    depth = min(num_steps, dim)
    rows = Basis.empty(depth, start, vectors, half=half)
    unit = start / start_norm
    del start
    rows.write(0, unit)
    before = None
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    first_product = None
    stray = 0.0
    eps = torch.finfo(operator.dtype).eps
    history: list[Tensor] = []
    while True:
        k = len(diagonal)
        if not rows.is_half:
            # No second copy of what the basis has.
            unit = rows.row(k)
        product = (operator @ unit).to(home)
        if product.data_ptr() == unit.data_ptr():
            # An operator may return what it was given.
            product = product.clone()
        if k == 0 and keep_product:
            first_product = product * start_norm
        known = rows.first(k + 1)
        scale = vectors.norm(product)
        alpha = 0.0
        if rows.is_half:
            if before is not None:
                product.sub_(before, alpha=off_diagonal[-1])
            alpha = vectors.inner(unit, product)
            product.sub_(unit, alpha=alpha)
        coefficients, beta = known.taken_out(vectors, product)
        diagonal.append(alpha + float(coefficients[k]))
        if rows.is_half:
            stray = math.hypot(stray, float(coefficients.norm()))
            # What the product took in pieces.
            give_back()
        # What is left of the product is rounding error: the subspace is invariant.
        broke_down = beta <= 10 * eps * max(scale, _scale(diagonal, off_diagonal)) or k + 1 == dim
        finished = broke_down or k + 1 == depth
        if broke_down:
            product.zero_()
        else:
            product.div_(beta)
        if finished or rtol is not None:
            run = LanczosRun(
                diagonal=torch.tensor(diagonal, dtype=torch.float64),
                off_diagonal=torch.tensor(off_diagonal, dtype=torch.float64),
                kept=known,
                next_vector=product,
                next_norm=0.0 if broke_down else beta,
                first_product=first_product,
                start_norm=start_norm,
                eps=operator.eps,
                broke_down=broke_down,
                stray=stray,
                noise=noise,
                earlier=earlier,
            )
            if finished:
                return run
            history.append(run.values)
            if isinstance(which, str):
                if _converged(run, rtol, which):
                    return run
            elif all(run.settled(place, rtol or 0.0, history) for place in which):
                return run
        off_diagonal.append(beta)
        rows.write(k + 1, product)
        if rows.is_half:
            before, unit = unit, product
        del product


def _scale(diagonal: list[float], off_diagonal: list[float]) -> float:
    """Return a lower bound of the operator's norm from what is known of it."""
    return max(map(abs, [*diagonal, *off_diagonal]), default=0.0)


def _converged(run: LanczosRun, rtol: float | None, which: str) -> bool:
    if rtol is None:
        return False
    if which == "max":
        return run.is_largest(rtol)
    worst = max(float(run.residuals[end]) for end in (0, -1))
    return worst <= rtol * float(run.values.abs().max())

"""The leading eigenvectors of the Hessian, each with its eigenvalue and its residual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lla_callbacks.linalg.lanczos import ROUNDING, LanczosRun, lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.probes import generator

# Residual that is aimed at, as a share of the eigenvalue itself: a vector is then off by about this
# over the relative gap to the next one. Choice.
RTOL = 1e-3
# Most products of a run, beside four for each vector that is asked for.
MOST_STEPS = 96
# Residual at which a look at what is left ends, as a share of its largest Ritz value.
LOOK = 0.05
# Stream of the random starts.
STREAM = 11


@dataclass(frozen=True, eq=False, repr=False)
class Eigenvectors:
    """The algebraically largest eigenvalues and their vectors, largest first.

    Vectors are orthonormal; of each the entry of largest magnitude is positive. ``found[i]`` is
    the ``i``-th by parameter name, shaped as the parameters are.

    Attributes:
        values: Eigenvalues, descending, shape ``(k,)``, float64.
        residuals: ``||H v - lambda v||`` of each, by a product of its own, and what the engine and
            rounding are worth: an eigenvalue lies within it. Shape ``(k,)``, float64.
        settled: Of each, whether it came within a thousandth of itself before the products that
            are spent were over. What did not may be another than that of its place.
        vectors: Unit vectors as columns, shape ``(n, k)``, on the CPU, in the order of ``names``.
        names: Parameters in the order of the vector.
        shapes: Their shapes.
    """

    values: Tensor
    residuals: Tensor
    settled: tuple[bool, ...]
    vectors: Tensor
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return self.values.numel()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        column = self.vectors[:, range(len(self))[index]]
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = torch.split(column, sizes)
        named = zip(self.names, parts, self.shapes, strict=True)
        return {name: part.reshape(shape) for name, part, shape in named}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        words = ", ".join(f"{value:.4g} (residual {residual:.1g})" for value, residual in pairs)
        return f"<Eigenvectors of {words or 'nothing'}>"

    def without_vectors(self) -> Eigenvectors:
        """Return the same with vectors of no entry, which takes no memory."""
        empty = self.vectors.new_empty(0, len(self))
        return replace(self, vectors=empty, names=(), shapes=())


def leading_eigenvectors(
    hessian: LossOperator, run: LanczosRun, count: int, seed: int
) -> Eigenvectors:
    """Return the ``count`` largest eigenvalues of the Hessian with their vectors.

    What the spectrum's own run settled costs nothing more; else a second run starts from its Ritz
    vectors. A Krylov space holds one vector of an eigenvalue that comes twice, so that a further
    run, among what is orthogonal to what was found, looks whether anything as large is left. The
    last products, one for each vector, rotate them among themselves and measure their residuals.

    Args:
        hessian: The Hessian.
        run: A Lanczos run of it from a random start.
        count: How many, 1 or more.
        seed: Fixes the random starts.

    Raises:
        ValueError: If there are fewer eigenvalues.
    """
    dim = hessian.shape[0]
    if count > dim:
        raise ValueError(
            f"num_eigenvectors is {count}; give at most {dim}, as many as there are parameters."
        )
    most = MOST_STEPS + 4 * count
    home = hessian.basis_device(most + 2 * count)
    source = generator(seed, STREAM)
    known = _of_first_run(hessian, run, count, most, home)
    found = [
        (float(known.values[-1 - i]), known.vectors([known.num_steps - 1 - i])[:, 0])
        for i in range(min(count, known.num_steps))
    ]
    while len(found) < dim:
        basis = hessian.vectors.orthonormal(
            torch.stack([vector.to(home) for _, vector in found], dim=1)
        )
        # The smallest that counts so far.
        enough = len(found) >= count
        least = sorted(value for value, _ in found)[-count] if enough else -torch.inf
        missed = _largest_of_the_rest(hessian, basis, most, source, least)
        if missed is None:
            break
        found.append(missed)
        if enough and missed[0] <= least:
            break
    return _rotated(hessian, [v.to(home) for _, v in found], count, float(run.values.abs().max()))


def _of_first_run(
    hessian: LossOperator, run: LanczosRun, count: int, most: int, home: torch.device
) -> LanczosRun:
    """Return a run that has settled, as far as that goes: the one at hand, or a deeper one."""
    places = [-1 - i for i in range(count)]
    if run.broke_down or (
        run.num_steps >= count and all(run.settled(place, RTOL) for place in places)
    ):
        return run
    depth = min(most, hessian.shape[0])
    kept = list(range(max(0, run.num_steps - count), run.num_steps))
    # The best that is known of each, and something of all else.
    start = run.vectors(kept).sum(dim=1) + 0.1 * run.kept.row(0)
    half = hessian.keeps_half(depth)
    return lanczos(hessian, start, depth, rtol=RTOL, which=places, basis_device=home, half=half)


def _largest_of_the_rest(
    hessian: LossOperator, basis: Tensor, most: int, source: torch.Generator, least: float
) -> tuple[float, Tensor] | None:
    """Return the largest Ritz pair orthogonal to a basis, or None if it is below ``least``."""
    dim = hessian.shape[0]
    deflated = _Deflated(hessian, basis.to(hessian.device, hessian.dtype))
    start = hessian.rademacher(source)
    start = deflated.projected(start[:, None])[:, 0]
    depth = min(dim - basis.shape[1], most)
    for rtol in (LOOK, RTOL):
        run = lanczos(deflated, start, depth, rtol=rtol, which=[-1], basis_device=basis.device)
        value, residual = float(run.values[-1]), float(run.residuals[-1])
        vector = run.vectors([run.num_steps - 1])[:, 0]
        if value + residual < least:
            return None
        if run.broke_down:
            break
        size = hessian.vectors.norm(start)
        start = deflated.projected(vector.to(start)[:, None])[:, 0] + 0.1 * start / size
    return value, vector


def _rotated(
    hessian: LossOperator, vectors: list[Tensor], count: int, scale: float
) -> Eigenvectors:
    """Return the leading Ritz pairs of what a few vectors span, with measured residuals."""
    held = hessian.vectors
    basis = held.orthonormal(torch.stack(vectors, dim=1))
    home = basis.device
    images = torch.stack(
        [(hessian @ column.to(hessian.device, hessian.dtype)).to(home) for column in basis.T], dim=1
    )
    small = held.products(basis.T, images)
    _, rotation = torch.linalg.eigh((small + small.T) / 2)
    rotation = rotation.flip(1)[:, :count].to(basis)
    chosen = held.orthonormal(basis @ rotation)
    # QR turns some round.
    chosen = chosen * held.products(chosen.T, basis @ rotation).diagonal().sign().to(chosen)
    products = images @ rotation
    values, residuals = [], []
    rounding = ROUNDING * hessian.eps * scale
    for i in range(chosen.shape[1]):
        vector, product, off = chosen[:, i], products[:, i], 0.0
        if hessian.engine != "exact":
            here = vector.to(hessian.device, hessian.dtype)
            product = hessian @ here
            off = held.norm(hessian.engine_error(here, product))
            product = product.to(home)
        values.append(held.inner(vector, product))
        residuals.append(max(held.norm(product - values[-1] * vector) + off, rounding))
        low, high = held.extent(vector)
        if -low > high:
            chosen[:, i] *= -1
    order = sorted(range(len(values)), key=lambda i: -values[i])
    space = hessian.space
    return Eigenvectors(
        values=torch.tensor([values[i] for i in order], dtype=torch.float64),
        residuals=torch.tensor([residuals[i] for i in order], dtype=torch.float64),
        settled=tuple(residuals[i] <= max(2 * RTOL * abs(values[i]), rounding) for i in order),
        vectors=hessian.whole(chosen[:, order]).cpu().contiguous(),
        names=space.names,
        shapes=tuple(tuple(tensor.shape) for tensor in space.tensors),
    )


class _Deflated(SymmetricOperator):
    """``P A P`` with ``P = I - V V'``."""

    def __init__(self, operator: SymmetricOperator, vectors: Tensor) -> None:
        super().__init__(
            operator.shape[0], operator.dtype, operator.device, vectors=operator.vectors
        )
        self.eps = operator.eps
        self._operator = operator
        self._vectors = vectors

    def projected(self, columns: Tensor) -> Tensor:
        """Return ``P columns``."""
        inside = self.vectors.products(self._vectors.T, columns)
        return columns - self._vectors @ inside.to(columns)

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.projected(self._operator @ self.projected(columns))

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lla_callbacks import measure_hessian
from lla_callbacks.linalg.accumulation import (
    PIECE,
    coordinates,
    inner,
    norm,
    norm_of,
    orthogonalised,
    total,
)
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.operators import SymmetricOperator

EPS = torch.finfo(torch.float32).eps
# Long enough that a sum in a row is off by 2e-5, and no multiple of a piece.
LONG = 10**6 + 3


def vector(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, PIECE, LONG])
def test_norms_and_inner_products_of_long_vectors_keep_their_digits(size: int) -> None:
    x, y = vector(size), vector(size, 1)
    exact = float(x.double().norm())
    assert abs(norm(x) / exact - 1) <= EPS
    assert abs(norm_of([x, y]) / math.hypot(exact, float(y.double().norm())) - 1) <= EPS
    # Errors of products are of the size of the factors.
    scale = exact * float(y.double().norm())
    assert abs(inner(x, y) - float(x.double() @ y.double())) <= EPS * scale
    assert abs(total(x) - float(x.double().sum())) <= 1e-12 * float(x.abs().double().sum())
    rows = torch.stack([x, y])
    assert torch.allclose(
        coordinates(rows, x), rows.double() @ x.double(), rtol=0, atol=EPS * scale
    )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_that_float32_cannot_hold(scale: float) -> None:
    x = torch.full((100,), scale)
    assert norm(x) == pytest.approx(10 * scale, rel=EPS)


def test_not_a_number_stays_one() -> None:
    assert math.isnan(norm(torch.tensor([1.0, math.nan])))
    assert norm(torch.zeros(3)) == 0.0


def test_orthogonalising_leaves_nothing_along_the_rows() -> None:
    columns = torch.stack([vector(LONG, s) for s in range(3)], 1).double()
    rows = torch.linalg.qr(columns)[0].T.contiguous().float()
    x = vector(LONG, 7) + 1e4 * rows[1]
    left, taken, length = orthogonalised(rows, x)
    assert abs(length / float(left.double().norm()) - 1) <= EPS
    assert float((rows.double() @ left.double()).abs().max()) <= 10 * EPS * length
    assert torch.allclose(taken, rows.double() @ x.double(), rtol=0, atol=10 * EPS * 1e4)
    assert torch.equal(x, vector(LONG, 7) + 1e4 * rows[1])


class Diagonal(SymmetricOperator):
    def __init__(self, entries: Tensor) -> None:
        super().__init__(len(entries), entries.dtype, entries.device)
        self.entries = entries[:, None]

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.entries * columns


def test_a_long_basis_is_orthonormal() -> None:
    run = lanczos(Diagonal(vector(LONG)), torch.ones(LONG), 5)
    basis = run.basis.double()
    off = basis @ basis.T - torch.eye(5, dtype=torch.float64)
    assert float(off.abs().max()) <= 10 * EPS


def test_a_big_layers_trace_and_norm_are_within_their_errors() -> None:
    size = 400_000
    torch.manual_seed(0)
    module = torch.nn.Linear(size, 1, bias=False)
    x = torch.randn(4, size)
    found = measure_hessian(
        module, [(x,)], loss=lambda m, b: 0.5 * m(b[0]).square().mean(), num_steps=8, num_probes=2
    )
    exact = float(x.double().square().sum() / 4)
    (layer,) = found.layers.values()
    # The run knows all of a Hessian of rank four; what is left is the arithmetic's.
    assert abs(found.trace / exact - 1) <= 5 * EPS
    assert abs(layer.trace / exact - 1) <= 5 * EPS
    assert abs(found.weight_norm / float(module.weight.detach().double().norm()) - 1) <= EPS

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lla_callbacks.linalg.operators import DenseOperator, ScaledOperator


def symmetric(dim: int) -> Tensor:
    a = torch.randn(dim, dim, dtype=torch.float64)
    return a + a.T


def test_products_keep_the_shape_and_count_columns() -> None:
    matrix = symmetric(5)
    operator = DenseOperator(matrix)
    vector, block = torch.randn(5).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(operator @ vector, matrix @ vector)
    torch.testing.assert_close(operator @ block, matrix @ block)
    assert (operator @ torch.empty(5, 0).double()).shape == (5, 0)
    assert operator.num_matvecs == 4


def test_a_listener_hears_of_every_product() -> None:
    operator = DenseOperator(symmetric(3))
    heard: list[int] = []
    operator.listener = heard.append
    operator.to_dense()
    operator @ torch.ones(3).double()
    assert heard == [3, 1]


@pytest.mark.parametrize("shape", [(4,), (4, 2), (5, 2, 1), ()])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot multiply .* shape \(5, 5\)"):
        DenseOperator(symmetric(5)) @ torch.zeros(shape, dtype=torch.float64)


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="square matrix"):
        DenseOperator(torch.zeros(2, 3))


def test_scaling_preconditions_symmetrically() -> None:
    matrix, diagonal, shift = symmetric(4), torch.rand(4).double(), torch.rand(4).double()
    root = diagonal.sqrt().diag()
    expected = root @ (matrix + shift.diag()) @ root
    scaled = ScaledOperator(DenseOperator(matrix), diagonal, shift)
    torch.testing.assert_close(scaled.to_dense(), expected)
    # Similar to D (A + shift), so the eigenvalues are those of the preconditioned matrix.
    torch.testing.assert_close(
        torch.linalg.eigvals(diagonal.diag() @ (matrix + shift.diag())).real.sort().values,
        torch.linalg.eigvalsh(scaled.to_dense()),
    )


def test_a_negative_preconditioner_is_refused() -> None:
    with pytest.raises(ValueError, match="no negative"):
        ScaledOperator(DenseOperator(symmetric(2)), torch.tensor([1.0, -1.0]))

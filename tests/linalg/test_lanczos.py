from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.operators import DenseOperator

DIM = 20


def spectrum(values: Tensor) -> Tensor:
    """A dense symmetric matrix with the given eigenvalues."""
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    return (q * values.double()) @ q.T


def run_on(matrix: Tensor, num_steps: int, **settings: object) -> LanczosRun:
    start = torch.randn(len(matrix), dtype=matrix.dtype)
    return lanczos(DenseOperator(matrix), start, num_steps, **settings)  # type: ignore[arg-type]


def tridiagonal(run: LanczosRun) -> Tensor:
    return run.project(torch.eye(run.num_steps, dtype=torch.float64))


@pytest.mark.parametrize("num_steps", [1, 2, DIM - 1, DIM, DIM + 1])
def test_the_defining_identity_holds(num_steps: int) -> None:
    matrix = spectrum(torch.randn(DIM))
    run = run_on(matrix, num_steps)
    q = run.basis.T
    rest = torch.zeros_like(q)
    rest[:, -1] = run.next_norm * run.next_vector
    tolerance = 10 * torch.finfo(torch.float64).eps * DIM * float(matrix.norm())
    assert float((matrix @ q - q @ tridiagonal(run) - rest).norm()) < tolerance
    assert float((q.T @ q - torch.eye(run.num_steps)).norm()) < tolerance
    assert run.num_steps == min(num_steps, DIM)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_basis_stays_orthonormal_where_plain_lanczos_loses_it(dtype: torch.dtype) -> None:
    # Outliers converge first; without re-orthogonalisation they come back as ghosts.
    matrix = spectrum(torch.cat([torch.tensor([1e4, 1e3, -1e3]), torch.rand(97)])).to(dtype)
    run = run_on(matrix, 60)
    error = (run.basis @ run.basis.T - torch.eye(60, dtype=dtype)).abs().max()
    assert float(error) < 100 * torch.finfo(dtype).eps
    assert int((run.values > 5e3).sum()) == 1


def test_full_depth_gives_every_eigenvalue() -> None:
    matrix = spectrum(torch.randn(DIM))
    run = run_on(matrix, DIM)
    torch.testing.assert_close(run.values, torch.linalg.eigvalsh(matrix))
    assert run.broke_down


def test_extremes_are_algebraic_not_by_magnitude() -> None:
    matrix = spectrum(torch.cat([torch.tensor([-50.0, 3.0]), torch.randn(18) * 0.1]))
    run = run_on(matrix, 12)
    assert math.isclose(float(run.values[-1]), 3.0, rel_tol=1e-6)
    assert math.isclose(float(run.values[0]), -50.0, rel_tol=1e-6)


@pytest.mark.parametrize("num_steps", [3, 8, 15])
def test_an_eigenvalue_lies_within_each_residual(num_steps: int) -> None:
    matrix = spectrum(torch.randn(60))
    run = run_on(matrix, num_steps)
    exact = torch.linalg.eigvalsh(matrix)
    distances = (run.values[:, None] - exact[None]).abs().min(dim=1).values
    assert bool((distances <= run.residuals * (1 + 1e-9)).all())


def test_residuals_are_the_true_ones() -> None:
    matrix = spectrum(torch.randn(60))
    run = run_on(matrix, 10)
    vectors = run.vectors(list(range(10)))
    true = (matrix @ vectors - vectors * run.values).norm(dim=0)
    torch.testing.assert_close(run.residuals, true, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 4, 9])
def test_quadrature_is_exact_for_polynomials_up_to_its_degree(num_steps: int) -> None:
    matrix = spectrum(torch.rand(40))
    start = torch.randn(40, dtype=torch.float64)
    run = lanczos(DenseOperator(matrix), start, num_steps)
    for power in range(2 * num_steps):
        exact = start @ torch.linalg.matrix_power(matrix, power) @ start / start.square().sum()
        torch.testing.assert_close((run.weights * run.values**power).sum(), exact)


def test_the_first_product_is_that_of_the_start_vector() -> None:
    matrix = spectrum(torch.randn(DIM))
    start = torch.randn(DIM, dtype=torch.float64)
    run = lanczos(DenseOperator(matrix), start, 3)
    torch.testing.assert_close(run.first_product, matrix @ start)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.zeros(DIM), [0.0]),
        (torch.full((DIM,), 2.0), [2.0]),
        (torch.cat([torch.full((15,), 1.0), torch.full((5,), -3.0)]), [-3.0, 1.0]),
    ],
    ids=["zero", "multiple of the identity", "two eigenvalues"],
)
def test_breakdown_is_success(values: Tensor, expected: list[float]) -> None:
    run = run_on(spectrum(values), 10)
    assert run.broke_down
    torch.testing.assert_close(run.values, torch.tensor(expected).double(), atol=1e-12, rtol=0)
    assert float(run.residuals.max()) < 1e-12


def test_a_one_by_one_operator() -> None:
    run = run_on(torch.tensor([[-3.0]]).double(), 5)
    assert run.values.tolist() == [-3.0]
    assert run.weights.tolist() == [1.0]


@pytest.mark.parametrize("which", ["both", "max"])
def test_it_stops_on_residuals(which: str) -> None:
    matrix = spectrum(torch.cat([torch.tensor([100.0]), torch.linspace(-1, 1, 199)]))
    run = run_on(matrix, 150, rtol=1e-3, which=which)
    ends = [-1] if which == "max" else [0, -1]
    assert run.num_steps < 100
    assert max(float(run.residuals[end]) for end in ends) <= 1e-3 * 100
    shorter = run_on(matrix, max(run.num_steps // 3, 1))
    assert max(float(shorter.residuals[end]) for end in ends) > 1e-3 * 100 or run.num_steps <= 3


@pytest.mark.parametrize(
    ("start", "num_steps", "message"),
    [
        (torch.ones(4), 0, "num_steps is 0"),
        (torch.zeros(4), 3, "norm 0.0"),
        (torch.tensor([1.0, math.nan, 0, 0]), 3, "norm nan"),
    ],
)
def test_bad_input_is_refused(start: Tensor, num_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lanczos(DenseOperator(torch.eye(4)), start, num_steps)


def test_the_basis_may_live_on_the_cpu() -> None:
    matrix = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    start = torch.ones(8, dtype=torch.float64)
    here = lanczos(DenseOperator(matrix), start, 5)
    there = lanczos(DenseOperator(matrix), start, 5, basis_device="cpu")
    assert there.basis.device.type == "cpu"
    assert torch.equal(here.values, there.values)


def test_where_the_extreme_may_still_lie() -> None:
    """A shallow run says how much further out eigenvalues may be; a deep one that none are."""
    values = torch.cat([torch.linspace(0, 1, 60), torch.tensor([-0.3, 4.0])]).double()
    basis = torch.linalg.qr(torch.randn(62, 62, dtype=torch.float64))[0]
    operator = DenseOperator((basis * values) @ basis.T)
    start = torch.randn(62, dtype=torch.float64)
    for depth in (4, 6, 10, 14):
        run = lanczos(operator, start, depth)
        low, high = run.beyond
        assert low >= float(run.residuals[0])
        assert high >= float(run.residuals[-1])
        # An estimate: over 40 starts it covered in 53 % at depth 4, 73 % at 5, 100 % from 10 on.
        assert depth < 10 or float(run.values[0]) - low <= -0.3 + 1e-9
        earlier = run.at_depth(depth - 1)
        again = lanczos(operator, start, depth - 1)
        assert torch.allclose(earlier.values, again.values, atol=1e-12)
        assert torch.allclose(earlier.residuals, again.residuals, atol=1e-12)
    deep = lanczos(operator, start, 50)
    assert max(deep.beyond) < 1e-3
    assert deep.settled(0, 0.01)
    assert not lanczos(operator, start, 5).settled(0, 0.01)

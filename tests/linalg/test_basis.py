"""A basis in half of its memory: what it loses is less than what is said, and no number moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lla_callbacks.linalg import basis as module
from lla_callbacks.linalg import vectors
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.operators import DenseOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.trace import TraceEstimator
from lla_callbacks.linalg.vectors import Vectors
from tests.linalg.test_lanczos import spectrum
from tests.linalg.test_vectors import CutDense, each

DIM, DEPTH = 300, 40
EPS = torch.finfo(torch.float32).eps
# Outliers converge first, and come back as ghosts where orthogonality is lost.
VALUES = torch.cat([torch.tensor([1e3, 300.0, 299.0, -200.0]), torch.linspace(-1, 5, DIM - 4)])


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    torch.manual_seed(0)
    return spectrum(VALUES).float()


def run_on(matrix: Tensor, depth: int = DEPTH, *, half: bool = True) -> LanczosRun:
    operator = DenseOperator(matrix)
    return lanczos(operator, operator.rademacher(generator(0)), depth, half=half)


def test_it_takes_half_and_the_numbers_stay(matrix: Tensor) -> None:
    whole, half = run_on(matrix, half=False), run_on(matrix)
    assert half.kept.kept.nbytes * 2 == whole.kept.kept.nbytes
    # Simon 1984: T is the projection to rounding while the basis is orthogonal to the root of eps.
    off = half.basis @ half.basis.T - torch.eye(DEPTH)
    assert EPS < float(off.abs().max()) < 2 * half.kept.rounding
    scale = float(VALUES.max())
    torch.testing.assert_close(half.values, whole.values, rtol=0, atol=10 * EPS * scale)
    exact = torch.linalg.eigvalsh(matrix.double())
    apart = (half.values[:, None] - exact[None]).abs().min(dim=1).values
    assert bool((apart <= half.residuals).all())
    assert int((half.values > 200).sum()) == 3
    assert int((half.values < -100).sum()) == 1


def test_what_rounding_costs_is_measured_and_in_every_residual(matrix: Tensor) -> None:
    half = run_on(matrix)
    rest = half.next_norm * half._eigh[1][-1].abs()
    assert 0 < half.stray < 1e-3 * float(VALUES.max())
    assert bool((half.residuals >= rest + half.stray).all())
    # It is the norm of what A Q = Q T + beta q e' leaves, as far as rows were not rounded.
    assert run_on(matrix, half=False).stray == 0.0


def test_eight_bits_would_not_do(matrix: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    eleven = run_on(matrix).stray
    monkeypatch.setattr(module, "HALF", torch.bfloat16)
    assert run_on(matrix).stray > 4 * eleven


def test_traces_stay_within_their_errors(matrix: Tensor) -> None:
    operator = DenseOperator(matrix)
    estimator = TraceEstimator(operator, {"a": slice(0, 99)}, run_on(matrix, 12))
    source = generator(1)
    for _ in range(6):
        estimator.add_probe(source)
    found, exact = estimator.estimate(), matrix.double().diagonal()
    for value, sem, wanted in (
        (found.value, found.sem, exact.sum()),
        (*found.blocks["a"], exact[:99].sum()),
    ):
        assert abs(value - float(wanted)) <= 3 * sem
    # What the run knows, against the same made of the rows as they are kept.
    q = estimator._known.kept.rows.double().T  # type: ignore[union-attr]
    inside = q.T @ matrix.double() @ q
    bracket = 2 * inside.trace() - (inside @ (q.T @ q)).trace()
    assert abs(float(estimator._exact[0] - bracket)) <= estimator.rounding


@pytest.mark.parametrize("length", [1, 7, 2 * module.PIECE + 5])
def test_rows_go_in_and_come_out_piece_by_piece(length: int) -> None:
    space, rows = Vectors(length), torch.randn(3, length) / length**0.5
    kept = module.Basis.empty(3, rows[0], space, half=True)
    for k, row in enumerate(rows):
        kept.write(k, row)
    close = {"rtol": kept.rounding, "atol": 1e-7 / length**0.5}
    torch.testing.assert_close(kept.rows, rows, **close)
    torch.testing.assert_close(kept.row(2), kept.rows[2])
    assert torch.equal(torch.cat([piece.clone() for piece in kept.pieces()], dim=1), kept.rows)
    small = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(kept.combined(small), kept.rows.T @ small.float())
    torch.testing.assert_close(
        kept.coordinates(space, rows[0]), kept.rows.double() @ rows[0].double(), rtol=0, atol=1e-5
    )
    # Signs, which a run starts from, are kept without an error.
    signs = torch.randn(length).sign() / length**0.5
    kept.write(0, signs)
    torch.testing.assert_close(kept.row(0), signs, rtol=2 * EPS, atol=0)


def test_float64_is_kept_as_it_is() -> None:
    run = run_on(torch.diag(torch.arange(1.0, 9.0)).double(), 4)
    assert not run.kept.is_half


def test_in_pieces_over_processes_it_is_that_of_one(
    matrix: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "LEAST_CUT", 0)
    alone = run_on(matrix, 8)

    def mine(member: object) -> LanczosRun:
        operator = CutDense(matrix, member)  # type: ignore[arg-type]
        return lanczos(operator, operator.rademacher(generator(0)), 8, half=True)

    for run in each(2, mine):
        assert run.kept.kept.shape == (8, DIM // 2)
        torch.testing.assert_close(run.values, alone.values, rtol=0, atol=1e-5 * 1e3)

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.operators import DenseOperator
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.linalg.trace import TraceEstimator
from lla_callbacks.linalg.tracking import TraceState, advance, begin

DIM = 12
TIMES = 6


def symmetric(source: torch.Generator, dim: int = DIM) -> Tensor:
    matrix = torch.randn(dim, dim, generator=source, dtype=torch.float64)
    return matrix + matrix.T


def forms(matrix: Tensor, probes: Tensor) -> Tensor:
    """Return ``z' A z`` of each probe, the whole and its first half, ``(count, 2)``."""
    products = probes * (probes @ matrix)
    return torch.stack([products.sum(1), products[:, : len(matrix) // 2].sum(1)], 1)


def signs_of(source: torch.Generator, count: int) -> Tensor:
    return 2.0 * torch.randint(0, 2, (count, DIM), generator=source).double() - 1


def follow(
    matrices: list[Tensor], half: int, source: torch.Generator
) -> tuple[list[Tensor], list[Tensor], TraceState]:
    """Chain over the matrices; return values, standard errors and the last state."""
    state: TraceState | None = None
    old = signs_of(source, half)
    values, sems = [], []
    for matrix in matrices:
        new = signs_of(source, half)
        if state is None:
            found, state = advance(None, None, forms(matrix, torch.cat([old, new])))
        else:
            found, state = advance(state, forms(matrix, old), forms(matrix, new))
        old = new
        values.append(found.value)
        sems.append(found.sem)
    assert state is not None
    return values, sems, state


def drifting(amount: float) -> list[Tensor]:
    """Matrices that move away from the first by a share of it at each time."""
    source = torch.Generator().manual_seed(5)
    matrices = [symmetric(source)]
    for _ in range(TIMES - 1):
        kept = math.sqrt(1 - amount**2)
        matrices.append(kept * matrices[-1] + amount * symmetric(source))
    return matrices


@pytest.mark.parametrize("half", [1, 2, 4])
@pytest.mark.parametrize("amount", [0.05, 0.5, 1.0])
def test_the_chain_is_unbiased_and_its_error_is_what_it_says(half: int, amount: float) -> None:
    matrices = drifting(amount)
    truth = torch.stack(
        [torch.stack([m.trace(), m.diagonal()[: DIM // 2].sum()]) for m in matrices]
    )
    source = torch.Generator().manual_seed(1)
    runs = [follow(matrices, half, source)[:2] for _ in range(500)]
    values = torch.stack([torch.stack(v) for v, _ in runs])
    variances = torch.stack([torch.stack(s) for _, s in runs]).square()
    error = values.mean(0) - truth
    spread = values.std(0)
    assert bool((error.abs() <= 5 * spread / math.sqrt(len(runs))).all())
    # At the first time the sem is the textbook's; later it rests on few degrees of freedom.
    said = variances.mean(0).sqrt()
    assert torch.allclose(said[0], spread[0], rtol=0.1)
    assert bool((said[2:] > 0.75 * spread[2:]).all())
    assert bool((said[2:] < 1.6 * spread[2:]).all())


def test_the_first_time_has_the_known_variance() -> None:
    matrix = symmetric(torch.Generator().manual_seed(2))
    source = torch.Generator().manual_seed(3)
    known = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    values = torch.stack([follow([matrix], 2, source)[0][0][0] for _ in range(1200)])
    # The variance of a sample variance, for nearly normal values.
    tolerance = 5 * float(known) / 4 * math.sqrt(2 / 1200) * 1.5
    assert abs(float(values.var() - known / 4)) < tolerance


def test_a_slow_change_makes_the_trace_surer_than_as_many_plain_probes() -> None:
    matrices = drifting(0.05)
    source = torch.Generator().manual_seed(1)
    last = torch.stack([follow(matrices, 4, source)[0][-1][0] for _ in range(400)])
    matrix = matrices[-1]
    plain = 2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / 8
    assert float(last.var()) < 0.75 * float(plain)


def test_without_a_correlation_it_costs_no_more_than_plain_probes() -> None:
    matrices = drifting(1.0)
    source = torch.Generator().manual_seed(1)
    last = torch.stack([follow(matrices, 4, source)[0][-1][0] for _ in range(400)])
    matrix = matrices[-1]
    plain = 2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / 8
    assert float(last.var()) < 1.25 * float(plain)


def test_an_anchor_lends_its_certainty_while_little_changes() -> None:
    matrices = drifting(0.05)
    source = torch.Generator().manual_seed(4)
    _, _, state = follow(matrices, 2, source)
    matrix = matrices[-1]
    level = forms(matrix, torch.eye(DIM, dtype=torch.float64)).sum(0)
    old, new = signs_of(source, 2), signs_of(source, 2)
    sure = begin(forms(matrix, old), level, 1e-9 * level.abs(), state)
    found, _ = advance(sure, forms(matrix, old), forms(matrix, new))
    plain = forms(matrix, torch.cat([old, new])).mean(0)
    assert float((found.value - level).abs()[0]) < 0.5 * float((plain - level).abs()[0])
    assert sure.time == state.time + 1


def test_the_state_goes_through_plain_tensors_and_numbers() -> None:
    source = torch.Generator().manual_seed(4)
    matrices = drifting(0.3)
    _, _, state = follow(matrices, 2, source)
    again = TraceState.from_state_dict(state.state_dict())
    old, new = signs_of(source, 2), signs_of(source, 2)
    pair = forms(matrices[0], old), forms(matrices[0], new)
    one, two = advance(state, *pair)[0], advance(again, *pair)[0]
    assert torch.equal(one.value, two.value)
    assert torch.equal(one.sem, two.sem)


def test_an_unlinked_state_starts_from_plain_probes() -> None:
    source = torch.Generator().manual_seed(4)
    matrices = drifting(0.3)
    _, _, state = follow(matrices, 2, source)
    values = forms(matrices[0], signs_of(source, 4))
    found, after = advance(state.unlinked(), None, values)
    assert torch.equal(found.value, values.mean(0))
    assert after.time == state.time + 1
    assert len(after.values) == 2


def test_a_zero_operator_has_trace_zero() -> None:
    source = torch.Generator().manual_seed(4)
    values, sems, _ = follow([torch.zeros(DIM, DIM, dtype=torch.float64)] * 4, 1, source)
    assert all(bool((v == 0).all()) for v in values)
    assert all(bool((s == 0).all()) for s in sems)


def test_what_does_not_fit_is_refused() -> None:
    two = torch.zeros(2, 1, dtype=torch.float64)
    _, state = advance(None, None, two)
    with pytest.raises(ValueError, match="no old probes, but values"):
        advance(None, two, two)
    with pytest.raises(ValueError, match="the old probes must give"):
        advance(state, None, two)
    with pytest.raises(ValueError, match="keep their number"):
        advance(state, two, two)
    with pytest.raises(ValueError, match="an even number"):
        advance(None, None, torch.zeros(3, 1, dtype=torch.float64))


@pytest.mark.parametrize("depth", [1, 3, DIM])
def test_a_ritz_pair_alone_is_a_factorisation_of_one_step(depth: int) -> None:
    matrix = symmetric(torch.Generator().manual_seed(2))
    run = lanczos(DenseOperator(matrix), torch.randn(DIM, dtype=torch.float64), depth)
    for which in (0, run.num_steps - 1):
        pair = run.pair(which)
        u = pair.basis[0]
        rest = matrix @ u - pair.diagonal[0] * u - pair.next_norm * pair.next_vector
        assert float(rest.norm()) < 1e-12 * float(matrix.norm())
        assert pair.next_norm >= 0
        assert abs(float(pair.residuals[0]) - float(run.residuals[which])) < 1e-12
        assert float((pair.first_product - matrix @ u).norm()) < 1e-12 * float(matrix.norm())


def test_warm_lanczos_finds_what_a_cold_one_finds_in_fewer_products() -> None:
    source = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(80, 80, generator=source, dtype=torch.float64))[0]
    values = torch.cat([torch.linspace(-1, 1, 77), torch.tensor([4.0, 5.0, 6.0])]).double()
    matrix = (basis * values) @ basis.T
    change = torch.randn(80, 80, generator=source, dtype=torch.float64)
    moved = matrix + 0.01 * (change + change.T)
    cold = rademacher(80, generator(0), dtype=torch.float64, device=torch.device("cpu"))
    before = lanczos(DenseOperator(matrix), cold, 40, rtol=0.01, which="max")
    vector = before.vectors([before.num_steps - 1])[:, 0]
    runs = [
        lanczos(DenseOperator(moved), start, 40, rtol=0.05, which="max") for start in (cold, vector)
    ]
    truth = float(torch.linalg.eigvalsh(moved)[-1])
    for run in runs:
        assert float(run.residuals[-1]) <= 0.05 * float(run.values.abs().max())
        assert abs(float(run.values[-1]) - truth) <= float(run.residuals[-1])
    assert runs[1].num_steps < runs[0].num_steps


def test_a_trace_deflated_by_an_earlier_vector_is_unbiased() -> None:
    """Probes that the vector does not depend on: the mean is the trace, at the known variance."""
    matrix = symmetric(torch.Generator().manual_seed(2))
    operator = DenseOperator(matrix)
    run = lanczos(operator, torch.ones(DIM, dtype=torch.float64), 4)
    known = run.pair(run.num_steps - 1)
    estimator = TraceEstimator(operator, {}, known)
    source = generator(0, 6, 0)
    for _ in range(2500):
        estimator.add_probe(source)
    samples = estimator.samples[:, 0]
    u = known.basis[0]
    project = torch.eye(DIM, dtype=torch.float64) - torch.outer(u, u)
    inner = project @ matrix @ project
    variance = float(2 * (inner.square().sum() - inner.diagonal().square().sum()))
    assert abs(float(samples.mean() - matrix.trace())) < 5 * math.sqrt(variance / 2500)
    assert abs(float(samples.var()) / variance - 1) < 0.15

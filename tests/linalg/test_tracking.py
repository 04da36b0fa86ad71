from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import scipy.stats
import torch
from torch import Tensor

from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.operators import DenseOperator
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.linalg.student import student_widening, widened_sem
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
    count = 2000
    # All chains at once, as quantities that are tracked together.
    state: TraceState | None = None
    found, old = [], signs_of(source, half * count)
    for matrix in matrices:
        new = signs_of(source, half * count)
        again, fresh = (forms(matrix, p).reshape(half, 2 * count) for p in (old, new))
        if state is None:
            one, state = advance(None, None, torch.cat([again, fresh]))
        else:
            one, state = advance(state, again, fresh)
        found.append(one)
        old = new
    values = torch.stack([one.value.reshape(count, 2) for one in found], 1)
    variances = torch.stack([one.sem.reshape(count, 2) for one in found], 1).square()
    error = values.mean(0) - truth
    spread = values.std(0)
    assert bool((error.abs() <= 5 * spread / math.sqrt(count)).all())
    # At the first time the sem is the textbook's, widened for the few probes behind it.
    said = variances.mean(0).sqrt()
    widening = student_widening(torch.tensor(2.0 * half - 1))
    assert torch.allclose(said[0], widening * spread[0], rtol=0.1)
    # Two of them cover 95 %; pooled variances lag where a matrix has a larger one than the last.
    covered = ((values - truth).abs() <= 2 * variances.sqrt()).double().mean(0)
    assert float(covered.mean()) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / count)
    assert float(covered.min()) >= 0.9
    # No larger than they need to be: with half = 1 one degree of freedom is added at a time.
    widest = 3.0 if half == 1 else 1.6
    assert bool((variances.median(0).values.sqrt()[2:] < widest * spread[2:]).all())


def simulated(
    correlation: float, half: int, rows: int, every: int, times: int
) -> Iterator[tuple[int, Tensor]]:
    """Chains of a trace of zero, and how many standard errors each time's estimate is off.

    Probes are normal of variance one, correlated in time; now and then a full measurement comes.
    """
    source = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(count, rows, generator=source, dtype=torch.float64)

    sure = torch.full((rows,), 0.05, dtype=torch.float64)
    past: TraceState | None = None
    for time in range(times):
        if past is None or time % every == 0:
            past = begin(draw(half), draw(1)[0] * sure, sure, past)
            continue
        again = correlation * past.values + math.sqrt(1 - correlation**2) * draw(half)
        found, past = advance(past, again, draw(half))
        yield time % every, (found.value / found.sem).abs()


@pytest.mark.parametrize("half", [1, 2, 4])
@pytest.mark.parametrize("interval", [1, 4, 16])
def test_two_standard_errors_cover_ninety_five_percent(half: int, interval: int) -> None:
    # Neighbouring steps have correlation 0.98 here; 0.9 was the correlation where it failed most.
    for correlation in (0.98**interval, 0.9**interval):
        off = list(simulated(correlation, half, rows=2000, every=10, times=21))
        first = torch.cat([z for time, z in off if time <= 3])
        for z in (torch.cat([z for _, z in off]), first):
            # 2,000 chains of correlated times.
            assert float((z > 2).double().mean()) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
            # Of one degree of freedom, as a single probe's change has, tails are long.
            assert float((z > 5).double().mean()) <= (0.02 if half == 1 else 0.002)


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


@pytest.mark.parametrize("freedom", [1, 1.7, 2, 3, 4, 7, 12, 25, 100, 1e6, math.inf])
def test_student_widens_as_its_quantiles_say(freedom: float) -> None:
    expected = scipy.stats.t.ppf(scipy.stats.norm.cdf(2.0), min(freedom, 1e9)) / 2
    found = float(student_widening(torch.tensor(freedom)))
    # Between 1 and 2 degrees it is a rougher interpolation, on the wide side.
    assert found == pytest.approx(expected, rel=0.02 if freedom == int(min(freedom, 1e9)) else 0.2)


def test_a_mean_of_one_value_has_no_error() -> None:
    assert math.isnan(widened_sem(1.0, 1))
    assert widened_sem(1.0, 2) == pytest.approx(6.984, rel=1e-3)

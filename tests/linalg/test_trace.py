from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.operators import DenseOperator
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.linalg.student import student_widening
from lla_callbacks.linalg.trace import TraceEstimate, TraceEstimator, _known_diagonal
from tests.linalg.test_lanczos import spectrum

DIM = 60
BLOCKS = {"a": slice(0, 20), "b": torch.arange(20, 25), "c": slice(25, 60)}


def outlier_matrix() -> Tensor:
    return spectrum(torch.cat([torch.tensor([40.0, 25.0, -15.0]), torch.randn(DIM - 3)]))


def start_of(seed: int) -> Tensor:
    return rademacher(DIM, generator(seed, 9), dtype=torch.float64, device=torch.device("cpu"))


def estimate(
    matrix: Tensor, depth: int, num_probes: int, seed: int, num_runs: int = 1
) -> tuple[TraceEstimate, int]:
    operator = DenseOperator(matrix)
    known = lanczos(operator, start_of(seed), depth) if depth else None
    estimator = TraceEstimator(operator, BLOCKS, known)
    for extra in range(1, num_runs):
        start = start_of(seed + 10_000 * extra)
        estimator.add_run(lanczos(operator, start, depth), start)
    source = generator(seed)
    while estimator.num_probes < num_probes:
        estimator.add_probe(source)
    return estimator.estimate(), operator.num_matvecs


@pytest.mark.parametrize(("depth", "num_runs"), [(0, 1), (5, 1), (12, 1), (5, 3)])
def test_unbiased_with_the_error_it_reports(depth: int, num_runs: int) -> None:
    matrix = outlier_matrix()
    repeats = 400
    found = [estimate(matrix, depth, 6, seed, num_runs)[0] for seed in range(repeats)]
    values = torch.tensor([e.value for e in found], dtype=torch.float64)
    squares = torch.tensor([e.square for e in found], dtype=torch.float64)
    sems = torch.tensor([e.sem for e in found], dtype=torch.float64)
    for sample, exact in ((values, matrix.trace()), (squares, matrix.square().sum())):
        assert abs(float(sample.mean() - exact)) < 5 * float(sample.std()) / math.sqrt(repeats)
    # The mean square of the reported errors is the variance of the estimates, widened for six
    # probes, so that two of them cover 95 %.
    widened = float(student_widening(torch.tensor(5.0)))
    assert float(sems.square().mean().sqrt() / values.std()) == pytest.approx(widened, rel=0.15)
    off = (values - matrix.trace()).abs()
    assert float((off <= 2 * sems).double().mean()) >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / repeats)


@pytest.mark.parametrize("num_probes", [2, 3, 5])
def test_two_errors_of_few_probes_cover_ninety_five_percent(num_probes: int) -> None:
    matrix = outlier_matrix()
    found = [estimate(matrix, 0, num_probes, seed)[0] for seed in range(400)]
    within = [abs(e.value - float(matrix.trace())) <= 2 * e.sem for e in found]
    # Without Student's law 72 % for two probes.
    assert sum(within) / 400 >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / 400)


def test_plain_probes_have_the_known_variance() -> None:
    matrix = outlier_matrix()
    known = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    found = torch.tensor([estimate(matrix, 0, 2, seed)[0].value for seed in range(1500)])
    assert float(found.var() * 2 / known) == pytest.approx(1, abs=0.15)


def test_a_blocks_trace_has_the_known_variance_by_whole_and_by_block_probes() -> None:
    matrix, repeats = outlier_matrix(), 600
    found = [estimate(matrix, 0, 2, seed)[0] for seed in range(repeats)]
    for name, index in BLOCKS.items():
        rows = matrix[index]
        block = rows[:, index]
        own = 2 * (block.square().sum() - block.diagonal().square().sum())
        cross = rows.square().sum() - block.square().sum()
        by_whole = torch.tensor([e.blocks[name][0] for e in found])
        by_block = []
        for seed in range(repeats):
            estimator = TraceEstimator(DenseOperator(block), {})
            source = generator(seed)
            estimator.add_probe(source)
            estimator.add_probe(source)
            by_block.append(estimator.estimate().value)
        # Two probes each; the variance of 600 estimates is good to 6 %.
        assert float(by_whole.var() * 2 / (own + cross)) == pytest.approx(1, abs=0.25)
        assert float(torch.tensor(by_block).var() * 2 / own) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("depth", [1, 4, 12, DIM])
def test_the_known_part_and_the_rest_make_the_whole_diagonal(depth: int) -> None:
    matrix = outlier_matrix()
    run = lanczos(DenseOperator(matrix), start_of(0), depth)
    q = run.basis.T
    rest = torch.eye(DIM).double() - q @ q.T
    known = _known_diagonal(run)
    torch.testing.assert_close(known + (rest @ matrix @ rest).diagonal(), matrix.diagonal())


@pytest.mark.parametrize("depth", [0, 4, 12])
def test_blocks_are_unbiased_and_add_up(depth: int) -> None:
    matrix = outlier_matrix()
    found = [estimate(matrix, depth, 4, seed)[0] for seed in range(300)]
    for name, index in BLOCKS.items():
        values = torch.tensor([e.blocks[name][0] for e in found])
        exact = matrix.diagonal()[index].sum()
        assert abs(float(values.mean() - exact)) < 5 * float(values.std()) / math.sqrt(300)
        sems = torch.tensor([e.blocks[name][1] for e in found])
        widened = float(student_widening(torch.tensor(3.0)))
        assert float(sems.square().mean().sqrt() / values.std()) == pytest.approx(widened, rel=0.2)
    for e in found:
        assert sum(value for value, _ in e.blocks.values()) == pytest.approx(e.value, abs=1e-9)


def test_taking_out_the_outliers_pays() -> None:
    matrix = outlier_matrix()
    plain = torch.tensor([estimate(matrix, 0, 18, s)[0].value for s in range(100)]).std()
    deflated = torch.tensor([estimate(matrix, 12, 6, s)[0].value for s in range(100)]).std()
    assert float(deflated) < 0.5 * float(plain)


def test_full_depth_is_exact_and_says_so() -> None:
    matrix = outlier_matrix()
    found, _ = estimate(matrix, DIM, 3, 0)
    assert abs(found.value - float(matrix.trace())) <= 5 * found.sem
    assert found.sem < 1e-10
    assert found.square == pytest.approx(float(matrix.square().sum()), rel=1e-10)


def test_a_further_run_costs_no_further_product_as_a_probe() -> None:
    found, products = estimate(outlier_matrix(), 5, 4, 0, num_runs=3)
    assert products == 3 * 5 + 2
    assert found.num_probes == 4


def test_one_probe_has_no_standard_error() -> None:
    found, _ = estimate(outlier_matrix(), 4, 1, 0)
    assert math.isnan(found.sem)


def test_no_probe_is_no_estimate() -> None:
    with pytest.raises(ValueError, match="at least one probe"):
        TraceEstimator(DenseOperator(torch.eye(3)), {}).estimate()


def test_probes_do_not_touch_the_global_stream_and_differ_by_seed_and_key() -> None:
    before = torch.get_rng_state()
    vectors = [
        rademacher(64, generator(*keys), dtype=torch.float32, device=torch.device("cpu"))
        for keys in ((0,), (1,), (0, 0), (0, 1), (1, 0))
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert len({tuple(v.tolist()) for v in vectors}) == len(vectors)
    assert all(set(v.tolist()) == {-1.0, 1.0} for v in vectors)

"""How far out an extreme eigenvalue may still lie, against spectra that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lla_callbacks.linalg.eigenvalue import extremes
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.operators import DenseOperator
from lla_callbacks.linalg.outermost import Seen, reach
from lla_callbacks.linalg.probes import generator, rademacher

DIM, STARTS = 120, 100
SPECTRA = {
    "one outlier": torch.cat([torch.linspace(-0.3, 1, DIM - 1), torch.tensor([2.0])]),
    "two close ones": torch.cat([torch.linspace(-0.3, 1, DIM - 2), torch.tensor([1.86, 1.993])]),
    "no outlier": torch.linspace(-1, 1, DIM),
}


def operator_of(values: Tensor) -> DenseOperator:
    source = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=source, dtype=torch.float64))[0]
    return DenseOperator((basis * values.double()) @ basis.T)


def runs_on(values: Tensor, depth: int, starts: int = STARTS) -> list[LanczosRun]:
    operator = operator_of(values)
    like: Any = {"dtype": torch.float64, "device": torch.device("cpu")}
    noise = [rademacher(DIM, generator(seed), **like) for seed in range(starts)]
    return [lanczos(operator, start, depth, noise=1.0) for start in noise]


@pytest.mark.parametrize("name", SPECTRA)
def test_the_extremes_lie_within_what_is_said_in_95_of_100_runs(name: str) -> None:
    values = SPECTRA[name]
    low, high = float(values.min()), float(values.max())
    full = runs_on(values, 9)
    for depth in (3, 5, 8):
        runs = [run.at_depth(depth) for run in full]
        ends = [extremes([run]) for run in runs]
        # Of 100 runs with a chance of 0.95 each no fewer than 88, but for one in a thousand.
        assert sum(top + top.beyond >= high for _, top in ends) >= 88
        assert sum(bottom - bottom.beyond <= low for bottom, _ in ends) >= 88
        # No Ritz value is outside of the spectrum.
        assert all(top <= high + 1e-9 and bottom >= low - 1e-9 for bottom, top in ends)
        if depth == 3 and name != "one outlier":
            # Which the residual alone does not tell.
            assert sum(top + top.residual >= high for _, top in ends) < 88
            assert all(top.is_open for _, top in ends)
    # It is within the residual once that is small, of a run that is deep enough.
    deep = runs_on(values, 60, 1)[0]
    assert max(deep.beyond) <= max(1.5 * float(deep.residuals.max()), 0.02)


def test_the_bound_is_where_the_polynomials_say() -> None:
    run = runs_on(SPECTRA["one outlier"], 6, 1)[0]
    edge = float(run.values[-1])
    out = edge + reach(run.seen, edge, doubt=0.05)
    # 1 / sum p_j^2 is what a quadrature with a node there can have as its weight at most
    # (Golub and Meurant 2010, section 6.2): the Gauss-Radau rule of one more step.
    tridiagonal = torch.diag(run.diagonal - out)
    tridiagonal += torch.diag(run.off_diagonal, 1) + torch.diag(run.off_diagonal, -1)
    last = torch.zeros(6, dtype=torch.float64)
    last[-1] = run.next_norm**2
    radau = torch.zeros(7, 7, dtype=torch.float64)
    radau[:6, :6] = tridiagonal + out * torch.eye(6, dtype=torch.float64)
    radau[5, 6] = radau[6, 5] = run.next_norm
    radau[6, 6] = out + float(torch.linalg.solve(tridiagonal, last)[-1])
    values, vectors = torch.linalg.eigh(radau)
    assert float(values[-1]) == pytest.approx(out, rel=1e-9)
    weight = float(vectors[0, -1] ** 2)
    assert weight == pytest.approx(math.pi * 0.05**2 / (2 * DIM), rel=1e-5)


def test_less_doubt_and_more_dimensions_lead_further_and_depth_less_far() -> None:
    run = runs_on(SPECTRA["no outlier"], 9, 1)[0]

    def far(depth: int, count: float, doubt: float, times: int = 1) -> float:
        part = run.at_depth(depth)
        seen = [replace(part.seen[0], count=count)] * times
        return reach(seen, float(part.values[-1]), doubt=doubt)

    assert far(4, 1e6, 0.05) > far(4, 1e3, 0.05) > far(8, 1e3, 0.05) > 0
    assert far(4, 1e3, 0.01) > far(4, 1e3, 0.05)
    # Two with noise of their own must both have missed it.
    assert far(4, 1e3, 0.0025, 2) == pytest.approx(far(4, 1e3, 0.05))


def test_the_smaller_of_two_close_outliers_is_not_called_the_largest() -> None:
    values = torch.cat([torch.linspace(-0.05, 1, DIM - 2), torch.tensor([3.2, 3.3])])
    shallow = [run.at_depth(5) for run in runs_on(values, 6)]
    low = [run for run in shallow if float(run.values[-1]) < 0.99 * 3.3]
    # By the residual more would be than one in twenty.
    assert sum(float(run.residuals[-1]) <= 0.01 * 3.3 for run in low) > 5
    assert sum(run.is_largest(0.01) for run in low) <= 5
    # A run that may go on, from noise and from what a short one found with a tenth of noise, says
    # so in the end; where there was no noise that cannot be known.
    source, wrong, operator = torch.Generator().manual_seed(1), 0, operator_of(values)
    for run in shallow[:30]:
        signs = torch.randn(DIM, generator=source, dtype=torch.float64).sign()
        size = 0.1 / math.sqrt(DIM)
        start = run.vectors([run.num_steps - 1])[:, 0] + size * signs
        # With what the first one has seen it is as sure, and shorter.
        for first, noise, seen in ((signs, 1.0, ()), (start, size, run.seen)):
            found = lanczos(operator, first, 40, rtol=0.01, which="max", noise=noise, earlier=seen)
            assert found.num_steps < 40
            assert found.is_largest(0.01)
            wrong += float(found.values[-1]) < 0.99 * 3.3
    assert wrong <= 3


@pytest.mark.parametrize(("value", "least"), [(math.nan, math.inf), (1e200, 0.0)])
def test_what_is_no_number_has_an_end_and_no_error(value: float, least: float) -> None:
    found = reach([Seen((value, 1.0), (1.0, 1.0), 10.0)], 1.0)
    assert found == pytest.approx(least, abs=1e-6)

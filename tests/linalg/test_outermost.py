"""How far out an extreme eigenvalue may still lie, against spectra that are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lla_callbacks.linalg.eigenvalue import extremes
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.operators import DenseOperator
from lla_callbacks.linalg.outermost import reach
from lla_callbacks.linalg.probes import generator, rademacher

DIM, STARTS = 120, 100
SPECTRA = {
    "one outlier": torch.cat([torch.linspace(-0.3, 1, DIM - 1), torch.tensor([2.0])]),
    "two close ones": torch.cat([torch.linspace(-0.3, 1, DIM - 2), torch.tensor([1.86, 1.993])]),
    "no outlier": torch.linspace(-1, 1, DIM),
}


def runs_on(values: Tensor, depth: int, starts: int = STARTS) -> list[LanczosRun]:
    source = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=source, dtype=torch.float64))[0]
    operator = DenseOperator((basis * values.double()) @ basis.T)
    like: Any = {"dtype": torch.float64, "device": torch.device("cpu")}
    noise = [rademacher(DIM, generator(seed), **like) for seed in range(starts)]
    return [lanczos(operator, start, depth, from_noise=True) for start in noise]


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
    beta = [*run.off_diagonal.tolist(), run.next_norm]
    edge = float(run.values[-1])
    out = edge + reach(run.diagonal.tolist(), beta, edge, DIM, doubt=0.05)
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

    def far(depth: int, dim: float, doubt: float) -> float:
        part = run.at_depth(depth)
        beta = [*part.off_diagonal.tolist(), part.next_norm]
        return reach(part.diagonal.tolist(), beta, float(part.values[-1]), dim, doubt=doubt)

    assert far(4, 1e6, 0.05) > far(4, 1e3, 0.05) > far(8, 1e3, 0.05) > 0
    assert far(4, 1e3, 0.01) > far(4, 1e3, 0.05)

"""What a run's depth leaves open is in the errors, or there is a gap that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks import measure_hessian
from lla_callbacks.hessian.criteria_of import FAR_END

BATCH = [(torch.zeros(1),)]


class Weights(nn.Module):
    """A body and a head, flat."""

    def __init__(self, body: int, head: int) -> None:
        super().__init__()
        self.body = nn.Parameter(torch.ones(body, dtype=torch.float64))
        self.head = nn.Parameter(torch.ones(head, dtype=torch.float64))


def quadratic(matrix: Tensor) -> Callable[[Any, Any], Tensor]:
    def loss(module: Any, batch: Any) -> Tensor:
        w = torch.cat([module.body, module.head])
        return 0.5 * w @ matrix @ w

    return loss


def matrix_of(values: Tensor, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=source, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    return (basis * values) @ basis.T


def at_start(dim: int = 240) -> Tensor:
    """A spectrum as at initialisation: small and of both signs, around few larger ones."""
    bulk = torch.linspace(-1, 1, dim - 4) ** 3
    return torch.cat([bulk, torch.tensor([-2.0, 1.5, 2.5, 4.0])]).double()


@pytest.mark.parametrize("num_runs", [1, 4])
@pytest.mark.parametrize("num_steps", [8, 14])
def test_two_errors_cover_what_a_deeper_run_would_change(num_runs: int, num_steps: int) -> None:
    values = at_start()
    positive = values.clamp(min=0)
    truth = {
        "effective_dimension": float((positive / (positive + 1)).sum()),
        "kh1": float(-values[values < 0].sum() / positive.sum()),
        "c_t": float(values.min() / values.max()),
    }
    module, loss = Weights(120, 120), quadratic(matrix_of(values))
    seeds = 15
    within = dict.fromkeys(truth, 0)
    for seed in range(seeds):
        found = measure_hessian(
            module,
            BATCH,
            loss=loss,
            num_steps=num_steps,
            num_probes=2,
            num_runs=num_runs,
            seed=seed,
        )
        for name, value in truth.items():
            off = abs(found.criteria[name] - value)
            within[name] += off <= 2 * found.criteria_errors[name]
    assert min(within.values()) >= 13, within


def test_a_run_that_ended_early_says_nothing_of_the_far_end() -> None:
    # The far end is small and takes long: at 5 % of the largest the run ends long before.
    values = torch.cat([torch.linspace(-0.02, 0.02, 60), torch.tensor([-0.05, 0.6, 1.0])]).double()
    module, loss = Weights(30, 33), quadratic(matrix_of(values))
    settings: dict[str, Any] = {"loss": loss, "num_steps": 40, "num_probes": 4}
    early = measure_hessian(module, BATCH, eig_rtol=0.05, **settings)
    assert early.num_steps < 40
    assert all(math.isnan(early.criteria[name]) for name in FAR_END)
    assert "eig_rtol=0.05 ended a run after" in early.gaps["criteria of the far end"]
    assert "no criteria of the far end eig_rtol=0.05" in early.summary()
    assert "c_t" in early.summary()
    # So are the layers' distances, which rest on whole spectra.
    layered = measure_hessian(module, BATCH, eig_rtol=0.05, num_layer_steps=20, **settings)
    spectra = [layer.spectrum for layer in layered.layers.values() if layer.spectrum]
    assert spectra
    assert all(math.isnan(s.distance) and s.ended_early for s in spectra)
    assert "ended the whole's run or a layer's" in layered.gaps["layers' distances"]
    assert "most like the whole" not in layered.summary()
    # What is left holds: the extremes with how far out they may still lie, and the share below
    # zero within what the quadrature resolves.
    assert early.lambda_min - early.lambda_min.beyond <= -0.05
    share = float((values < 0).double().mean())
    assert (
        abs(early.criteria["negative_mass"] - share) <= 2 * early.criteria_errors["negative_mass"]
    )
    full = measure_hessian(module, BATCH, **settings)
    assert not full.gaps
    assert full.criteria["r_e"] == pytest.approx(0.05, abs=2 * full.criteria_errors["r_e"] + 1e-8)


def test_stability_of_an_optimizer_of_the_head_alone() -> None:
    # Close to the head's largest eigenvalue are others, and far more parameters stand still.
    values = torch.cat([torch.linspace(-0.1, 0.9, 80), torch.tensor([1.0])]).double()
    matrix = torch.diag(torch.linspace(-3, 5, 300 + len(values)).double())
    matrix[300:, 300:] = matrix_of(values)
    module = Weights(300, len(values))
    optimizer = torch.optim.SGD([module.head], lr=0.5)
    for seed in range(20):
        found = measure_hessian(
            module, BATCH, loss=quadratic(matrix), optimizer=optimizer, seed=seed, num_steps=24,
            num_probes=2,
        )  # fmt: skip
        off = abs(found.criteria["stability"] - 0.25)
        assert off <= found.criteria_errors["stability"]
        assert off <= 0.05 * 0.25

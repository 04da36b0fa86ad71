from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks.hessian.measures import measure
from lla_callbacks.hessian.settings import HessianSettings, TrackingSettings
from lla_callbacks.hessian.tracking import HessianTracking, TrackerState, anchored, track
from lla_callbacks.objective.objective import Objective
from tests.cases import cross_entropy, tanh_net


def objective(seed: int = 1) -> tuple[nn.Module, Objective]:
    torch.manual_seed(seed)
    module = tanh_net().double()
    batch = (torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,)))
    return module, Objective(module, [batch], cross_entropy)


def move(module: nn.Module, amount: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn_like(parameter)


def dense(found: Objective) -> Tensor:
    return found.hessian().to_dense()


def test_cold_and_warm_agree_with_the_dense_hessian() -> None:
    module, found = objective()
    settings = TrackingSettings(eig_rtol=0.01, num_probes=2)
    state: TrackerState | None = None
    steps = []
    for _ in range(4):
        warm, state = track(found, settings, state)
        cold, _ = track(found, settings)
        truth = float(torch.linalg.eigvalsh(dense(found))[-1])
        for tracking in (warm, cold):
            assert tracking.lambda_max.residual <= 0.01 * truth * 1.01
            assert abs(tracking.lambda_max - truth) <= tracking.lambda_max.residual
        steps.append((warm.num_steps, cold.num_steps))
        move(module)
    assert steps[0][0] == steps[0][1]
    assert sum(w for w, _ in steps[1:]) < sum(c for _, c in steps[1:])


def test_counts_and_what_is_left_out() -> None:
    _, found = objective()
    both, state = track(found, TrackingSettings())
    assert both.num_matvecs == both.num_steps + both.num_probes
    assert both.num_samples == 8
    assert set(both.layer_traces) == {"0", "2"}
    assert state.vector is not None
    assert abs(float(state.vector.norm()) - 1) < 1e-12
    only, state = track(found, TrackingSettings(eig_rtol=None))
    assert math.isnan(only.lambda_max)
    assert only.num_matvecs == 4
    assert state.vector is None
    only, state = track(found, TrackingSettings(num_probes=0))
    assert math.isnan(only.trace)
    assert only.layer_traces == {}
    assert only.num_matvecs == only.num_steps
    assert state.trace is None


@pytest.mark.parametrize("eig_rtol", [None, 0.05])
def test_traces_are_unbiased_over_seeds(eig_rtol: float | None) -> None:
    module, found = objective()
    batch_of: list[list[HessianTracking]] = []
    for seed in range(150):
        module.load_state_dict(objective()[0].state_dict())
        torch.manual_seed(3)
        state, row = None, []
        for _ in range(3):
            tracking, state = track(found, TrackingSettings(eig_rtol=eig_rtol, seed=seed), state)
            row.append(tracking)
            move(module)
        batch_of.append(row)
    module.load_state_dict(objective()[0].state_dict())
    torch.manual_seed(3)
    for i in range(3):
        diagonal = dense(found).diagonal()
        truth = {"0": diagonal[:25].sum(), "2": diagonal[25:].sum()}
        values = torch.tensor([row[i].trace for row in batch_of])
        sems = torch.tensor([row[i].trace_sem for row in batch_of])
        error = float(values.mean() - diagonal.sum())
        assert abs(error) < 5 * float(values.std()) / math.sqrt(150)
        # Widened, at the first time for the three degrees of freedom of four probes.
        assert 0.7 < float(sems.square().mean().sqrt() / values.std()) < 1.5 * 1.654
        assert float(((values - diagonal.sum()).abs() <= 2 * sems).double().mean()) >= 0.9
        for layer, value in truth.items():
            parts = torch.tensor([row[i].layer_traces[layer].value for row in batch_of])
            assert abs(float(parts.mean() - value)) < 5 * float(parts.std()) / math.sqrt(150)
        move(module)


def test_a_full_measurement_hands_over_vector_and_level() -> None:
    _, found = objective()
    settings = TrackingSettings()
    kept = []

    def anchor(*known) -> None:  # type: ignore[no-untyped-def]
        kept.append(anchored(*known, settings))

    plain = measure(found, HessianSettings(num_steps=10, num_probes=4))
    full = measure(found, HessianSettings(num_steps=10, num_probes=4), anchor=anchor)
    assert full.trace == plain.trace
    assert full.num_matvecs == plain.num_matvecs + 2
    (state,) = kept
    assert state.trace is not None
    assert float(state.trace.level[0]) == full.trace
    after, _ = track(found, settings, state)
    # The vector is the eigenvector already; the gradient beside it costs a few steps at most.
    cold, _ = track(found, settings)
    assert after.num_steps <= cold.num_steps
    assert abs(after.lambda_max - full.lambda_max) <= 0.05 * full.lambda_max


def test_the_same_state_gives_the_same_numbers_again() -> None:
    module, found = objective()
    _, state = track(found, TrackingSettings())
    move(module)
    one, _ = track(found, TrackingSettings(), state)
    again = TrackerState.from_state_dict(state.state_dict())
    two, _ = track(found, TrackingSettings(), again)
    assert (one.trace, one.trace_sem, one.lambda_max) == (two.trace, two.trace_sem, two.lambda_max)


def test_a_state_of_other_settings_starts_the_traces_anew() -> None:
    _, found = objective()
    _, state = track(found, TrackingSettings(num_probes=2))
    more, _ = track(found, TrackingSettings(num_probes=6), state)
    assert more.num_probes == 6
    other, _ = track(found, TrackingSettings(num_probes=2, layers=["0"]), state)
    assert set(other.layer_traces) == {"0"}


def test_what_is_too_old_is_left_out() -> None:
    _, found = objective()
    _, state = track(found, TrackingSettings())
    assert state.trace is not None
    for num_steps, interval, warm, linked in [
        (4, 4, True, True),
        (5, 4, True, False),
        (16, 16, True, True),
        (17, 17, False, True),
        (17, 16, False, False),
    ]:
        aged = state.aged(num_steps, interval)
        assert aged.trace is not None
        assert (aged.vector is not None, len(aged.trace.values) > 0) == (warm, linked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_probes": 3}, "num_probes is 3; give an even number"),
        ({"num_probes": -2}, "num_probes is -2; give an even number"),
        ({"eig_rtol": 2}, "eig_rtol is 2; give a number between 0 and 1"),
        ({"num_probes": 0, "eig_rtol": None}, "there is nothing to track"),
        ({"num_steps": 0}, "num_steps is 0; give a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, float | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrackingSettings(**settings)  # type: ignore[arg-type]

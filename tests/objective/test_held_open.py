"""One guard for questions in a row: entered once, left for whoever needs the module itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import loss_plane
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.sharing import Alone
from lla_callbacks.objective import evaluation
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.held_open import held_in_one
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.probing import Prober

SETTINGS: dict[str, Any] = {"alphas": [-1, 0, 1], "betas": [0, 1], "evaluation": "loop"}


class Counting(nn.Module):
    """Normalizes, counts its passes, and can be told to write where it should not."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4).double()
        self.norm = nn.BatchNorm1d(4).double()
        self.passes = 0
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.wrong == "weights" or (self.wrong == "gradient" and torch.is_grad_enabled()):
            self.layer.weight.data += 0.1
        if self.wrong == "turns off" and not torch.is_grad_enabled():
            self.layer.weight.requires_grad_(False)
        return self.norm(self.layer(x))


def loss(module: Any, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def batch() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x, y = (torch.randn(6, n, generator=source, dtype=torch.float64) for n in (3, 4))
    return x, y


def state(module: nn.Module) -> Any:
    tensors = {k: v.clone() for k, v in module.state_dict().items()}
    return tensors, module.passes, module.training, torch.get_rng_state()


def same(a: Any, b: Any) -> bool:
    tensors = zip([*a[0].values(), a[3]], [*b[0].values(), b[3]], strict=True)
    return a[1:3] == b[1:3] and all(torch.equal(x, y) for x, y in tensors)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    found: list[None] = []
    enter = evaluation.repeatable
    monkeypatch.setattr(
        evaluation, "repeatable", lambda *a, **k: (found.append(None), enter(*a, **k))[1]
    )
    return found


@pytest.mark.parametrize("directions", ["random", ("gradient", "random")])
def test_a_plane_enters_the_guard_once_and_leaves_no_trace(
    entries: list[None], directions: Any
) -> None:
    module = Counting()
    before = state(module)
    plane = loss_plane(module, [batch()], loss=loss, directions=directions, **SETTINGS)
    assert plane.facts.self_check == "self-check passed"
    # What is differentiated has a guard of its own, after which it is entered again.
    assert len(entries) == (1 if directions == "random" else 2)
    assert same(before, state(module))
    unchecked = loss_plane(
        module, [batch()], loss=loss, directions=directions, check=False, **SETTINGS
    )
    assert torch.equal(plane.loss, unchecked.loss)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("wrong", ["weights", "gradient"])
def test_a_loss_that_changes_the_weights_is_refused_and_they_are_put_back(
    wrong: str, check: bool
) -> None:
    module = Counting(wrong)
    before = state(module)
    if wrong == "gradient" and not check:
        # Nothing is differentiated.
        loss_plane(module, [batch()], loss=loss, check=check, **SETTINGS)
    else:
        with pytest.raises(MeasurementError, match="changes the trainable weights"):
            loss_plane(module, [batch()], loss=loss, check=check, **SETTINGS)
    assert same(before, state(module))


@pytest.mark.parametrize("drops", [True, False])
def test_what_is_known_of_dropout_goes_along_but_not_to_metrics(drops: bool) -> None:
    def dropping(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        return (F.dropout(out) if drops else out).square().mean()

    objective = Objective(Counting(), [batch()], dropping)
    plain = objective()
    metrics = {"one": lambda module, batch: torch.ones(())}
    with held_in_one(objective):
        for asked, watched in (({}, True), ({}, drops), (metrics, True)):
            with evaluating(objective, metrics=asked) as evaluate:
                # Looking at every function costs as much as a small network's pass.
                assert (evaluate._no_dropout is not None) == watched
                assert float(evaluate()[0]) == plain


def broken(module: Any, batch: Any) -> Tensor:
    module(batch[0])
    raise ValueError("broken")


def test_it_is_left_with_an_error_and_may_be_used_again() -> None:
    objective = Objective(Counting(), [batch()], loss)
    before = state(objective.module)
    with held_in_one(objective):
        value = objective()
        assert not same(before, state(objective.module))  # inside of it
        objective.loss = broken
        with pytest.raises(ValueError, match="broken"):
            objective()
        assert same(before, state(objective.module))
        objective.loss = loss
        # A context inside has no guard of its own, and does not end it.
        with held_in_one(objective), evaluating(objective) as evaluate:
            objective.release()
            assert evaluate()[0] == value
    assert objective.held_open is None
    assert same(before, state(objective.module))


def test_a_gradient_inside_of_the_guard_is_that_of_one_of_its_own() -> None:
    # A step that turns a part off does so for itself alone.
    for wrong in ("", "turns off"):
        objective = Objective(Counting(wrong), [batch(), batch()], loss)
        with Prober(objective, Alone()) as prober:
            first, second = prober.twice()
            value, found = prober.gradient()
        assert first == second
        expected, gradient = objective.gradient()
        assert value == expected
        assert torch.equal(found, gradient)

"""Passes from one start: the numbers of passes from a start each, whatever a step writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks.objective.bare_passes import BarePasses
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, Values, _Visit, evaluate_points, space_of
from tests.objective.test_watching import BATCH, STEPS, Net, loss

POINTS = torch.tensor([0.0, 1.0, 2.0] * 7, dtype=torch.float64)[:, None]


def net(*step: Callable[[Any], Any]) -> Net:
    torch.manual_seed(0)
    return Net(*step)


def visited(
    step: Callable[[Any, Any], Tensor],
    module: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    batch: Any = BATCH,
) -> tuple[list[float], int]:
    """Return values at points, and how many of them had a start of their own."""
    alone: list[int] = []
    monkeypatch.setenv("PASSES", "0")
    with monkeypatch.context() as patch:
        one = _Visit._one
        patch.setattr(_Visit, "_one", lambda self, i: (alone.append(i), one(self, i))[1])
        objective = Objective(module, [batch, batch], step, mode="eval", check=False)
        family = Offsets(space_of(objective), [torch.ones(3, dtype=torch.float64)])
        settings = PointSettings(evaluation="loop")
        found: Values = evaluate_points(objective, family, POINTS, settings)
    return found.table[:, 0].tolist(), len(alone)


@pytest.mark.parametrize("name", STEPS)
def test_values_are_those_of_passes_from_a_start_each(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = visited(loss, net(STEPS[name]), monkeypatch)
    monkeypatch.setattr(BarePasses, "of", classmethod(lambda cls, evaluate: None))
    each, alone = visited(loss, net(STEPS[name]), monkeypatch)
    assert together == each
    assert len(set(together)) == 3
    assert alone == len(POINTS)


def unseen(net: Any, batch: Any) -> Tensor:
    found: Tensor = (net.inner(batch[0]) - batch[1]).square().mean()
    batch[1].numpy()[:] += 1.0
    return found


def seen(net: Any, batch: Any) -> Tensor:
    return net.inner(batch[0].add_(1.0)).square().mean()  # type: ignore[no-any-return]


def replaced(net: Any, batch: Any) -> Tensor:
    found: Tensor = net.inner(batch["x"]).square().mean()
    batch["x"] = batch["x"] + 1.0
    return found


def marked(net: Any, batch: Any) -> Tensor:
    extra = getattr(batch[0], "extra", 0.0)
    batch[0].extra = extra + 1.0
    return net.inner(batch[0]).square().mean() + extra  # type: ignore[no-any-return]


def gradients_left_on(net: Any, batch: Any) -> Tensor:
    torch.set_grad_enabled(True)
    return net.inner(batch[0]).square().mean()  # type: ignore[no-any-return]


def parameter_itself(net: Any, batch: Any) -> Tensor:
    return net.inner.bias  # type: ignore[no-any-return]


def passes() -> int:
    """Count where no guard looks."""
    os.environ["PASSES"] = str(int(os.environ["PASSES"]) + 1)
    return int(os.environ["PASSES"])


def late_noise(net: Any, batch: Any) -> Tensor:
    found: Tensor = net.inner(batch[0]).square().mean()
    return found + torch.rand(()) if passes() > 9 else found


def fails_once(net: Any, batch: Any) -> Tensor:
    if passes() == 20:
        raise RuntimeError("not again")
    return net.inner(batch[0]).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("step", "batch", "few"),
    [(unseen, BATCH, False), (seen, BATCH, False), (marked, BATCH, False),
     (replaced, {"x": BATCH[0], "y": BATCH[1]}, True), (gradients_left_on, BATCH, False),
     (parameter_itself, BATCH, True), (loss, [*BATCH], True), (fails_once, BATCH, False)],
)  # fmt: skip
def test_batches_and_modes_are_whole_at_every_point(
    step: Callable[[Any, Any], Tensor], batch: Any, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, alone = visited(step, net(), monkeypatch, batch)
    assert values == values[:3] * 7
    assert len(set(values)) == 3
    # Where nothing is written, the first point alone has a start of its own.
    assert alone == 1 if few else alone > 1
    assert torch.is_grad_enabled()


def test_noise_that_comes_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    values, alone = visited(late_noise, net(), monkeypatch)
    assert values[-3:] == values[-6:-3]
    assert alone > 10

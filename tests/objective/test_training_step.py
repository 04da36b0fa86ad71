"""How a training step is called: by what it takes, which is looked up once and seen to change."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lla_callbacks.objective import training_step
from lla_callbacks.objective.training_step import replay_training_step


class Numbered(nn.Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.tensor(float(batch + 10 * batch_idx))


class Unnumbered(nn.Module):
    def training_step(self, batch: Any) -> Tensor:
        return torch.tensor(float(batch))


class Fetching(nn.Module):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return torch.tensor(float(batch + 10 * batch_idx))


def logged(step: Any) -> Any:
    @functools.wraps(step)
    def wrapper(*args: Any) -> Any:
        return step(*args)

    return wrapper


class Decorated(nn.Module):
    @logged
    def training_step(self, batch: Any) -> Tensor:
        return torch.tensor(float(batch))


@pytest.mark.parametrize(
    ("kind", "expected", "looks"),
    [(Numbered, 31, 1), (Unnumbered, 1, 1), (Fetching, 31, 1), (Decorated, 1, 3)],
)
def test_a_step_gets_what_it_takes_and_is_looked_up_once(
    kind: type[nn.Module], expected: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step._FORMS.clear()
    seen = []
    look = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda step: (seen.append(1), look(step))[1])
    module = kind()
    assert [float(replay_training_step(module, 1, 3)) for _ in range(3)] == [expected] * 3
    # What a decorator makes says by itself what it takes, and may say something else.
    assert len(seen) == looks


def test_a_step_that_was_exchanged_is_looked_up_anew() -> None:
    class Exchanged(Unnumbered):
        def training_step(self, batch: Any) -> Tensor:
            return torch.tensor(float(batch))

    module = Exchanged()
    assert float(replay_training_step(module, 1, 3)) == 1
    step: Any = Exchanged.training_step
    step.__code__ = Numbered.training_step.__code__
    assert float(replay_training_step(module, 1, 3)) == 31
    module.__dict__["training_step"] = lambda batch: torch.tensor(-float(batch))
    assert float(replay_training_step(module, 1, 3)) == -1

"""The user's own loss, inside a Trainer: the training step replayed, nothing noticed."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from typing import Any

from torch import Tensor, nn

from lla_callbacks.callbacks.compat import (
    full_precision_context,
    muted_loggers,
    training_precision_context,
)
from lla_callbacks.objective.evaluation import Loss
from lla_callbacks.objective.muting import no_output
from lla_callbacks.objective.training_step import mute, present_place, replay_training_step


def trainer_loss(
    trainer: Any,
    loss: Loss | None,
    *,
    batch_idx: int | Sequence[int] = 0,
    as_trained: bool = False,
) -> Loss:
    """Return ``loss(module, batch)`` that runs in the Trainer's surroundings.

    Args:
        trainer: Its loggers are replaced by dummies meanwhile.
        loss: The user's loss; ``None`` replays ``training_step``.
        batch_idx: What a replayed ``training_step`` is told; or that of each held batch, by place.
        as_trained: Whether the Trainer's precision is kept: autocast, default dtype. Otherwise
            float32 at least.
    """
    surroundings = training_precision_context if as_trained else full_precision_context

    def evaluate(module: nn.Module, batch: Any) -> Tensor:
        # The user's own loss may log as well, through a method of the module.
        mute(module)
        # Context variables are the step's own there.
        found: Tensor = copy_context().run(evaluate_inside, module, batch)
        return found

    def evaluate_inside(module: nn.Module, batch: Any) -> Tensor:
        with muted_loggers(trainer), surroundings(trainer), no_output():
            if loss is not None:
                return loss(module, batch)
            number = batch_idx if isinstance(batch_idx, int) else batch_idx[present_place()]
            return replay_training_step(module, batch, number)

    return evaluate

"""Is it a minimum? Some hundred steps of plain training, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lla_callbacks.minima.predictions import Accuracy
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.objective import Objective, trainable
from lla_callbacks.objective.state import preserved, set_mode

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
# How often along the way everything is evaluated, about evenly on a logarithmic axis.
POINTS = 24


@dataclass(frozen=True, eq=False)
class RelaxationPath:
    """What became of a network under plain training; all tensors have shape ``(k,)``, float64.

    Attributes:
        steps: Steps taken, from 0.
        loss: The loss on the batches of training.
        accuracy: Share of their labels that are predicted; NaN without labels.
        held_loss: The loss on batches held out; NaN without any.
        held_accuracy: Their accuracy.
        displacement: ``||w - w_0|| / ||w_0||``.
        gradient_norm: Norm of the gradient of the step that comes next.
        num_samples: Samples trained on.
        num_held: Samples held out.
        num_params: Trainable parameters.
        optimizer: What took the steps.
        mode: Mode of the network in which losses and accuracies are.
        state_dict: Where the network ended: its parameters and buffers, by name.
    """

    steps: Tensor
    loss: Tensor
    accuracy: Tensor
    held_loss: Tensor
    held_accuracy: Tensor
    displacement: Tensor
    gradient_norm: Tensor
    num_samples: int
    num_held: int
    num_params: int
    optimizer: str
    mode: str
    state_dict: Mapping[str, Tensor]


def follow(
    objective: Objective,
    held: Objective | None,
    accuracy: Accuracy,
    *,
    num_steps: int,
    make_optimizer: MakeOptimizer,
    dropout: bool,
    seed: int,
) -> RelaxationPath:
    """Train on an objective's batches, one a step in their order, and put everything back.

    Args:
        objective: Module, batches and loss; its mode is that of what is recorded.
        held: The same on batches held out.
        accuracy: How labels are compared.
        num_steps: How many steps.
        make_optimizer: Makes the optimizer of the parameters.
        dropout: Whether dropout is on in the steps.
        seed: Of random streams in the steps.
    """
    module = objective.module
    parameters = list(trainable(module).values())
    saved = [p.detach().clone() for p in parameters]
    modes = {m: m.training for m in module.modules()} if module.training else None
    wanted = _wanted(num_steps)
    rows: list[list[float]] = []
    try:
        with preserved(module, seed=seed, check_weights=False):
            optimizer = make_optimizer(parameters)
            for step in range(num_steps + 1):
                recorded = step in wanted
                row = _values(objective, held, accuracy) if recorded else []
                set_mode(module, "batch", dropout=dropout, training=modes)
                optimizer.zero_grad()
                batch = objective.fresh(step % len(objective.batches))
                torch.autograd.backward(objective.loss(module, batch))
                if recorded:
                    moved = [p - s for p, s in zip(parameters, saved, strict=True)]
                    gradients = [p.grad for p in parameters if p.grad is not None]
                    rows.append([step, *row, _norm(moved) / _norm(saved), _norm(gradients)])
                if step < num_steps:
                    optimizer.step()
            ended = {k: v.detach().clone() for k, v in module.state_dict().items()}
            name = f"{type(optimizer).__name__}, lr {optimizer.param_groups[0]['lr']:g}"
    finally:
        for p, value in zip(parameters, saved, strict=True):
            p.data.copy_(value)
    columns = iter(torch.tensor(rows, dtype=torch.float64).T)
    return RelaxationPath(
        steps=next(columns),
        loss=next(columns),
        accuracy=next(columns),
        held_loss=next(columns),
        held_accuracy=next(columns),
        displacement=next(columns),
        gradient_norm=next(columns),
        num_samples=objective.num_samples,
        num_held=0 if held is None else held.num_samples,
        num_params=sum(p.numel() for p in parameters),
        optimizer=name,
        mode=objective.mode,
        state_dict=ended,
    )


def _wanted(num_steps: int) -> set[int]:
    """Return about ``POINTS`` steps between the first and the last."""
    ratio = num_steps ** (1 / max(1, POINTS - 2))
    return {0, num_steps, *(round(ratio**k) for k in range(POINTS - 1))}


def _values(objective: Objective, held: Objective | None, accuracy: Accuracy) -> list[float]:
    found: list[float] = []
    for part in (objective, held):
        if part is None:
            found += [math.nan, math.nan]
            continue
        with evaluating(part, metrics={"accuracy": accuracy}, check_weights=False) as evaluate:
            found += evaluate().tolist()
    return found


def _norm(tensors: list[Tensor]) -> float:
    squares = [t.detach().double().square().sum() for t in tensors]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0

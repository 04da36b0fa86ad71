"""Train a curve between two networks by a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lla_callbacks.curves.curve import (
    Kind,
    straight_bends,
)
from lla_callbacks.curves.training import MovingCurve
from lla_callbacks.linalg.errors import NonFiniteError
from lla_callbacks.linalg.probes import generator
from lla_callbacks.objective.networks import Networks
from lla_callbacks.objective.objective import Objective, trainable
from lla_callbacks.objective.state import preserved, set_mode

# An optimizer of these parameters, for `connect`.
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def train_curve(
    objective: Objective,
    networks: Networks,
    kind: Kind,
    bends: int,
    epochs: int,
    weight_decay: float,
    scale_steps: bool,
    seed: int,
    make: MakeOptimizer,
) -> list[list[Tensor]]:
    """Return trained bends; the module's weights come back to the bit."""
    module = objective.module
    live = list(trainable(module).values())
    saved = [w.detach().clone() for w in live]
    modes = {m: m.training for m in module.modules()} if module.training else None
    start, end = networks.weights[0], networks.weights[-1]
    first, *others = straight_bends(start, end, bends)
    further = [[nn.Parameter(w) for w in bend] for bend in others]
    try:
        with preserved(module, seed=seed, check_weights=False):
            set_mode(module, "batch", dropout=True, training=modes)
            torch._foreach_copy_([w.data for w in live], first)
            moving = MovingCurve(live, start, end, further, kind, seed)
            optimizer = make([*live, *(w for bend in further for w in bend)])
            _check_optimizer(optimizer)
            rates = [group["lr"] for group in optimizer.param_groups]
            scaled = scale_steps and isinstance(optimizer, torch.optim.SGD)
            step = 0
            for epoch in range(epochs):
                factor = published_rate(epoch / epochs)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                order = torch.randperm(
                    len(objective.batches), generator=generator(seed, -1, epoch)
                ).tolist()
                for i in order:
                    moving.displace(moving.draw(step))
                    _backward(objective, i, live)
                    moving.restore()
                    used = [k for k, w in enumerate(live) if w.grad is not None]
                    gradients: list[Tensor] = [live[k].grad for k in used]  # type: ignore[misc]
                    found = moving.pull_back(
                        used, gradients, [weight_decay] * len(used), scaled=scaled
                    )
                    for bend, received in zip(further, found, strict=True):
                        for k, g in zip(used, received, strict=True):
                            bend[k].grad = g
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
            return [[w.detach().clone() for w in bend] for bend in (live, *further)]
    finally:
        torch._foreach_copy_([w.data for w in live], saved)


def _backward(objective: Objective, i: int, live: Sequence[nn.Parameter]) -> None:
    loss = objective.loss(objective.module, objective.fresh(i))
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            f"the loss on the curve is {loss.item()} on batch {i}.",
            "Lower lr, or give networks that have trained.",
        )
    loss.backward()  # type: ignore[no-untyped-call]


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer is LBFGS, which evaluates the loss several times a step, and "
                         "each step has a t of its own: give a first-order optimizer.")  # fmt: skip
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        raise ValueError(
            "the optimizer decays the bends: give weight_decay=0 there, and weight_decay= to "
            "connect, which decays the weights on the curve."
        )


def published_rate(progress: float) -> float:
    """Return the authors' factor of the learning rate at a share of the epochs."""
    if progress <= 0.5:
        return 1.0
    return 1.0 - 0.99 * (progress - 0.5) / 0.4 if progress <= 0.9 else 0.01

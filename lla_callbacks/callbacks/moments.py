"""When a measurement is of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lla_callbacks.hessian.stability import StabilityLimit
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.objective import trainable
from lla_callbacks.objective.state import Snapshot


@dataclass(frozen=True)
class Moment:
    """When a measurement is of.

    Attributes:
        step: Optimizer steps that the weights have seen.
        function: ``"fit"``, or a stand-alone ``"validate"`` or ``"test"``.
        limit: The optimizer's stability limit then, where it is known.
        snapshot: The weights then, if they are no longer the module's.
        optimizer: The one optimizer, where its state belongs to these weights.
        light: Whether it is a light measurement between two full ones.
        last: Whether it is the one at the end of training.
        first: Whether it is the one of its start.
    """

    step: int
    function: str = "fit"
    limit: StabilityLimit | None = None
    snapshot: Snapshot | None = None
    optimizer: torch.optim.Optimizer | None = None
    light: bool = False
    last: bool = False
    first: bool = False


def space_of(module: nn.Module) -> ParameterSpace:
    """Return the layout of a module's trainable parameters."""
    return ParameterSpace(trainable(module))

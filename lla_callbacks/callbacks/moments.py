"""When a measurement is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

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


def is_unsized(module: nn.Module) -> bool:
    """Return whether lazy layers wait for the first batch to tell their size."""
    return any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers()))


def change_of(before: Sequence[str], names: Sequence[str], moment: Moment) -> str:
    """Return in words that other parameters are trained than before."""
    was, now = set(before), set(names)
    changed = sorted(now - was or was - now)
    some = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    verb = "trained" if now - was else "frozen"
    return (
        f"from step {moment.step} on {some} {'is' if len(changed) == 1 else 'are'} {verb}: "
        "measurements are of other parameters than before, and curves may jump there."
    )

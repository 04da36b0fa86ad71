"""When a measurement is of, and what whoever asks for it lends to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from lla_callbacks.linalg.sharing import Alone, Share
from lla_callbacks.objective.state import Snapshot

# Opens a progress bar of a total; yields what advances it.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class Tools:
    """What a monitor lends to a measurement.

    Attributes:
        share: The processes of the run, which may divide the work. Each holds all batches.
        progress: Opens a bar in the Trainer's own: ``progress(text, total)`` yields
            ``advance(count)``.
        say: Logs a line for the user.
        quick: Whether every line of code is asked for and little work (``fast_dev_run``).
        size: Settings by name that were chosen for this run, so that its limit is kept.
        only: Whether this is the one measurement that there is room for.
        step_seconds: Seconds of a training step on the user's own batch; NaN where unknown.
        offer: Offers the others what a quantity has at hand, while it has it: a name, and things.
            ``"spectrum"`` comes with the operator and a Lanczos run on it.
        shared: What quantities keep of that until it is their turn, by name; also of what those of
            other monitors offered at the same weights.
    """

    share: Share = field(default_factory=Alone)
    progress: Progress = lambda text, total: nullcontext(lambda count: None)
    say: Callable[[str], object] = lambda text: None
    quick: bool = False
    size: Mapping[str, Any] = field(default_factory=dict)
    only: bool = False
    step_seconds: float = math.nan
    offer: Callable[..., None] = lambda what, *things: None
    shared: dict[str, Any] = field(default_factory=dict)

    def in_steps(self, seconds: float) -> float:
        """Return seconds in training steps of the user's own batch, NaN outside of a fit."""
        return seconds / self.step_seconds if self.step_seconds > 0 else math.nan


@dataclass(frozen=True)
class Moment:
    """When a measurement is of.

    Attributes:
        step: Optimizer steps that the weights have seen.
        function: ``"fit"``, or a stand-alone ``"validate"`` or ``"test"``.
        limit: The optimizer's :class:`~lla_callbacks.hessian.stability.StabilityLimit` then,
            where it is known.
        snapshot: The weights then, if they are no longer the module's.
        optimizer: The one optimizer, where its state belongs to these weights.
        light: Whether it is a light measurement between two full ones.
        last: Whether it is the one at the end of training.
        first: Whether it is the one of its start.
        tools: What the monitor lends; None until the measurement begins.
    """

    step: int
    function: str = "fit"
    limit: Any = None
    snapshot: Snapshot | None = None
    optimizer: torch.optim.Optimizer | None = None
    light: bool = False
    last: bool = False
    first: bool = False
    tools: Tools | None = None

    @property
    def lent(self) -> Tools:
        """What the monitor lends, or what stands for it where there is no monitor."""
        return self.tools or Tools()

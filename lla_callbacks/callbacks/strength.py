"""How strong a penalty is, step by step: interval, ramp, and a strength that is found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lla_callbacks.callbacks.schedule import Schedule
from lla_callbacks.objective.checks import flag, settle, whole

# Of an automatic strength: number of penalized steps whose median ratio sets it (choice: one
# batch's ratio varies by a factor of about two), what it is tried with (noise of 0.01 on each
# weight, the published default of noise stability optimization), and the ratio it aims at
# (choice: a tenth of the loss's gradient, so that the loss still leads).
CALIBRATION_STEPS = 10
TRIAL_STRENGTH = 0.5 * 0.01**2
TARGET_RATIO = 0.1


@dataclass(frozen=True)
class StrengthSchedule:
    """When the penalty is on, and with what factor on its strength.

    Attributes:
        every_n_train_steps: Every so many optimizer steps from ``start_step`` on.
        start_step: First optimizer step that is penalized, counted from 0.
        ramp_steps: The factor grows linearly over so many steps.
        scale_by_interval: Whether the factor contains ``every_n_train_steps``, so that the
            penalty has the same weight on the average over steps.

    Raises:
        ValueError: If a setting is not allowed.
    """

    every_n_train_steps: int = 1
    start_step: int = 0
    ramp_steps: int = 0
    scale_by_interval: bool = True

    def __post_init__(self) -> None:
        for name, least in {"every_n_train_steps": 1, "start_step": 0, "ramp_steps": 0}.items():
            settle(self, **{name: whole(name, getattr(self, name), least)})
        settle(self, scale_by_interval=flag("scale_by_interval", self.scale_by_interval))

    def due(self, step: int) -> bool:
        """Return whether the optimizer step with this many steps before it is penalized."""
        since = step - self.start_step
        return since >= 0 and Schedule(self.every_n_train_steps).after_step(since)

    def factor(self, step: int) -> float:
        """Return the factor on the strength at a step that is due."""
        ramp = min(1.0, (step - self.start_step + 1) / self.ramp_steps) if self.ramp_steps else 1.0
        return ramp * (self.every_n_train_steps if self.scale_by_interval else 1)


class FoundStrength:
    """A strength found in the first penalized steps, and kept from then on.

    In those steps the gradients of trace and loss are compared and nothing is penalized.
    With ``r`` the median of ``|d tr| / |g|`` over them, the strength is
    ``target_ratio / r``: afterwards it is a constant, so that training minimizes one function.

    Attributes:
        strength: What was found, ``None`` until then.
    """

    def __init__(self, target_ratio: float) -> None:
        self.strength: float | None = None
        self.ratios: list[float] = []
        self._target = target_ratio
        self._step = -1

    def add(self, ratio: float, step: int) -> None:
        """Take note of one ratio per unit of strength; of a step's micro-batches, the first."""
        if step == self._step or self.strength is not None:
            return
        self._step = step
        if math.isfinite(ratio) and ratio > 0:
            self.ratios.append(ratio)
        self._settle()

    def state(self) -> dict[str, Any]:
        """Return what is known so far, as numbers."""
        return {"ratios": list(self.ratios), "ratio_step": self._step, "strength": self.strength}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; another target ratio than before gives another strength."""
        self.ratios = list(state["ratios"])
        self._step = state.get("ratio_step", -1)
        self._settle()

    def _settle(self) -> None:
        if len(self.ratios) >= CALIBRATION_STEPS:
            self.strength = self._target / statistics.median(self.ratios)

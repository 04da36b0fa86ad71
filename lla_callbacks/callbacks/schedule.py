"""When to measure: a schedule, and a budget that may postpone it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lla_callbacks.objective.checks import settle, whole

# Share of training time that measurements may take where the user set no schedule. A fit took
# 0.8 % longer than its measurements explain (docs/cost.md), so 4 % keep it within 5 %.
DEFAULT_OVERHEAD = 0.04


_NONE = ", or None for no schedule of this kind"


@dataclass(frozen=True)
class Schedule:
    """Every so many optimizer steps, epochs, or both.

    Attributes:
        every_n_train_steps: In optimizer steps, as ModelCheckpoint counts them.
        every_n_epochs: In training epochs.

    Raises:
        ValueError: If a number is not a positive whole one.
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_n_train_steps", "every_n_epochs"):
            settle(self, **{name: whole(name, getattr(self, name), 1, none=True, other=_NONE)})

    def after_step(self, global_step: int) -> bool:
        """Return whether a measurement is due once this many optimizer steps are done."""
        return self.every_n_train_steps is not None and global_step % self.every_n_train_steps == 0

    def after_epoch(self, epoch: int) -> bool:
        """Return whether one is due at the end of this epoch, counted from 0."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0


class Budget:
    """Keeps measurements below a share of training time.

    Args:
        max_overhead: Largest share, e.g. 0.05; ``None`` for no limit.
        light_counts: Whether light measurements, between full ones, count towards it. Without
            it they are allowed always, and leave the full ones their share.

    Attributes:
        spent: Seconds of all measurements.
    """

    def __init__(self, max_overhead: float | None, *, light_counts: bool = True) -> None:
        self.max_overhead = max_overhead
        self.light_counts = light_counts
        self.start()

    def start(self) -> None:
        """Begin to count, at the start of training."""
        self.spent = 0.0
        self._spent_lightly = 0.0
        # Of the last full and the last light measurement.
        self._costs = {False: 0.0, True: 0.0}
        self._began = time.monotonic()

    @property
    def last_cost(self) -> float:
        """Seconds of the last full measurement."""
        return self._costs[False]

    def state(self) -> dict[str, float]:
        """Return what was booked so far, as numbers."""
        return {
            "spent": self.spent,
            "spent_lightly": self._spent_lightly,
            "last_cost": self._costs[False],
            "last_light_cost": self._costs[True],
            "elapsed": time.monotonic() - self._began,
        }

    def resume(self, state: dict[str, float]) -> None:
        """Go on counting from a state; the time between two runs is in neither."""
        self.spent, self._spent_lightly = state["spent"], state["spent_lightly"]
        self._costs = {False: state["last_cost"], True: state["last_light_cost"]}
        self._began = time.monotonic() - state["elapsed"]

    def spend(self, seconds: float, *, light: bool = False) -> None:
        """Book one measurement."""
        self.spent += seconds
        self._spent_lightly += seconds if light else 0.0
        self._costs[light] = seconds

    @property
    def overhead(self) -> float:
        """Seconds of measurement per second of training, so far; NaN before training."""
        training = time.monotonic() - self._began - self.spent
        return self.spent / training if training > 0 else float("nan")

    def allows(self, *, light: bool = False) -> bool:
        """Return whether a measurement as long as the last of its kind fits in the budget.

        Room is left for a full one more, the one at the end of training, which always happens.
        """
        if self.max_overhead is None or (light and not self.light_counts):
            return True
        training = time.monotonic() - self._began - self.spent
        spent = self.spent if self.light_counts else self.spent - self._spent_lightly
        return spent + self._costs[light] + self._costs[False] <= self.max_overhead * training

"""When to measure, where the user says it."""

from __future__ import annotations

from dataclasses import dataclass

from lla_callbacks.objective.checks import settle, whole

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

    @property
    def is_given(self) -> bool:
        """Whether there is a schedule at all."""
        return self.every_n_train_steps is not None or self.every_n_epochs is not None

    def after_step(self, global_step: int, before: int | None = None) -> bool:
        """Return whether a measurement is due once this many optimizer steps are done.

        Args:
            global_step: How many there were.
            before: How many there were when this was last asked: with several optimizers there
                can be several steps at a time, and a multiple in between counts. By default
                one less.
        """
        every = self.every_n_train_steps
        before = global_step - 1 if before is None else before
        return every is not None and global_step // every > before // every

    def after_epoch(self, epoch: int) -> bool:
        """Return whether one is due at the end of this epoch, counted from 0."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

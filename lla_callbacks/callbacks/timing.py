"""When a monitor measures: its schedule, its part of the account, and what is due."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from lla_callbacks.callbacks.account import Account
from lla_callbacks.callbacks.compat import say
from lla_callbacks.callbacks.foretold import tell_if_far
from lla_callbacks.callbacks.monitor_settings import When
from lla_callbacks.callbacks.pace import Pace
from lla_callbacks.callbacks.processes import Processes
from lla_callbacks.objective.moment import Moment

# Seconds from which a measurement is announced: longer looks like a hang.
LONG = 3.0


class Timing:
    """When, and what that may cost.

    Args:
        owner: What the log begins with, the monitor's class.
        name: The monitor's name.
        when: The settings.
        share: In which proportion it plans with what its account has, beside others.

    Attributes:
        schedule: The user's own.
        is_bounded: Whether a limit holds.
        account: Of all monitors of the Trainer.
        pace: The plan of this one for a run.
        due: Whether a measurement is.
        last_step: Step of the last one.
        last_epoch: The last epoch whose end was seen.
        batch_samples: Samples in a batch of the user's own, 0 until one was seen.
        count: Measurements so far.
        foretold: Training steps that one takes, as was said beforehand.
        most_seconds: How long one takes at most, where a time budget ends it.
        left_out: Figures of the last measurement for which there was no room.
    """

    def __init__(self, owner: str, name: str, when: When, share: float) -> None:
        self.owner = owner
        self.name = name
        self.schedule = when.schedule
        self.max_overhead = when.max_overhead
        self.is_bounded = when.is_bounded
        self.share = share
        self.account = Account()
        self.reset()

    @property
    def is_asked(self) -> bool:
        """Whether the user's own schedule says when, whatever it costs."""
        return not self.is_bounded

    def reset(self) -> None:
        """Forget earlier runs."""
        self.due = False
        self.last_step = self.last_epoch = -1
        # Optimizer steps when the schedule was last asked.
        self.seen_steps = 0
        self.batch_samples = 0
        self.count = 0
        self.foretold = math.nan
        self.most_seconds = math.inf
        self.left_out = 0
        self._ending = False
        self.pace = Pace()

    def join(self, others: Iterable[Timing]) -> None:
        """Share the account of the monitors that come first, or open one."""
        found = [other.account for other in others if not other.account.has(self.name)]
        self.account = found[0] if found else Account()
        share = self.share if self.is_bounded else None
        self.account.join(self.name, self.max_overhead, share=share)

    def watching(self) -> AbstractContextManager[None]:
        """Book whatever time passes in this context."""
        return self.account.watching(self.name, asked=self.is_asked)

    # -- what is due --------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing can be due after this batch: most batches of a long run."""
        return self.account.is_idle and self.may_rest

    @property
    def may_rest(self) -> bool:
        """Whether nothing can be due but by the account."""
        return self.is_bounded and not self.schedule.is_given and not self.due

    def after_batch(self, global_step: int, step: int, *, complete: bool) -> None:
        """Note what falls due after a batch.

        Args:
            global_step: As Lightning counts.
            step: Optimizer steps that the weights have seen.
            complete: Whether the held batches are there.
        """
        before, self.seen_steps = self.seen_steps, global_step
        if self.schedule.after_step(global_step, before) and step != self.last_step:
            # What falls due while batches are still being held is dropped, not caught up with.
            self.due = complete
        if self.pace.planned and not self.schedule.is_given and step != self.last_step:
            self.due = self.pace.reached(self.account) or self.due

    def spread(self, processes: Processes) -> None:
        """Take more points in where measurements were cheaper than planned.

        Once all monitors have planned, after each measurement; the first process's clock decides.
        """
        pace, account = self.pace, self.account
        if not (pace.waits and pace.planned) or account.unplanned:
            return
        if processes.size > 1 and account.batches & (account.batches - 1):
            # An exchange: at batches that are the same in all processes, whatever their clocks say.
            return
        pace.waits = False
        if self.is_bounded and not self.schedule.is_given and not self._ending:
            count = processes.first(pace.affordable(account, self.name))
            pace.spread(count, account, self.name)

    def is_time(self, step: int, processes: Processes, *, complete: bool) -> bool:
        """Return whether to measure now; then nothing is due any more."""
        if step == self.last_step:
            self.due = False
        if not (self.due and complete):
            return False
        if self.is_bounded:
            if not self.pace.planned:
                return False
            # Clocks differ from process to process: the first one's decides.
            if not processes.agree(self.fits):
                # A schedule of the user's own is caught up with when there is room.
                self.due = self.schedule.is_given
                return False
        self.due = False
        return True

    @property
    def fits(self) -> bool:
        """Whether one more measurement fits beside what is put aside."""
        return self.pace.fits(self.account, self.name)

    def begins(self, moment: Moment) -> None:
        """Note that a measurement begins."""
        if not moment.light:
            self.last_step = moment.step
            # In all processes, also where one of them fails to keep what it measured.
            self.pace.waits = True
        if moment.last:
            # What was put aside for it is spent now.
            self._ending = True
            self.pace.release(self.account, self.name)

    # -- what it costs ------------------------------------------------------------------

    def announced(self, trainer: Any, moment: Moment) -> bool:
        """Say beforehand that a measurement will take long; return whether it was said."""
        expected = self.pace.cost
        if not expected and self.foretold > 0 and self.account.batches > 1:
            expected = min(self.foretold * self.account.seconds_a_batch, self.most_seconds)
        if moment.light or not expected >= LONG:
            return False
        say(trainer, f"{self.owner}: a measurement of about {expected:.0f} s begins.")
        return True

    def took(self, trainer: Any, seconds: float) -> None:
        """Take note of what a measurement took, and tell if that is far from what was said."""
        self.count += 1
        batch = self.account.seconds_a_batch
        if self.count == 2 and not self.is_bounded and batch > 0:
            # Not the first, in which everything happens for the first time.
            tell_if_far(self, trainer, seconds, min(self.foretold * batch, self.most_seconds))
        if self.pace.planned and not self._ending:
            self.pace.reserve(self.account, self.name)

    def has_room_for_figure(self, moment: Moment, number: int) -> bool:
        """Return whether there is room for one more figure: at the end one at least."""
        always = moment.last and number == 0
        return always or self.pace.draws(self.account, self.name, last=moment.last)

"""The choice of a run's sizes, once its pace is known, and the words about it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from torch import nn

from lla_callbacks.callbacks.compat import say, step_of
from lla_callbacks.callbacks.foretold import cost_of, plan_of, too_short
from lla_callbacks.callbacks.handed_on import Served
from lla_callbacks.callbacks.pace import Choice, share_of
from lla_callbacks.callbacks.planning import least_samples, unit_costs
from lla_callbacks.callbacks.sizers import Means, Sizer
from lla_callbacks.callbacks.sizing import CALIBRATION_SAMPLES, UnitCosts
from lla_callbacks.callbacks.subject import Subject
from lla_callbacks.callbacks.timing import Timing
from lla_callbacks.linalg.sharing import all_or_none
from lla_callbacks.objective.batches import first_of
from lla_callbacks.objective.counting import about
from lla_callbacks.objective.moment import Moment

# Share of a run after which no more samples are waited for.
SOON = 0.05
# Training steps that trying out a whole batch takes, about, and the share of the account that it
# may take at most.
STEPS_OF_A_TRIAL = 4
TRIAL = 0.1
# Samples at the end of a run that was too short for a plan, where its batches can be cut.
LEAST_AT_END = 16


class Planner:
    """Chooses how much is held and how large measurements are, where a limit holds.

    Args:
        owner: What the log begins with, the monitor's class.
        timing: When it measures.
        subject: On what.
        sizer: Of its quantities.
        all_hold: Returns whether every process holds its batches.
        served: Returns what other monitors leave for this one, on so many samples.
    """

    def __init__(
        self,
        owner: str,
        timing: Timing,
        subject: Subject,
        sizer: Sizer,
        all_hold: Callable[[], bool],
        served: Callable[[int], Served],
    ) -> None:
        self.owner = owner
        self.timing, self.subject, self.sizer = timing, subject, sizer
        self._all_hold, self._served = all_hold, served

    @property
    def _full(self) -> float:
        return self.sizer.gradients * self.subject.settings.samples

    def foretell(self, trainer: Any, batch: Any) -> None:
        """Note how large a batch is, and say what the user's own schedule will cost."""
        timing, held = self.timing, self.subject.settings
        timing.batch_samples = about(batch, held.batch_size)
        if timing.is_bounded or timing.count:
            return
        batches = -(-held.samples // timing.batch_samples)
        saved = self.sizer.saved(self._served(held.samples).num_steps)
        timing.foretold = batches * (self.sizer.gradients - saved)
        timing.most_seconds = self.sizer.most_seconds
        say(trainer, f"{self.owner}: {cost_of(timing, trainer, timing.foretold)}")

    def plan_when_ready(self, trainer: Any, module: nn.Module) -> bool:
        """Choose sizes once the pace of the run is known; return whether that was now."""
        timing, subject = self.timing, self.subject
        account, processes = timing.account, subject.processes
        if not subject.held.complete and account.fraction >= SOON:
            # A long wait for samples would cost the curve its first part.
            subject.held.complete = processes.all(bool(subject.held.batches))
            self._all_hold()
        if not subject.held.complete or not subject.held.batches:
            return False
        if processes.size > 1 and account.batches & (account.batches - 1):
            # Few exchanges; the count is the same in all processes.
            return False
        if self.sizer.plans_last and account.unplanned - {timing.name}:
            return False
        if not processes.agree(account.is_known):
            return False
        account.unplanned.discard(timing.name)
        try:
            costs, least = all_or_none(
                processes, lambda: self._unit_costs(trainer, module), "trying out a gradient"
            )
        except Exception as error:  # noqa: BLE001 - whatever fails, training must go on
            subject.sink.warn(error, "a measurement")
            costs, least, subject.start_pending, subject.start = None, 1, False, None
        seconds = processes.first(share_of(account, timing.name))
        self._take(self.sizer.choose(Means(costs, seconds, least, timing, subject, self._served)))
        return True

    def tell(self, trainer: Any) -> None:
        """Say what was planned; a run of one measurement leaves out its start."""
        say(trainer, f"{self.owner}: {plan_of(self.timing, self._full)}")
        choice = self.timing.pace.choice
        if not (choice and choice.count > 1):
            self.subject.start_pending, self.subject.start = False, None

    def plan_end(self, trainer: Any) -> None:
        """Choose the least size for a run that ended before there was a plan."""
        timing, subject = self.timing, self.subject
        if not timing.pace.planned:
            held = subject.held.batches
            least = about(held[0], subject.settings.batch_size) if held else 1
            least = min(LEAST_AT_END, least)
            self._take(self.sizer.choose(Means(None, 0.0, least, timing, subject, self._served)))
            say(trainer, f"{self.owner}: {too_short(timing, self._full)}")

    def _take(self, choice: Choice) -> None:
        account, subject = self.timing.account, self.subject
        subject.held.keep(choice.samples)
        account.samples = account.samples or choice.samples
        # Monitors of one loss on the same batches ask only once what is to be known of it.
        same = subject.same_findings(choice.samples)
        subject.findings = account.findings.setdefault(same, subject.findings)
        grid = self._served(choice.samples).targets
        self.timing.pace.take(choice, account, self.timing.name, grid)

    def _unit_costs(self, trainer: Any, module: nn.Module) -> tuple[UnitCosts, int]:
        """Return what a gradient takes, measured by the first monitor that asks, and the least."""
        timing, subject = self.timing, self.subject
        account, processes = timing.account, subject.processes
        moment, held, size = Moment(step_of(trainer)), subject.held.batches, subject.held.batch_size
        with ExitStack() as stack:
            few = subject.objective(
                trainer, module, moment, stack, first_of(held, CALIBRATION_SAMPLES, size)
            )
            least = least_samples(few)
            if few.num_samples > CALIBRATION_SAMPLES:
                # A batch that cannot be cut.
                least = max(least, few.num_samples)
            if account.costs is None:
                step = account.seconds_a_batch
                affordable = STEPS_OF_A_TRIAL * step <= TRIAL * account.limit * account.expected
                samples, larger = timing.batch_samples, None
                if processes.agree(affordable):
                    batch = first_of(held, samples or few.num_samples, size)
                    larger = subject.objective(trainer, module, moment, ExitStack(), batch)
                found = all_or_none(
                    processes,
                    lambda: unit_costs(few, larger, step=step, batch_samples=samples or 1),
                )
                account.costs = UnitCosts(**processes.first(asdict(found)))
        return account.costs, least

"""The parts that a monitor is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lla_callbacks.callbacks.account import Account
from lla_callbacks.callbacks.compat import (
    state_key_of,
)
from lla_callbacks.callbacks.evaluated import EvaluatedToo
from lla_callbacks.callbacks.firing import Firing
from lla_callbacks.callbacks.handed_on import HandedOn, Served
from lla_callbacks.callbacks.monitor_settings import MonitorSettings
from lla_callbacks.callbacks.pace import Pace
from lla_callbacks.callbacks.planner import Planner
from lla_callbacks.callbacks.records import Record
from lla_callbacks.callbacks.run_state import RunState
from lla_callbacks.callbacks.schedule import Schedule
from lla_callbacks.callbacks.self_words import SaysItself
from lla_callbacks.callbacks.sink import Sink
from lla_callbacks.callbacks.sizers import Sizer
from lla_callbacks.callbacks.spawned import ComesHome
from lla_callbacks.callbacks.subject import Subject
from lla_callbacks.callbacks.timing import Timing


class HasParts(EvaluatedToo, ComesHome, SaysItself):
    """A callback made of parts, each of which knows one thing.

    ``timing`` knows when, ``subject`` on what, ``records`` what, ``sink`` where to; ``planner`` how
    large, ``firing`` how one measurement goes, ``run`` what a checkpoint holds.

    Args:
        records: What is measured, with room for what was found.
        given: The shared settings by name.
        sizer: Who chooses the sizes of a run with a limit.
        alone: Whether there is one quantity, whose state lies beside the monitor's own.
    """

    def __init__(
        self, records: Sequence[Record], given: Mapping[str, Any], sizer: Sizer, *, alone: bool
    ) -> None:
        super().__init__()
        owner, settings = type(self).__name__, MonitorSettings.of(given)
        self.shared_settings = settings
        self.__dict__.update(settings.flat, num_samples=settings.held.samples)
        self.name = settings.output.name
        self.records = tuple(records)
        for record in self.records:
            # Those that keep vectors of their own must know which.
            if hasattr(record.quantity, "parameters"):
                record.quantity.parameters = settings.products.parameters
        self.sizer = sizer
        self.sink = Sink(
            owner,
            self.name,
            figures=settings.output.figures,
            save_arrays=settings.output.save_arrays,
            own_loss=settings.held.loss is not None,
        )
        self.timing = Timing(owner, self.name, settings.when, sizer.share)
        self.subject = Subject(owner, settings.held, settings.products, self.sink)
        self.handed = HandedOn(self.timing, self.subject, self.records)
        self.planner = Planner(
            owner, self.timing, self.subject, sizer, self._all_hold, self._served
        )
        self.run = RunState(
            owner, settings, self.timing, self.subject, self.records, self.sink, alone=alone
        )
        self.firing = Firing(
            owner,
            self.timing,
            self.subject,
            self.records,
            self.sink,
            sizer,
            settings.output.scalars,
            self.handed,
        )
        # Parts of the present hook that are done already, since another monitor waited for them.
        self._gone_first: set[str] = set()
        # Quantities that look at every step.
        self._watching = [r.quantity for r in self.records if r.quantity.watches]

    # -- its parts ----------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The user's own schedule."""
        return self.timing.schedule

    @property
    def account(self) -> Account:
        """What the run may spend on being watched, and has."""
        return self.timing.account

    @property
    def pace(self) -> Pace:
        """What was planned for the run."""
        return self.timing.pace

    @property
    def is_bounded(self) -> bool:
        """Whether a limit holds."""
        return self.timing.is_bounded

    @property
    def is_asked(self) -> bool:
        """Whether the user's own schedule says when, whatever it costs."""
        return self.timing.is_asked

    @property
    def is_running(self) -> bool:
        """Whether a fit is under way."""
        return self.run.is_running

    @property
    def measures_shards(self) -> bool:
        """Whether parameters may be spread over processes."""
        return all(record.quantity.reads_shards for record in self.records)

    @property
    def state_key(self) -> str:
        """Tell several monitors of one Trainer apart."""
        return state_key_of(self, name=self.name)

    def names(self) -> list[str]:
        """Return the first parts of all tags."""
        return list(dict.fromkeys([self.name, *(r.quantity.name for r in self.records)]))

    def _served(self, samples: int) -> Served:
        """Return what other monitors leave for this one, on so many samples."""
        return Served()

    def _all_hold(self) -> bool:
        """Return whether every process holds its batches; then each holds those of all."""
        choice = self.timing.pace.choice
        return self.subject.all_hold(None if choice is None else choice.samples)

"""What a run may spend on being watched, and has: one account for all monitors of a Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any, TypeVar

from lla_callbacks.callbacks.sizing import UnitCosts
from lla_callbacks.callbacks.telling import Said

# Share of training time that all monitors of a Trainer together may take where the user gave
# none. Choice: what is less is not felt.
DEFAULT_OVERHEAD = 0.05
# The pace of a run is judged by its last part of about this share: runs get slower and faster.
RECENT = 0.2
_MARKS = 100
# A pace is known after so many batches, and so many seconds or so much of the run.
LEAST_BATCHES = 4
LEAST_SECONDS = 1.0
LATEST = 0.1
# How far a run goes, at most, until the next look at how far it is.
LOOK = 0.004

# Batches by which a stretch of a run tells its pace.
LEAST_STRETCH = 4

# Seconds of training, share of the run and batches at one moment.
_Mark = tuple[float, float, int]
Hook = TypeVar("Hook", bound=Callable[..., Any])


class Account:
    """The clock and the ledger of one fit.

    The monitors of a Trainer share one, whatever their order. It is about the run as it will be:
    the time that training has taken so far, without whatever was booked, and what is left of the
    run at its recent pace. Where the length is unknown, it is about what has passed.

    Attributes:
        spent: Seconds booked, by whoever spent them (the monitor's name), within the limit.
        asked: Seconds of what the user's own schedule asked for, which no limit holds up.
        fraction: Share of the run that is done, from 0 to 1; NaN where the length is unknown.
        limits: ``max_overhead`` of each monitor that has one.
        shares: In which proportion those monitors plan with what there is.
        reserved: Seconds that each of them has put aside for the end.
        promised: And for the points of its curve that are to come.
        unplanned: Those that have not chosen their sizes yet.
        costs: What a gradient takes, once it was measured.
        samples: Held samples that the first of them chose.
        batches: Batches so far.
        is_idle: Whether the last batch is one after which nothing can be due.
        findings: What is known of a loss, by the settings that it depends on.
        members: All monitors, in the order of the callbacks.
        said: What they have told, so that each thing is told once.
        resting: Wakes those that Lightning does not call while nothing can be due.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.asked: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.reserved: dict[str, float] = {}
        self.promised: dict[str, float] = {}
        self.unplanned: set[str] = set()
        self.costs: UnitCosts | None = None
        self.samples: int | None = None
        self.findings: dict[Any, Any] = {}
        self.members: list[str] = []
        self.said = Said()
        self.resting: list[Callable[[], None]] = []
        self.fraction = math.nan
        self.batches = 0
        self.is_idle = False
        self._is_resumed = False
        self._next_look = 0
        # The ledger that time goes to at present, the name in it, and since when.
        self._open: tuple[dict[str, float], str] | None = None
        self._since = 0.0
        self._began = time.monotonic()
        # Pairs of training seconds and fraction, ascending.
        self._marks: list[tuple[float, float]] = []
        self._first: tuple[float, float] | None = None
        # Each time the number of batches had doubled.
        self._doubled: list[_Mark] = []

    # -- who takes part -------------------------------------------------------------------

    def join(self, name: str, limit: float | None, *, share: float | None) -> None:
        """Let a monitor take part.

        Args:
            name: Its name.
            limit: Its own ``max_overhead``; ``None``: the default for all together.
            share: In which proportion it plans with what there is; ``None``: no limit holds for
                it, since the user gave a schedule and no limit.
        """
        self.members.append(name)
        self.spent.setdefault(name, 0.0)
        self.asked.setdefault(name, 0.0)
        if share is not None:
            self.limits[name] = DEFAULT_OVERHEAD if limit is None else limit
            self.shares[name] = share
            self.unplanned.add(name)

    def has(self, name: str) -> bool:
        """Return whether a monitor takes part already."""
        return name in self.members

    @property
    def limit(self) -> float:
        """Share of training time for all together: the largest that any of them was given."""
        return max(self.limits.values(), default=DEFAULT_OVERHEAD)

    # -- the clock ------------------------------------------------------------------------

    @property
    def total(self) -> float:
        """Seconds booked in all, up to now."""
        self._settle()
        return sum(self.spent.values()) + sum(self.asked.values())

    @property
    def training(self) -> float:
        """Seconds of training so far, without what was booked."""
        return time.monotonic() - self._began - self.total

    def tick(self, fraction: Callable[[], float]) -> None:
        """Note that a batch is done.

        Args:
            fraction: Returns how far the run is, from 0 to 1, NaN where nobody knows. It is asked
                for every batch of a run that has not been planned, and then now and then.
        """
        if self.passes():
            return
        self.batches += 1
        doubled = not self.batches & (self.batches - 1)
        while self.resting:
            self.resting.pop()()
        self.fraction = done = fraction()
        if doubled:
            self._doubled.append((self.training, done, self.batches))
        if self._first is None:
            # The first batch is left out of the pace: workers start, kernels are compiled.
            self._first = (self.training, done)
        if math.isnan(done):
            self._next_look = self.batches + 1
            return
        # Of the run a small part, so that targets are met within that.
        self._next_look = self.batches + max(1, int(self.batches * LOOK / max(done, LOOK)))
        if not self._marks or done >= self._marks[-1][1] + 1 / _MARKS:
            self._marks.append((self.training, done))

    def passes(self) -> bool:
        """Count a batch after which nothing can be due, if the next one is such a batch."""
        number = self.batches + 1
        doubled = not number & (number - 1)
        self.is_idle = not (self.unplanned or doubled) and number < self._next_look
        if self.is_idle:
            self.batches = number
        return self.is_idle

    @property
    def seconds_a_batch(self) -> float:
        """Seconds of training a batch; NaN until it is known."""
        if self._first is None or self.batches < 2:
            return math.nan
        now = (self.training, self.fraction, self.batches)
        return min((t - s) / (n - m) for (s, _, m), (t, _, n) in self._stretches(now))

    def _stretches(self, now: _Mark) -> list[tuple[_Mark, _Mark]]:
        """Return the stretches in which the number of batches doubled, and the last one.

        A stall (a garbage collection, something compiled) is in one of them: the fastest one
        tells the pace. Short ones tell little.
        """
        marks = [*self._doubled, now]
        found = [(a, b) for a, b in pairwise(marks) if b[2] - a[2] >= LEAST_STRETCH]
        return found or [((*(self._first or (0.0, 0.0)), 1), now)]

    @property
    def is_known(self) -> bool:
        """Whether the pace of the run is known well enough to plan."""
        if self._first is None or self.batches < LEAST_BATCHES:
            return False
        return self.training - self._first[0] >= LEAST_SECONDS or self.fraction >= LATEST

    @property
    def expected(self) -> float:
        """Seconds that training will have taken in the end, as far as is known now."""
        now, done = self.training, self.fraction
        if self._first is None or math.isnan(done):
            return now
        earlier = [mark for mark in self._marks if mark[1] <= done - RECENT]
        if earlier:
            since, start = earlier[-1]
            return now + (1 - done) * (now - since) / (done - start)
        stretches = self._stretches((now, done, self.batches))
        paces = [(t - s) / (b - a) for (s, a, _), (t, b, _) in stretches if b > a]
        return now + (1 - done) * min(paces) if paces else now

    # -- the ledger -----------------------------------------------------------------------

    @contextmanager
    def watching(self, name: str, *, asked: bool = False) -> Iterator[None]:
        """Book whatever time passes in this context; once, where contexts are nested."""
        if self.is_open:
            yield
            return
        self.open(name, asked=asked)
        try:
            yield
        finally:
            self.close()

    @contextmanager
    def instead(self, name: str, *, asked: bool) -> Iterator[None]:
        """Book the time in this context to another one than whoever it is booked to now."""
        self._settle()
        before = self._open
        self.open(name, asked=asked)
        try:
            yield
        finally:
            self.close()
            self._open, self._since = before, time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether time is being booked at present."""
        return self._open is not None

    def open(self, name: str, *, asked: bool) -> None:
        """Book the time from now on; see :meth:`watching`."""
        self._open, self._since = (self.asked if asked else self.spent, name), time.monotonic()

    def close(self) -> None:
        """Book no more."""
        self._settle()
        self._open = None

    def _settle(self) -> None:
        """Book what has passed in an open context so far."""
        if self._open is not None:
            ledger, name = self._open
            now = time.monotonic()
            ledger[name] = ledger.get(name, 0.0) + now - self._since
            self._since = now

    def room(self, name: str) -> float:
        """Return the seconds that a monitor may still spend, others' plans left out."""
        if name not in self.limits:
            return math.inf
        expected = self.expected  # Books what has passed, too.
        together = sum(self.spent[other] for other in self.limits)
        # Whose own limit is lower spends no more than that itself.
        return min(
            self.limit * expected - together, self.limits[name] * expected - self.spent[name]
        )

    @property
    def overhead(self) -> float:
        """Seconds booked so far per second of the whole training as it will be.

        NaN before the pace is known: of a training that has hardly begun any share is a large one.
        """
        expected = self.expected
        return self.total / expected if self.is_known and expected > 0 else math.nan

    # -- across checkpoints ---------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what was booked so far, as plain numbers."""
        return {
            "spent": dict(self.spent),
            "asked": dict(self.asked),
            "training": self.training,
            "batches": self.batches,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on counting from a state; the time between two runs is in neither.

        Several monitors bring the same one: the second time changes nothing.
        """
        if self._is_resumed:
            return
        self._is_resumed = True
        # Whatever this run has booked or trained so far comes on top.
        self._settle()
        self._began -= state["training"]
        for ledger, before in ((self.spent, state["spent"]), (self.asked, state["asked"])):
            for name, seconds in before.items():
                ledger[name] = ledger.get(name, 0.0) + seconds
                self._began -= seconds


def booked(hook: Hook) -> Hook:
    """Book the time that a monitor's hook takes."""

    @wraps(hook)
    def timed(self: Any, *arguments: Any, **settings: Any) -> Any:
        account = self.account
        if account.is_open:
            return hook(self, *arguments, **settings)
        account.open(self.name, asked=self.is_asked)
        try:
            return hook(self, *arguments, **settings)
        finally:
            account.close()

    return timed  # type: ignore[return-value]

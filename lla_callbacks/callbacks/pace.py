"""When a monitor with a limit measures: at shares of the run, as its account has room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lla_callbacks.callbacks.account import Account
from lla_callbacks.callbacks.sizing import PLANNED, POINTS, targets

# By how much a run of unknown length grows from one measurement to the next.
GROWTH = 1.1
# Seconds that such a run is taken to last, at least, when sizes are chosen.
NOMINAL = 600.0
# Of what turns out to be left over, what more points may take.
SPENDABLE = 0.7


@dataclass
class Choice:
    """What a monitor chose for a run.

    Attributes:
        samples: Held samples.
        count: Measurements of the run, the last included.
        cost: Seconds of one, as predicted, figures left out.
        figures: Seconds of the figures at the end, as predicted.
        fits: Whether that is within the limit.
        words: The size, for people.
        draws: Whether there is room for figures at every measurement, not only at the end.
        size: The size, by the fields of its class.
    """

    samples: int
    count: int
    cost: float
    figures: float
    fits: bool
    words: str
    draws: bool = False
    size: dict[str, int] = field(default_factory=dict)


@dataclass
class Pace:
    """The plan of one monitor for one run.

    Attributes:
        planned: Whether there is one yet.
        targets: Shares of the run after which it is measured, ascending, those to come.
        cost: Seconds of one measurement, as last seen or predicted.
        predicted: As predicted.
        figure: Seconds of one figure, as last seen or predicted.
        choice: What was chosen.
        seen: Measurements so far.
        waits: Whether it is still to be asked how many points the last one's cost allows.
        next_batch: Batch after which a run of unknown length is measured next.
    """

    planned: bool = False
    targets: list[float] = field(default_factory=list)
    cost: float = 0.0
    predicted: float = 0.0
    figure: float = 0.12
    choice: Choice | None = None
    next_batch: float = 0.0
    seen: int = 0
    waits: bool = False

    def take(self, choice: Choice, account: Account, name: str, grid: Sequence[float] = ()) -> None:
        """Take over a choice, and have its cost put aside.

        Args:
            choice: The choice.
            account: Of the run.
            name: The monitor's.
            grid: When another one measures, of whose work this one has a part: likewise then.
        """
        self.planned = True
        self.choice = choice
        self.cost = self.predicted = choice.cost
        self.next_batch = GROWTH * account.batches
        wanted = [t for t in targets(choice.count) if not t <= account.fraction]
        self.targets = sorted({_nearest(grid, t) for t in wanted}) if grid else wanted
        self.reserve(account, name)

    def reserve(self, account: Account, name: str) -> None:
        """Put the cost of what is to come aside, so that no other monitor spends it."""
        figures = self.choice.figures if self.choice else 0.0
        account.reserved[name] = self.cost + figures
        account.promised[name] = len(self.targets) * self.cost

    def saw(self, seconds: float) -> None:
        """Note what a measurement took: the mean of the last ones, since clocks are noisy.

        The first one checks itself and does everything for the first time: the others are taken to
        cost half of it at most, or what was predicted.
        """
        if not self.seen:
            self.cost = min(max(self.cost, seconds / 2), seconds) if self.cost else seconds
        else:
            self.cost = (self.cost + seconds) / 2
        self.seen += 1

    def reached(self, account: Account) -> bool:
        """Return whether a target was passed since the last time; then it is dropped.

        Where the length of a run is unknown, it has to have grown by a tenth.
        """
        if math.isnan(account.fraction):
            found = account.batches >= self.next_batch
            if found:
                self.next_batch = GROWTH * account.batches
            return found
        found = False
        while self.targets and account.fraction >= self.targets[0]:
            self.targets.pop(0)
            found = True
        return found

    def fits(self, account: Account, name: str) -> bool:
        """Return whether one more measurement fits beside what is put aside."""
        others = sum(v for other, v in account.promised.items() if other != name)
        return self.cost + sum(account.reserved.values()) + others <= account.room(name)

    def affordable(self, account: Account, name: str) -> int:
        """Return how many more points there may be before the end, those planned included.

        Measurements turn out cheaper than was planned, more often than not: what is left over once
        all monitors have put aside what they need goes to the curve.
        """
        if account.unplanned or math.isnan(account.fraction) or not self.cost:
            return len(self.targets)
        others = sum(v for other, v in account.promised.items() if other != name)
        free = account.room(name) - sum(account.reserved.values()) - others
        more = min(int(SPENDABLE * free / self.cost), POINTS - 1 - self.seen)
        return max(more, len(self.targets))

    def spread(self, count: int, account: Account, name: str) -> None:
        """Take so many points in for the rest of the run, evenly, if that is more than planned."""
        if count > len(self.targets):
            done = account.fraction
            self.targets = [done + (1 - done) * i / (count + 1) for i in range(1, count + 1)]
            self.reserve(account, name)

    def release(self, account: Account, name: str) -> None:
        """Put nothing aside any more: the end is here."""
        self.targets = []
        account.reserved[name] = account.promised[name] = 0.0

    def draws(self, account: Account, name: str, *, last: bool) -> bool:
        """Return whether one more figure fits beside what is put aside."""
        if not last and not (self.choice and self.choice.draws):
            return False
        aside = sum(account.reserved.values()) + sum(account.promised.values())
        return self.figure + aside <= account.room(name)

    def state(self) -> dict[str, Any]:
        """Return the plan as plain containers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Pace:
        """Return what :meth:`state` described."""
        choice = state["choice"]
        return cls(**{**state, "choice": None if choice is None else Choice(**choice)})


def share_of(account: Account, name: str) -> float:
    """Return the seconds of a run that a monitor may plan with, what it spent left out."""
    share = account.shares[name] / sum(account.shares.values())
    limit = min(account.limit * share, account.limits[name])
    # A run of unknown length is planned for as one of ten minutes; it pays as it grows.
    length = max(account.expected, NOMINAL) if math.isnan(account.fraction) else account.expected
    return PLANNED * limit * length - account.spent[name]


def _nearest(grid: Sequence[float], target: float) -> float:
    return min(grid, key=lambda t: abs(t - target))

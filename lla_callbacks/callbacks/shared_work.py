"""How the monitors of a Trainer use each other's work, whatever the order they are listed in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import takewhile
from typing import Any

from torch import nn

from lla_callbacks.callbacks.handed_on import Served
from lla_callbacks.callbacks.monitor_parts import HasParts
from lla_callbacks.objective.moment import Moment


class SharesWork(HasParts):
    """A monitor among others: what one of them leaves (`handed_on.py`), the next one takes.

    Who takes comes after who leaves. Where two are listed the other way round with nobody else's
    callback between, the first one has the second do its part of a hook before its own.
    """

    # Monitors whose measurements serve this one, and those of them that are listed right behind.
    _servants: Sequence[SharesWork] = ()
    _behind: Sequence[SharesWork] = ()

    def _others(self, trainer: Any) -> list[SharesWork]:
        return [c for c in trainer.callbacks if isinstance(c, SharesWork) and c is not self]

    def _running(self, trainer: Any) -> list[SharesWork]:
        return [c for c in self._others(trainer) if c.is_running]

    def _find_servants(self, trainer: Any) -> None:
        """Note which monitors measure before this one what it can use."""
        before = list(takewhile(lambda c: c is not self, trainer.callbacks))
        behind = takewhile(_shares, trainer.callbacks[len(before) + 1 :])
        self._behind = [c for c in behind if self.handed.is_served_by(c.handed)]
        others = [c for c in before if _shares(c) and self.handed.is_served_by(c.handed)]
        self._servants = [*others, *self._behind]
        self._gone_first = set()

    def _let_go_first(self, what: str, *arguments: Any) -> None:
        """Have monitors right behind do a part of the present hook now, if that serves this one."""
        for other in self._behind:
            rests = what == "_after_batch" and other.timing.is_idle
            if rests or what in other._gone_first:
                continue
            other._gone_first.add(what)
            with ExitStack() as stack:
                if self.is_running:
                    booked = self.account.instead(other.name, asked=other.is_asked)
                    stack.enter_context(booked)
                getattr(other, what)(*arguments)

    def _went_first(self, what: str) -> bool:
        """Return whether this part of the present hook is done already."""
        if what not in self._gone_first:
            return False
        self._gone_first.remove(what)
        return True

    def _served(self, samples: int) -> Served:
        """Return what other monitors leave for this one, on so many samples."""
        for other in self._servants:
            held, choice = other.subject.held, other.pace.choice
            if choice is None and other.is_bounded:
                continue
            count = other.subject.settings.samples if choice is None else choice.samples
            # All that have a limit measure the end, like everybody else.
            meets = self.is_bounded or other.schedule == self.schedule
            if meets and samples in (count, held.num_held):
                return Served(other.sizer.depth(other.timing), tuple(other.pace.targets))
        return Served()

    def _fire(self, trainer: Any, module: nn.Module, moment: Moment) -> dict[str, float]:
        others = [c.handed for c in self._others(trainer) if self in c._servants]
        return self.firing.fire(trainer, module, moment, others)


def _shares(callback: Any) -> bool:
    return isinstance(callback, SharesWork)

"""One measurement: the quantities of a monitor on one objective at one moment, and its report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lla_callbacks.callbacks.compat import progress, say
from lla_callbacks.callbacks.handed_on import HandedOn, Source, taken
from lla_callbacks.callbacks.moments import space_of
from lla_callbacks.callbacks.records import Record
from lla_callbacks.callbacks.sink import Sink
from lla_callbacks.callbacks.sizers import Sizer
from lla_callbacks.callbacks.subject import Subject
from lla_callbacks.callbacks.timing import Timing
from lla_callbacks.linalg.errors import (
    MeasurementError,
    NotYetError,
    forgetful,
    is_out_of_memory,
)
from lla_callbacks.linalg.sharing import OutOfStepError, all_or_none
from lla_callbacks.objective.engines import prove
from lla_callbacks.objective.moment import Moment, Tools
from lla_callbacks.objective.objective import Objective
from lla_callbacks.report.cost import cost_scalars
from lla_callbacks.report.quantity import Quantity, finite
from lla_callbacks.report.tiers import for_callbacks, logged
from lla_callbacks.slices.quantity import YOUNG

# A quantity with its record, and what it found.
Found = list[tuple[Record, Any]]


class Firing:
    """Measures what is wanted of a moment, and hands it on.

    Args:
        owner: What the log begins with, the monitor's class.
        timing: When.
        subject: On what.
        records: What.
        sink: Where to.
        sizer: How large.
        scalars: Which scalars are logged, as words and names.
        handed: What other monitors left for these quantities.

    Attributes:
        pages: Shows what is no figure: takes the Trainer, a result and the moment.
    """

    def __init__(
        self,
        owner: str,
        timing: Timing,
        subject: Subject,
        records: Sequence[Record],
        sink: Sink,
        sizer: Sizer,
        scalars: Sequence[str],
        handed: HandedOn,
    ) -> None:
        self._owner = owner
        self._timing, self._subject, self._records = timing, subject, records
        self._sink, self._sizer, self._scalars = sink, sizer, scalars
        self._handed = handed
        self.pages: Callable[[Any, Any, Moment], None] | None = None

    def fire(
        self, trainer: Any, module: nn.Module, moment: Moment, others: Sequence[HandedOn] = ()
    ) -> dict[str, float]:
        """Measure and report once; return the scalars, none if it failed.

        Args:
            trainer: The Trainer.
            module: Its module.
            moment: Of what.
            others: Where that may leave something for other monitors.
        """
        began = time.monotonic()
        timing, sink, asked = self._timing, self._sink, moment
        timing.begins(moment)
        announced = timing.announced(trainer, moment)
        try:
            # Whatever fails in one process, wherever it is, fails in all of them.
            moment, measured = all_or_none(
                self._subject.processes,
                lambda: self._measured(trainer, module, asked, others),
                "a measurement",
            )
        except Exception as error:  # noqa: BLE001 - whatever fails, training must go on
            young = asked.step < YOUNG and asked.function == "fit"
            # Nothing else was wanted than what no young run has, or than was told to be missing.
            if not (isinstance(error, NotYetError) and (young or sink.foreseen)):
                self._warn(error)
            return {}
        found: Found = []
        values: dict[str, float] = {}
        for record, result in measured:
            try:
                values |= self._kept(record, result, moment)
                found.append((record, result))
            except Exception as error:  # noqa: BLE001 - likewise
                self._warn(error)
        if not found:
            return {}
        in_fit = moment.function == "fit"
        if not moment.light:
            stem = f"{'step' if in_fit else moment.function}_{moment.step:08d}"
            for record, result in found:
                sink.arrays(trainer, result, stem, record.quantity.name)
                sink.guarded("logging", self._tell, trainer, record, result, moment)
            took = time.monotonic() - began
            self._draw_what_fits(trainer, found, moment)
        seconds = time.monotonic() - began
        overhead = timing.account.overhead if in_fit else math.nan
        values |= cost_scalars(timing.name, seconds, overhead)
        if in_fit:
            for tag, value in for_callbacks(values).items():
                trainer.callback_metrics[tag] = torch.tensor(value)
            logging = time.monotonic()
            sink.scalars(trainer, self.shown(values), moment.step)
            if not moment.light:
                # A logger may let the run wait, which the next measurement has to pay for too.
                timing.pace.saw(took + time.monotonic() - logging)
                timing.took(trainer, seconds)
        if announced:
            say(trainer, f"{self._owner}: that took {seconds:.1f} s.")
        return values

    def shown(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the scalars that loggers get: those that the user asked for."""
        few: dict[str, tuple[str, ...]] = {self._timing.name: ("overhead",)}
        few |= {record.quantity.name: record.quantity.few for record in self._records}
        return {
            tag: value
            for name, part in few.items()
            for tag, value in logged(values, self._scalars, name, part).items()
        }

    def _tell(self, trainer: Any, record: Record, result: Any, moment: Moment) -> None:
        """Write a result in words."""
        text = record.quantity.text(result, record.history, moment)
        if text:
            self._sink.text(trainer, text, moment.step, record.quantity.name)

    def _measured(
        self, trainer: Any, module: nn.Module, moment: Moment, others: Sequence[HandedOn]
    ) -> tuple[Moment, Found]:
        """Return what each quantity found, and the moment with all that is known of it."""
        subject, timing = self._subject, self._timing
        moment = subject.completed(trainer, module, moment)
        change = subject.change(module, moment)
        if change:
            say(trainer, f"{self._owner}: {change}")
            for record in self._records:
                record.quantity.weights_changed(space_of(module, subject.products.parameters).dim)
        found: Found = []
        troubles: list[Exception] = []
        with ExitStack() as stack:
            takers = [other for other in others if other.waits(moment) and not moment.light]
            left: dict[str, Any] = {}
            if takers or self._handed.is_left:
                here = Source.of(subject, module, moment)
                left = self._handed.take(here)
                here = replace(here, findings=subject.findings)
            objective = subject.objective(trainer, module, moment, stack)
            choice = timing.pace.choice
            # Those that use what others offer come last.
            order = sorted(self._records, key=lambda record: bool(record.quantity.takes))

            def offer(what: str, *things: Any) -> None:
                for record in order[len(found) + len(troubles) + 1 :]:
                    taken(subject.processes, partial(record.quantity.offered, what, things, moment))
                for other in takers:
                    other.offer(here, what, things, subject.processes)

            tools = Tools(
                share=subject.processes,
                progress=lambda text, total: progress(trainer, text, total),
                say=lambda text: say(trainer, f"{self._owner}: {text}"),
                # A smoke test should run every line, not take long.
                quick=bool(trainer.fast_dev_run),
                offer=offer,
                shared=left,
                size=self._sizer.size(moment, timing, subject),
                only=choice is not None and choice.count == 1 and not timing.schedule.is_given,
                step_seconds=(
                    timing.account.seconds_a_batch if moment.function == "fit" else math.nan
                ),
            )
            moment = replace(moment, tools=tools)
            for record in order:
                measure = partial(_measured_by, record.quantity, objective, moment)
                try:
                    result = all_or_none(subject.processes, measure, record.quantity.name)
                except OutOfStepError:
                    # There is no common point to go on from.
                    raise
                except Exception as error:  # noqa: BLE001 - one quantity must not cost the others
                    # Without its traceback, whose frames hold graphs and weights.
                    troubles.append(forgetful(error) if len(self._records) > 1 else error)
                else:
                    found.append((record, result))
        if troubles and not found:
            raise troubles[0]
        for trouble in troubles:
            self._warn(trouble)
        return moment, [pair for record in self._records for pair in found if pair[0] is record]

    def _kept(self, record: Record, result: Any, moment: Moment) -> dict[str, float]:
        """Take note of a result, tell of its gaps, and return its numbers."""
        quantity = record.quantity
        check = self._subject.findings.proof.self_check
        if check is not None and check.trouble:
            told = MeasurementError(f"{check.trouble}.", check.remedy)
            self._sink.warn(told, "the self-check", remedy="")
        for what, trouble in quantity.gaps(result, moment).items():
            if check is not None and trouble == check.trouble:
                continue
            error = trouble
            if not isinstance(trouble, Exception):
                error = MeasurementError(f"{what}: {trouble}.", quantity.remedy(result))
            self._sink.warn(error, what, remedy="")
        values = finite(quantity.scalars(result))
        record.keep(result, moment)
        return values

    def _draw_what_fits(self, trainer: Any, found: Found, moment: Moment) -> None:
        """Draw figures while there is room for them: at the end one at least."""
        bounded = self._timing.is_bounded and moment.function == "fit" and not trainer.fast_dev_run
        drawn = self._timing.left_out = 0

        def draw(record: Record, result: Any) -> None:
            nonlocal drawn
            figures = record.quantity.figures(result, record.history, moment)
            for i, (name, figure) in enumerate(figures.items()):
                # Only the first process draws, so that nobody has to be asked.
                if bounded and not self._timing.has_room_for_figure(moment, drawn):
                    self._timing.left_out += len(figures) - i if self._sink.figures else 0
                    break
                drawn += 1
                began, named = time.monotonic(), record.quantity.name
                for _ in self._sink.draw(trainer, {name: figure}, moment.step, named):
                    self._timing.pace.figure = time.monotonic() - began
            if self.pages is not None:
                self.pages(trainer, result, moment)

        for record, result in found:
            self._sink.guarded("drawing", draw, record, result)

    def _warn(self, error: Exception) -> None:
        # A loss of one's own is no remedy for trouble with it.
        own = self._subject.settings.loss is not None and not is_out_of_memory(error)
        self._sink.warn(error, "a measurement", "" if own else None)


def _measured_by(quantity: Quantity, objective: Objective, moment: Moment) -> Any:
    if quantity.proves_itself:
        return quantity.measure(objective, moment)
    prove(objective, moment.lent.share)
    return objective.without_skipped(lambda: quantity.measure(objective, moment))

"""What a monitor does, in a few words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lla_callbacks.callbacks.records import Record
from lla_callbacks.objective.checks import shown
from lla_callbacks.report.history import to_dataframe

if TYPE_CHECKING:
    from pandas import DataFrame


class SaysItself:
    """A part of monitors: what they do in words, and what they found as a table."""

    if TYPE_CHECKING:
        records: tuple[Record, ...]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {described(self)}>"

    def to_dataframe(self, quantity: str | None = None) -> DataFrame:
        """Return the results of the last fit as a table, a row a step and a column a number.

        Parts of a result are joined by ``/``: ``criteria/kh05``, ``layers/0.weight/trace``. What is
        no single number is left out.

        Args:
            quantity: Name of the one that is wanted, where several are measured.

        Raises:
            ValueError: If there is none of this name, or several and no name.
            ImportError: If pandas is not installed.
        """
        known = {record.quantity.name: record.history for record in self.records}
        if quantity is None and len(known) == 1:
            quantity = next(iter(known))
        if quantity not in known:
            raise ValueError(f"quantity is {quantity!r}; give one of {', '.join(known)}.")
        return to_dataframe(known[quantity])


def described(monitor: Any) -> str:
    """Return when a monitor measures what, on what, and what it has found so far."""
    held, how = monitor.shared_settings.held, monitor.shared_settings.products
    names = [record.quantity.name for record in monitor.records]
    what = ", ".join(dict.fromkeys([repr(monitor.name), *map(repr, names)]))
    parts = [f"{what}: {_when(monitor)}"]
    batches = "first training samples" if held.dataloader is None else "samples of its dataloader"
    loss = "training_step" if held.loss is None else f"loss={_called(held.loss)}"
    if held.num_samples:
        on = f"on the {held.num_samples:,} {batches}"
    else:
        on = f"on the {batches}, 256 at most,"
    parts.append(f"{on} by {loss}, mode {held.mode!r}")
    if how.parameters is not None:
        part = how.parameters
        words = f"where {_called(part)}" if callable(part) else shown(part)
        parts.append(f"of the parameters {words}")
    found = monitor.records[0].history
    parts.append(
        f"{len(found)} measured so far, last at step {found[-1][0]}" if found else "none so far"
    )
    return "; ".join(parts)


def _when(monitor: Any) -> str:
    schedule, limit = monitor.schedule, monitor.shared_settings.when.max_overhead
    times = []
    if schedule.every_n_train_steps:
        times.append(f"every {schedule.every_n_train_steps:,} steps")
    if schedule.every_n_epochs:
        n = schedule.every_n_epochs
        times.append("every epoch" if n == 1 else f"every {n:,} epochs")
    light = getattr(monitor, "tracking_schedule", None)
    if light is not None and light.is_given:
        times.append(f"lightly every {light.every_n_train_steps:,} steps")
    if schedule.is_given:
        times[0] = f"at the start, {times[0]}"
        return ", ".join(times) + " and at the end" + (f", within {limit:.0%}" if limit else "")
    share = f"{limit or 0.05:.0%} of training time for all monitors together"
    return ", ".join([f"about ten times a run within {share}", *times])


def _called(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))

"""What a quantity is: something that is measured of an objective at a moment, and its result.

A monitor knows no more of what it measures than this, so that a quantity of a user's own has the
promises of those that come with the package: schedule, account, guard, gaps, processes, resumed
runs, loggers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from lla_callbacks.objective.checks import shown, tag_of
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.objective import Objective
from lla_callbacks.report.result import Drawn, Result


class Quantity(ABC):
    """Something to be measured: its settings, and how.

    Subclass it as a frozen dataclass whose fields are the settings, and check them in
    ``__post_init__``; docs/own_quantity.md has one in 30 lines.

    Attributes:
        name: First part of every tag, and the folder of its files.
        gradients: What measuring takes, in gradients of all held samples, about: by this a run
            with ``max_overhead`` is planned.
        most_seconds: How long it takes at most, where it ends itself; infinite where it does not.
        result: Class of the results.
        watches: Whether :meth:`before_step` and :meth:`after_step` are called.
        proves_itself: Whether :meth:`measure` has the loss prove itself; else that is done before.
        reads_shards: Whether it can be measured where parameters are spread over processes.
        few: Last parts of the tags that are logged unless more are asked for; none: all are.
        offers: What others may use that measure at the same moment; see :meth:`offered`.
        takes: What of that it uses itself. It is measured after those that offer it.
    """

    name: str
    gradients: float = 1.0
    most_seconds: float = math.inf
    result: ClassVar[Any] = Result
    watches: bool = False
    proves_itself: ClassVar[bool] = False
    reads_shards: ClassVar[bool] = False
    few: ClassVar[tuple[str, ...]] = ()
    offers: ClassVar[tuple[str, ...]] = ()
    takes: tuple[str, ...] = ()

    @property
    def settings(self) -> Any:
        """The settings, a frozen dataclass."""
        return self

    @abstractmethod
    def measure(self, objective: Objective, moment: Moment) -> Any:
        """Return the result; what it raises becomes a warning with a remedy, and a gap.

        Args:
            objective: ``L(weights)`` on the held batches, at the weights of the moment. The module
                is guarded: whatever is done to it through the objective is undone.
            moment: Of which step, and ``moment.lent``: processes, a progress bar and more. Under
                several processes each one calls this with the same batches; where the work is
                not divided (``moment.lent.share``), each does all of it.
        """

    def kept(self, result: Any) -> Any:
        """Return what a history keeps of a result: all of it, if that does not grow too large."""
        return result

    def offered(self, what: str, things: Sequence[Any], moment: Moment) -> None:
        """Keep in ``moment.lent.shared`` what can be used of a thing that another has at hand.

        One that offers it calls this through ``moment.lent.offer``; so one spectrum run, say,
        serves both. It may belong to another monitor of the same loss: what is kept is then there
        at the next measurement, if that is at the same weights. Keep what is small.
        """

    def scalars(self, result: Any) -> dict[str, float]:
        """Return a result's numbers by tag; not finite ones are left out of the logs."""
        found: dict[str, float] = result.scalars(self.name)
        return found

    def text(self, result: Any, history: Sequence[tuple[int, Any]], moment: Moment) -> str:
        """Return a result in Markdown, for TensorBoard's text page; empty for none."""
        return "\n".join(f"    {line}" for line in str(result.summary()).splitlines())

    def figures(self, result: Any, history: Sequence[tuple[int, Any]], moment: Moment) -> Drawn:
        """Return functions that draw; ``history`` ends with this result."""
        found: Drawn = result.figures(moment.step)
        return found

    def gaps(self, result: Any, moment: Moment) -> Mapping[str, Any]:
        """Return what could not be said, by name: a sentence or an error."""
        found = dict(result.gaps)
        for tag, value in self.scalars(result).items():
            known = any(tag == name or tag.endswith(f"/{name}") for name in found)
            if not math.isfinite(value) and not known:
                found[tag] = f"it is {value}, and left out of the logs"
        return found

    def remedy(self, result: Any) -> str:
        """Return what a user can do about gaps."""
        return ""

    def check(self, module: nn.Module) -> str:
        """Raise a ValueError if the settings do not fit a module; return what is to be said."""
        return ""

    # -- for quantities that carry something from one moment to the next ----------------

    def begin(self) -> None:
        """Forget all earlier runs."""

    def end(self) -> None:
        """Drop what is as large as the network: the run is over."""

    def weights_changed(self, dim: int) -> None:
        """Drop vectors of other parameters than those that are trained now."""

    def do_without_layers(self) -> None:
        """Tell each module's own parameters apart, where a function of the user's fails."""

    def before_step(self, step: int, module: nn.Module) -> None:
        """Look at the weights before a training batch."""

    def after_step(self, step: int, module: nn.Module) -> None:
        """Look at the weights after a training batch, and when training starts."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from: plain containers, numbers and tensors."""
        return {}

    def read(self, state: Mapping[str, Any], module: nn.Module) -> Any:
        """Return a state, read and checked; raise if it cannot be gone on from."""
        return state

    def take(self, read: Any) -> None:
        """Go on from what :meth:`read` returned; this does not fail."""


def check_quantities(value: Any) -> tuple[Quantity, ...]:
    """Return quantities as a tuple.

    Raises:
        ValueError: If it is none, or two have one name.
    """
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    found = tuple(value) if several else ()
    if not found or not all(isinstance(one, Quantity) for one in found):
        given = found or (value,)
        strange = next((one for one in given if not isinstance(one, Quantity)), None)
        what = f"a list with {shown(strange)}" if found else shown(value)
        what = "one quantity" if strange is None else what
        raise ValueError(
            f"quantities is {what}; give a list of quantities that are made, such as "
            "[Spectrum(), Slices()] or one of your own."
        )
    for one in found:
        tag_of("the name of a quantity", getattr(one, "name", None))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise ValueError(f"quantities have the names {names}; give each a name of its own.")
    return found


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Return the finite ones as plain floats."""
    found = {tag: float(value) for tag, value in values.items()}
    return {tag: value for tag, value in found.items() if math.isfinite(value)}

"""What a monitor of the Hessian has shown so far: reports, and light measurements in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lla_callbacks.callbacks.records import Record
from lla_callbacks.callbacks.sink import Sink
from lla_callbacks.hessian.light_arrays import LightSeries
from lla_callbacks.hessian.quantity import Spectrum
from lla_callbacks.hessian.tracking import HessianTracking
from lla_callbacks.objective.moment import Moment
from lla_callbacks.report.conform import check_entries, check_type
from lla_callbacks.report.plain import PlainForms, unpack
from lla_callbacks.report.thinning import RECENT, thin

# Of what type the further entries of a stored state are.
_STATE = {"last_light": int, "written": int, "tracked": list[tuple[int, Mapping[str, Any]]]}


class LightRecord(Record):
    """A spectrum and its results, full and light ones.

    Args:
        quantity: The spectrum.

    Attributes:
        tracked: Pairs of step and light measurement of the last fit, thinned.
        last_light: Step of the last one.
    """

    def __init__(self, quantity: Spectrum) -> None:
        super().__init__(quantity)
        self.tracked: list[tuple[int, HessianTracking]] = []
        self._reset()

    def _reset(self) -> None:
        self.last_light = -1
        # Step of the last light measurement that is in a file.
        self._written = -1
        self._plain_tracked = PlainForms()

    def begin(self) -> None:
        """Forget what is known of an earlier run."""
        super().begin()
        self._reset()

    def clear(self) -> None:
        """Begin the curves of a fit."""
        super().clear()
        self.tracked = []

    def keep(self, result: Any, moment: Moment) -> None:
        """Take note of a result."""
        if isinstance(result, HessianTracking):
            self.tracked.append((moment.step, result))
            thin(self.tracked)
        else:
            super().keep(result, moment)

    def write(self, trainer: Any, sink: Sink, *, few: bool = False) -> None:
        """Write light measurements that are in no file yet, once there are many, or even a few.

        One file for many, since they come often; what is not written yet is never thinned out.
        """
        new = [pair for pair in self.tracked[-RECENT:] if pair[0] > self._written]
        if len(new) >= (1 if few else RECENT):
            self._written = new[-1][0]
            stem = f"light_{new[0][0]:08d}_to_{new[-1][0]:08d}"
            sink.arrays(trainer, LightSeries(new), stem)

    def state(self) -> dict[str, Any]:
        """Return plain state, the history left out."""
        return {
            **super().state(),
            "last_light": self.last_light,
            "tracked": self._plain_tracked.of(self.tracked),
            "written": self._written,
        }

    def read(self, state: Mapping[str, Any], module: Any) -> Any:
        """Return a state, read and checked."""
        check_entries(state, _STATE, "the state")
        tracked = [(step, unpack(found)) for step, found in state["tracked"]]
        check_type(tracked, list[tuple[int, HessianTracking]], "the state's tracked")
        return (*super().read(state, module), tracked, state)

    def show(self, state: Mapping[str, Any]) -> None:
        """Take over the results of another process."""
        super().show(state)
        self.tracked[:] = [(step, unpack(light)) for step, light in state["tracked"]]

    def take(self, read: Any) -> None:
        """Go on from a state."""
        *rest, tracked, state = read
        super().take(rest)
        self.tracked[:] = tracked
        self._plain_tracked.learn(tracked, state["tracked"])
        self._written, self.last_light = state["written"], state["last_light"]

"""What a monitor measures, and what each quantity of it has shown so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lla_callbacks.callbacks.compat import MisconfigurationException
from lla_callbacks.callbacks.sink import Sink
from lla_callbacks.callbacks.telling import rank_zero_info
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.objective import Engine
from lla_callbacks.objective.sharded import is_sharded
from lla_callbacks.report.conform import check_type
from lla_callbacks.report.plain import PlainForms, unpack
from lla_callbacks.report.quantity import Quantity
from lla_callbacks.report.thinning import thin


class Record:
    """A quantity and its results of one run.

    Args:
        quantity: What is measured.

    Attributes:
        history: Pairs of step and result of the last fit, thinned.
        result: The last one of all.
    """

    def __init__(self, quantity: Quantity) -> None:
        self.quantity = quantity
        self.history: list[tuple[int, Any]] = []
        self.result: Any = None
        self._plain = PlainForms()

    def begin(self) -> None:
        """Forget what the quantity knows of an earlier run."""
        self.quantity.begin()

    def clear(self) -> None:
        """Begin the curves of a fit."""
        self.history = []
        self._plain = PlainForms()

    def keep(self, result: Any, moment: Moment) -> None:
        """Take note of a result."""
        self.result = result
        if moment.function == "fit":
            self.history.append((moment.step, self.quantity.kept(result)))
            thin(self.history)

    def state(self) -> dict[str, Any]:
        """Return plain state, the history left out."""
        return self.quantity.state()

    def plain_history(self) -> list[Any]:
        """Return the history with plain forms."""
        return self._plain.of(self.history)

    def read(self, state: Mapping[str, Any], module: Any) -> Any:
        """Return a state, read and checked; raise if it cannot be gone on from."""
        return *self._read_history(state), self.quantity.read(state, module)

    def _read_history(self, state: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """Return the history, and its plain form."""
        history = state["history"]
        check_type(history, list[tuple[int, Mapping[str, Any]]], "the state's history")
        found = [(step, unpack(report)) for step, report in history]
        for step, report in found:
            check_type(report, self.quantity.result, f"the report of step {step}")
        return found, history

    def show(self, state: Mapping[str, Any]) -> None:
        """Take over the results of another process, not what a run would go on from."""
        found, plain = self._read_history(state)
        self._take_history(found, plain)

    def last_scalars(self, read: Any) -> dict[str, float]:
        """Return the numbers that a read history ends with."""
        found = read[0]
        return self.quantity.scalars(found[-1][1]) if found else {}

    def take(self, read: Any) -> None:
        """Go on from what :meth:`read` returned; this does not fail."""
        found, plain, more = read
        self._take_history(found, plain)
        self.quantity.take(more)

    def _take_history(self, found: list[Any], plain: list[Any]) -> None:
        self.history[:] = found
        self._plain = PlainForms()
        self._plain.learn(found, plain)
        if found:
            self.result = found[-1][1]


def check_fit(
    owner: str, module: nn.Module, records: Sequence[Record], engine: Engine, sink: Sink
) -> None:
    """Raise if settings do not fit a module; say what of it is told apart.

    Raises:
        MisconfigurationException: With the remedy.
    """
    if engine == "exact" and is_sharded(module):
        raise MisconfigurationException(
            f"{owner}: engine is 'exact', and torch differentiates only once "
            "through parameters that fully_shard has spread: give engine='difference' or 'auto'."
        )
    for record in records:
        try:
            words = record.quantity.check(module)
            if words:
                rank_zero_info(f"{owner}: {words}")
        except ValueError as error:
            raise MisconfigurationException(f"{owner}: {error}") from error
        except Exception as error:  # noqa: BLE001 - of a function that the user gave
            sink.warn(error, "layers=")
            record.quantity.do_without_layers()

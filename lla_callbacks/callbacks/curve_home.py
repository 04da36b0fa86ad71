"""The curve that spawned processes trained, in the object of their parent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lla_callbacks.callbacks.spawned import ComesHome
from lla_callbacks.curves.curve import Curve
from lla_callbacks.report.conform import check_type
from lla_callbacks.report.plain import pack, unpack

if TYPE_CHECKING:
    from lla_callbacks.callbacks.curve_view import CurveView


class CurveComesHome(ComesHome):
    """Hands over the curve and the losses along it."""

    if TYPE_CHECKING:
        _view: CurveView

        @property
        def curve(self) -> Curve | None:
            """The curve."""

    # The curve of spawned processes.
    _found: Curve | None = None

    def _sent(self) -> Any:
        history = [(step, pack(loss)) for step, loss in self._view.history]
        return {"curve": None if self.curve is None else pack(self.curve), "history": history}

    def _received(self, found: Any) -> None:
        if found["curve"] is not None:
            curve = unpack(found["curve"])
            check_type(curve, Curve, "the curve")
            self._found = curve
        self._view.history[:] = [(step, unpack(loss)) for step, loss in found["history"]]

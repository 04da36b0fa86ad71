"""Points evaluated by the operations of one pass, without the Python that led to them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from lla_callbacks.linalg.recorded import Program
from lla_callbacks.objective.bare_passes import BarePasses
from lla_callbacks.objective.families import Family, Offsets
from lla_callbacks.objective.first_layers import FirstLayers

# Fewer points than this do not pay for recording a pass and for the passes that check it.
LEAST_POINTS = 24
# What the results of a recorded pass's operations may take for the moment of recording.
MOST_BYTES = 128 * 2**20
# By how much rounding may take apart what first layers taken together give, in float32; in other
# arithmetic, by as many units of its rounding.
RELATIVE, ABSOLUTE = 1e-4, 1e-6
# After so many points the module is asked first, and again when there are so many times as many.
FIRST_ASKED, GROWTH = 4, 4
# And after so many seconds, if so many points came meanwhile: what is not confirmed is not kept.
ASKED_EVERY, LEAST_ASKED = 5.0, 16
# Points and seconds of one call.
LARGEST_BLOCK, LONGEST_BLOCK = 64, 0.5


class RecordedPasses:
    """Evaluates a loss by recorded operations, which write and draw nothing and know no module.

    They are the operations of the module's own pass, in the same order, so that the values are the
    same to the bit; with :class:`~lla_callbacks.objective.first_layers.FirstLayers`, to rounding.
    What does not depend on the weights that move was computed once, and what the loss does not
    come from is left out. Now and then, and at the end, the module itself is asked at the last
    point: if it says something else, none of the values that were found this way is believed.

    Args:
        passes: Passes by the module itself.
        family: From coordinates to weights.
        programs: The operations, a program for each batch.
    """

    def __init__(self, passes: BarePasses, family: Family, programs: Sequence[Program]) -> None:
        self._passes = passes
        self._family = family
        self._programs = programs
        self._asked, self._ask_at = 0, FIRST_ASKED
        self._asked_at = time.monotonic()
        self._last: tuple[Sequence[float], float] = ((), 0.0)
        self._first: list[FirstLayers] = []
        self._place = family.place
        if type(family) is Offsets:
            with torch.no_grad():
                first = [FirstLayers(p, family, MOST_BYTES / len(programs)) for p in programs]
            if any(first):
                read = [p.reads(family.live) for p in programs]
                but = frozenset(
                    i for i, uses in enumerate(zip(*read, strict=True)) if not any(uses)
                )
                self._first, self._place = first, partial(family.place_partly, but=but)
        #: Numbers of the points that were found this way.
        self.found: list[int] = []

    def __call__(
        self, waiting: Sequence[int], points: Sequence[Sequence[float]], late: Callable[[], bool]
    ) -> list[float] | None:
        """Return the losses at first of the points that wait, ``None`` if any so far was wrong.

        Args:
            waiting: Numbers of the points.
            points: Coordinates of all.
            late: Whether no further point may be begun.
        """
        chunk = waiting[: min(self._ask_at - len(self.found), LARGEST_BLOCK)]
        until = time.monotonic() + LONGEST_BLOCK
        place, programs, first = self._place, self._programs, self._first
        values = []
        try:
            with torch.no_grad():
                for k, i in enumerate(chunk):
                    if k and (time.monotonic() > until or late()):
                        break
                    place(points[i])
                    if first:
                        given = [layers.at(points[i]) for layers in first]
                        values += [p((), g).item() for p, g in zip(programs, given, strict=True)]
                    else:
                        values += [program(()).item() for program in programs]
        except RuntimeError:  # of memory, say: the loop needs less, or says what it is
            return None
        found = self._passes.means(values)
        self.found += chunk[: len(found)]
        self._last = points[self.found[-1]], found[-1]
        waited = time.monotonic() - self._asked_at > ASKED_EVERY
        if len(self.found) >= self._ask_at or (waited and self._new >= LEAST_ASKED):
            self._ask_at = max(self._ask_at, GROWTH * len(self.found))
            if not self.are_right():
                return None
        return found

    @property
    def _new(self) -> int:
        """How many points were found since the module was asked."""
        return len(self.found) - self._asked

    @property
    def are_confirmed(self) -> bool:
        """Whether the module was asked after the last of the points."""
        return self._new == 0

    def are_right(self) -> bool:
        """Return whether the module has the value of the last point, too."""
        if self.are_confirmed:
            return True
        self._asked, self._asked_at = len(self.found), time.monotonic()
        point, value = self._last
        if self._first:
            self._family.place(point)
        losses, right = self._passes.losses([None])
        return right and self._is_same(value, losses[0])

    def _is_same(self, a: float, b: float) -> bool:
        if self._first:
            unit = torch.finfo(self._family.space.precision).eps / torch.finfo(torch.float32).eps
            same = math.isclose(a, b, rel_tol=RELATIVE * unit, abs_tol=ABSOLUTE * unit)
            return same or (math.isnan(a) and math.isnan(b))
        return a == b or (math.isnan(a) and math.isnan(b))

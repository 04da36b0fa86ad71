"""Points evaluated by the operations of one pass, without the Python that led to them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from lla_callbacks.objective.bare_passes import BarePasses
from lla_callbacks.objective.families import Family, Offsets
from lla_callbacks.objective.first_layers import FirstLayers
from lla_callbacks.objective.recorded import Program

# Fewer points than this do not pay for recording a pass and for the passes that check it.
LEAST_POINTS = 24
# What the results of a recorded pass's operations may take for the moment of recording.
MOST_BYTES = 128 * 2**20
# By how much rounding may take apart what first layers taken together give.
RELATIVE, ABSOLUTE = 1e-4, 1e-6
# Points in the first block, how much larger the next one is, the most, and seconds.
FIRST_BLOCK, GROWTH, LARGEST_BLOCK, LONGEST_BLOCK = 4, 4, 128, 0.5


class RecordedPasses:
    """Evaluates a loss by recorded operations, which write and draw nothing and know no module.

    They are the operations of the module's own pass, in the same order, so that the values are the
    same to the bit; with :class:`~lla_callbacks.objective.first_layers.FirstLayers`, to rounding.
    What does not depend on the weights that move was computed once, and what the loss does not
    come from is left out. After each block of points the module itself is asked at the last one: if
    it says something else, none of the values that were found this way is believed.

    Args:
        passes: Passes by the module itself.
        family: From coordinates to weights.
        programs: The operations, a program for each batch.
    """

    def __init__(self, passes: BarePasses, family: Family, programs: Sequence[Program]) -> None:
        self._passes = passes
        self._family = family
        self._programs = programs
        self._block = FIRST_BLOCK
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
        """Return the losses at the first of the points that wait, ``None`` if they were wrong.

        Args:
            waiting: Numbers of the points.
            points: Coordinates of all.
            late: Whether no further point may be begun.
        """
        chunk = waiting[: self._block]
        self._block = min(GROWTH * self._block, LARGEST_BLOCK)
        until = time.monotonic() + LONGEST_BLOCK
        place, programs, first = self._place, self._programs, self._first
        values = []
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
        found = self._passes.means(values)
        if first:
            self._family.place(points[chunk[len(found) - 1]])
        known, right = self._passes.losses([None])
        if not right or not self._is_same(found[-1], known[0]):
            return None
        self.found += chunk[: len(found)]
        return found

    def _is_same(self, a: float, b: float) -> bool:
        if self._first:
            return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) or (
                math.isnan(a) and math.isnan(b)
            )
        return a == b or (math.isnan(a) and math.isnan(b))

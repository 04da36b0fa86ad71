"""How large a measurement may be: the best that fits, by what costs least accuracy to cut.

Everything here is plain arithmetic on seconds, so that all of it can be tested without a Trainer.
The ladders rest on ``docs/benchmarks/sizes.md``: of equal savings, fewer probes and a shallower
Lanczos run cost least accuracy, then samples, then points of the curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Samples on which the unit costs are measured.
CALIBRATION_SAMPLES = 2
# Gradients with a graph that a self-check takes, about (docs/benchmarks/self_check.md).
CHECK = 8
# Of what is there, what is planned: the rest is for costs that turn out higher (on the five
# ordinary projects by a fifth to a third, docs/benchmarks/ordinary.md).
PLANNED = 0.7


@dataclass(frozen=True)
class UnitCosts:
    """What the parts of a measurement take here, in seconds.

    Costs grow in proportion from a few samples to a batch of the user's own, and then with the
    number of batches.

    Attributes:
        forward: A forward pass at one point of a slice, of a few samples.
        gradient: A gradient with its graph.
        product: A product with the Hessian on that graph.
        few: How many samples that was.
        batch_forward: A forward pass of the user's own batch.
        batch_gradient: A gradient with its graph.
        batch_product: A product on that graph.
        batch_samples: Samples in that batch.
        step: A training step on that batch.
        figure: Drawing and writing one figure.
        fixed: Scalars, arrays and whatever else does not depend on samples.
        most: Seconds after which no further point of a slice is begun.
    """

    forward: float
    gradient: float
    product: float
    few: int
    batch_forward: float
    batch_gradient: float
    batch_product: float
    batch_samples: int
    step: float
    figure: float = 0.12
    fixed: float = 0.015
    most: float = math.inf

    def of(self, few: float, batch: float, samples: int) -> float:
        """Return what takes ``few`` and ``batch`` seconds at the two known sizes, at another."""
        if samples >= self.batch_samples:
            return batch * samples / self.batch_samples
        if samples <= self.few:
            return few
        share = (samples - self.few) / (self.batch_samples - self.few)
        return few + (batch - few) * share

    def spectrum(self, size: SpectrumSize) -> float:
        """Return the seconds of one measurement of the Hessian, figures left out."""
        gradient = self.of(self.gradient, self.batch_gradient, size.samples)
        product = self.of(self.product, self.batch_product, size.samples)
        return self.fixed + gradient + size.products * product

    def check(self, samples: int) -> float:
        """Return the seconds in which the first measurement of a run checks itself."""
        return CHECK * self.of(self.gradient, self.batch_gradient, samples)

    def slices(self, size: SlicesSize, samples: int) -> float:
        """Return the seconds of one measurement of slices, figures left out."""
        forward = self.of(self.forward, self.batch_forward, samples)
        gradient = self.of(self.gradient, self.batch_gradient, samples)
        product = self.of(self.product, self.batch_product, samples)
        passes = size.plane_points**2 * size.planes + size.line_points * size.lines
        passes += size.more + 4
        left = max(0, size.products - size.at_hand)
        found = gradient + left * product if left else 0.0
        return self.fixed + min(forward * passes + found, self.most)


@dataclass(frozen=True)
class SpectrumSize:
    """How a Hessian is measured.

    Attributes:
        points: Measurements of the run, first and last included.
        samples: Held samples.
        num_steps: Lanczos depth.
        num_probes: Probes of the trace.
    """

    points: int
    samples: int
    num_steps: int
    num_probes: int

    @property
    def products(self) -> int:
        """Products of one measurement: one probe is the start vector of the run."""
        return self.num_steps + self.num_probes


@dataclass(frozen=True)
class SlicesSize:
    """How slices are measured.

    Attributes:
        plane_points: Points along each side of a plane.
        line_points: Points of a line.
        lines: How many of the lines, the first ones.
        planes: How many planes.
        products: Products that their directions take.
        more: Further passes: rays, points of a map, what refining planes is worth.
        at_hand: Products of those for directions that another monitor has done already.
    """

    plane_points: int
    line_points: int
    lines: int
    planes: int = 1
    products: int = 0
    more: int = 0
    at_hand: int = 0


# From the best to the least: samples, Lanczos steps, probes. The first is a measurement without a
# limit. Fewer probes and steps cost least at first; from 12 + 8 on the trace's error grows faster
# than with fewer samples, until few samples are another function (docs/benchmarks/sizes.md).
_SIZES = (
    (256, 24, 24), (256, 16, 12), (256, 12, 8), (128, 12, 8), (64, 12, 8), (64, 8, 6), (32, 8, 6),
    (32, 8, 4), (16, 8, 4), (16, 6, 4), (8, 6, 4), (8, 5, 3), (4, 5, 3), (2, 5, 3),
)  # fmt: skip
# Points of a curve, first and last included: first of all there is a curve.
POINTS = 10
_POINTS = (POINTS, 8, 6, 5, 4, 3, 2, 1)


def spectrum_ladder() -> list[SpectrumSize]:
    """Return the sizes of a spectrum: for each number of points from the best to the least."""
    return [SpectrumSize(points, *size) for points in _POINTS for size in _SIZES]


SLICES = (
    SlicesSize(17, 21, 2, products=12),
    SlicesSize(13, 17, 2, products=12),
    SlicesSize(11, 13, 2, products=10),
    SlicesSize(9, 11, 2, products=8),
    SlicesSize(9, 11, 1),
    SlicesSize(7, 9, 1),
    SlicesSize(7, 0, 0),
    SlicesSize(5, 0, 0),
)


def choose_spectrum(
    seconds: float,
    costs: UnitCosts,
    ladder: Sequence[SpectrumSize],
    *,
    figures: int,
) -> tuple[SpectrumSize, bool]:
    """Return the best size for as many points as fit at all, and whether any does.

    Args:
        seconds: What all measurements of the run may take together.
        costs: Unit costs.
        ladder: Sizes, for each number of points from the best to the least.
        figures: Figures that are drawn once, at the end.
    """
    fits = [
        size
        for size in ladder
        if size.points * costs.spectrum(size) + costs.check(size.samples) + figures * costs.figure
        <= seconds
    ]
    if not fits:
        return ladder[-1], False
    most = max(size.points for size in fits)
    return next(size for size in fits if size.points == most), True


def choose_slices(
    seconds: float,
    costs: UnitCosts,
    ladder: Sequence[SlicesSize],
    samples: int,
    *,
    figures: int,
    meets: bool = True,
) -> tuple[SlicesSize, int, bool]:
    """Return the best size that fits once, how often it fits, and whether it fits at all.

    Args:
        seconds: What all slices of the run may take together.
        costs: Unit costs.
        ladder: Sizes, from the best to the least.
        samples: Held samples.
        figures: Figures of one measurement.
        meets: Whether further ones come when the other monitor has measured, too; the one at the
            end does.
    """
    for size in ladder:
        one = costs.slices(size, samples) + figures * costs.figure
        if one <= seconds:
            alone = costs.slices(replace(size, at_hand=0), samples) + figures * costs.figure
            more = int((seconds - one) / (one if meets else alone))
            return size, min(POINTS, 1 + more), True
    return ladder[-1], 1, False


def has_room_to_draw(seconds: float, cost: float, count: int, figures: int, each: float) -> bool:
    """Return whether figures fit at every measurement of a run, within half of what is there."""
    return count * (cost + figures * each) <= seconds and 2 * count * figures * each <= seconds


def fitting(
    ladder: Sequence[SpectrumSize],
    *,
    samples: int | None = None,
    num_steps: int | None = None,
    num_probes: int | None = None,
    least_samples: int = 1,
    most_samples: int,
) -> list[SpectrumSize]:
    """Return a ladder in which what the user set is as told, without repetition.

    Args:
        ladder: Sizes, from the best to the least.
        samples: Held samples, where the user gave them.
        num_steps: Lanczos depth, likewise.
        num_probes: Probes, likewise.
        least_samples: Fewer would be another function: batch statistics, or a batch that cannot
            be cut.
        most_samples: As many as there are.
    """
    found: list[SpectrumSize] = []
    for size in ladder:
        n = size.samples if samples is None else samples
        made = replace(
            size,
            samples=min(max(n, least_samples), most_samples),
            num_steps=num_steps or size.num_steps,
            num_probes=num_probes or size.num_probes,
        )
        if made not in found:
            found.append(made)
    return found


def targets(points: int) -> list[float]:
    """Return the shares of a run after which it is measured, first and last left out."""
    return [i / (points - 1) for i in range(1, points - 1)] if points > 2 else []

"""Who chooses how large a run's measurements are, for each kind of quantity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lla_callbacks.callbacks.handed_on import Served
from lla_callbacks.callbacks.pace import Choice
from lla_callbacks.callbacks.sizing import (
    POINTS,
    SLICES,
    SlicesSize,
    SpectrumSize,
    UnitCosts,
    choose_slices,
    choose_spectrum,
    fitting,
    has_room_to_draw,
    spectrum_ladder,
)
from lla_callbacks.callbacks.subject import Subject
from lla_callbacks.callbacks.timing import Timing
from lla_callbacks.hessian.quantity import Spectrum
from lla_callbacks.objective.costs import PRODUCT
from lla_callbacks.objective.moment import Moment
from lla_callbacks.report.quantity import Quantity
from lla_callbacks.slices.landscape import PASSES_A_MAP_POINT, PASSES_A_RAY, LandscapeSettings
from lla_callbacks.slices.quantity import PRODUCTS, Slices, largest_alone, needs_products

# Figures that are planned for at the end.
NUM_FIGURES = 1
# Figures of a spectrum, where there is room for all.
MOST_FIGURES = 4
# Samples below which pictures get coarse before samples get fewer.
FEWEST = 16


@dataclass(frozen=True)
class Means:
    """What the sizes of a run's measurements are chosen by.

    Attributes:
        costs: What a gradient and a product take; ``None``: unknown, take the least.
        seconds: What all measurements and figures of the run may take.
        least: Fewest samples.
        timing: Of the monitor.
        subject: What it holds.
        served: Returns what other monitors leave for this one, on so many samples.
    """

    costs: UnitCosts | None
    seconds: float
    least: int
    timing: Timing
    subject: Subject
    served: Callable[[int], Served] = lambda samples: Served()

    @property
    def held(self) -> int:
        """Samples that are held, the most there can be."""
        return self.subject.held.num_held

    @property
    def told(self) -> int | None:
        """Samples that the user gave, or another monitor chose."""
        return self.subject.settings.num_samples or self.timing.account.samples

    @property
    def figures(self) -> float:
        """Seconds of a quantity's figures at the end."""
        return NUM_FIGURES * self.timing.pace.figure


class Sizer(ABC):
    """Chooses the sizes of a run's measurements.

    Args:
        quantities: Of what.

    Attributes:
        share: In which proportion the monitor plans with what the account has, beside others.
        plans_last: Whether it chooses after other monitors have.
    """

    share = 1.0
    plans_last = False

    def __init__(self, quantities: Sequence[Quantity]) -> None:
        self._quantities = quantities

    @property
    def gradients(self) -> float:
        """What a measurement of the default size takes, in gradients of its samples, about."""
        return sum(quantity.gradients for quantity in self._quantities)

    @property
    def most_seconds(self) -> float:
        """How long a measurement takes at most, where its quantities end themselves."""
        return sum(quantity.most_seconds for quantity in self._quantities)

    def depth(self, timing: Timing) -> int:
        """Return how deep a Lanczos run of the whole Hessian each measurement has, 0 for none."""
        return 0

    def saved(self, num_steps: int) -> float:
        """Return how many of the gradients another monitor's run of such a depth saves."""
        return 0.0

    @abstractmethod
    def choose(self, means: Means) -> Choice:
        """Choose the sizes of a run's measurements, and return what they are."""

    def size(self, moment: Moment, timing: Timing, subject: Subject) -> Mapping[str, Any]:
        """Return the settings of a measurement that were chosen, by name."""
        return {}


class SamplesSizer(Sizer):
    """Chooses the number of samples alone: of a quantity's own settings it knows nothing."""

    def choose(self, means: Means) -> Choice:
        """Choose as many points of a curve as fit at all, then as many samples."""
        costs, seconds, least, held, told = (
            means.costs, means.seconds, means.least, means.held, means.told,
        )  # fmt: skip
        sizes = [min(max(told or held, least), held)]
        while not told and sizes[-1] > max(1, least):
            sizes.append(max(sizes[-1] // 2, least))

        def cost(samples: int) -> float:
            assert costs is not None
            gradient = costs.of(costs.gradient, costs.batch_gradient, samples)
            each = (min(q.gradients * gradient, q.most_seconds) for q in self._quantities)
            return costs.fixed + sum(each)

        samples, points, fits = sizes[-1], 1, False
        if costs is not None:
            figures = NUM_FIGURES * len(self._quantities) * costs.figure
            ladder = [(p, n) for p in range(POINTS, 0, -1) for n in sizes]
            for p, n in ladder:
                if p * cost(n) + costs.check(n) + figures <= seconds:
                    points, samples, fits = p, n, True
                    break
        price = 0.0 if costs is None else cost(samples)
        words = f"{samples} samples"
        return Choice(samples, points, price, means.figures, fits, words, fits)


class SpectrumSizer(Sizer):
    """Chooses samples, Lanczos steps and probes, as far as the user did not.

    Args:
        quantity: The spectrum.
        num_steps: Whether its depth is the user's own.
        num_probes: Whether the number of its probes is.
    """

    share = 0.65

    def __init__(self, quantity: Spectrum, *, num_steps: bool, num_probes: bool) -> None:
        super().__init__([quantity])
        self._quantity = quantity
        self._steps, self._probes = num_steps, num_probes

    def choose(self, means: Means) -> Choice:
        """Choose the best size for as many points of the curve as fit at all."""
        costs, seconds = means.costs, means.seconds
        settings = self._quantity.settings
        ladder = fitting(
            spectrum_ladder(),
            samples=means.subject.settings.num_samples,
            num_steps=settings.num_steps if self._steps else None,
            num_probes=settings.num_probes if self._probes else None,
            least_samples=means.least,
            most_samples=means.held,
        )
        size, fits, cost, draws = replace(ladder[-1], points=1), False, 0.0, False
        if costs is not None:
            size, fits = choose_spectrum(seconds, costs, ladder, figures=NUM_FIGURES)
            cost = costs.spectrum(size)
            draws = has_room_to_draw(seconds, cost, size.points, MOST_FIGURES, costs.figure)
        words = (
            f"{size.samples} samples ({size.num_steps} Lanczos steps for eigenvalues, "
            f"{size.num_probes} probes for the trace)"
        )
        figures = means.figures
        return Choice(size.samples, size.points, cost, figures, fits, words, draws, asdict(size))

    def depth(self, timing: Timing) -> int:
        """Return the depth that was chosen, or the user's."""
        choice = timing.pace.choice
        return choice.size["num_steps"] if choice else self._quantity.settings.num_steps

    def size(self, moment: Moment, timing: Timing, subject: Subject) -> Mapping[str, Any]:
        """Return depth and probes."""
        choice = timing.pace.choice
        if choice is None:
            return {}
        size = SpectrumSize(**choice.size)
        return {"num_steps": size.num_steps, "num_probes": size.num_probes}


class SlicesSizer(Sizer):
    """Chooses samples, points and how many lines, as far as the user did not.

    Args:
        quantity: The slices.
        given: Which of ``lines``, ``plane_points`` and ``line_points`` are the user's own.
    """

    share = 0.35
    plans_last = True

    def __init__(self, quantity: Slices, given: Mapping[str, bool]) -> None:
        super().__init__([quantity])
        self._quantity = quantity
        self._given = given

    def saved(self, num_steps: int) -> float:
        """Return the products that need not be done again."""
        alone = largest_alone(self._quantity.settings)
        return PRODUCT * min(PRODUCTS, num_steps) if alone else 0.0

    def choose(self, means: Means) -> Choice:
        """Choose the best size that fits once; how often it fits follows."""
        least, held, told = means.least, means.held, means.told
        costs = self._within(means.costs)
        samples = min(max(told or held, least), held)
        served = means.served(samples)
        ladder = self._ladder(served.num_steps)
        size, count, fits, cost = ladder[-1], 1, False, 0.0
        if costs is not None:
            # Alone, it lowers the number of samples before pictures get coarse.
            while True:
                size, count, fits = choose_slices(
                    means.seconds, costs, ladder, samples, figures=NUM_FIGURES,
                    meets=bool(served.targets),
                )  # fmt: skip
                coarse = ladder.index(size) > len(ladder) // 2
                if told or not coarse or samples <= max(least, FEWEST):
                    break
                samples = max(samples // 2, least)
            cost = costs.slices(size, samples)
        else:
            given = means.subject.settings.num_samples
            samples = min(max(given or least, least), held)
        s = replace(self._quantity.settings, **self._sized(size))
        parts = [f"planes of {s.plane_points} x {s.plane_points}"] if s.planes else []
        parts += [f"lines of {s.line_points}"] if s.lines else []
        words = f"{samples} samples ({', '.join(parts) or 'radii'})"
        return Choice(samples, count, cost, means.figures, fits, words, True, asdict(size))

    def size(self, moment: Moment, timing: Timing, subject: Subject) -> Mapping[str, Any]:
        """Return points and lines; fewer at the end, where less is left than was planned."""
        choice = timing.pace.choice
        if moment.function != "fit" or choice is None:
            return {}
        size, costs = SlicesSize(**choice.size), self._within(timing.account.costs)
        if moment.last and costs is not None:
            # Whatever was spent since the plan was made, this one pays for.
            aside = sum(timing.account.reserved.values())
            seconds = subject.processes.first(timing.account.room(timing.name) - aside)
            ladder = self._ladder(size.at_hand)
            ladder = ladder[ladder.index(size) :] if size in ladder else ladder
            size = choose_slices(
                max(seconds, 0.0), costs, ladder, subject.held.num_held, figures=NUM_FIGURES
            )[0]
        return self._sized(size)

    def _within(self, costs: UnitCosts | None) -> UnitCosts | None:
        """Return costs with the time that slices have at most."""
        return None if costs is None else replace(costs, most=self.most_seconds)

    def _sized(self, size: SlicesSize) -> dict[str, Any]:
        s, given = self._quantity.settings, self._given
        return {
            "plane_points": s.plane_points if given["plane_points"] else size.plane_points,
            "line_points": s.line_points if given["line_points"] else max(5, size.line_points),
            "lines": s.lines if given["lines"] or not s.planes else tuple(s.lines[: size.lines]),
        }

    def _ladder(self, at_hand: int) -> list[SlicesSize]:
        """Return the sizes of these slices, from the best to the least.

        Args:
            at_hand: Products that another monitor has done for the largest eigenvalue's direction;
                of others nobody knows whether they are found by so many.
        """
        found: list[SlicesSize] = []
        for size in SLICES:
            s: LandscapeSettings = replace(self._quantity.settings, **self._sized(size))
            products = size.products if needs_products(s) else 0
            made = SlicesSize(
                s.plane_points,
                s.line_points,
                len(s.lines),
                len(s.planes),
                products=products,
                more=PASSES_A_RAY * s.num_rays
                + PASSES_A_MAP_POINT * s.convexity_points**2
                + round(len(s.planes) * (s.passes_of_a_plane - s.plane_points**2)),
                at_hand=min(products, at_hand) if largest_alone(s) else 0,
            )
            if made not in found:
                found.append(made)
        return found

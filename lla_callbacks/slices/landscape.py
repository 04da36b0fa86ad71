"""Several slices of one objective, measured together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from lla_callbacks.linalg.errors import MeasurementError, forgetful
from lla_callbacks.linalg.sharing import Alone, OutOfStepError, Share, all_or_none
from lla_callbacks.objective.engines import prove
from lla_callbacks.objective.grid import centred
from lla_callbacks.objective.held_open import held_in_one
from lla_callbacks.objective.moment import Progress
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings, space_of
from lla_callbacks.objective.self_check import SelfCheck
from lla_callbacks.slices.basin import Basin, measure_basin
from lla_callbacks.slices.choice import (
    DirectionSource,
    line_names,
    plane_coordinates,
    plane_names,
)
from lla_callbacks.slices.convexity import Convexity, measure_convexity
from lla_callbacks.slices.landscape_settings import PASSES_A_MAP_POINT as PASSES_A_MAP_POINT
from lla_callbacks.slices.landscape_settings import PASSES_A_RAY as PASSES_A_RAY
from lla_callbacks.slices.landscape_settings import LandscapeSettings as LandscapeSettings
from lla_callbacks.slices.slices import (
    Line,
    Plane,
    measure_line,
    measure_path,
    measure_plane,
)


class Refines(Protocol):
    """Finds the loss between the points of one plane; see ``refinement.py``."""

    settings: PointSettings
    reason: str

    def finish(self, plane: Plane) -> Plane:
        """Return a measured plane with the loss between its points."""


Refining = Callable[[Objective, PointSettings, tuple[int, int], Share | None], Refines]


@dataclass(frozen=True, eq=False)
class Landscape:
    """What one measurement of several slices found.

    Attributes:
        planes: Name to plane.
        lines: Name to line.
        convexity: The convexity map, if one was asked for.
        basin: The basin's radii, if they were asked for.
        missing: Name of a slice to why it is not there.
        loss: The loss at the weights.
        seconds: Wall time.
        self_check: What the objective proved of itself; ``None`` if it was not asked.
        notes: What else a reader should know of the loss, in sentences.
    """

    planes: Mapping[str, Plane]
    lines: Mapping[str, Line]
    convexity: Convexity | None
    basin: Basin | None
    missing: Mapping[str, Exception]
    loss: float
    seconds: float
    self_check: SelfCheck | None = None
    notes: tuple[str, ...] = ()


def measure_landscape(
    objective: Objective,
    settings: LandscapeSettings,
    source: DirectionSource,
    *,
    share: Share | None = None,
    progress: Progress = lambda text, total: nullcontext(lambda count: None),
    refining: Refining | None = None,
) -> Landscape:
    """Return several slices, their directions computed once for all of them.

    A slice that cannot be had (Adam's moments before its first step, a path too short for a
    plane) is left out and named in ``missing``; the others are measured all the same.

    Args:
        objective: The loss.
        settings: Which slices, and how.
        source: Of directions.
        share: Processes that divide the points.
        progress: Opens a progress bar.
        refining: Finds the loss between a plane's points, if ``settings.refine`` asks for it.
    """
    source.expected = settings.wanted
    if space_of(objective).is_spread:
        # Each process holds a part of the weights: a point is computed by all of them together.
        share = source.share = None
    with held_in_one(objective):
        return _measured(
            _Work(objective, settings, source, share, progress, time.perf_counter(), refining)
        )


def _measured(work: _Work) -> Landscape:
    objective, settings, share = work.objective, work.settings, work.share
    loss = all_or_none(share or Alone(), objective)
    prove(objective, share)
    # Lines first: they are the cheapest, and say most for it.
    lines = {str(name): work.tried(f"line_{name}", work.line, name) for name in settings.lines}
    planes = {str(name): work.tried(f"plane_{name}", work.plane, name) for name in settings.planes}
    convexity = basin = None
    if settings.convexity_points:
        convexity = work.tried("convexity", work.convexity, (*settings.planes, "random")[0])
    if settings.num_rays:
        basin = work.tried("basin", work.basin)
    if work.missing and not (any(planes.values()) or any(lines.values()) or convexity or basin):
        raise next(iter(work.missing.values()))
    return Landscape(
        {name: plane for name, plane in planes.items() if plane is not None},
        {name: line for name, line in lines.items() if line is not None},
        convexity,
        basin,
        work.missing,
        loss,
        time.perf_counter() - work.began,
        objective.findings.proof.self_check if objective.check else None,
        objective.notes,
    )


@dataclass
class _Work:
    objective: Objective
    settings: LandscapeSettings
    source: DirectionSource
    share: Share | None
    progress: Progress
    began: float
    refining: Refining | None = None
    missing: dict[str, Exception] = field(default_factory=dict)
    # Passes of the slices that are still to come, by which what is left of the time is shared.
    to_come: float = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self.to_come = (
            len(s.lines) * s.line_points
            + len(s.planes) * s.passes_of_a_plane
            + PASSES_A_MAP_POINT * s.convexity_points**2
            + PASSES_A_RAY * s.num_rays
        )

    def tried(self, what: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return a slice, or None with its reason noted, the same in all processes."""
        try:
            return all_or_none(self.share or Alone(), lambda: action(*arguments), what)
        except OutOfStepError:
            # There is no common point to go on from.
            raise
        except Exception as error:  # noqa: BLE001 - one slice must not cost the others
            self.source.forget()
            # Without its traceback, whose frames hold graphs and weights.
            self.missing[what] = forgetful(error)
            return None

    def left(self, passes: float) -> float | None:
        """Return a slice's share of what is left of the time, a moment at least.

        Args:
            passes: What it takes of the passes that are still to come.
        """
        budget = self.settings.time_budget
        if budget is None:
            return None
        share = min(1.0, passes / max(self.to_come, passes))
        self.to_come -= passes
        return max(1e-3, share * (budget - (time.perf_counter() - self.began)))

    def plane(self, name: str) -> Plane:
        s = self.settings
        names = plane_names(name)
        first, second = self.source.get(names)
        path = self.source.path_on(names)
        alphas, betas = plane_coordinates((first, second), path, s.plane_points, s.reach)
        if path is not None:
            path = measure_path(self.objective, path, self.source.weights, share=self.share)
        budget = self.left(s.passes_of_a_plane)
        if budget is not None:
            # The rest is for what is between the points.
            budget *= s.plane_points**2 / s.passes_of_a_plane
        points, refinement = s.points(budget), None
        if s.refine and self.refining is not None:
            shape = len(alphas), len(betas)
            refinement = self.refining(self.objective, points, shape, self.share)
            points = refinement.settings
        with self.progress(f"Plane {name}", len(alphas) * len(betas)) as advance:
            plane = measure_plane(
                self.objective,
                (first, second),
                alphas,
                betas,
                points,
                normalization=s.normalization if self.source.is_normalized(names) else "",
                seed=s.seed,
                path=path,
                share=self.share,
                listener=advance,
            )
        if refinement is not None:
            plane = refinement.finish(plane)
            if refinement.reason:
                # The plane itself is there.
                why, _, remedy = refinement.reason.partition("; ")
                self.missing["refine"] = MeasurementError(
                    f"planes are not refined: {why}.",
                    f"{remedy[:1].upper()}{remedy[1:]}, or refine=False.",
                )
        return plane

    def line(self, name: str) -> Line:
        s = self.settings
        names = line_names(name)
        (direction,) = self.source.get(names)
        budget = self.left(s.line_points)
        with self.progress(f"Line {name}", s.line_points) as advance:
            return measure_line(
                self.objective,
                direction,
                centred(s.reach * direction.reach, s.line_points),
                s.points(budget),
                normalization=s.normalization if self.source.is_normalized(names) else "",
                seed=s.seed,
                share=self.share,
                listener=advance,
            )

    def convexity(self, name: str) -> Convexity:
        s = self.settings
        names = plane_names(name)
        first, second = self.source.get(names)
        path = self.source.path_on(names)
        alphas, betas = plane_coordinates((first, second), path, s.convexity_points, s.reach)
        budget = self.left(PASSES_A_MAP_POINT * s.convexity_points**2)
        with self.progress("Convexity map", len(alphas) * len(betas)) as advance:
            return measure_convexity(
                self.objective,
                (first, second),
                alphas,
                betas,
                num_steps=40,
                rtol=0.01,
                normalization=s.normalization if self.source.is_normalized(names) else "",
                seed=s.seed,
                time_budget=budget,
                share=self.share,
                listener=advance,
            )

    def basin(self) -> Basin:
        s = self.settings
        budget = self.left(PASSES_A_RAY * s.num_rays)
        with self.progress("Basin", s.num_rays) as advance:
            return measure_basin(
                self.objective,
                num_rays=s.num_rays,
                rise=s.rise,
                cutoff=s.cutoff,
                max_radius=4.0,
                normalization=s.normalization,
                vectors=s.vectors,
                seed=s.seed,
                time_budget=budget,
                share=self.share,
                listener=advance,
            )

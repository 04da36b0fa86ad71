"""Which slices are measured together, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lla_callbacks.objective.checks import (
    MOST_WORK,
    number,
    odd_points,
    positive,
    seed_of,
    settle,
    shown,
    whole,
)
from lla_callbacks.objective.evaluation import Predict, check_metrics
from lla_callbacks.objective.points import Evaluation, PointSettings
from lla_callbacks.slices.choice import line_names, plane_names
from lla_callbacks.slices.directions import Normalization, Vectors, check_normalization
from lla_callbacks.slices.fine import FEWEST, check_refine

# Passes that a ray takes, and a Lanczos run of a convexity map's point, about.
PASSES_A_RAY = 12
PASSES_A_MAP_POINT = 250
# What refining a plane takes beyond its points, in passes a point: 0.1 to 1.2 were measured
# (docs/benchmarks/planes.md), by how much a pass costs beside the loss of what it gives out.
PASSES_OF_REFINING = 1.2


@dataclass(frozen=True)
class LandscapeSettings:
    """Which slices are measured, and how.

    Attributes:
        planes: Names of planes; see :func:`~lla_callbacks.loss_plane`.
        lines: Names of lines; see :func:`~lla_callbacks.loss_line`.
        plane_points: Points along each side of a plane, odd.
        line_points: Points of a line, odd.
        convexity_points: Points along each side of a convexity map on the first plane's
            directions, odd; 0 for none.
        num_rays: Rays for the basin's radii; 0 for none.
        rise: Rim of the basin, above the loss at the weights.
        cutoff: The loss at the rim itself, instead of ``rise``.
        reach: Multiple of each direction's own range.
        normalization: Of random directions.
        vectors: One-dimensional parameters in random directions.
        metrics: Name to torchmetrics metric or function of (module, batch).
        predict: Gives torchmetrics their pairs.
        evaluation: ``"auto"``, ``"loop"`` or ``"vmap"``.
        time_budget: Seconds for all slices together; ``None``: no limit.
        seed: Of random directions, rays and start vectors.
        refine: Whether the loss between the points of a plane follows from what the network gives
            out at them; see :func:`~lla_callbacks.loss_plane`. Not with ``predict``.

    Raises:
        ValueError: Naming the setting, what was given, and what is allowed.
    """

    planes: Sequence[str] = ("random",)
    lines: Sequence[str] = ("random", "top1")
    plane_points: int = 17
    line_points: int = 21
    convexity_points: int = 0
    num_rays: int = 0
    rise: float = 0.1
    cutoff: float | None = None
    reach: float = 1.0
    normalization: Normalization = "filter"
    vectors: Vectors = "zero"
    metrics: Mapping[str, Any] | None = None
    predict: Predict | None = None
    evaluation: Evaluation = "auto"
    time_budget: float | None = None
    seed: int = 0
    refine: bool = False

    def __post_init__(self) -> None:
        for name in ("planes", "lines"):
            value = getattr(self, name)
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
                raise ValueError(
                    f"{name} is {shown(value)}; give a list of names, such as ['random']."
                )
            for item in value:
                _name(name, item)
            if len(set(value)) != len(value):
                raise ValueError(f"{name} is {shown(value)}; give each name once.")
        for name in ("plane_points", "line_points", "convexity_points"):
            found = odd_points(name, getattr(self, name), zero=name == "convexity_points")
            settle(self, **{name: found})
        rays = whole("num_rays", self.num_rays, 0, MOST_WORK, other=", 0 for none")
        settle(self, num_rays=rays, seed=seed_of("seed", self.seed))
        for name in ("rise", "reach"):
            settle(self, **{name: positive(name, getattr(self, name))})
        allowed = "a loss, or None for the one that rise gives"
        settle(self, cutoff=number("cutoff", self.cutoff, allowed, none=True))
        check_normalization(self.normalization, self.vectors)
        check_metrics(self.metrics, self.predict)
        refine = check_refine(self.refine, predict=self.predict)
        if not (self.planes or self.lines or self.num_rays):
            raise ValueError("planes, lines and num_rays are all empty: give one at least.")
        settle(self, time_budget=self.points(None).time_budget, refine=refine)

    def points(self, budget: float | None) -> PointSettings:
        """Return how points are evaluated, in what is left of the time."""
        return PointSettings(
            self.metrics, self.predict, self.evaluation, budget or self.time_budget
        )

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of all single directions."""
        pairs = [name for plane in self.planes for name in plane_names(plane)]
        return (*pairs, *self.lines)

    @property
    def passes_of_a_plane(self) -> float:
        """What a plane takes, in passes."""
        refined = self.refine and self.plane_points >= FEWEST
        return self.plane_points**2 * (1 + PASSES_OF_REFINING * refined)

    def smallest(self) -> LandscapeSettings:
        """Return settings that run every line of code and take no time."""
        return replace(
            self,
            plane_points=FEWEST if self.refine else 3,
            line_points=5,
            convexity_points=min(3, self.convexity_points),
            num_rays=min(2, self.num_rays),
        )


def _name(setting: str, value: Any) -> None:
    """Raise a ValueError, of the setting, for what names no plane or no line."""
    if not isinstance(value, str):
        raise ValueError(f"{setting} holds {shown(value)}; give names of directions.")
    try:
        (plane_names if setting == "planes" else line_names)(value)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error

"""The result of one measurement of several slices, with everything that can be made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lla_callbacks.objective.self_check import SelfCheck
from lla_callbacks.report.cost import in_steps
from lla_callbacks.report.files import write_arrays
from lla_callbacks.report.result import Drawn, Result
from lla_callbacks.report.stored import load_result, result_arrays
from lla_callbacks.report.words import with_error
from lla_callbacks.slices.directions import Direction
from lla_callbacks.slices.landscape import Landscape
from lla_callbacks.slices.landscape_figures import radius_in_words
from lla_callbacks.slices.line_figures import line_figure
from lla_callbacks.slices.results import (
    BasinRadii,
    ConvexityMap,
    LossLine,
    LossPlane,
    counted_of,
    finite_range,
)
from lla_callbacks.slices.scalars import landscape_scalars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class LandscapeReport(Result):
    """What :class:`~lla_callbacks.LossLandscapeMonitor` keeps of one measurement.

    The directions of planes and lines come without their vectors, so that a run that measures
    often does not fill memory with copies as large as the network.

    Attributes:
        planes: Name to plane.
        lines: Name to line.
        convexity: The convexity map, or None.
        basin: The basin's radii, or None.
        missing: Name of a slice to why it could not be had.
        loss: The loss at the weights.
        seconds: Wall time.
        training_steps: The same in training steps of the user's own batch; NaN where unknown.
        self_check: What the objective proved of itself; ``None`` if it was not asked.
        notes: What else a reader should know of the loss, in sentences.
    """

    planes: Mapping[str, LossPlane]
    lines: Mapping[str, LossLine]
    convexity: ConvexityMap | None
    basin: BasinRadii | None
    missing: Mapping[str, Exception]
    loss: float
    seconds: float
    self_check: SelfCheck | None = None
    notes: tuple[str, ...] = ()
    training_steps: float = math.nan

    @classmethod
    def of(cls, found: Landscape, *, training_steps: float = math.nan) -> LandscapeReport:
        """Return a report of a measurement."""
        return cls(
            {name: LossPlane.of(_light(plane)) for name, plane in found.planes.items()},
            {name: LossLine.of(_light(line)) for name, line in found.lines.items()},
            None if found.convexity is None else ConvexityMap.of(_light(found.convexity)),
            None if found.basin is None else BasinRadii.of(found.basin),
            found.missing,
            found.loss,
            found.seconds,
            found.self_check,
            found.notes,
            training_steps,
        )

    def __repr__(self) -> str:
        return f"<LandscapeReport of {', '.join(self.slices)}, loss {self.loss:.4g}>"

    @property
    def gaps(self) -> Mapping[str, Exception]:  # type: ignore[override]
        """What could not be had, by name, and why."""
        return self.missing

    @property
    def slices(self) -> dict[str, Any]:
        """Every slice by its name: ``plane_random``, ``line_top1``, ``convexity``, ``basin``."""
        found: dict[str, Any] = {f"plane_{name}": plane for name, plane in self.planes.items()}
        found |= {f"line_{name}": line for name, line in self.lines.items()}
        found |= {"convexity": self.convexity, "basin": self.basin}
        return {name: part for name, part in found.items() if part is not None}

    def scalars(self, name: str = "landscape") -> dict[str, float]:
        """Return the finite numbers by tag; ``name`` is the first part of each."""
        return landscape_scalars(self.slices, name, loss=self.loss, seconds=self.seconds)

    def figures(
        self,
        step: int,
        *,
        interpolate: bool = False,
        cap: float | None = None,
        surface: bool = False,
        run: tuple[float, float] | None = None,
        fine: int = 0,
    ) -> Drawn:
        """Return functions that draw what was found at a step, what matters first.

        Args:
            step: For titles.
            interpolate: Whether planes are drawn through a spline of the log loss.
            cap: Losses above this are drawn as this.
            surface: Whether planes are drawn as surfaces too.
            run: Lowest and highest loss of the whole run, where this picture is marked in.
            fine: Planes of fewer points along a side are drawn through a spline anyway.
        """
        drawn: dict[str, Callable[[], Figure]] = {}
        for name, plane in self.planes.items():
            # What is known between the points is shown.
            spline = interpolate or len(plane.alphas) < fine or plane.fine is not None
            look: dict[str, Any] = {"interpolate": spline, "cap": cap, "run": run}
            title = f"Loss on the {name} plane at step {step}"
            drawn[f"plane_{name}"] = partial(plane.figure, title=title, **look)
            for metric in plane.metrics:
                drawn[f"plane_{name}_{metric}"] = partial(
                    plane.figure,
                    title=f"{metric} on the {name} plane at step {step}",
                    metric=metric,
                    interpolate=interpolate,
                )
            if surface:
                drawn[f"surface_{name}"] = partial(plane.surface, title=title, cap=cap)
        if self.lines:
            drawn["lines"] = partial(self.line_figure, title=f"Loss on lines at step {step}")
        if self.convexity is not None:
            drawn["convexity"] = partial(self.convexity.figure, title=f"Convexity at step {step}")
        if self.basin is not None:
            drawn["basin"] = partial(self.basin.figure, title=f"Radii of the basin at step {step}")
        return drawn

    def save(self, path: str | Path) -> Path:
        """Write each slice to a folder of its own beside ``path``, and return their folder.

        ``<folder>/step_00000100.npz`` becomes ``<folder>/plane_random/step_00000100.npz``, and
        so on; what belongs to no slice is in ``<folder>/report/step_00000100.npz``.
        """
        path = Path(path)
        for name, part in self.slices.items():
            part.save(path.parent / name / path.name)
        rest = replace(self, planes={}, lines={}, convexity=None, basin=None)
        write_arrays(_rest_of(path), result_arrays(rest))
        return path.parent

    @classmethod
    def load(cls, path: str | Path) -> LandscapeReport:
        """Return a report that was saved, by the path that :meth:`save` was given.

        Raises:
            ValueError: If there is none.
        """
        path = Path(path)
        if not _rest_of(path).exists():
            raise ValueError(
                f"{_rest_of(path)} does not exist; give the path that save of a LandscapeReport "
                "was given."
            )
        rest: LandscapeReport = load_result(_rest_of(path), cls)
        files = {p.parent.name: p for p in sorted(path.parent.glob(f"*/{path.name}"))}
        parts: dict[str, Any] = {"planes": {}, "lines": {}}
        for name, file in files.items():
            for prefix, kind in (("plane_", LossPlane), ("line_", LossLine)):
                if name.startswith(prefix):
                    parts[f"{prefix[:-1]}s"][name.removeprefix(prefix)] = kind.load(file)
        if "convexity" in files:
            parts["convexity"] = ConvexityMap.load(files["convexity"])
        if "basin" in files:
            parts["basin"] = BasinRadii.load(files["basin"])
        return replace(rest, **parts)

    def figure(self, *, title: str = "") -> Figure:
        """Return what says most: the first plane, else all lines, the convexity map, the basin.

        Raises:
            ValueError: If there is no slice.
        """
        found = self._figures(title)
        if not found:
            raise ValueError(f"no slice was measured; {self.missing or 'none was asked for'}.")
        return found[0]

    def _figures(self, title: str = "") -> list[Figure]:
        found = [plane.figure(title=title) for plane in self.planes.values()]
        if self.lines:
            found.append(self.line_figure(title=title))
        return found + [
            part.figure(title=title) for part in (self.convexity, self.basin) if part is not None
        ]

    def _draw(self, axes: Axes) -> None:
        for part in self.slices.values():
            part._draw(axes)
            return
        axes.set_axis_off()

    @classmethod
    def _compared(cls, results: Sequence[LandscapeReport], names: Sequence[str]) -> Figure | None:
        for name, part in results[0].slices.items():
            same = [found.slices.get(name) for found in results]
            if None not in same:
                compared: Figure = type(part)._compared(same, names)
                return compared
        return None

    def line_figure(self, *, title: str = "", metric: str | None = None) -> Figure:
        """Return all lines side by side."""
        return line_figure(list(self.lines.values()), title=title, metric=metric)

    def summary(self) -> str:
        """Return what was found, in sentences."""
        lines = [f"Loss {self.loss:.4g} at the weights, {self.seconds:.2g} s of slices around it."]
        for name, plane in self.planes.items():
            lines.append(
                f"  plane {name:<12} loss {finite_range(plane.loss)} on "
                f"{counted_of(plane.evaluated)}"
            )
            lines += [f"  {'':18} {_unsettled(d)}" for d in plane.directions if not d.settled]
            if plane.fine is not None and plane.picture is not None:
                lines.append(f"  {'':18} between them: {plane.picture.words}")
            if plane.path is not None:
                lines.append(
                    f"  path of training   {float(plane.path.explained.sum()):.1%} of its variance "
                    f"lies in the plane; the point furthest from it misses "
                    f"{float(plane.path.residuals.max()):.0%} of its distance"
                )
        for name, line in self.lines.items():
            direction = line.directions[0]
            text = f"  line {name:<13} curvature {with_error(line.curvature, line.curvature_error)}"
            if direction.eigenvalue is not None:
                known = with_error(direction.eigenvalue, direction.residual or math.nan)
                text += f", where the Hessian's eigenvalue is {known}"
            if not bool(line.evaluated.all()):
                text += f", on {counted_of(line.evaluated)}"
            lines.append(text)
            lines += [f"  {'':18} {_unsettled(d)}" for d in line.directions if not d.settled]
        if self.basin is not None:
            b = self.basin
            lines.append(
                f"  basin              effective radius "
                f"{radius_in_words(b)} filter norms until the "
                f"loss passes {b.cutoff:.4g} ({len(b.radii)} rays, {int(b.open.sum())} never did)"
            )
        if self.self_check is not None:
            lines += [f"  {line}" for line in self.self_check.lines()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines) + in_steps(self.training_steps)


def _unsettled(direction: Direction) -> str:
    return (
        f"{direction.name}: too few products to tell, so another direction may be the one asked for"
    )


def _light(found: Any) -> Any:
    """Return a result whose directions have no vectors."""
    bare = tuple(replace(d, vector=torch.empty(0)) for d in found.directions)
    return replace(found, directions=bare)


def _rest_of(path: Path) -> Path:
    return path.parent / "report" / path.name

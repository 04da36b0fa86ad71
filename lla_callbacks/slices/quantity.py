"""Lines, planes, convexity and basin around the weights, as one quantity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lla_callbacks.linalg.errors import NotYetError
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.costs import FORWARD, PRODUCT
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.parts import Parameters, variables_of
from lla_callbacks.objective.spelling import made, spelled
from lla_callbacks.report.conform import check_entries, check_flat
from lla_callbacks.report.quantity import Drawn, Quantity
from lla_callbacks.report.step_words import step_text
from lla_callbacks.slices.choice import DirectionSource
from lla_callbacks.slices.eigenvectors import NAMES, Known, known_directions
from lla_callbacks.slices.fields import counted
from lla_callbacks.slices.landscape import (
    PASSES_A_MAP_POINT,
    PASSES_A_RAY,
    LandscapeSettings,
    measure_landscape,
)
from lla_callbacks.slices.refinement import Refinement
from lla_callbacks.slices.report import LandscapeReport
from lla_callbacks.slices.scalars import FEW
from lla_callbacks.slices.step_words import numbers_of
from lla_callbacks.slices.trajectory import Trajectory

# Weights of the path of training that are kept on the CPU, all together.
PATH_MEMORY = 2**30
# Products that eigenvectors take.
PRODUCTS = 12
# Points along each side from which a plane looks smooth by itself.
FINE = 13
# Before this many steps a path has no plane and Adam no moments worth a warning.
YOUNG = 4

# Of what type the entries of a stored state are.
_STATE: dict[str, Any] = {
    "path": Mapping[str, Any],
    "previous": tuple[int, Tensor] | None,
    "scale": tuple[float, float] | None,
}
_PATH = {"steps": list[int], "weights": list[Tensor], "interval": int}


class Slices(Quantity):
    """The loss on lines and planes through the weights, convexity maps and the basin's radii.

    Directions come from one seed, the same for all moments; contours are at the same values in all
    pictures, and a bar shows which part of the run's range each one has, so that they compare.
    Tags, figures and files are those of :class:`~lla_callbacks.LossLandscapeMonitor`.

    Args:
        settings: Which slices, and how.
        interpolate: Whether planes are drawn through a spline of the log loss.
        cap: Losses above this are drawn as this.
        surface: Whether planes are drawn as surfaces too.
        name: First part of every tag.

    Attributes:
        path: The weights of training that principal components are of.
    """

    proves_itself = True
    result = LandscapeReport
    few = FEW
    reads_shards = True

    @spelled
    def __init__(
        self,
        settings: LandscapeSettings | None = None,
        *,
        interpolate: bool = False,
        cap: float | None = None,
        surface: bool = False,
        name: str = "landscape",
    ) -> None:
        self.name = name
        # Which parameters the monitor moves.
        self.parameters: Parameters = None
        self._settings = made("settings", settings) or LandscapeSettings()
        self.interpolate, self.cap, self.surface = interpolate, cap, surface
        if not {*NAMES, "gradient"}.isdisjoint(self.settings.wanted):
            self.takes = ("spectrum",)
        # Asked after every batch.
        self._wants_update = "update" in self.settings.wanted
        self._wants_path = not {"pc1", "pc2"}.isdisjoint(self.settings.wanted)
        self.watches = self._wants_update or self._wants_path
        self.path = Trajectory(PATH_MEMORY)
        # Of the weights along it, whole; of spread ones each process records what it has.
        self._dim = 0
        self._previous: tuple[int, Tensor] | None = None
        self._scale: tuple[float, float] | None = None
        # Whether it was said that time was over before all points were there.
        self._was_late = False

    @property
    def settings(self) -> LandscapeSettings:
        """Which slices are measured, and how."""
        return self._settings

    @property
    def gradients(self) -> float:  # type: ignore[override]
        """What measuring takes, in gradients of all held samples, about."""
        s = self.settings
        passes = len(s.planes) * s.passes_of_a_plane + len(s.lines) * s.line_points + 4
        passes += PASSES_A_RAY * s.num_rays + PASSES_A_MAP_POINT * s.convexity_points**2
        return FORWARD * passes + (PRODUCT * PRODUCTS if needs_products(s) else 0)

    @property
    def most_seconds(self) -> float:  # type: ignore[override]
        """Seconds after which no further point is begun; infinite without a limit."""
        budget = self.settings.time_budget
        return math.inf if budget is None else budget

    # -- measured -----------------------------------------------------------------------

    def measure(self, objective: Objective, moment: Moment) -> LandscapeReport:
        """Return a report of all slices."""
        lent = moment.lent
        settings = replace(self.settings, **lent.size)
        if lent.quick:
            settings = self.settings.smallest()
        earlier = self._common_points(moment, lent.share)
        before = self._previous
        source = DirectionSource(
            objective,
            settings.normalization,
            settings.vectors,
            settings.seed,
            moment.optimizer,
            previous=before[1] if before and before[0] == moment.step - 1 else None,
            weights=[self.path.weights[i] for i in earlier],
            steps=[*(self.path.steps[i] for i in earlier), moment.step],
            share=lent.share,
            known=lent.shared.get("directions", Known()),
        )
        found = measure_landscape(
            objective,
            settings,
            source,
            share=lent.share,
            progress=lent.progress,
            refining=Refinement,
        )
        result = LandscapeReport.of(found, training_steps=lent.in_steps(found.seconds))
        self._tell_if_late(result, settings, lent.say)
        if self._scale is None and result.loss > 0 and not lent.only:
            # Four decades about the first loss, for all pictures of the run.
            self._scale = (1e-3 * result.loss, 10 * result.loss)
        return result

    def _tell_if_late(
        self, result: LandscapeReport, settings: LandscapeSettings, say: Callable[[str], object]
    ) -> None:
        """Say once a run that time was over before all points were there."""
        done = {f"plane_{name}": plane.evaluated for name, plane in result.planes.items()}
        done |= {f"line_{name}": line.evaluated for name, line in result.lines.items()}
        if result.convexity is not None:
            done["convexity"] = result.convexity.evaluated
        cut = [
            f"{name} has {counted(int(points.sum()), points.numel())}"
            for name, points in done.items()
            if not bool(points.all())
        ]
        if result.basin is not None and len(result.basin.radii) < settings.num_rays:
            cut.append(f"basin has {len(result.basin.radii)} of {settings.num_rays} rays")
        if not cut or self._was_late:
            return
        self._was_late = True
        say(
            f"time_budget={settings.time_budget:g} s was over before all points were there: "
            f"{'; '.join(cut)}. Coarse pictures are drawn of them. Raise time_budget (None: no "
            "limit), or ask for fewer points, slices or samples."
        )

    def _common_points(self, moment: Moment, share: Share) -> list[int]:
        """Return which recorded weights are earlier ones that every process has."""
        steps = self.path.steps
        common = {step for step in steps if step < moment.step}
        if self._wants_path:
            for other in share.union([list(steps)]):
                common &= set(other)
        return [i for i, step in enumerate(steps) if step in common]

    def offered(self, what: str, things: Sequence[Any], moment: Moment) -> None:
        """Take eigenvectors from somebody else's Lanczos run, as far as it has found them."""
        if what == "spectrum":
            hessian, run = things
            found = known_directions(hessian, run, self.settings.wanted)
            moment.lent.shared["directions"] = found

    # -- shown --------------------------------------------------------------------------

    def text(
        self, result: LandscapeReport, history: Sequence[tuple[int, Any]], moment: Moment
    ) -> str:
        """Return what changed since the last measurement, and everything in sentences."""
        before = [(step, numbers_of(found)) for step, found in history[-2:-1]]
        return step_text(
            moment.step, numbers_of(result), before[0] if before else None, result.summary()
        )

    def figures(
        self, result: LandscapeReport, history: Sequence[tuple[int, Any]], moment: Moment
    ) -> Drawn:
        """Return functions that draw, what matters first."""
        return result.figures(
            moment.step,
            interpolate=self.interpolate,
            cap=self.cap,
            surface=self.surface,
            run=self._scale,
            # A plane that had to be coarse is drawn through the spline, and says so.
            fine=FINE if moment.lent.size else 0,
        )

    def gaps(self, result: LandscapeReport, moment: Moment) -> Mapping[str, Any]:
        """Return what could not be had, but for what no young run has."""
        young = moment.step < YOUNG and moment.function == "fit"
        return {
            what: error
            for what, error in result.missing.items()
            if not (young and isinstance(error, NotYetError))
        }

    # -- the path of training -----------------------------------------------------------

    def begin(self) -> None:
        """Forget all earlier runs."""
        self.end()
        self._scale, self._was_late = None, False

    def end(self) -> None:
        """Drop the path."""
        self.path = Trajectory(PATH_MEMORY)
        self._previous = None

    def weights_changed(self, dim: int) -> None:
        """Drop a path of other parameters: it is one of the same ones throughout."""
        if self._dim not in (0, dim):
            self.path, self._previous, self._dim = Trajectory(PATH_MEMORY), None, 0

    def before_step(self, step: int, module: nn.Module) -> None:
        """Keep the weights before a step, for the direction of the last update."""
        if self._wants_update and (self._previous is None or self._previous[0] != step):
            self._previous = step, self._weights(module)

    def after_step(self, step: int, module: nn.Module) -> None:
        """Keep the present weights as a point of the path, if one is wanted and due."""
        if self._wants_path and self.path.wants(step):
            self.path.record(step, self._weights(module))

    def _weights(self, module: nn.Module) -> Tensor:
        space = ParameterSpace(variables_of(module, self.parameters))
        self.weights_changed(space.dim)
        self._dim = space.dim
        return space.flatten(space.tensors).cpu()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        path, previous = self.path.state(), self._previous
        recorded = [*self.path.weights, *([previous[1]] if previous else [])]
        if any(len(weights) != self._dim for weights in recorded):
            # One process saves for all, and has a part of each.
            path, previous = Trajectory(PATH_MEMORY).state(), None
        return {"path": path, "previous": previous, "scale": self._scale}

    def read(self, state: Mapping[str, Any], module: nn.Module) -> Any:
        """Return a state, read and checked."""
        check_entries(state, _STATE, "the state")
        path, previous, scale = (state[name] for name in _STATE)
        check_entries(path, _PATH, "the state's path")
        if len(path["steps"]) != len(path["weights"]) or path["interval"] < 1:
            raise ValueError("the state's path has not one set of weights for each step.")
        space = ParameterSpace(variables_of(module, self.parameters))
        for weights in [*path["weights"], *([previous[1]] if previous else [])]:
            check_flat(weights, space.dim, "a point of the state's path")
        # The run may go on in another precision.
        path = {**path, "weights": [weights.to(space.dtype) for weights in path["weights"]]}
        if previous is not None:
            previous = previous[0], previous[1].to(space.dtype)
        return path, previous, scale

    def take(self, read: Any) -> None:
        """Go on from a state."""
        path, self._previous, self._scale = read
        self.path.load(path)
        recorded = [*path["weights"], *([self._previous[1]] if self._previous else [])]
        self._dim = len(recorded[0]) if recorded else 0


def largest_alone(settings: LandscapeSettings) -> bool:
    """Return whether the only eigenvector among the directions is that of the largest one."""
    return {*NAMES} & {*settings.wanted} == {"top1"}


def needs_products(settings: LandscapeSettings) -> bool:
    """Return whether some direction is an eigenvector."""
    return any(str(name).startswith(("top", "bottom")) for name in settings.wanted)

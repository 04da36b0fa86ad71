"""The Hessian's spectrum as a quantity: measured fully, and lightly in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lla_callbacks.hessian.engine_error import gap_remedy
from lla_callbacks.hessian.figures import history_figure
from lla_callbacks.hessian.layer_figures import layer_history_figure
from lla_callbacks.hessian.measures import Anchor, measure
from lla_callbacks.hessian.report import HessianReport
from lla_callbacks.hessian.scalars import FEW, tracking_scalars
from lla_callbacks.hessian.settings import HessianSettings, TrackingSettings
from lla_callbacks.hessian.step_words import numbers_of
from lla_callbacks.hessian.tracking import HessianTracking, TrackerState, anchored, track
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.sharing import all_or_none
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.costs import PRODUCT
from lla_callbacks.objective.layers import layer_parameters, outside
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.parts import Parameters, variables_of
from lla_callbacks.objective.spelling import made, spelled
from lla_callbacks.report.conform import check_entries, check_fields, check_flat
from lla_callbacks.report.quantity import Drawn, Quantity
from lla_callbacks.report.step_words import step_text
from lla_callbacks.report.thinning import drawn as drawn_part

# Of what type the entries of a stored state are.
_STATE = {"tracker": Mapping[str, Any], "tracker_step": int, "fallback": str}


class Spectrum(Quantity):
    """Extreme eigenvalues, traces, density, layers and criteria of the Hessian.

    One spectrum run feeds all of it. Tags, figures and files are those of
    :class:`~lla_callbacks.HessianMonitor`.

    Args:
        settings: How a Hessian is measured.
        tracking: How it is measured lightly; ``None`` does without, and nothing is kept for it.
        interval: Optimizer steps between two light measurements.
        name: First part of every tag.

    Attributes:
        tracker: What a light measurement goes on from.
        tracker_step: The step it is of, -1 before.
    """

    proves_itself = True
    result = HessianReport
    reads_shards = True
    few = FEW
    offers = ("spectrum",)

    @spelled
    def __init__(
        self,
        settings: HessianSettings | None = None,
        tracking: TrackingSettings | None = None,
        interval: int = 0,
        name: str = "hessian",
    ) -> None:
        self.name = name
        self._settings = made("settings", settings) or HessianSettings()
        self.tracking = tracking
        self.interval = interval
        self.tracker = TrackerState()
        self.tracker_step = -1
        # Why differences took over in this run; empty while the exact engine serves.
        self._fallback = ""
        self._told = False
        # Which parameters the monitor measures.
        self.parameters: Parameters = None

    @property
    def settings(self) -> HessianSettings:
        """How a Hessian is measured."""
        return self._settings

    @property
    def gradients(self) -> float:  # type: ignore[override]
        """What measuring takes, in gradients of all held samples, about."""
        products = self.settings.max_matvecs + self.settings.layer_plan.max_matvecs
        return 1 + PRODUCT * products

    # -- measured -----------------------------------------------------------------------

    def measure(self, objective: Objective, moment: Moment) -> HessianReport | HessianTracking:
        """Return a report, or what a light measurement found."""
        engine = objective.engine
        reason = self._fallback if engine == "auto" else ""
        if reason:
            # What failed once would fail again, at its cost.
            objective.engine = "difference"
        try:
            found: HessianReport | HessianTracking
            if moment.light:
                found = self._light(objective, moment)
            else:
                found = self._full(objective, moment, reason)
        finally:
            objective.engine = engine
        if engine == "auto" and found.engine == "difference" and not self._told:
            self._told = True
            # Memory that is short once need not be short the next time.
            self._fallback = "" if "Memory" in found.engine_reason else found.engine_reason
            moment.lent.say(f"products by differences of gradients, since {found.engine_reason}")
        return found

    def _full(self, objective: Objective, moment: Moment, reason: str) -> HessianReport:
        lent = moment.lent
        settings = replace(self.settings, **lent.size)
        if lent.quick:
            settings = settings.smallest()
        with ExitStack() as stack:
            advance = all_or_none(
                lent.share,
                lambda: stack.enter_context(
                    lent.progress("Hessian", self._num_products(objective, settings))
                ),
            )
            found = measure(
                objective,
                settings,
                limit=moment.limit,
                listener=advance,
                share=lent.share,
                anchor=self._anchor(moment),
            )
        if reason:
            found = replace(found, engine_reason=reason)
        return HessianReport.of(found, training_steps=lent.in_steps(found.seconds))

    def _num_products(self, objective: Objective, settings: HessianSettings) -> int:
        """Return how many products a full measurement takes at most."""
        products = settings.max_matvecs
        if self.tracking:
            products += self.tracking.num_probes // 2
        if settings.layer_plan.max_matvecs:
            space = ParameterSpace(objective.variables)
            groups = layer_parameters(objective.module, space, settings.layers)
            products += len(groups) * settings.layer_plan.max_matvecs
        return products

    def _anchor(self, moment: Moment) -> Anchor:
        """Return what lets others, and light measurements, go on from a full one."""

        def anchor(hessian: Any, blocks: Any, runs: Any, traces: Any) -> None:
            moment.lent.offer("spectrum", hessian, runs[0])
            if self.tracking is None:
                return
            settings = self._light_settings(quick=moment.lent.quick)
            known = anchored(hessian, blocks, runs, traces, settings, self.tracker)
            self.tracker, self.tracker_step = known, moment.step

        return anchor

    def _light(self, objective: Objective, moment: Moment) -> HessianTracking:
        lent = moment.lent
        state = self.tracker.aged(moment.step - self.tracker_step, self.interval)
        settings = self._light_settings(quick=lent.quick)
        found, self.tracker = track(objective, settings, state, share=lent.share)
        self.tracker_step = moment.step
        return found

    def _light_settings(self, *, quick: bool) -> TrackingSettings:
        assert self.tracking is not None
        if not quick:
            return self.tracking
        return replace(self.tracking, num_steps=2, num_probes=min(2, self.tracking.num_probes))

    def kept(self, result: HessianReport) -> HessianReport:
        """Return a report without eigenvectors, each of which is as long as the network."""
        vectors = result.eigenvectors
        return result if vectors is None else replace(
            result, eigenvectors=vectors.without_vectors()
        )  # fmt: skip

    # -- shown --------------------------------------------------------------------------

    def scalars(self, result: HessianReport | HessianTracking) -> dict[str, float]:
        """Return a result's numbers by tag."""
        if isinstance(result, HessianTracking):
            return tracking_scalars(result, self.name)
        return result.scalars(self.name)

    def gaps(self, result: HessianReport | HessianTracking, moment: Moment) -> Mapping[str, Any]:
        """Return what could not be said, by name; what is not the engine's says what to do."""
        return {
            what: MeasurementError(f"{what}: {why}.", "") if why.startswith("eig_rtol=") else why
            for what, why in result.gaps.items()
        }

    def remedy(self, result: HessianReport | HessianTracking) -> str:
        """Return what a user can do about gaps."""
        return gap_remedy(result.engine_reason)

    def text(
        self, result: HessianReport, history: Sequence[tuple[int, Any]], moment: Moment
    ) -> str:
        """Return what changed since the last measurement, and everything in sentences."""
        before = [(step, numbers_of(found)) for step, found in history[-2:-1]]
        return step_text(
            moment.step, numbers_of(result), before[0] if before else None, result.summary()
        )

    def figures(
        self, result: HessianReport, history: Sequence[tuple[int, Any]], moment: Moment
    ) -> Drawn:
        """Return functions that draw, what matters first."""
        step = moment.step
        now = result.figures(step, layer_spectra=bool(self.settings.num_layer_steps))
        past: dict[str, Callable[[], Any]] = {}
        if moment.function == "fit" and len(history) > 1:
            title = f"How the spectrum moved, up to step {step}"
            past["history"] = partial(history_figure, drawn_part(history), title=title)
            title = f"How the layers' curvature moved, up to step {step}"
            past["layer_history"] = partial(layer_history_figure, drawn_part(history), title=title)
        both = {**now, **past}
        return {name: both[name] for name in _ORDER if name in both}

    # -- of a run -----------------------------------------------------------------------

    def check(self, module: nn.Module) -> str:
        """Raise a ValueError if layers do not fit a module; return which are told apart."""
        if self.settings.layers is None:
            return ""
        space = ParameterSpace(variables_of(module, self.parameters))
        groups = layer_parameters(module, space, self.settings.layers)
        left = outside(space, groups)
        if not left:
            return ""
        some = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        return (
            f"{len(groups)} layers are told apart; "
            f"{len(space.index(left)):,} of {space.dim:,} parameters belong to none ({some})."
        )

    def begin(self) -> None:
        """Forget all earlier runs."""
        self.tracker, self.tracker_step = TrackerState(), -1
        self._fallback, self._told = "", False

    def end(self) -> None:
        """Drop the vectors of light measurements."""
        self.tracker = TrackerState()

    def weights_changed(self, dim: int) -> None:
        """Drop vectors of other parameters."""
        self.tracker = TrackerState()

    def do_without_layers(self) -> None:
        """Tell each module's own parameters apart."""
        self._settings = replace(self.settings, layers=None)
        self.tracking = self.tracking and replace(self.tracking, layers=None)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {
            "tracker": self.tracker.state_dict(),
            "tracker_step": self.tracker_step,
            "fallback": self._fallback,
        }

    def read(self, state: Mapping[str, Any], module: nn.Module) -> Any:
        """Return a state, read and checked."""
        check_entries(state, _STATE, "the state")
        tracker = TrackerState.from_state_dict(state["tracker"])
        check_fields(tracker, "the state's tracker")
        if tracker.vector is not None:
            space = ParameterSpace(variables_of(module, self.parameters))
            check_flat(tracker.vector, space.dim, "the state's tracker.vector")
            # The run may go on in another precision.
            tracker = replace(tracker, vector=tracker.vector.to(space.dtype))
        return tracker, state["tracker_step"], state["fallback"]

    def take(self, read: Any) -> None:
        """Go on from a state."""
        self.tracker, self.tracker_step, self._fallback = read
        self._told = bool(self._fallback)


# What matters first.
_ORDER = (
    "density", "history", "layer_traces", "layer_history", "layer_densities", "layer_distances",
)  # fmt: skip

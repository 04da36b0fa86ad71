"""Measure the Hessian of a training run, live, without disturbing it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lla_callbacks.callbacks.account import booked
from lla_callbacks.callbacks.compat import step_of
from lla_callbacks.callbacks.moments import Moment, space_of
from lla_callbacks.callbacks.monitor import Monitor
from lla_callbacks.callbacks.pace import Choice
from lla_callbacks.callbacks.saved_state import check_entries, check_flat
from lla_callbacks.callbacks.schedule import Schedule
from lla_callbacks.callbacks.sizing import (
    SpectrumSize,
    UnitCosts,
    choose_spectrum,
    fitting,
    has_room_to_draw,
    spectrum_ladder,
)
from lla_callbacks.hessian.engine_error import gap_remedy
from lla_callbacks.hessian.figures import history_figure
from lla_callbacks.hessian.layer_figures import layer_history_figure
from lla_callbacks.hessian.light_arrays import LightSeries
from lla_callbacks.hessian.measures import Anchor, measure
from lla_callbacks.hessian.report import HessianReport
from lla_callbacks.hessian.scalars import custom_scalars_layout, hessian_scalars, tracking_scalars
from lla_callbacks.hessian.settings import HessianSettings, TrackingSettings, check_light
from lla_callbacks.hessian.tracking import HessianTracking, TrackerState, anchored, track
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.sharing import all_or_none
from lla_callbacks.objective.checks import whole
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.layers import layer_parameters, outside
from lla_callbacks.objective.objective import Engine, Mode, Objective
from lla_callbacks.objective.precision import Precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.report.conform import check_fields, check_type
from lla_callbacks.report.plain import PlainForms, unpack
from lla_callbacks.report.thinning import RECENT, thin
from lla_callbacks.report.thinning import drawn as drawn_part

# A product in gradients, about (docs/cost.md).
PRODUCT = 2.4
# Figures that are planned for at the end.
NUM_FIGURES = 1
# Figures of a measurement, where there is room for all.
MOST_FIGURES = 4

# Of what type the further entries of a stored state are.
_TRACKED = {
    "tracker": Mapping[str, Any],
    "tracker_step": int,
    "last_light": int,
    "written": int,
    "tracked": list[tuple[int, Mapping[str, Any]]],
    "fallback": str,
}
_NO = ", or None for no light measurements"


class HessianMonitor(Monitor):
    r"""Log the Hessian's extreme eigenvalues, trace, layer traces, density and criteria.

    Training is left bitwise unchanged. A measurement happens when training starts, on
    schedule, and when it ends; stand-alone ``trainer.validate`` and ``trainer.test``
    measure on their own batches. If one fails, there is one warning with the remedy and a
    gap in the curves.

    **Logged**: ``hessian/lambda_max``, ``hessian/lambda_min``, ``hessian/trace``,
    ``hessian/trace_sem``, ``hessian/kh05`` and the other criteria,
    ``hessian_layers/<layer>/trace`` and more of each layer on request, ``hessian/seconds``,
    ``hessian/overhead``; residuals and errors under ``hessian_errors/``; figures
    ``hessian/density``, ``hessian/history``, ``hessian/layer_traces``,
    ``hessian/layer_history`` and, with ``num_layer_steps``, ``hessian/layer_densities`` and
    ``hessian/layer_distances``. The step is the number of optimizer steps
    that the weights have seen. Scalars reach ``trainer.callback_metrics`` too, for
    EarlyStopping and ModelCheckpoint, where the last value stays until the next one.

    Args:
        every_n_epochs: Measure at the end of every n-th training epoch.
        every_n_train_steps: Measure every n optimizer steps, from when the held batches are
            there (after ``num_samples`` samples). With neither, about ten times a run, in sizes
            that fit ``max_overhead`` (docs/usage.md).
        track_every_n_train_steps: Between two of those, measure ``lambda_max``, the trace and
            the layers' traces every n optimizer steps, lightly: they go on from the last time's
            vectors and estimates (docs/usage.md), and write to the same tags. ``None``
            (default) does without.
        track_num_probes: Probes of the trace in a light measurement, an even number; 0 leaves
            out the traces. This and the next one:
            :class:`~lla_callbacks.hessian.tracking.TrackingSettings`.
        track_eig_rtol: Relative residual at which a light measurement's Lanczos run stops;
            ``None`` leaves out ``lambda_max``.
        layers: Layers that are told apart: ``None`` takes every module that owns parameters,
            ``"blocks"`` every repeated block; or paths, patterns or a predicate of modules,
            see :func:`~lla_callbacks.objective.layers.layer_parameters`.
        num_probes: Random probes of the trace; see
            :class:`~lla_callbacks.hessian.settings.HessianSettings` for this and the
            next two.
        num_steps: Lanczos depth. KH05 compares only at equal depth; published: 100.
        num_runs: Independent Lanczos runs, of the whole and of each layer.
        num_layer_steps: Lanczos depth in each layer's own block, for its extreme
            eigenvalues, density and distance to the whole; 0 (default) does without.
        num_layer_probes: Most block probes a layer, where they make its trace surer than
            the whole's probes do; 0 (default) does without.
        num_samples: Hold the first training batches until they have this many samples.
            ``None``: 256, or as many as fit ``max_overhead``. Likewise ``num_probes`` and
            ``num_steps``.
        mode: ``"batch"``: normalization by batch statistics, as in training; ``"eval"``:
            by running statistics.
        dropout: Whether dropout stays on; off by default.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``.
        dataloader: Batches to measure on instead of the first training batches.
        seed: Fixes every random vector.
        max_overhead: Share of training time, such as 0.05, that all monitors of the Trainer may
            take together, first and last measurement included. ``None``: 0.05 (choice: what is
            less is not felt) if no schedule is given, no limit if one is, so that an explicit
            schedule is kept. Of several monitors the largest counts for all together, and each
            keeps to its own.
        eig_rtol: Stop Lanczos early at this relative residual of both extremes. KH05 then
            has the depth that ``hessian/num_steps`` says.
        trace_rtol: Stop probing early at this relative standard error.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that a measurement may take beside training. Graphs that do not fit are
            built anew for each product (3 gradients instead of 2), batches that do not fit are
            split where their samples do not see each other, and where that is not enough,
            differences of gradients take over. ``None``: half of what a training step takes, and
            256 MiB at least; a batch that cannot be split then goes through whole.
        engine: ``"exact"``: double backward. ``"difference"``: central differences of gradients,
            in the memory of a training step, with their own error in every result; what they
            cannot say within 5 % is a gap. ``"auto"``: exact, and by difference where a second
            derivative does not exist or does not fit in memory, or parameters are sharded; one
            line in the log says so.
        check: Whether the loss proves itself at the first measurement of a run, for about six
            gradients; see :func:`~lla_callbacks.measure_hessian` for this and the next.
        jacobian: Where the gradient is no derivative of the loss: ``"gap"``, or ``"measure"`` the
            Jacobian of the training gradient, marked as such.
        precision: ``"float32"``: no autocast, and half-precision weights are widened for the
            measurement. ``"training"``: as the Trainer has it; bfloat16 costs 1 to 4 %.
        figures: Whether figures are drawn.
        save_arrays: Whether every result is written to
            ``<log_dir>/hessian/step_00000100.npz`` (TensorBoard thins images out).
        save_batches: Whether checkpoints hold the held batches, once for all monitors that hold
            the same ones. Without them a resumed run holds new ones, and says so where they are
            others.
        custom_scalars: Whether TensorBoard gets a layout that draws values with their
            error bands. Turn it off if you store a layout of your own.
        name: First part of every tag; give each monitor its own.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Attributes:
        history: Pairs of step and :class:`HessianReport` of the last fit: all of it up to 400,
            then the last 100 and the older ones evenly thinned; files and loggers have all.
        tracked: Pairs of step and
            :class:`~lla_callbacks.hessian.tracking.HessianTracking`, the light
            measurements of the last fit, thinned likewise.
        report: The last one of all, also of a stand-alone validate or test.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lla_callbacks import HessianMonitor
        >>> trainer = Trainer(callbacks=[HessianMonitor()], max_epochs=1)
    """

    measures_shards = True
    _result = HessianReport
    _last_light: int
    _tracker_step: int
    _written: int
    share = 0.65

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        track_every_n_train_steps: int | None = None,
        track_num_probes: int = TrackingSettings.num_probes,
        track_eig_rtol: float | None = TrackingSettings.eig_rtol,
        layers: str | list[str] | Callable[[str, nn.Module], bool] | None = None,
        num_probes: int | None = None,
        num_steps: int | None = None,
        num_runs: int = HessianSettings.num_runs,
        num_layer_steps: int = HessianSettings.num_layer_steps,
        num_layer_probes: int = HessianSettings.num_layer_probes,
        num_samples: int | None = None,
        mode: Mode = "batch",
        dropout: bool = False,
        loss: Callable[[Any, Any], Any] | None = None,
        dataloader: Any = None,
        seed: int = 0,
        max_overhead: float | None = None,
        eig_rtol: float | None = None,
        trace_rtol: float | None = None,
        microbatch_size: int | None = None,
        max_memory: int | None = None,
        engine: Engine = "auto",
        precision: Precision = "float32",
        check: bool = True,
        jacobian: Jacobian = "gap",
        figures: bool = True,
        save_arrays: bool = True,
        save_batches: bool = True,
        custom_scalars: bool = True,
        name: str = "hessian",
        batch_size: BatchSize = None,
    ) -> None:
        steps = HessianSettings.num_steps if num_steps is None else num_steps
        probes = HessianSettings.num_probes if num_probes is None else num_probes
        self.settings = HessianSettings(
            num_steps=steps,
            num_probes=probes,
            num_runs=num_runs,
            num_layer_steps=num_layer_steps,
            num_layer_probes=num_layer_probes,
            layers=layers,
            eig_rtol=eig_rtol,
            trace_rtol=trace_rtol,
            seed=seed,
        )
        self._given_steps = None if num_steps is None else self.settings.num_steps
        self._given_probes = None if num_probes is None else self.settings.num_probes
        probes, rtol = check_light(
            track_num_probes, track_eig_rtol, ("track_num_probes", "track_eig_rtol")
        )
        self.tracking_settings = TrackingSettings(
            num_probes=probes,
            eig_rtol=rtol,
            num_steps=self.settings.num_steps,
            layers=layers,
            seed=self.settings.seed,
        )
        self.tracking_schedule = Schedule(
            whole("track_every_n_train_steps", track_every_n_train_steps, 1, none=True, other=_NO)
        )
        super().__init__(
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            num_samples=num_samples,
            mode=mode,
            dropout=dropout,
            loss=loss,
            dataloader=dataloader,
            seed=seed,
            max_overhead=max_overhead,
            microbatch_size=microbatch_size,
            max_memory=max_memory,
            engine=engine,
            precision=precision,
            check=check,
            jacobian=jacobian,
            figures=figures,
            save_arrays=save_arrays,
            save_batches=save_batches,
            custom_scalars=custom_scalars,
            name=name,
            batch_size=batch_size,
        )
        self.history: list[tuple[int, HessianReport]] = []
        self.tracked: list[tuple[int, HessianTracking]] = []
        self.report: HessianReport | None = None

    @property
    def tracks(self) -> bool:
        """Whether there are light measurements between the full ones."""
        return self.tracking_schedule.every_n_train_steps is not None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.history, self.tracked = [], []
        super().on_train_start(trainer, pl_module)
        self._seen_light = trainer.global_step

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "settings": self.settings}

    @booked
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = step_of(trainer)
        before, self._seen_light = self._seen_light, trainer.global_step
        if (
            self._held.complete
            and self._held.batches
            # A full measurement of these weights says all that a light one would.
            and step not in (self._last_step, self._last_light)
            and self.tracking_schedule.after_step(trainer.global_step, before)
            and not self._is_about_to_fire(trainer)
            and self._processes.agree(self._has_room_for_light())
        ):
            self._last_light = step
            began = time.monotonic()
            self._fire(trainer, pl_module, Moment(step, light=True))
            self._write_light(trainer, RECENT)
            self._light_cost = time.monotonic() - began

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.tracked:
            with self.account.watching(self.name, asked=self.is_asked):
                self._write_light(trainer, 1)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._guarded("saving arrays", self._write_light, trainer, 1)
        super().on_exception(trainer, pl_module, exception)

    def _write_light(self, trainer: Any, least: int) -> None:
        """Write light measurements that are in no file yet, if there are at least so many.

        One file for many, since they come often; what is not written yet is never thinned out.
        """
        new = [pair for pair in self.tracked[-RECENT:] if pair[0] > self._written]
        if len(new) >= least:
            self._written = new[-1][0]
            stem = f"light_{new[0][0]:08d}_to_{new[-1][0]:08d}"
            self.sink.arrays(trainer, LightSeries(new), stem)

    def _is_about_to_fire(self, trainer: Any) -> bool:
        """Return whether a full measurement of these weights follows, as far as is known."""
        if trainer.global_step == trainer.max_steps:
            return True
        if not trainer.is_last_batch:
            return False
        if trainer.current_epoch + 1 == trainer.max_epochs:
            return True
        after = self.schedule.after_epoch(trainer.current_epoch)
        fits = self.is_asked or self.pace.fits(self.account, self.name)
        return bool(after and self._processes.agree(fits))

    def _has_room_for_light(self) -> bool:
        """Return whether a light measurement as long as the last one fits."""
        if self.max_overhead is None:
            # A light schedule is always the user's own, which only a limit of its own holds up.
            return True
        aside = sum(self.account.reserved.values())
        return self._light_cost + aside <= self.account.room(self.name)

    def _reset(self) -> None:
        super()._reset()
        # Why differences took over in this run; empty while the exact engine serves.
        self._fallback = ""
        self._told = False
        self._light_cost = 0.0
        self._tracker = TrackerState()
        self._plain_tracked = PlainForms()
        # Step of the last light measurement that is in a file.
        self._written = -1
        # Steps of the last light measurement, and of whatever the tracker knows.
        self._last_light = self._tracker_step = -1
        # Optimizer steps when the light schedule was last asked.
        self._seen_light = 0

    def _forget(self) -> None:
        super()._forget()
        self._tracker = TrackerState()

    def _more_state(self) -> dict[str, Any]:
        return {
            "tracker": self._tracker.state_dict(),
            "tracker_step": self._tracker_step,
            "last_light": self._last_light,
            "tracked": self._plain_tracked.of(self.tracked),
            "written": self._written,
            "fallback": self._fallback,
        }

    def _read_more(self, state: Mapping[str, Any], module: Any) -> Any:
        check_entries(state, _TRACKED, "the state")
        tracker = TrackerState.from_state_dict(state["tracker"])
        check_fields(tracker, "the state's tracker")
        if tracker.vector is not None:
            space = space_of(module)
            check_flat(tracker.vector, space.dim, "the state's tracker.vector")
            # The run may go on in another precision.
            tracker = replace(tracker, vector=tracker.vector.to(space.dtype))
        tracked = [(step, unpack(found)) for step, found in state["tracked"]]
        check_type(tracked, list[tuple[int, HessianTracking]], "the state's tracked")
        return tracker, tracked, state

    def _take_more(self, read: Any) -> None:
        self._tracker, self.tracked[:], state = read
        self._plain_tracked.learn(self.tracked, state["tracked"])
        self._written = state["written"]
        self._tracker_step = state["tracker_step"]
        self._last_light = state["last_light"]
        # An engine that was asked for is taken.
        self._fallback = state["fallback"] if self.engine == "auto" else ""
        self._told = bool(self._fallback)

    def _check(self, module: nn.Module) -> None:
        if self.settings.layers is None:
            return
        space = space_of(module)
        groups = layer_parameters(module, space, self.settings.layers)
        left = outside(space, groups)
        if left:
            some = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            rank_zero_info(
                f"{type(self).__name__}: {len(groups)} layers are told apart; "
                f"{len(space.index(left)):,} of {space.dim:,} parameters belong to none ({some})."
            )

    def _forget_weights(self, dim: int) -> None:
        self._tracker = TrackerState()

    def _do_without_layers(self) -> None:
        self.settings = replace(self.settings, layers=None)
        self.tracking_settings = replace(self.tracking_settings, layers=None)

    def _measure(
        self,
        objective: Objective,
        moment: Moment,
        *,
        quick: bool,
        progress: Callable[[str, int], AbstractContextManager[Callable[[int], object]]],
    ) -> HessianReport | HessianTracking:
        if moment.light:
            return self._track(objective, moment, quick=quick)
        settings = self._present_settings()
        if self._fallback:
            # What failed once would fail again, at its cost.
            objective.engine = "difference"
        if quick:
            settings = HessianSettings(
                num_steps=2,
                num_probes=2,
                layers=settings.layers,
                num_layer_steps=min(2, settings.num_layer_steps),
                num_layer_probes=min(2, settings.num_layer_probes),
            )
        with ExitStack() as stack:
            advance = all_or_none(
                self._processes,
                lambda: stack.enter_context(
                    progress("Hessian", self._num_products(objective, settings))
                ),
            )
            found = measure(
                objective,
                settings,
                limit=moment.limit,
                listener=advance,
                share=self._processes,
                anchor=self._anchor(moment, quick=quick) if self.tracks else None,
            )
        if self._fallback:
            found = replace(found, engine_reason=self._fallback)
        return HessianReport.of(found, training_steps=self._in_steps(found.seconds))

    def _present_settings(self) -> HessianSettings:
        """Return the settings, at the size that was chosen for this run."""
        size = self._size
        if size is None:
            return self.settings
        return replace(self.settings, num_steps=size.num_steps, num_probes=size.num_probes)

    def _choose(self, costs: UnitCosts | None, seconds: float, least: int) -> Choice:
        ladder = fitting(
            spectrum_ladder(),
            samples=self.given_samples,
            num_steps=self._given_steps,
            num_probes=self._given_probes,
            least_samples=least,
            most_samples=self._held.num_held,
        )
        size, fits, cost, draws = replace(ladder[-1], points=1), False, 0.0, False
        if costs is not None:
            size, fits = choose_spectrum(seconds, costs, ladder, figures=NUM_FIGURES)
            cost = costs.spectrum(size)
            draws = has_room_to_draw(seconds, cost, size.points, MOST_FIGURES, costs.figure)
        words = f"{size.samples} samples ({size.num_steps} Lanczos steps, {size.num_probes} probes)"
        figures = NUM_FIGURES * self.pace.figure
        return Choice(size.samples, size.points, cost, figures, fits, words, draws, asdict(size))

    @property
    def _size(self) -> SpectrumSize | None:
        """The size that was chosen for this run, if any was."""
        choice = self.pace.choice
        return None if choice is None else SpectrumSize(**choice.size)

    def _gradients(self) -> float:
        module_products = self.settings.max_matvecs + self.settings.layer_plan.max_matvecs
        return 1 + PRODUCT * module_products

    @property
    def full_gradients(self) -> float:
        """What a measurement of the default size takes, in gradients of its samples, about."""
        return self._gradients()

    def _num_products(self, objective: Objective, settings: HessianSettings) -> int:
        """Return how many products a full measurement takes at most."""
        products = settings.max_matvecs
        if self.tracks:
            products += self.tracking_settings.num_probes // 2
        if settings.layer_plan.max_matvecs:
            module = objective.module
            groups = layer_parameters(module, space_of(module), settings.layers)
            products += len(groups) * settings.layer_plan.max_matvecs
        return products

    def _anchor(self, moment: Moment, *, quick: bool) -> Anchor:
        """Return what lets light measurements go on from a full one."""

        def anchor(hessian: Any, blocks: Any, runs: Any, traces: Any) -> None:
            settings = self._light_settings(quick=quick)
            known = anchored(hessian, blocks, runs, traces, settings, self._tracker)
            self._tracker, self._tracker_step = known, moment.step

        return anchor

    def _track(self, objective: Objective, moment: Moment, *, quick: bool) -> HessianTracking:
        interval = self.tracking_schedule.every_n_train_steps or 0
        state = self._tracker.aged(moment.step - self._tracker_step, interval)
        if self._fallback:
            objective.engine = "difference"
        found, self._tracker = track(
            objective, self._light_settings(quick=quick), state, share=self._processes
        )
        self._tracker_step = moment.step
        return found

    def _light_settings(self, *, quick: bool) -> TrackingSettings:
        settings = self.tracking_settings
        if not quick:
            return settings
        return replace(settings, num_steps=2, num_probes=min(2, settings.num_probes))

    def _keep(self, result: HessianReport | HessianTracking, moment: Moment) -> None:
        if result.engine == "difference" and not self._told and self.engine == "auto":
            self._told = True
            # Memory that is short once need not be short the next time.
            self._fallback = "" if "Memory" in result.engine_reason else result.engine_reason
            rank_zero_info(
                f"{type(self).__name__}: products by differences of gradients, since "
                f"{result.engine_reason}"
            )
        check = self._findings.proof.self_check
        if check is not None:
            self._tell_check(check)
        for what, reason in result.gaps.items():
            if check is None or reason != check.trouble:
                error = MeasurementError(f"{what}: {reason}.", gap_remedy(result.engine_reason))
                self._warn(error, what, remedy="")
        if isinstance(result, HessianTracking):
            self.tracked.append((moment.step, result))
            thin(self.tracked)
            return
        self.report = result
        if moment.function == "fit":
            self.history.append((moment.step, result))
            thin(self.history)

    def _scalars(self, result: HessianReport | HessianTracking) -> dict[str, float]:
        if isinstance(result, HessianTracking):
            return tracking_scalars(result, self.name)
        return hessian_scalars(result, self.name)

    def _figures(self, result: HessianReport, moment: Moment) -> Mapping[str, Any]:
        step = moment.step
        drawn: dict[str, Callable[[], Any]] = {}
        if "density" not in result.gaps:
            title = f"Hessian spectrum at step {step}"
            drawn["density"] = partial(result.figure, title=title)
        moved = moment.function == "fit" and len(self.history) > 1
        if moved:
            title = f"How the spectrum moved, up to step {step}"
            drawn["history"] = partial(history_figure, drawn_part(self.history), title=title)
        if "layers" not in result.gaps:
            title = f"Curvature by layer at step {step}"
            drawn["layer_traces"] = partial(result.layer_figure, title=title)
        if moved:
            title = f"How the layers' curvature moved, up to step {step}"
            drawn["layer_history"] = partial(
                layer_history_figure, drawn_part(self.history), title=title
            )
        if self.settings.num_layer_steps and "layers" not in result.gaps:
            title = f"Spectrum of each layer and of the whole at step {step}"
            drawn["layer_densities"] = partial(result.layer_density_figure, title=title)
            title = f"How unlike the whole each layer is at step {step}"
            drawn["layer_distances"] = partial(result.layer_distance_figure, title=title)
        return drawn

    def _layout(self) -> Mapping[str, Any]:
        spectra = self.settings.num_layer_steps > 0
        return custom_scalars_layout(self.name, layer_spectra=spectra)

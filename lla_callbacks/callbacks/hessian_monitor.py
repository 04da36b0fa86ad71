"""Measure the Hessian of a training run, live, without disturbing it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from lla_callbacks.callbacks.account import booked
from lla_callbacks.callbacks.compat import say, step_of
from lla_callbacks.callbacks.foretold import no_room_for_light
from lla_callbacks.callbacks.keywords import by_name_after
from lla_callbacks.callbacks.light_record import LightRecord
from lla_callbacks.callbacks.monitor_settings import shared
from lla_callbacks.callbacks.schedule import Schedule
from lla_callbacks.callbacks.sizers import SpectrumSizer
from lla_callbacks.callbacks.watching import Watching
from lla_callbacks.hessian.quantity import Spectrum
from lla_callbacks.hessian.report import HessianReport
from lla_callbacks.hessian.scalars import custom_scalars_layout
from lla_callbacks.hessian.settings import HessianSettings, TrackingSettings, check_light
from lla_callbacks.hessian.tracking import HessianTracking
from lla_callbacks.objective.checks import whole
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.objective import Engine, Mode
from lla_callbacks.objective.precision import Precision
from lla_callbacks.objective.self_check import Jacobian

_NO = ", or None for no light measurements"


class HessianMonitor(Watching):
    r"""Log the Hessian's extreme eigenvalues, trace, layer traces, density and criteria.

    Training is left bitwise unchanged. A measurement happens when training starts, on
    schedule, and when it ends; stand-alone ``trainer.validate`` and ``trainer.test``
    measure on their own batches. If one fails, there is one warning with the remedy and a
    gap in the curves.

    **Logged**: ``hessian/lambda_max``, ``hessian/lambda_min``, ``hessian/trace``,
    ``hessian/stability``, ``hessian/kh05``, other criteria on request (``scalars``),
    ``hessian_layers/<layer>/trace`` and more of each layer on request, ``hessian/overhead``;
    residuals and errors under ``zz_hessian_errors/``; the text ``hessian/summary``; figures
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
        num_steps: Lanczos depth. KH05 compares only at equal depth; published: 100. What is given
            is done as told; ``None`` is less where memory is tight, and reports say so.
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
            take together, first and last measurement included. ``None``: 0.05 (choice: what is less
            is not felt) if no schedule is given, no limit if one is, so that an explicit schedule
            is kept. Of several monitors the largest counts for all together, and each keeps to its
            own.
        eig_rtol: Stop Lanczos early at this relative residual of both extremes. KH05 then
            has the depth that ``zz_hessian_cost/num_steps`` says.
        trace_rtol: Stop probing early at this relative standard error.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that a measurement may take beside training. Graphs that do not fit are
            built anew for each product (3 gradients instead of 2), batches that do not fit are
            split where their samples do not see each other, and where that is not enough,
            differences of gradients take over. ``None``: half of what a training step takes, and
            256 MiB at least; a batch that cannot be split then goes through whole.
        engine: ``"exact"``: double backward. ``"difference"``: central differences of gradients, in
            the memory of a training step, with their own error in every result; what they cannot
            say within 5 % is a gap. ``"auto"``: exact, and by difference where a second derivative
            does not exist or does not fit in memory, or parameters are sharded; one line in the log
            says so.
        check: Whether the loss proves itself at the first measurement of a run, for about six
            gradients: two evaluations agree, the gradient is the slope of the loss, products are
            symmetric and agree with differences of gradients.
        jacobian: Where the gradient is no derivative of the loss: ``"gap"``, or ``"measure"`` the
            Jacobian of the training gradient, marked as such.
        precision: ``"float32"``: no autocast, and half-precision weights are widened for the
            measurement. ``"training"``: as the Trainer has it; bfloat16 costs 1 to 4 %.
        figures: Whether figures are drawn.
        save_arrays: Whether every result is written to
            ``<log_dir>/hessian/step_00000100.npz`` (TensorBoard thins images out).
        save_batches: Whether checkpoints hold the data of the held batches. ``None``: a fingerprint
            where the training loader gives them again, else the data. ``False``: never; a resumed
            run then says where it goes on with other ones.
        custom_scalars: Whether TensorBoard gets a layout that draws values with their
            error bands. Turn it off if you store a layout of your own.
        scalars: Which scalars loggers get: ``"few"`` (what everybody looks at), ``"criteria"`` (and
            every criterion), ``"layers"`` (and all of each layer), ``"all"``, or a list of these
            words and of names such as ``"kh1"``; docs/measures.md has all of them. Callbacks such
            as EarlyStopping may ask for any.
        name: First part of every tag; give each monitor its own.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.
        num_eigenvectors: How many leading eigenvectors each report has, by parameter name; see
            :func:`~lla_callbacks.measure_hessian`. 0 (default): none. Files have all of them,
            ``report`` those of the last measurement, ``history`` their eigenvalues alone.
        parameters: Which parameters are measured: ``None`` takes all that are trained; shell
            patterns of their names (``"generator.*"``), or of modules; or a predicate ``(name,
            parameter) -> bool``. Another monitor may measure others.

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

    @by_name_after("every_n_train_steps")
    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        *,
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
        save_batches: bool | None = None,
        custom_scalars: bool = True,
        scalars: str | Sequence[str] = "few",
        name: str = "hessian",
        batch_size: BatchSize = None,
        num_eigenvectors: int = HessianSettings.num_eigenvectors,
        parameters: str | list[str] | Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        given = shared(locals())
        settings = HessianSettings(
            num_steps=HessianSettings.num_steps if num_steps is None else num_steps,
            may_shorten=num_steps is None,
            num_probes=HessianSettings.num_probes if num_probes is None else num_probes,
            num_runs=num_runs,
            num_layer_steps=num_layer_steps,
            num_layer_probes=num_layer_probes,
            layers=layers,
            eig_rtol=eig_rtol,
            trace_rtol=trace_rtol,
            num_eigenvectors=num_eigenvectors,
            seed=seed,
        )
        probes, rtol = check_light(
            track_num_probes, track_eig_rtol, ("track_num_probes", "track_eig_rtol")
        )
        tracking = TrackingSettings(
            num_probes=probes,
            eig_rtol=rtol,
            num_steps=settings.num_steps,
            layers=layers,
            seed=settings.seed,
        )
        every = whole(
            "track_every_n_train_steps", track_every_n_train_steps, 1, none=True, other=_NO
        )
        self.tracking_schedule = Schedule(every)
        self.spectrum = Spectrum(settings, tracking if every else None, every or 0, name)
        self.record = LightRecord(self.spectrum)
        sizer = SpectrumSizer(
            self.spectrum, num_steps=num_steps is not None, num_probes=num_probes is not None
        )
        super().__init__([self.record], given, sizer, alone=True)
        self._light_cost, self._told_no_room = 0.0, False
        # Optimizer steps when the light schedule was last asked.
        self._seen_light = 0

    @property
    def settings(self) -> HessianSettings:
        """How a Hessian is measured."""
        return self.spectrum.settings

    @property
    def history(self) -> list[tuple[int, HessianReport]]:
        """Pairs of step and report of the last fit."""
        return self.record.history

    @property
    def tracked(self) -> list[tuple[int, HessianTracking]]:
        """Pairs of step and light measurement of the last fit."""
        return self.record.tracked

    @property
    def report(self) -> HessianReport | None:
        """The last one of all; ``None`` before anything was measured."""
        found: HessianReport | None = self.record.result
        return found

    def _last(self) -> HessianReport | None:
        return self.report

    @property
    def tracks(self) -> bool:
        """Whether there are light measurements between the full ones."""
        return self.tracking_schedule.is_given

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._light_cost, self._told_no_room = 0.0, False
        super().on_train_start(trainer, pl_module)
        self._seen_light = trainer.global_step

    @property
    def _looks_at_each_batch(self) -> bool:
        return self.tracks

    @booked
    def _batch_ended(self, trainer: Any, pl_module: Any, batch_idx: int, *, leads: bool) -> None:
        super()._batch_ended(trainer, pl_module, batch_idx, leads=leads)
        if not self.tracks:
            return
        step = step_of(trainer)
        before, self._seen_light = self._seen_light, trainer.global_step
        if (
            self.subject.held.complete
            and self.subject.held.batches
            # A full measurement of these weights says all that a light one would.
            and step not in (self.timing.last_step, self.record.last_light)
            and self.tracking_schedule.after_step(trainer.global_step, before)
            and not self._is_about_to_fire(trainer)
            and self._may_track(trainer, step)
        ):
            self.record.last_light = step
            began = time.monotonic()
            self._fire(trainer, pl_module, Moment(step, light=True))
            self.record.write(trainer, self.sink)
            self._light_cost = time.monotonic() - began

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.tracked:
            with self.timing.watching():
                self.record.write(trainer, self.sink, few=True)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        write = partial(self.record.write, trainer, self.sink, few=True)
        self.sink.guarded("saving arrays", write)
        super().on_exception(trainer, pl_module, exception)

    def _is_about_to_fire(self, trainer: Any) -> bool:
        """Return whether a full measurement of these weights follows, as far as is known."""
        if trainer.global_step == trainer.max_steps:
            return True
        if not trainer.is_last_batch:
            return False
        if trainer.current_epoch + 1 == trainer.max_epochs:
            return True
        after = self.schedule.after_epoch(trainer.current_epoch)
        fits = self.is_asked or self.timing.fits
        return bool(after and self.subject.processes.agree(fits))

    def _may_track(self, trainer: Any, step: int) -> bool:
        """Return whether there is room for a light measurement; say once that there is none."""
        if self.subject.processes.agree(self._has_room_for_light()):
            return True
        if not self._told_no_room:
            self._told_no_room = True
            say(trainer, f"{type(self).__name__}: {no_room_for_light(self.timing, step)}")
        return False

    def _has_room_for_light(self) -> bool:
        """Return whether a light measurement as long as the last one fits."""
        if self.timing.max_overhead is None:
            # A light schedule is always the user's own, which only a limit of its own holds up.
            return True
        aside = sum(self.account.reserved.values())
        return self._light_cost + aside <= self.account.room(self.name)

    def _layout(self) -> Mapping[str, Any] | None:
        if not self.shared_settings.output.custom_scalars:
            return None
        spectra = self.settings.num_layer_steps > 0
        return custom_scalars_layout(self.name, layer_spectra=spectra)

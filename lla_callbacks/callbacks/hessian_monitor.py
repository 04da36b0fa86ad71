"""Measure the Hessian of a training run, live, without disturbing it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lla_callbacks.callbacks.compat import (
    Callback,
    MisconfigurationException,
    is_barebones,
    prepared,
    progress,
    shards_parameters,
)
from lla_callbacks.callbacks.replay import trainer_loss
from lla_callbacks.callbacks.schedule import DEFAULT_OVERHEAD, Budget, Schedule
from lla_callbacks.landscape.batches import hold, sample_count
from lla_callbacks.landscape.layers import layer_parameters
from lla_callbacks.landscape.measures import HessianSettings, measure
from lla_callbacks.landscape.objective import Mode, Objective
from lla_callbacks.landscape.stability import StabilityLimit, stability_limit
from lla_callbacks.landscape.state import (
    Snapshot,
    preserved_random_streams,
    take_snapshot,
    weights_at,
)
from lla_callbacks.landscape.training_step import check_replayable
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.report.figures import history_figure
from lla_callbacks.report.hessian_report import HessianReport
from lla_callbacks.report.loggers import folder_of, write_figure, write_layout, write_scalars
from lla_callbacks.report.scalars import custom_scalars_layout, hessian_scalars


class HessianMonitor(Callback):
    r"""Log the Hessian's extreme eigenvalues, trace, layer traces, density and criteria.

    Training is left bitwise unchanged. A measurement happens when training starts, on
    schedule, and when it ends; stand-alone ``trainer.validate`` and ``trainer.test``
    measure on their own batches. If one fails, there is one warning with the remedy and a
    gap in the curves.

    **Logged**: ``hessian/lambda_max``, ``hessian/lambda_min``, ``hessian/trace``,
    ``hessian/trace_sem``, ``hessian/kh05`` and the other criteria,
    ``hessian_layers/<layer>/trace``, ``hessian/seconds``, ``hessian/overhead``; residuals
    and errors under ``hessian_errors/``; figures ``hessian/density``,
    ``hessian/layer_traces``, ``hessian/history``. The step is the number of optimizer steps
    that the weights have seen. Scalars reach ``trainer.callback_metrics`` too, for
    EarlyStopping and ModelCheckpoint, where the last value stays until the next one.

    Args:
        every_n_epochs: Measure at the end of every n-th training epoch.
        every_n_train_steps: Measure every n optimizer steps. With neither, every epoch
            that ``max_overhead`` has room for.
        layers: Paths or patterns of the modules whose traces are told apart; ``None``
            takes every module that owns parameters.
        num_probes: Random probes of the trace; see
            :class:`~lla_callbacks.landscape.measures.HessianSettings` for this and the
            next two.
        num_steps: Lanczos depth. KH05 compares only at equal depth; published: 100.
        num_runs: Independent Lanczos runs.
        num_samples: Hold the first training batches until they have this many samples.
            Default 512 (choice): eight batches of the common size 64.
        mode: ``"batch"``: normalization by batch statistics, as in training; ``"eval"``:
            by running statistics.
        dropout: Whether dropout stays on; off by default.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``.
        dataloader: Batches to measure on instead of the first training batches.
        seed: Fixes every random vector.
        max_overhead: Postpone measurements that would take more than this share of training
            time. ``None``: 0.05 if no schedule is given (choice: one in twenty seconds is
            not felt), no limit if one is, so that an explicit schedule is kept. The first
            and the last measurement always happen.
        eig_rtol: Stop Lanczos early at this relative residual of both extremes.
        trace_rtol: Stop probing early at this relative standard error.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        figures: Whether figures are drawn.
        save_arrays: Whether every result is written to
            ``<log_dir>/hessian/step_00000100.npz`` (TensorBoard thins images out).
        custom_scalars: Whether TensorBoard gets a layout that draws values with their
            error bands. Turn it off if you store a layout of your own.
        name: First part of every tag; give each monitor its own.

    Attributes:
        history: Pairs of step and :class:`HessianReport`, all of the last fit.
        report: The last one of all, also of a stand-alone validate or test.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lla_callbacks import HessianMonitor
        >>> trainer = Trainer(callbacks=[HessianMonitor()], logger=False, max_epochs=1)
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        layers: list[str] | None = None,
        num_probes: int = HessianSettings.num_probes,
        num_steps: int = HessianSettings.num_steps,
        num_runs: int = HessianSettings.num_runs,
        num_samples: int = 512,
        mode: Mode = "batch",
        dropout: bool = False,
        loss: Callable[[Any, Any], Any] | None = None,
        dataloader: Any = None,
        seed: int = 0,
        max_overhead: float | None = None,
        eig_rtol: float | None = None,
        trace_rtol: float | None = None,
        microbatch_size: int | None = None,
        figures: bool = True,
        save_arrays: bool = True,
        custom_scalars: bool = True,
        name: str = "hessian",
    ) -> None:
        super().__init__()
        default_schedule = every_n_epochs is None and every_n_train_steps is None
        self.schedule = (
            Schedule(every_n_epochs=1)
            if default_schedule
            else Schedule(every_n_train_steps, every_n_epochs)
        )
        self.settings = HessianSettings(
            num_steps=num_steps,
            num_probes=num_probes,
            num_runs=num_runs,
            layers=layers,
            eig_rtol=eig_rtol,
            trace_rtol=trace_rtol,
            seed=seed,
        )
        _check_positive("num_samples", num_samples)
        if microbatch_size is not None:
            _check_positive("microbatch_size", microbatch_size)
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; give one of {', '.join(get_args(Mode))}.")
        if loss is not None and not callable(loss):
            raise ValueError(f"loss is {loss!r}; give loss(module, batch) -> scalar, or None.")
        if max_overhead is not None and not (
            isinstance(max_overhead, (int, float)) and max_overhead > 0
        ):
            raise ValueError(
                f"max_overhead is {max_overhead!r}; give a positive share of training time, "
                "such as 0.05, or None."
            )
        if dataloader is not None and not isinstance(dataloader, Iterable):
            raise ValueError(
                f"dataloader is {type(dataloader).__name__}; give an iterable of batches, or "
                "None for the first training batches."
            )
        if not name or not isinstance(name, str):
            raise ValueError(f"name is {name!r}; give the first part of the tags, a string.")
        self.num_samples = num_samples
        self.mode: Mode = mode
        self.dropout = dropout
        self.loss = loss
        self.dataloader = dataloader
        self.microbatch_size = microbatch_size
        self.figures = figures
        self.save_arrays = save_arrays
        self.custom_scalars = custom_scalars
        self.name = name
        if max_overhead is None and default_schedule:
            max_overhead = DEFAULT_OVERHEAD
        self.budget = Budget(max_overhead)
        self.history: list[tuple[int, HessianReport]] = []
        self.report: HessianReport | None = None
        self._reset()

    @property
    def state_key(self) -> str:
        """Tell several monitors of one Trainer apart."""
        return str(self._generate_state_key(name=self.name))

    def _reset(self) -> None:
        self._batches: list[Any] = []
        self._complete = False
        self._start_pending = True
        self._start: tuple[Snapshot, StabilityLimit | None, int] | None = None
        self._training: dict[nn.Module, bool] | None = None
        self._due = False
        self._last_step = -1
        self._warned: set[str] = set()

    def _forget(self) -> None:
        """Drop what belongs to a finished run and would keep its module alive."""
        self._batches = []
        self._start = self._training = None

    # -- when ---------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        if is_barebones(trainer):
            return
        if self.loss is None and stage in ("fit", "validate", "test"):
            try:
                check_replayable(pl_module)
            except TypeError as error:
                raise MisconfigurationException(f"HessianMonitor: {error}") from error
        if shards_parameters(trainer, pl_module):
            raise MisconfigurationException(
                f"HessianMonitor cannot differentiate twice through parameters sharded by "
                f"{type(trainer.strategy).__name__}. Train with one process, or load the "
                "checkpoint into a plain module and call measure_hessian(module, batches)."
            )
        if getattr(trainer, "world_size", 1) > 1:
            raise MisconfigurationException(
                f"HessianMonitor measures in one process, and this Trainer has "
                f"{trainer.world_size}: each would see the Hessian of its own batches only. "
                "Train with devices=1, or call measure_hessian(module, batches) on a "
                "checkpoint."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: the module's own setup and configure_model may still make layers.
        self._check_layers(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._reset()
        self.history = []
        self.budget.start()
        if is_barebones(trainer):
            rank_zero_warn("HessianMonitor does nothing with Trainer(barebones=True).")
            return
        if self.dataloader is not None:
            self._training = {m: m.training for m in pl_module.modules()}
            self._guarded("reading dataloader", self._hold_loader, trainer, pl_module)
            if self._complete:
                self._measure_start(trainer, pl_module)
        for logger in self._loggers(trainer):
            self._guarded("logging", self._introduce, trainer, logger)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._complete or self.dataloader is not None or is_barebones(trainer):
            return
        self._guarded("holding a batch", self._hold, trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_barebones(trainer):
            return
        step = trainer.global_step
        if step != self._last_step and step > 0 and self.schedule.after_step(step):
            # What falls due while batches are still being held is dropped, not caught up with.
            self._due = self._complete
        self._fire_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if is_barebones(trainer):
            return
        if not self._complete and self._batches:
            # An epoch is all there is: further batches would repeat its samples.
            self._complete = True
            self._measure_start(trainer, pl_module)
        if self.schedule.after_epoch(trainer.current_epoch):
            self._due = True
        self._fire_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not is_barebones(trainer) and self._complete and trainer.global_step != self._last_step:
            self._measure(trainer, pl_module, trainer.global_step)
        self._forget()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._start_evaluation(trainer, "validate")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._hold_evaluation(trainer, batch, "validate")

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish_evaluation(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start_evaluation(trainer, "test")

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._hold_evaluation(trainer, batch, "test")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish_evaluation(trainer, pl_module, "test")

    def _start_evaluation(self, trainer: Any, function: str) -> None:
        """Begin a stand-alone validate or test; validation inside fit is left alone."""
        if _runs(trainer, function):
            self._check_layers(trainer, trainer.lightning_module)
            self._reset()
            self.budget.start()
            if self.dataloader is not None:
                self._guarded(
                    "reading dataloader", self._hold_loader, trainer, trainer.lightning_module
                )

    def _hold_evaluation(self, trainer: Any, batch: Any, function: str) -> None:
        if _runs(trainer, function) and not self._complete and self.dataloader is None:
            self._guarded("holding a batch", self._keep, batch)

    def _finish_evaluation(self, trainer: Any, pl_module: Any, function: str) -> None:
        if _runs(trainer, function) and self._batches:
            values = self._measure(trainer, pl_module, trainer.global_step, function=function)
            # The loop hands them to the loggers, prints them and returns them.
            pl_module.log_dict(values, batch_size=1)
            self._forget()

    def _check_layers(self, trainer: Any, module: nn.Module) -> None:
        if self.settings.layers is None or is_barebones(trainer):
            return
        try:
            layer_parameters(module, _space(module), self.settings.layers)
        except ValueError as error:
            raise MisconfigurationException(f"HessianMonitor: {error}") from error

    # -- what ---------------------------------------------------------------------------

    def _hold(self, trainer: Any, module: nn.Module, batch: Any) -> None:
        """Keep one training batch; measure the start once there are enough."""
        if self._training is None:
            self._training = {m: m.training for m in module.modules()}
        # Steps that take the iterator themselves are announced without a batch at first.
        if batch is not None:
            self._keep(batch)
            if len(self._batches) >= trainer.num_training_batches:
                self._complete = True
        if self._complete:
            self._measure_start(trainer, module)
        elif self._start is None:
            # The start is measured on all held batches, so its weights are kept until then.
            self._start = (take_snapshot(module), self._limit(trainer, module), trainer.global_step)

    def _keep(self, batch: Any) -> None:
        self._batches.append(hold(batch))
        self._complete = self._num_held() >= self.num_samples

    def _hold_loader(self, trainer: Any, module: nn.Module) -> None:
        loader: Any = self.dataloader
        sources = [getattr(loader, "generator", None)]
        sources.append(getattr(getattr(loader, "sampler", None), "generator", None))
        states = [(source, source.get_state()) for source in sources if source is not None]
        try:
            # Iterating draws from random streams; the run must not notice.
            with preserved_random_streams(self.settings.seed):
                for batch in loader:
                    self._keep(prepared(trainer, module, batch))
                    if self._complete:
                        break
        finally:
            for source, state in states:
                source.set_state(state)
        self._complete = True

    def _num_held(self) -> int:
        return sum(sample_count(batch) for batch in self._batches)

    def _measure_start(self, trainer: Any, module: nn.Module) -> None:
        if not self._start_pending:
            return
        self._start_pending = False
        if self._start is None:
            self._measure(trainer, module, trainer.global_step)
        else:
            snapshot, limit, step = self._start
            self._start = None
            self._measure(trainer, module, step, at=snapshot, limit=limit)

    def _fire_if_due(self, trainer: Any, module: nn.Module) -> None:
        if trainer.global_step == self._last_step:
            self._due = False
        if not self._due or not self._complete:
            return
        if self.budget.allows():
            self._due = False
            self._measure(trainer, module, trainer.global_step)

    def _measure(
        self,
        trainer: Any,
        module: nn.Module,
        step: int,
        *,
        at: Snapshot | None = None,
        limit: StabilityLimit | None = None,
        function: str = "fit",
    ) -> dict[str, float]:
        """Measure and report once; return the scalars, none if it failed."""
        began = time.monotonic()
        self._last_step = step
        settings = self.settings
        if trainer.fast_dev_run:
            # A smoke test should run every line, not take long.
            settings = HessianSettings(num_steps=2, num_probes=2, layers=settings.layers)
        report: HessianReport | None = None
        try:
            with (
                weights_at(module, at),
                progress(trainer, "Hessian", settings.max_matvecs) as advance,
            ):
                objective = Objective(
                    module,
                    self._batches,
                    trainer_loss(trainer, self.loss),
                    mode=self.mode,
                    dropout=self.dropout,
                    seed=settings.seed,
                    training=self._training,
                    microbatch_size=self.microbatch_size,
                )
                if at is None:
                    limit = self._limit(trainer, module)
                report = HessianReport.of(
                    measure(objective, settings, limit=limit, listener=advance)
                )
        except Exception as error:  # noqa: BLE001 - whatever fails, training must go on
            self._warn(error, "a measurement")
        values: dict[str, float] = {}
        if report is not None:
            self.report = report
            if function == "fit":
                self.history.append((step, report))
            values = hessian_scalars(report, self.name)
            self._save(trainer, report, "step" if function == "fit" else function, step)
            self._guarded("drawing", self._draw, trainer, report, step, function == "fit")
        self.budget.spend(time.monotonic() - began)
        if report is not None:
            values[f"{self.name}/seconds"] = time.monotonic() - began
            values[f"{self.name}/overhead"] = self.budget.overhead
            if function == "fit":
                for tag, value in values.items():
                    trainer.callback_metrics[tag] = torch.tensor(value)
                for logger in self._loggers(trainer):
                    self._guarded("logging", write_scalars, logger, values, step)
        return values

    def _limit(self, trainer: Any, module: nn.Module) -> StabilityLimit | None:
        """Return the optimizer's stability limit, where there is one optimizer."""
        optimizers = trainer.optimizers
        if len(optimizers) != 1:
            return None
        return stability_limit(optimizers[0], _space(module))

    # -- report -------------------------------------------------------------------------

    def _loggers(self, trainer: Any) -> list[Any]:
        return [] if trainer.fast_dev_run or not trainer.is_global_zero else trainer.loggers

    def _introduce(self, trainer: Any, logger: Any) -> None:
        if callable(getattr(logger.experiment, "add_figure", None)) and self.figures:
            # A child of Lightning's own logger, so that users see it as they see Lightning's.
            logging.getLogger(type(trainer).__module__).info(
                f"HessianMonitor: open TensorBoard with --samples_per_plugin images=1000 to keep "
                f"every figure (it shows ten a tag otherwise): tensorboard --logdir "
                f"{folder_of(logger)} --samples_per_plugin images=1000"
            )
        if self.custom_scalars:
            write_layout(logger, custom_scalars_layout(self.name))

    def _save(self, trainer: Any, report: HessianReport, stem: str, step: int) -> None:
        if self.save_arrays:
            for folder in {folder_of(logger) for logger in self._loggers(trainer)} - {None}:
                assert isinstance(folder, Path)
                path = folder / self.name / f"{stem}_{step:08d}.npz"
                self._guarded("saving arrays", report.save, path)

    def _draw(self, trainer: Any, report: HessianReport, step: int, in_fit: bool) -> None:
        loggers = self._loggers(trainer)
        if not self.figures or not loggers:
            return
        drawn = {
            "density": report.figure(title=f"Hessian spectrum at step {step}"),
            "layer_traces": report.layer_figure(title=f"Curvature by layer at step {step}"),
        }
        if in_fit and len(self.history) > 1:
            title = f"How the spectrum moved, up to step {step}"
            drawn["history"] = history_figure(self.history, title=title)
        for logger in loggers:
            for tag, figure in drawn.items():
                arguments = (logger, f"{self.name}/{tag}", figure, step)
                self._guarded("drawing", write_figure, *arguments)

    def _guarded(self, what: str, action: Callable[..., object], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # noqa: BLE001 - a broken logger must not end the run
            self._warn(error, what)

    def _warn(self, error: Exception, what: str) -> None:
        """Warn once a cause, with the remedy."""
        cause = type(error).__name__
        if cause in self._warned:
            return
        self._warned.add(cause)
        remedy = "" if isinstance(error, MeasurementError) else " " + _remedy(error)
        rank_zero_warn(
            f"HessianMonitor: {what} failed and leaves a gap; training goes on. "
            f"{cause}: {error}{remedy}"
        )


def _space(module: nn.Module) -> ParameterSpace:
    return ParameterSpace({n: p for n, p in module.named_parameters() if p.requires_grad})


def _runs(trainer: Any, function: str) -> bool:
    """Return whether the Trainer was called for this and not for a fit."""
    return trainer.state.fn == function and not is_barebones(trainer)


def _remedy(error: Exception) -> str:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return "Lower num_samples or num_steps, or set microbatch_size."
    if isinstance(error, OSError):
        return "Free disk space, or set save_arrays=False and figures=False."
    return "Give loss=callable(module, batch) if the training step cannot be replayed here."


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least 1.")

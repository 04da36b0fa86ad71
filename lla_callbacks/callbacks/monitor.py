"""What every monitor shares: when to measure, on what, and where results go."""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lla_callbacks.callbacks.compat import (
    MisconfigurationException,
    autocast_dtype,
    averages_before,
    flattens_parameters,
    is_barebones,
    progress,
    shards_parameters,
    state_key_of,
)
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.monitor_settings import checked
from lla_callbacks.callbacks.own_loader import SharedLoaderError
from lla_callbacks.callbacks.processes import Processes
from lla_callbacks.callbacks.replay import trainer_loss
from lla_callbacks.callbacks.run_state import Resumable
from lla_callbacks.callbacks.schedule import DEFAULT_OVERHEAD, Budget, Schedule
from lla_callbacks.hessian.stability import StabilityLimit, stability_limit
from lla_callbacks.linalg.errors import MeasurementError, is_out_of_memory
from lla_callbacks.linalg.sharing import all_or_none
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.objective import (
    Engine,
    Mode,
    Objective,
    trainable,
)
from lla_callbacks.objective.precision import Precision, at_precision
from lla_callbacks.objective.sharded import is_sharded, reshard
from lla_callbacks.objective.state import Snapshot, take_snapshot, weights_at
from lla_callbacks.objective.training_step import check_replayable
from lla_callbacks.report.cost import cost_scalars
from lla_callbacks.report.loggers import folder_of, write_figure, write_layout, write_scalars


@dataclass(frozen=True)
class Moment:
    """When a measurement is of.

    Attributes:
        step: Optimizer steps that the weights have seen.
        function: ``"fit"``, or a stand-alone ``"validate"`` or ``"test"``.
        limit: The optimizer's stability limit then, where it is known.
        snapshot: The weights then, if they are no longer the module's.
        optimizer: The one optimizer, where its state belongs to these weights.
        light: Whether it is a light measurement between two full ones.
    """

    step: int
    function: str = "fit"
    limit: StabilityLimit | None = None
    snapshot: Snapshot | None = None
    optimizer: torch.optim.Optimizer | None = None
    light: bool = False


class Monitor(Resumable):
    """Measures something of the held objective, and leaves training bitwise unchanged.

    A subclass says what is measured and how it is shown; this class says when, on which
    batches and weights, keeps to the budget, and turns trouble into a warning and a gap.

    Args:
        every_n_epochs: Measure at the end of every n-th training epoch.
        every_n_train_steps: Measure every n optimizer steps.
        num_samples: Hold the first training batches until they have this many samples.
        mode: Normalization mode.
        dropout: Whether dropout stays on.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``.
        dataloader: Batches to measure on instead of the first training batches.
        seed: Fixes whatever is random.
        max_overhead: Largest share of training time; see
            :class:`~lla_callbacks.HessianMonitor`.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that a measurement may take.
        engine: How to multiply with the Hessian.
        precision: In which arithmetic.
        figures: Whether figures are drawn.
        save_arrays: Whether results are written beside the logs.
        custom_scalars: Whether TensorBoard gets a layout.
        name: First part of every tag.
    """

    # Whether parameters may be spread over processes.
    measures_shards = False
    # Of what class moments are, which a checkpoint may hold one of.
    _moment = Moment

    def __init__(
        self,
        *,
        every_n_epochs: int | None,
        every_n_train_steps: int | None,
        num_samples: int,
        mode: Mode,
        dropout: bool,
        loss: Callable[[Any, Any], Any] | None,
        dataloader: Any,
        seed: int,
        max_overhead: float | None,
        microbatch_size: int | None,
        max_memory: int | None,
        engine: Engine,
        precision: Precision,
        figures: bool,
        save_arrays: bool,
        custom_scalars: bool,
        name: str,
    ) -> None:
        super().__init__()
        default_schedule = every_n_epochs is None and every_n_train_steps is None
        self.schedule = Schedule(every_n_train_steps, 1 if default_schedule else every_n_epochs)
        found = checked(
            {
                "num_samples": num_samples,
                "mode": mode,
                "dropout": dropout,
                "loss": loss,
                "dataloader": dataloader,
                "seed": seed,
                "max_overhead": max_overhead,
                "microbatch_size": microbatch_size,
                "max_memory": max_memory,
                "engine": engine,
                "precision": precision,
                "figures": figures,
                "save_arrays": save_arrays,
                "custom_scalars": custom_scalars,
                "name": name,
            }
        )
        self.num_samples: int = found["num_samples"]
        self.mode: Mode = mode
        self.dropout: bool = found["dropout"]
        self.loss = loss
        self.dataloader = dataloader
        self.seed: int = found["seed"]
        self.microbatch_size: int | None = found["microbatch_size"]
        self.max_memory: int | None = found["max_memory"]
        self.engine: Engine = engine
        self.precision: Precision = precision
        self.figures: bool = found["figures"]
        self.save_arrays: bool = found["save_arrays"]
        self.custom_scalars: bool = found["custom_scalars"]
        self.name = name
        max_overhead = found["max_overhead"]
        # A light schedule is always the user's own, which only an own limit holds up.
        light_counts = max_overhead is not None
        if max_overhead is None and default_schedule:
            max_overhead = DEFAULT_OVERHEAD
        self.budget = Budget(max_overhead, light_counts=light_counts)
        self._reset()

    # -- what a subclass gives ----------------------------------------------------------

    @abstractmethod
    def _measure(
        self,
        objective: Objective,
        moment: Moment,
        *,
        quick: bool,
        progress: Callable[[str, int], AbstractContextManager[Callable[[int], object]]],
    ) -> Any:
        """Return a result; ``quick`` asks for every line of code and little work.

        ``progress(description, total)`` opens a bar and yields its ``advance(count)``.
        """

    @abstractmethod
    def _keep(self, result: Any, moment: Moment) -> None:
        """Take note of a result."""

    @abstractmethod
    def _scalars(self, result: Any) -> dict[str, float]:
        """Return the result as finite scalars by tag."""

    @abstractmethod
    def _figures(self, result: Any, moment: Moment) -> Mapping[str, Any]:
        """Return the result as figures by the tag's last part."""

    def _layout(self) -> Mapping[str, Any]:
        """Return a TensorBoard layout of custom charts, if there is one."""
        return {}

    def _settings(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "dropout": self.dropout,
            "loss": self.loss,
            "engine": self.engine,
            "precision": self.precision,
        }

    def _check(self, module: nn.Module) -> None:
        """Raise a ValueError if the settings do not fit the module."""

    # -- when ---------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tell several monitors of one Trainer apart."""
        return state_key_of(self, name=self.name)

    def _reset(self) -> None:
        self._processes = Processes()
        self._held = HeldBatches(self.num_samples)
        self._findings = Findings()
        self._start: Moment | None = None
        self._start_pending = True
        self._final: Snapshot | None = None
        self._training: dict[nn.Module, bool] | None = None
        self._due = False
        self._last_step = self._last_epoch = -1
        self._warned: set[tuple[str, str]] = set()

    def _begin(self, trainer: Any) -> None:
        """Start anew, among the processes that there are."""
        self._reset()
        self._processes = Processes(trainer)
        # Together the processes hold as many samples as one would alone.
        if self.dataloader is None:
            self._held.num_samples = -(-self.num_samples // self._processes.size)
        self.budget.start()

    def _forget(self) -> None:
        """Drop what belongs to a finished run and would keep its module alive."""
        self._processes = Processes()
        self._held = HeldBatches(self.num_samples)
        self._start = self._training = self._final = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        # Before a checkpoint is loaded: one that an earlier call loaded is not this one's.
        self._loaded = None
        if is_barebones(trainer):
            return
        kind = type(self).__name__
        for other in trainer.callbacks:
            if other is not self and isinstance(other, Monitor) and other.name == self.name:
                raise MisconfigurationException(
                    f"two monitors are named {self.name!r} and would write the same tags: give "
                    "one of them another name=."
                )
        if self.loss is None and stage in ("fit", "validate", "test"):
            try:
                check_replayable(pl_module)
            except TypeError as error:
                raise MisconfigurationException(f"{kind}: {error}") from error
        if flattens_parameters(trainer, pl_module):
            raise MisconfigurationException(
                f"{kind} cannot move parameters that {type(trainer.strategy).__name__} shards in "
                "its own way. Train with ModelParallelStrategy and fully_shard (FSDP2) or with "
                "DDP, or load the checkpoint into a plain module and call "
                "measure_hessian(module, batches)."
            )
        if shards_parameters(trainer, pl_module) and not self.measures_shards:
            raise MisconfigurationException(
                f"{kind} moves whole parameters, and {type(trainer.strategy).__name__} spreads "
                "them. Train with DDP or in one process, or load the checkpoint into a plain "
                "module and call loss_plane(module, batches)."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: the module's own setup and configure_model may still make layers.
        self._check_module(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer)
        if is_barebones(trainer):
            rank_zero_warn(f"{type(self).__name__} does nothing with Trainer(barebones=True).")
            return
        self._resume(trainer, pl_module)
        if self.dataloader is not None:
            if self._training is None:
                self._training = {m: m.training for m in pl_module.modules()}
            self._hold_loader(trainer, pl_module)
            self._compare_loader()
            if self._all_hold():
                self._fire_start(trainer, pl_module)
        if self._missed_epoch(trainer):
            self._end_epoch(trainer, pl_module, trainer.current_epoch - 1)
        for logger in self._loggers(trainer):
            self._guarded("logging", self._introduce, trainer, logger)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._held.complete or self.dataloader is not None or is_barebones(trainer):
            return
        self._guarded("holding a batch", self._hold, trainer, pl_module, batch)
        if self._all_hold():
            self._fire_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_barebones(trainer):
            return
        step = trainer.global_step
        if step != self._last_step and step > 0 and self.schedule.after_step(step):
            # What falls due while batches are still being held is dropped, not caught up with.
            self._due = self._held.complete
        self._fire_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if is_barebones(trainer):
            return
        self._end_epoch(trainer, pl_module, trainer.current_epoch)
        if averages_before(trainer, self):
            # When training ends the module has the average already.
            self._final = take_snapshot(pl_module)

    def _end_epoch(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        self._last_epoch = epoch
        if not self._held.complete and self._processes.all(bool(self._held.batches)):
            # An epoch is all there is: further batches would repeat its samples.
            self._held.complete = True
            self._all_hold()
            self._fire_start(trainer, pl_module)
        if self.schedule.after_epoch(epoch):
            self._due = True
        self._fire_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._held.complete and trainer.global_step != self._last_step:
            moment = None
            if self._final is not None:
                limit = self._limit(trainer, pl_module)
                moment = Moment(trainer.global_step, "fit", limit, self._final)
            self._fire(trainer, pl_module, moment)
        self._end()
        self._forget()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # Callbacks that save a checkpoint now come later.
        self._end()
        self._forget()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._start_evaluation(trainer, pl_module, "validate")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._hold_evaluation(trainer, batch, "validate")

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish_evaluation(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start_evaluation(trainer, pl_module, "test")

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._hold_evaluation(trainer, batch, "test")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish_evaluation(trainer, pl_module, "test")

    def _start_evaluation(self, trainer: Any, module: Any, function: str) -> None:
        """Begin a stand-alone validate or test; validation inside fit is left alone."""
        if _runs(trainer, function):
            self._check_module(trainer, module)
            self._begin(trainer)
            if self.dataloader is not None:
                self._hold_loader(trainer, module)

    def _hold_evaluation(self, trainer: Any, batch: Any, function: str) -> None:
        if _runs(trainer, function) and not self._held.complete and self.dataloader is None:
            self._guarded("holding a batch", self._held.add, batch)

    def _finish_evaluation(self, trainer: Any, module: Any, function: str) -> None:
        if _runs(trainer, function) and self._processes.all(bool(self._held.batches)):
            self._held.complete = True
            self._all_hold()
            values = self._fire(trainer, module, function=function)
            # The loop hands what matters most to the loggers, prints and returns it.
            main = {tag: v for tag, v in values.items() if tag.startswith(f"{self.name}/")}
            module.log_dict(main, batch_size=1, sync_dist=self._processes.size > 1)
            rest = {tag: v for tag, v in values.items() if tag not in main}
            for logger in self._loggers(trainer):
                self._guarded("logging", write_scalars, logger, rest, trainer.global_step)
            self._forget()

    # -- on what ------------------------------------------------------------------------

    def _check_module(self, trainer: Any, module: nn.Module) -> None:
        if is_barebones(trainer):
            return
        if self.engine == "exact" and is_sharded(module):
            raise MisconfigurationException(
                f"{type(self).__name__}: engine is 'exact', and torch differentiates only once "
                "through parameters that fully_shard has spread: give engine='difference' or "
                "'auto'."
            )
        try:
            self._check(module)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def _hold(self, trainer: Any, module: nn.Module, batch: Any) -> None:
        """Keep one training batch, and the weights that the first one meets."""
        if self._training is None:
            self._training = {m: m.training for m in module.modules()}
        # Steps that take the iterator themselves are announced without a batch at first.
        if batch is not None:
            self._held.add(batch, most=trainer.num_training_batches)
        alone = self._held.complete and self._processes.size == 1
        if self._start_pending and self._start is None and not alone:
            # The start is measured on all held batches, so its weights are kept until then.
            limit = self._limit(trainer, module)
            self._start = Moment(trainer.global_step, "fit", limit, take_snapshot(module))

    def _all_hold(self) -> bool:
        """Return whether every process holds its batches; then each holds those of all."""
        if self._processes.size == 1:
            return self._held.complete
        # Together, since what follows is an exchange.
        self._held.complete = self._processes.all(self._held.complete)
        if not self._held.complete:
            return False
        # A loader of the user's own is the same in every process.
        alike = self.dataloader is not None
        try:
            self._held.batches = self._processes.union(self._held.batches, alike=alike)
        except Exception as error:  # noqa: BLE001 - no batches, no measurements; training goes on
            self._warn(error, "holding a batch", _REMEDIES["holding a batch"])
            self._held.batches = []
        return bool(self._held.batches)

    def _hold_loader(self, trainer: Any, module: Any) -> None:
        add = self._held.add_loader
        self._guarded("reading dataloader", add, trainer, module, self.dataloader, self.seed)

    def _limit(self, trainer: Any, module: nn.Module) -> StabilityLimit | None:
        """Return the optimizer's stability limit, where there is one optimizer."""
        optimizers = trainer.optimizers
        return stability_limit(optimizers[0], space_of(module)) if len(optimizers) == 1 else None

    def _fire_start(self, trainer: Any, module: nn.Module) -> None:
        if self._start_pending:
            self._start_pending = False
            moment, self._start = self._start, None
            self._fire(trainer, module, moment)

    def _fire_if_due(self, trainer: Any, module: nn.Module) -> None:
        if trainer.global_step == self._last_step:
            self._due = False
        due = self._due and self._held.complete
        # Clocks differ from process to process: the first one's decides.
        if due and self._processes.agree(self.budget.allows()):
            self._due = False
            self._fire(trainer, module)

    def _fire(
        self,
        trainer: Any,
        module: nn.Module,
        moment: Moment | None = None,
        function: str = "fit",
    ) -> dict[str, float]:
        """Measure and report once, by default now; return the scalars, none if it failed."""
        began = time.monotonic()
        light = moment is not None and moment.light
        if not light:
            self._last_step = moment.step if moment else trainer.global_step
        if moment is None:
            moment = Moment(trainer.global_step, function)
        try:
            moment = self._completed(trainer, module, moment)
            with ExitStack() as stack:
                objective = self._objective(trainer, module, moment, stack)
                result = self._measure(
                    objective,
                    moment,
                    # A smoke test should run every line, not take long.
                    quick=bool(trainer.fast_dev_run),
                    progress=lambda text, total: progress(trainer, text, total),
                )
            self._keep(result, moment)
            values = self._scalars(result)
        except Exception as error:  # noqa: BLE001 - whatever fails, training must go on
            self._warn(error, "a measurement")
            self.budget.spend(time.monotonic() - began, light=light)
            return {}
        if not light:
            self._guarded("saving arrays", self._save, trainer, result, moment)
            self._guarded("drawing", self._draw, trainer, result, moment)
        self.budget.spend(time.monotonic() - began, light=light)
        in_fit = moment.function == "fit"
        overhead = self.budget.overhead if in_fit else math.nan
        values |= cost_scalars(self.name, time.monotonic() - began, overhead)
        if in_fit:
            for tag, value in values.items():
                trainer.callback_metrics[tag] = torch.tensor(value)
            for logger in self._loggers(trainer):
                self._guarded("logging", write_scalars, logger, values, moment.step)
        return values

    def _completed(self, trainer: Any, module: nn.Module, moment: Moment) -> Moment:
        """Return a moment of the present weights with what the optimizer knows of them."""
        if moment.snapshot is not None:
            return moment
        limit = all_or_none(self._processes, lambda: self._limit(trainer, module))
        only = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        return replace(moment, limit=limit, optimizer=only)

    def _objective(
        self, trainer: Any, module: nn.Module, moment: Moment, stack: ExitStack
    ) -> Objective:
        """Return the objective at a moment's weights, which it has until the stack unwinds.

        Raises:
            MeasurementError: If any process cannot make its own.
        """
        as_trained = self.precision == "training"

        def make() -> Objective:
            # Last of all: sharded parts must not keep whatever was measured.
            stack.callback(reshard, module)
            # Lightning evaluates in inference mode, whose tensors nothing can be done with later.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(weights_at(module, moment.snapshot))
            stack.enter_context(at_precision(module, self.precision))
            return Objective(
                module,
                self._held.batches,
                trainer_loss(trainer, self.loss, as_trained=as_trained),
                mode=self.mode,
                dropout=self.dropout,
                seed=self.seed,
                training=self._modes(module, moment),
                microbatch_size=self.microbatch_size,
                max_memory=self.max_memory,
                engine=self.engine,
                precision=self.precision,
                arithmetic=autocast_dtype(trainer) if as_trained else None,
                findings=self._findings,
            )

        return all_or_none(self._processes, make)

    def _modes(self, module: nn.Module, moment: Moment) -> dict[nn.Module, bool] | None:
        """Return each submodule's train or eval mode in training, as it is at a moment."""
        past = moment.snapshot is not None and moment.snapshot is not self._final
        if past or moment.function != "fit":
            # The weights that the first batch met; and an evaluation says nothing of training.
            return self._training
        return {m: m.training for m in module.modules()}

    # -- where to -----------------------------------------------------------------------

    def _loggers(self, trainer: Any) -> list[Any]:
        return [] if trainer.fast_dev_run or not trainer.is_global_zero else trainer.loggers

    def _introduce(self, trainer: Any, logger: Any) -> None:
        experiment = getattr(logger, "experiment", None)
        if callable(getattr(experiment, "add_figure", None)) and self.figures:
            # A child of Lightning's own logger, so that users see it as they see Lightning's.
            logging.getLogger(type(trainer).__module__).info(
                f"{type(self).__name__}: see it by tensorboard --logdir {folder_of(logger)} "
                "--samples_per_plugin images=1000 (without that it shows ten figures a tag)"
                + (f" (numbers are in {self.name}/*.npz there)" if self.save_arrays else "")
            )
        if self.custom_scalars and self._layout():
            write_layout(logger, self._layout())

    def _save(self, trainer: Any, result: Any, moment: Moment) -> None:
        if self.save_arrays:
            stem = "step" if moment.function == "fit" else moment.function
            for folder in {folder_of(logger) for logger in self._loggers(trainer)} - {None}:
                assert isinstance(folder, Path)
                path = folder / self.name / f"{stem}_{moment.step:08d}.npz"
                self._guarded("saving arrays", result.save, path)

    def _draw(self, trainer: Any, result: Any, moment: Moment) -> None:
        loggers = self._loggers(trainer)
        if not self.figures or not loggers:
            return
        for tag, figure in self._figures(result, moment).items():
            for logger in loggers:
                arguments = (logger, f"{self.name}/{tag}", figure, moment.step)
                self._guarded("drawing", write_figure, *arguments)

    def _guarded(self, what: str, action: Callable[..., object], *arguments: Any) -> None:
        try:
            action(*arguments)
        except SharedLoaderError:
            raise
        except Exception as error:  # noqa: BLE001 - a broken logger must not end the run
            self._warn(error, what)

    def _warn(self, error: Exception, what: str, remedy: str | None = None) -> None:
        """Warn once a cause, with the remedy; ``""`` if the error says it itself."""
        cause = type(error).__name__
        if (what, cause) in self._warned:
            return
        self._warned.add((what, cause))
        if remedy is None:
            remedy = "" if isinstance(error, MeasurementError) else " " + _remedy(error, what)
        rank_zero_warn(
            f"{type(self).__name__}: {what} failed and leaves a gap; training goes on. "
            f"{cause}: {error}{remedy}"
        )


def space_of(module: nn.Module) -> ParameterSpace:
    """Return the layout of a module's trainable parameters."""
    return ParameterSpace(trainable(module))


def _runs(trainer: Any, function: str) -> bool:
    """Return whether the Trainer was called for this and not for a fit."""
    return bool(trainer.state.fn == function and not is_barebones(trainer))


def _remedy(error: Exception, what: str) -> str:
    if is_out_of_memory(error):
        return "Lower num_samples or num_steps, or set max_memory or microbatch_size."
    if isinstance(error, OSError):
        return "Free disk space, or set save_arrays=False and figures=False."
    return _REMEDIES.get(what, "Set figures=False or custom_scalars=False to do without.")


_REMEDIES = {
    "a measurement": (
        "Give loss=callable(module, batch) if the training step cannot be replayed here."
    ),
    "holding a batch": "Give dataloader= with batches of tensors in plain containers.",
    "reading dataloader": "Mend the dataloader, or leave it out to hold training batches.",
    "saving arrays": "Set save_arrays=False to do without.",
    "resuming": "Curves begin anew at this step.",
    "storing the history": "A resumed run will begin its curves anew.",
    "keeping the state": "A run resumed from here will begin its curves anew.",
}

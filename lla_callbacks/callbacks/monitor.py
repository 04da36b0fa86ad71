"""What every monitor shares: when to measure, on what, and where results go."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lla_callbacks.callbacks.account import Account, booked
from lla_callbacks.callbacks.compat import (
    MisconfigurationException,
    autocast_dtype,
    averages_before,
    fraction_done,
    is_barebones,
    progress,
    say,
    state_key_of,
    step_of,
)
from lla_callbacks.callbacks.evaluated import EvaluatedToo
from lla_callbacks.callbacks.foretold import (
    balance_of,
    cost_of,
    plan_of,
    tell_if_far,
    too_short,
)
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.moments import Moment, change_of, is_unsized, space_of
from lla_callbacks.callbacks.monitor_settings import checked
from lla_callbacks.callbacks.pace import Choice, Pace, share_of
from lla_callbacks.callbacks.planning import least_samples, unit_costs
from lla_callbacks.callbacks.processes import Processes
from lla_callbacks.callbacks.refusals import refuse_shards
from lla_callbacks.callbacks.replay import trainer_loss
from lla_callbacks.callbacks.run_state import Resumable
from lla_callbacks.callbacks.schedule import Schedule
from lla_callbacks.callbacks.sink import REMEDIES, Sink
from lla_callbacks.callbacks.sizing import CALIBRATION_SAMPLES, UnitCosts
from lla_callbacks.hessian.stability import StabilityLimit, stability_limit
from lla_callbacks.linalg.errors import MeasurementError, is_out_of_memory
from lla_callbacks.linalg.sharing import all_or_none
from lla_callbacks.objective.batches import first_of
from lla_callbacks.objective.counting import BatchSize, about
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.objective import (
    Engine,
    Mode,
    Objective,
    trainable,
)
from lla_callbacks.objective.precision import Precision, at_precision
from lla_callbacks.objective.self_check import Jacobian, SelfCheck
from lla_callbacks.objective.sharded import is_sharded, reshard
from lla_callbacks.objective.state import Snapshot, take_snapshot, weights_at
from lla_callbacks.objective.training_step import check_replayable
from lla_callbacks.report.cost import cost_scalars
from lla_callbacks.report.plain import PlainForms

# Held where the user gave no number: by 256 the largest eigenvalue of a batch of them is within
# some 20 % of that of the whole data (docs/benchmarks/sizes.md).
NUM_SAMPLES = 256
# Weights that are kept until they can be measured.
START, FINAL = "the weights of the start", "the last weights of training"
# Seconds from which a measurement is announced: longer looks like a hang.
LONG = 3.0
# Share of a run after which no more samples are waited for.
SOON = 0.05
# Training steps that trying out a whole batch takes, about, and the share of the account that it
# may take at most.
STEPS_OF_A_TRIAL = 4
TRIAL = 0.1
# Samples at the end of a run that was too short for a plan, where its batches can be cut.
LEAST_AT_END = 16


class Monitor(EvaluatedToo, Resumable):
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
        check: Whether the loss proves itself at the first measurement of a run.
        jacobian: What is measured where its gradient is no derivative.
        figures: Whether figures are drawn.
        save_arrays: Whether results are written beside the logs.
        save_batches: Whether checkpoints hold the held batches.
        custom_scalars: Whether TensorBoard gets a layout.
        name: First part of every tag.
        batch_size: How many samples a batch has, where it does not tell.
    """

    # Whether parameters may be spread over processes.
    measures_shards = False
    # Of what class moments are, which a checkpoint may hold one of.
    _moment = Moment
    # In which proportion it plans with what its account has, beside others.
    share = 1.0
    # Whether it chooses its sizes after other monitors have.
    plans_last = False

    def __init__(
        self,
        *,
        every_n_epochs: int | None,
        every_n_train_steps: int | None,
        num_samples: int | None,
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
        check: bool,
        jacobian: Jacobian,
        figures: bool,
        save_arrays: bool,
        save_batches: bool,
        custom_scalars: bool,
        name: str,
        batch_size: BatchSize = None,
    ) -> None:
        super().__init__()
        self.schedule = Schedule(every_n_train_steps, every_n_epochs)
        found = checked(
            {
                "num_samples": NUM_SAMPLES if num_samples is None else num_samples,
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
                "check": check,
                "jacobian": jacobian,
                "figures": figures,
                "save_arrays": save_arrays,
                "save_batches": save_batches,
                "custom_scalars": custom_scalars,
                "name": name,
                "batch_size": batch_size,
            }
        )
        self.num_samples: int = found["num_samples"]
        self.given_samples = None if num_samples is None else self.num_samples
        self.mode: Mode = mode
        self.dropout: bool = found["dropout"]
        self.loss = loss
        self.dataloader = dataloader
        self.seed: int = found["seed"]
        self.max_overhead: float | None = found["max_overhead"]
        self.microbatch_size: int | None = found["microbatch_size"]
        self.max_memory: int | None = found["max_memory"]
        self.engine: Engine = engine
        self.precision: Precision = precision
        self.check: bool = found["check"]
        self.jacobian: Jacobian = jacobian
        self.figures: bool = found["figures"]
        self.save_arrays: bool = found["save_arrays"]
        self.save_batches: bool = found["save_batches"]
        self.custom_scalars: bool = found["custom_scalars"]
        self.name = name
        self.batch_size: BatchSize = found["batch_size"]
        # Whether a limit holds: one that was given, or the default where no schedule was.
        self.is_bounded = self.max_overhead is not None or not self.schedule.is_given
        self._plain = PlainForms()
        self.account = Account()
        self.pace = Pace()
        self.sink = Sink(type(self).__name__, name, figures=figures, save_arrays=save_arrays)
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
        """Return functions that draw the result, by the tag's last part, what matters first."""

    @abstractmethod
    def _choose(self, costs: UnitCosts | None, seconds: float, least: int) -> Choice:
        """Choose the sizes of a run's measurements, and return what they are.

        Args:
            costs: What a gradient and a product take; ``None``: unknown, take the least.
            seconds: What all measurements and figures of the run may take.
            least: Fewest samples.
        """

    @abstractmethod
    def _gradients(self) -> float:
        """Return what a measurement of the present size takes, in gradients, about."""

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

    def _forget_weights(self, dim: int) -> None:
        """Drop vectors of other parameters than those that are trained now."""

    def _do_without_layers(self) -> None:
        """Tell each module's own parameters apart, where the user's function fails."""

    # -- when ---------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tell several monitors of one Trainer apart."""
        return state_key_of(self, name=self.name)

    @property
    def is_asked(self) -> bool:
        """Whether the user's own schedule says when, whatever it costs."""
        return not self.is_bounded

    def _reset(self) -> None:
        self._processes = Processes()
        self._held = HeldBatches(self.num_samples, self.batch_size)
        self._findings = Findings()
        self._start: Moment | None = None
        self._start_pending = True
        self._final: Snapshot | None = None
        self._training: dict[nn.Module, bool] | None = None
        # Which weights should have been kept and could not be.
        self._lost: set[str] = set()
        # Optimizer steps when the schedule was last asked.
        self._seen_steps = 0
        # Whether lazy layers had no size when settings were checked.
        self._late = False
        # Trainable parameters of the last measurement.
        self._known_names: tuple[str, ...] = ()
        self._due = False
        self._last_step = self._last_epoch = -1
        self.batch_samples = 0
        self.count = 0
        self._foretold = math.nan
        self._ending = False
        self.pace = Pace()

    def _begin(self, trainer: Any) -> None:
        """Start anew, among the processes that there are."""
        self._reset()
        self._processes = Processes(trainer)
        self.sink.begin(self._processes.rank)
        # Together the processes hold as many samples as one would alone.
        if self.dataloader is None:
            self._held.num_samples = -(-self.num_samples // self._processes.size)

    def _open_account(self, trainer: Any) -> None:
        """Share the account of the monitors that come first, or open one."""
        others = [c for c in trainer.callbacks if isinstance(c, Monitor) and c is not self]
        found = [c.account for c in others if c.is_running and not c.account.has(self.name)]
        self.account = found[0] if found else Account()
        share = self.share if self.is_bounded else None
        self.account.join(self.name, self.max_overhead, share=share)

    def _forget(self) -> None:
        """Drop what belongs to a finished run and would keep its module alive."""
        self._processes = Processes()
        self._held = HeldBatches(self.num_samples, self.batch_size)
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
        refuse_shards(self, trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: the module's own setup and configure_model may still make layers.
        self._check_module(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer)
        if is_barebones(trainer):
            rank_zero_warn(f"{type(self).__name__} does nothing with Trainer(barebones=True).")
            return
        self._open_account(trainer)
        with self.account.watching(self.name, asked=self.is_asked):
            self._seen_steps = trainer.global_step
            self._resume(trainer, pl_module)
            self._share_held(trainer)
            if self.dataloader is not None:
                if self._training is None:
                    self._training = {m: m.training for m in pl_module.modules()}
                self._hold_loader(trainer, pl_module)
                self._compare_loader()
                if self._all_hold():
                    self._fire_start(trainer, pl_module)
            if self._missed_epoch(trainer):
                self._end_epoch(trainer, pl_module, trainer.current_epoch - 1)
            self.sink.introduce(trainer, self._layout() if self.custom_scalars else None)

    @booked
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if (self._held.complete and self.batch_samples) or is_barebones(trainer):
            return
        if not self.batch_samples and batch is not None:
            self._guarded("holding a batch", self._foretell, trainer, batch)
        if self._held.complete or self.dataloader is not None:
            return
        self._guarded("holding a batch", self._hold, trainer, pl_module, batch, batch_idx)
        if self._all_hold():
            self._fire_start(trainer, pl_module)

    @booked
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_barebones(trainer):
            return
        account = self.account
        if account.members[0] == self.name:
            account.tick(partial(fraction_done, trainer, batch_idx))
        if account.is_idle and self.is_bounded and not self.schedule.is_given and not self._due:
            # Most batches of a long run: nothing can be due, and nothing is asked.
            return
        step = step_of(trainer)
        if self.is_bounded and not self.pace.planned:
            self._plan_when_ready(trainer, pl_module)
        elif self.is_bounded and self._start_pending:
            self._fire_start_if_there_is_room(trainer, pl_module)
        before, self._seen_steps = self._seen_steps, trainer.global_step
        if self.schedule.after_step(trainer.global_step, before) and step != self._last_step:
            # What falls due while batches are still being held is dropped, not caught up with.
            self._due = self._held.complete
        if self.pace.planned and not self.schedule.is_given and step != self._last_step:
            self._due = self.pace.reached(self.account) or self._due
        self._fire_if_due(trainer, pl_module)

    @booked
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if is_barebones(trainer):
            return
        self._end_epoch(trainer, pl_module, trainer.current_epoch)
        if averages_before(trainer, self):
            # When training ends the module has the average already.
            self._final = None
            self._guarded("keeping weights", self._keep_final, pl_module)

    def _keep_final(self, module: nn.Module) -> None:
        self._lost.add(FINAL)
        self._final = take_snapshot(module)
        self._lost.discard(FINAL)

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
        if is_barebones(trainer):
            return
        with self.account.watching(self.name, asked=self.is_asked):
            if self._held.complete and step_of(trainer) != self._last_step:
                if self.is_bounded:
                    self._guarded("a measurement", self._plan_end, trainer)
                moment = Moment(step_of(trainer), last=True)
                if self._final is not None:
                    limit = self._limit(trainer, pl_module)
                    moment = replace(moment, limit=limit, snapshot=self._final)
                self._fire(trainer, pl_module, moment)
        if self.count:
            say(trainer, balance_of(self))
        self._end()
        self._forget()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take over the state of a run in which nothing was left to train.

        Its history and report are there again, and if it was killed between its last checkpoint
        and its end, that end is measured: its weights are those of the checkpoint.
        """
        if not self._loaded or is_barebones(trainer):
            return
        self.history = []
        self._begin(trainer)
        self._open_account(trainer)
        with self.account.watching(self.name, asked=self.is_asked):
            self._resume(trainer, pl_module)
            alone = trainer.world_size == 1
            missing = self._resumed and alone and step_of(trainer) != self._last_step
            if missing and self.dataloader is not None:
                self._hold_loader(trainer, pl_module)
                self._all_hold()
        if missing:
            self.on_train_end(trainer, pl_module)
        else:
            self._end()
            self._forget()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # Callbacks that save a checkpoint now come later.
        self._end()
        self._forget()

    # -- how much -------------------------------------------------------------------------

    def _foretell(self, trainer: Any, batch: Any) -> None:
        """Note how large a batch is, and say what the user's own schedule will cost."""
        self.batch_samples = about(batch, self.batch_size)
        if self.is_bounded or self.count:
            return
        held = -(-self.num_samples // self.batch_samples)
        self._foretold = held * self._gradients()
        say(trainer, f"{type(self).__name__}: {cost_of(self, trainer, self._foretold)}")

    def _plan_when_ready(self, trainer: Any, module: nn.Module) -> None:
        """Choose sizes once the pace of the run is known, and measure its start with them."""
        account = self.account
        if not self._held.complete and account.fraction >= SOON:
            # A long wait for samples would cost the curve its first part.
            self._held.complete = self._processes.all(bool(self._held.batches))
            self._all_hold()
        if not self._held.complete or not self._held.batches:
            return
        if self._processes.size > 1 and account.batches & (account.batches - 1):
            # Few exchanges; the count is the same in all processes.
            return
        if self.plans_last and account.unplanned - {self.name}:
            return
        if not self._processes.agree(account.is_known):
            return
        account.unplanned.discard(self.name)
        try:
            costs, least = all_or_none(
                self._processes, lambda: self._unit_costs(trainer, module), "trying out a gradient"
            )
        except Exception as error:  # noqa: BLE001 - whatever fails, training must go on
            self._warn(error, "a measurement")
            costs, least, self._start_pending, self._start = None, 1, False, None
        seconds = self._processes.first(share_of(account, self.name))
        self._take(self._choose(costs, seconds, least))
        self._share_held(trainer)
        say(trainer, f"{type(self).__name__}: {plan_of(self)}")
        if not (self.pace.choice and self.pace.choice.count > 1):
            self._start_pending, self._start = False, None
        self._fire_start_if_there_is_room(trainer, module)

    def _fire_start_if_there_is_room(self, trainer: Any, module: nn.Module) -> None:
        """Measure the start now; in a run of unknown length once what has passed pays for it."""
        rare = self._processes.size == 1 or not self.account.batches & (self.account.batches - 1)
        if not self._start_pending or not rare:
            return
        known = not math.isnan(self.account.fraction)
        if known or self._processes.agree(self.pace.fits(self.account, self.name)):
            self._fire_start(trainer, module)

    def _take(self, choice: Choice) -> None:
        self._held.keep(choice.samples)
        self.account.samples = self.account.samples or choice.samples
        # Monitors of one loss on the same batches ask only once what is to be known of it.
        same = (
            choice.samples, self.mode, self.dropout, self.loss, id(self.dataloader), self.seed,
            self.precision, self.engine, self.microbatch_size, self.max_memory, self.check,
        )  # fmt: skip
        self._findings = self.account.findings.setdefault(same, self._findings)
        self.pace.take(choice, self.account, self.name)

    def _unit_costs(self, trainer: Any, module: nn.Module) -> tuple[UnitCosts, int]:
        """Return what a gradient takes, measured by the first monitor that asks, and the least."""
        moment, account, held = Moment(step_of(trainer)), self.account, self._held.batches
        with ExitStack() as stack:
            few = self._objective(
                trainer, module, moment, stack, first_of(held, CALIBRATION_SAMPLES, self.batch_size)
            )
            least = least_samples(few)
            if few.num_samples > CALIBRATION_SAMPLES:
                # A batch that cannot be cut.
                least = max(least, few.num_samples)
            if account.costs is None:
                step = account.seconds_a_batch
                affordable = STEPS_OF_A_TRIAL * step <= TRIAL * account.limit * account.expected
                larger = None
                if self._processes.agree(affordable):
                    wanted = self.batch_samples or few.num_samples
                    batch = first_of(held, wanted, self.batch_size)
                    larger = self._objective(trainer, module, moment, ExitStack(), batch)
                found = all_or_none(
                    self._processes,
                    lambda: unit_costs(
                        few, larger, step=step, batch_samples=self.batch_samples or 1
                    ),
                )
                account.costs = UnitCosts(**self._processes.first(asdict(found)))
        return account.costs, least

    def _plan_end(self, trainer: Any) -> None:
        """Choose the least size for a run that ended before there was a plan."""
        if not self.pace.planned:
            held = self._held.batches
            least = about(held[0], self.batch_size) if held else 1
            choice = self._choose(None, 0.0, min(LEAST_AT_END, least))
            self._take(choice)
            say(trainer, f"{type(self).__name__}: {too_short(self)}")

    # -- on what ------------------------------------------------------------------------

    def _check_module(self, trainer: Any, module: nn.Module) -> None:
        if is_barebones(trainer) or is_unsized(module):
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
        except Exception as error:  # noqa: BLE001 - of a function that the user gave
            self._warn(error, "layers=")
            self._do_without_layers()

    def _hold(self, trainer: Any, module: nn.Module, batch: Any, number: int) -> None:
        """Keep one training batch, and the weights that the first one meets."""
        if self._training is None:
            self._training = {m: m.training for m in module.modules()}
        # Steps that take the iterator themselves are announced without a batch at first.
        try:
            if batch is not None:
                self._held.add(batch, number=number, most=trainer.num_training_batches)
                self._share_held(trainer)
        finally:
            # In all processes at the same step, whatever became of the batch.
            alone = self._held.complete and self._processes.size == 1 and not self.is_bounded
            if not alone:
                self._guarded("keeping weights", self._remember_start, trainer, module)

    def _share_held(self, trainer: Any) -> None:
        """Keep one copy of what other monitors of the Trainer hold as well."""
        others = [c for c in trainer.callbacks if isinstance(c, Monitor) and c is not self]
        self._held.share(c._held for c in others if c.is_running)

    def _remember_start(self, trainer: Any, module: nn.Module) -> None:
        """Keep the weights of the start until they can be measured."""
        if is_unsized(module):
            if self._start_pending:
                say(trainer, f"{type(self).__name__}: lazy layers have no weights yet, so that "
                    "the start is left out; measurements begin after the first step.")  # fmt: skip
            self._start_pending, self._late = False, True
            return
        if self._late:
            self._late = False
            self._guarded("layers=", self._check_late, trainer, module)
        if self._start_pending and self._start is None and START not in self._lost:
            self._lost.add(START)
            limit = self._limit(trainer, module)
            self._start = Moment(step_of(trainer), "fit", limit, take_snapshot(module))
            self._lost.discard(START)

    def _check_late(self, trainer: Any, module: nn.Module) -> None:
        """Check what could not be while layers had no size; the run has begun, and goes on."""
        try:
            self._check_module(trainer, module)
        except Exception:
            self._do_without_layers()
            raise

    def _all_hold(self) -> bool:
        """Return whether every process holds its batches; then each holds those of all."""
        if self._processes.size == 1:
            if self._held.complete:
                self._go_on_with_new()
            return self._held.complete
        # Together, since what follows is an exchange.
        self._held.complete = self._processes.all(self._held.complete)
        if not self._held.complete:
            return False
        # A loader of the user's own is the same in every process.
        alike = self.dataloader is not None
        try:
            pairs = list(zip(self._held.batches, self._held.numbers, strict=True))
            pairs = self._processes.union(pairs, alike=alike)
            self._held.batches = [batch for batch, _ in pairs]
            self._held.numbers = [number for _, number in pairs]
        except Exception as error:  # noqa: BLE001 - no batches, no measurements; training goes on
            self._warn(error, "holding a batch", REMEDIES["holding a batch"])
            self._held.batches, self._held.numbers = [], []
        self._go_on_with_new()
        return bool(self._held.batches)

    def _hold_loader(self, trainer: Any, module: Any) -> None:
        add = self._held.add_loader
        self._guarded("reading dataloader", add, trainer, module, self.dataloader, self.seed)

    def _limit(self, trainer: Any, module: nn.Module) -> StabilityLimit | None:
        """Return the optimizer's stability limit, where there is one optimizer."""
        if len(trainer.optimizers) != 1:
            return None
        try:
            return stability_limit(trainer.optimizers[0], space_of(module))
        except Exception as error:  # noqa: BLE001 - of an optimizer that is not known well enough
            self._warn(error, "the stability limit")
            return None

    def _fire_start(self, trainer: Any, module: nn.Module) -> None:
        self._share_held(trainer)
        if (self.is_bounded and not self.pace.planned) or is_unsized(module):
            # Its size is chosen first, when the pace of the run is known.
            self._remember_start(trainer, module)
        elif self._start_pending:
            self._start_pending = False
            moment, self._start = self._start, None
            moment = moment or Moment(step_of(trainer))
            self._fire(trainer, module, replace(moment, first=True))

    def _fire_if_due(self, trainer: Any, module: nn.Module) -> None:
        if step_of(trainer) == self._last_step:
            self._due = False
        if not (self._due and self._held.complete):
            return
        if self.is_bounded:
            if not self.pace.planned:
                return
            # Clocks differ from process to process: the first one's decides.
            if not self._processes.agree(self.pace.fits(self.account, self.name)):
                # A schedule of the user's own is caught up with when there is room.
                self._due = self.schedule.is_given
                return
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
            self._last_step = moment.step if moment else step_of(trainer)
        if moment is None:
            moment = Moment(step_of(trainer), function)
        if moment.last:
            # What was put aside for it is spent now.
            self._ending = True
            self.pace.release(self.account, self.name)
        announced = self._announce(trainer, moment)
        asked = moment
        try:
            # Whatever fails in one process, wherever it is, fails in all of them.
            moment, result = all_or_none(
                self._processes, lambda: self._measured(trainer, module, asked), "a measurement"
            )
            self._keep(result, moment)
            values = self._scalars(result)
        except Exception as error:  # noqa: BLE001 - whatever fails, training must go on
            # A loss of one's own is no remedy for trouble with it.
            own = self.loss is not None and not is_out_of_memory(error)
            self._warn(error, "a measurement", "" if own else None)
            return {}
        in_fit = moment.function == "fit"
        if not light:
            stem = f"{'step' if in_fit else moment.function}_{moment.step:08d}"
            self.sink.arrays(trainer, result, stem)
            if in_fit:
                self.pace.saw(time.monotonic() - began)
            self._guarded("drawing", self._draw_what_fits, trainer, result, moment)
        seconds = time.monotonic() - began
        overhead = self.account.overhead if in_fit else math.nan
        values |= cost_scalars(self.name, seconds, overhead)
        if in_fit:
            self._note_cost(trainer, seconds, light=light)
            for tag, value in values.items():
                trainer.callback_metrics[tag] = torch.tensor(value)
            self.sink.scalars(trainer, values, moment.step)
        if announced:
            say(trainer, f"{type(self).__name__}: that took {seconds:.1f} s.")
        return values

    def _announce(self, trainer: Any, moment: Moment) -> bool:
        """Say beforehand that a measurement will take long; return whether it was said."""
        expected = self.pace.cost
        if not expected and self._foretold > 0 and self.account.batches > 1:
            expected = self._foretold * self.account.seconds_a_batch
        if moment.light or not expected >= LONG:
            return False
        say(trainer, f"{type(self).__name__}: a measurement of about {expected:.0f} s begins.")
        return True

    def _note_cost(self, trainer: Any, seconds: float, *, light: bool) -> None:
        """Take note of what a measurement took, and tell if that is far from what was said."""
        if light:
            return
        self.count += 1
        batch = self.account.seconds_a_batch
        if self.count == 2 and not self.is_bounded and batch > 0:
            # Not the first, in which everything happens for the first time.
            tell_if_far(self, trainer, seconds, self._foretold * batch)
        if self.pace.planned and not self._ending:
            self.pace.reserve(self.account, self.name)

    def _draw_what_fits(self, trainer: Any, result: Any, moment: Moment) -> None:
        """Draw figures while there is room for them: at the end one at least."""
        pace, account = self.pace, self.account
        bounded = self.is_bounded and moment.function == "fit" and not trainer.fast_dev_run
        for number, (name, figure) in enumerate(self._figures(result, moment).items()):
            always = moment.last and number == 0
            # Only the first process draws, so that nobody has to be asked.
            if bounded and not always and not pace.draws(account, self.name, last=moment.last):
                break
            began = time.monotonic()
            for _ in self.sink.draw(trainer, {name: figure}, moment.step):
                pace.figure = time.monotonic() - began
        self._draw_more(trainer, result, moment)

    def _draw_more(self, trainer: Any, result: Any, moment: Moment) -> None:
        """Show what is no figure."""

    def _in_steps(self, seconds: float) -> float:
        """Return seconds in training steps of the user's own batch, NaN outside of a fit."""
        batch = self.account.seconds_a_batch if self.is_running else math.nan
        return seconds / batch if batch > 0 else math.nan

    def _completed(self, trainer: Any, module: nn.Module, moment: Moment) -> Moment:
        """Return a moment of the present weights with what the optimizer knows of them.

        Raises:
            MeasurementError: If weights that should have been kept were not, in any process.
        """
        lost = self._lost & ({FINAL} if moment.last else {START} if moment.first else set())
        if lost:
            raise MeasurementError(f"{lost.pop()} could not be kept.", "")
        if moment.snapshot is None:
            only = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
            moment = replace(moment, limit=self._limit(trainer, module), optimizer=only)
        known = torch.tensor([float(moment.limit is not None)])
        if float(self._processes.total(known)) < self._processes.size:
            # Its spectrum costs products, which all processes share or none.
            moment = replace(moment, limit=None)
        return moment

    def _measured(self, trainer: Any, module: nn.Module, moment: Moment) -> tuple[Moment, Any]:
        """Return a result, and the moment with all that is known of it."""
        moment = self._completed(trainer, module, moment)
        names = tuple(trainable(module))
        if self._known_names not in ((), names):
            say(trainer, f"{type(self).__name__}: {change_of(self._known_names, names, moment)}")
            self._forget_weights(space_of(module).dim)
        self._known_names = names
        with ExitStack() as stack:
            objective = self._objective(trainer, module, moment, stack)
            result = self._measure(
                objective,
                moment,
                # A smoke test should run every line, not take long.
                quick=bool(trainer.fast_dev_run),
                progress=lambda text, total: progress(trainer, text, total),
            )
        return moment, result

    def _objective(
        self,
        trainer: Any,
        module: nn.Module,
        moment: Moment,
        stack: ExitStack,
        batches: list[Any] | None = None,
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
                self._held.batches if batches is None else batches,
                trainer_loss(
                    trainer, self.loss, batch_idx=self._held.numbers, as_trained=as_trained
                ),
                mode=self.mode,
                dropout=self.dropout,
                seed=self.seed,
                training=self._modes(module, moment),
                microbatch_size=self.microbatch_size,
                max_memory=self.max_memory,
                engine=self.engine,
                precision=self.precision,
                arithmetic=autocast_dtype(trainer) if as_trained else None,
                findings=self._findings if batches is None else Findings(),
                check=self.check and batches is None,
                jacobian=self.jacobian,
                batch_size=self.batch_size,
            )

        return all_or_none(self._processes, make)

    def _modes(self, module: nn.Module, moment: Moment) -> dict[nn.Module, bool] | None:
        """Return each submodule's train or eval mode in training, as it is at a moment."""
        past = moment.snapshot is not None and moment.snapshot is not self._final
        if past or moment.function != "fit":
            # The weights that the first batch met; and an evaluation says nothing of training.
            return self._training
        return {m: m.training for m in module.modules()}

    def _guarded(self, what: str, action: Callable[..., object], *arguments: Any) -> None:
        self.sink.guarded(what, action, *arguments)

    def _tell_check(self, check: SelfCheck) -> None:
        """Warn once of what the loss's own check found, where it found anything."""
        if check.trouble:
            error = MeasurementError(f"{check.trouble}.", check.remedy)
            self._warn(error, "the self-check", remedy="")

    def _warn(self, error: Exception, what: str, remedy: str | None = None) -> None:
        self.sink.warn(error, what, remedy)

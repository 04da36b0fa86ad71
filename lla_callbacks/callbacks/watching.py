"""What a monitor does at each of Lightning's hooks: it sequences its parts, no more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from lla_callbacks.callbacks.account import booked
from lla_callbacks.callbacks.compat import (
    MisconfigurationException,
    averages_before,
    fraction_done,
    is_barebones,
    say,
    step_of,
)
from lla_callbacks.callbacks.foreseen import without_moments
from lla_callbacks.callbacks.foretold import balance_of
from lla_callbacks.callbacks.hparams_table import show_row
from lla_callbacks.callbacks.idle_hooks import without_idle_hooks
from lla_callbacks.callbacks.moments import is_unsized
from lla_callbacks.callbacks.own_loader import refuse_shared
from lla_callbacks.callbacks.records import check_fit
from lla_callbacks.callbacks.refusals import refuse_shards
from lla_callbacks.callbacks.resting import Resting
from lla_callbacks.callbacks.shared_work import SharesWork
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.training_step import check_replayable


@without_idle_hooks
class Watching(Resting, SharesWork):
    """A callback that measures quantities of the held objective, and leaves training unchanged.

    It knows the order of things, its parts the rest. Trouble becomes a warning and a gap.
    """

    # -- Lightning's hooks --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the present fit, or of the last one."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until training starts, when the module is there."""
        self.run.loaded = state_dict

    def _sent(self) -> dict[str, Any]:
        return self.run.sent(self.evaluated)

    def _received(self, found: Any) -> None:
        self.evaluated = self.run.received(found)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        # Before a checkpoint is loaded: one that an earlier call loaded is not this one's.
        self.run.loaded = None
        if is_barebones(trainer):
            return
        for other in self._others(trainer):
            for name in {*self.names()} & {*other.names()}:
                raise MisconfigurationException(
                    f"two monitors are named {name!r} and would write the same tags: give "
                    "one of them another name=."
                )
        if self.subject.settings.loss is None and stage in ("fit", "validate", "test"):
            try:
                check_replayable(pl_module)
            except TypeError as error:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        refuse_shards(self, trainer, pl_module)
        refuse_shared(trainer, pl_module, self.subject.settings.dataloader, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: the module's own setup and configure_model may still make layers.
        self._check_module(trainer, pl_module)
        for record in self.records:
            gaps, words = without_moments(record.quantity, trainer.optimizers)
            if gaps and not is_barebones(trainer):
                self.sink.foreseen.update(gaps)
                rank_zero_warn(f"{type(self).__name__}: {words}")
        show_row(self, self._others(trainer), trainer, pl_module, early=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for record in self.records:
            record.clear()
        self._begin(trainer)
        if is_barebones(trainer):
            rank_zero_warn(f"{type(self).__name__} does nothing with Trainer(barebones=True).")
            return
        self._join(trainer)
        with self.timing.watching():
            self.timing.seen_steps = trainer.global_step
            self.run.resume(trainer, pl_module)
            self._share_copies(trainer)
            if self.subject.settings.dataloader is not None:
                self.subject.note_modes(pl_module)
                self.subject.hold_loader(trainer, pl_module)
                self.subject.compare_loader(trainer)
                if self._all_hold():
                    self._fire_start(trainer, pl_module)
            if self.run.missed_epoch(trainer):
                self._end_epoch(trainer, pl_module, trainer.current_epoch - 1)
            self.sink.introduce(trainer, self._layout())
        self._look("after_step", trainer, pl_module)

    @booked
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        done = self._went_first("_meet")
        held, seen = self.subject.held, self.timing.batch_samples
        if (held.complete and seen and not self._watching) or is_barebones(trainer):
            # For the rest of the run.
            self._rest_from("on_train_batch_start", trainer)
            return
        if not done:
            self._let_go_first("_meet", trainer, pl_module, batch, batch_idx)
            self._meet(trainer, pl_module, batch, batch_idx)
        self._look("before_step", trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # What comes before the account is opened is all that happens after most batches.
        if is_barebones(trainer):
            return
        timing, account = self.timing, self.timing.account
        leads = account.members[0] == self.name
        rests = timing.may_rest and not self._watching and not self._looks_at_each_batch
        if rests and (account.passes() if leads else account.is_idle):
            if not leads and self._rest_from("on_train_batch_end", trainer):
                account.resting.append(self._wake_up)
            self._gone_first.discard("_after_batch")
            return
        self._batch_ended(trainer, pl_module, batch_idx, leads=leads)
        if self.handed.is_left and not trainer.is_last_batch:
            self.handed.let_go()

    @booked
    def _batch_ended(self, trainer: Any, pl_module: Any, batch_idx: int, *, leads: bool) -> None:
        if self._watching:
            self._look("after_step", trainer, pl_module)
        timing, account = self.timing, self.timing.account
        if leads:
            account.tick(partial(fraction_done, trainer, batch_idx))
        if not (self._went_first("_after_batch") or timing.is_idle):
            self._let_go_first("_after_batch", trainer, pl_module)
            self._after_batch(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # What the end of the last epoch left.
        self.handed.let_go()

    @booked
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if is_barebones(trainer):
            return
        if not self._went_first("_end_epoch"):
            self._let_go_first("_end_epoch", trainer, pl_module, trainer.current_epoch)
            self._end_epoch(trainer, pl_module, trainer.current_epoch)
        if averages_before(trainer, self):
            # When training ends the module has the average already.
            self.subject.keep_final(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if is_barebones(trainer):
            return
        timing = self.timing
        if not self._went_first("_end_training"):
            self._let_go_first("_end_training", trainer, pl_module)
            self._end_training(trainer, pl_module)
        if timing.count:
            say(trainer, balance_of(timing, saved=self.sink.save_arrays))
        show_row(self, self._others(trainer), trainer, pl_module, early=False)
        self.run.end()
        self._forget()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take over the state of a run in which nothing was left to train.

        Its history and report are there again, and if it was killed between its last checkpoint
        and its end, that end is measured: its weights are those of the checkpoint.
        """
        if not self.run.loaded or is_barebones(trainer):
            return
        for record in self.records:
            record.clear()
        self._begin(trainer)
        self._join(trainer)
        with self.timing.watching():
            self.run.resume(trainer, pl_module)
            behind = step_of(trainer) != self.timing.last_step
            missing = self.run.is_resumed and trainer.world_size == 1 and behind
            if missing and self.subject.settings.dataloader is not None:
                self.subject.hold_loader(trainer, pl_module)
                self._all_hold()
        if missing:
            self.on_train_end(trainer, pl_module)
        else:
            self.run.end()
            self._forget()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # Callbacks that save a checkpoint now come later.
        self.run.end()
        self._forget()

    # -- a run --------------------------------------------------------------------------

    @property
    def _looks_at_each_batch(self) -> bool:
        """Whether something may be due after any batch, whatever the account says."""
        return False

    @classmethod
    def _resting_class(cls) -> type:
        return Watching

    def _wake_up(self) -> None:
        self._wake("on_train_batch_end")

    def _begin(self, trainer: Any) -> None:
        """Start anew, among the processes that there are."""
        self._wake()
        self.timing.reset()
        self.subject.reset(trainer)
        for record in self.records:
            record.begin()
        self.sink.begin(self.subject.processes.rank)
        self.handed.let_go()
        self._find_servants(trainer)

    def _join(self, trainer: Any) -> None:
        """Share an account with the monitors that run already, and what they have told."""
        self.timing.join(other.timing for other in self._running(trainer))
        self.sink.said = self.account.said

    def _forget(self) -> None:
        """Drop what belongs to a finished run and would keep its module alive."""
        self._wake()
        self.subject.forget()
        self.handed.let_go()
        for record in self.records:
            record.quantity.end()

    def _look(self, what: str, trainer: Any, module: nn.Module) -> None:
        """Let quantities look at the weights that want to."""
        if not self._watching or is_barebones(trainer) or is_unsized(module):
            return
        for quantity in self._watching:
            look = getattr(quantity, what)
            self.sink.guarded("recording the path", look, step_of(trainer), module)

    def _share_copies(self, trainer: Any) -> None:
        self.subject.share_copies(other.subject for other in self._running(trainer))

    def _check_module(self, trainer: Any, module: nn.Module) -> None:
        if not is_barebones(trainer) and not is_unsized(module):
            engine = self.subject.products.engine
            self.subject.check_parameters(module)
            check_fit(type(self).__name__, module, self.records, engine, self.sink)

    def _layout(self) -> Mapping[str, Any] | None:
        """Return a TensorBoard layout of custom charts, if there is one."""
        return None

    # -- on what ------------------------------------------------------------------------

    def _meet(self, trainer: Any, module: nn.Module, batch: Any, number: int) -> None:
        """Take note of a training batch, and keep it if it is one of those that are held."""
        if not self.timing.batch_samples and batch is not None:
            self.sink.guarded("holding a batch", self.planner.foretell, trainer, batch)
        if not self.subject.held.complete and self.subject.settings.dataloader is None:
            self.sink.guarded("holding a batch", self._hold, trainer, module, batch, number)
            if self._all_hold():
                self._fire_start(trainer, module)

    def _hold(self, trainer: Any, module: nn.Module, batch: Any, number: int) -> None:
        """Keep one training batch, and the weights that the first one meets."""
        subject = self.subject
        subject.note_modes(module)
        # Steps that take the iterator themselves are announced without a batch at first.
        try:
            if batch is not None:
                subject.held.add(batch, number=number, most=trainer.num_training_batches)
                self._share_copies(trainer)
        finally:
            # In all processes at the same step, whatever became of the batch.
            alone = subject.held.complete and subject.processes.size == 1 and not self.is_bounded
            if not alone:
                self.sink.guarded("keeping weights", self._remember_start, trainer, module)

    def _remember_start(self, trainer: Any, module: nn.Module) -> None:
        if self.subject.late and not is_unsized(module):
            self.subject.late = False
            self.sink.guarded("layers=", self._check_late, trainer, module)
        self.subject.remember_start(trainer, module)

    def _check_late(self, trainer: Any, module: nn.Module) -> None:
        """Check what could not be while layers had no size; the run has begun, and goes on."""
        try:
            self._check_module(trainer, module)
        except Exception:
            for record in self.records:
                record.quantity.do_without_layers()
            raise

    def _after_batch(self, trainer: Any, module: nn.Module) -> None:
        """Plan, and measure what is due."""
        timing = self.timing
        if timing.is_bounded and not timing.pace.planned:
            if self.planner.plan_when_ready(trainer, module):
                self._share_copies(trainer)
                self.planner.tell(trainer)
                self._fire_start_if_there_is_room(trainer, module)
        elif timing.is_bounded and self.subject.start_pending:
            self._fire_start_if_there_is_room(trainer, module)
        timing.spread(self.subject.processes)
        complete = self.subject.held.complete
        timing.after_batch(trainer.global_step, step_of(trainer), complete=complete)
        self._fire_if_due(trainer, module)

    def _end_training(self, trainer: Any, module: nn.Module) -> None:
        """Measure the last weights, unless that is done."""
        timing, subject = self.timing, self.subject
        with timing.watching():
            if subject.held.complete and step_of(trainer) != timing.last_step:
                if timing.is_bounded:
                    self.sink.guarded("a measurement", self.planner.plan_end, trainer)
                self._fire(trainer, module, subject.final(trainer, module))

    def _end_epoch(self, trainer: Any, module: nn.Module, epoch: int) -> None:
        self.timing.last_epoch = epoch
        subject = self.subject
        if not subject.held.complete and subject.processes.all(bool(subject.held.batches)):
            # An epoch is all there is: further batches would repeat its samples.
            subject.held.complete = True
            self._all_hold()
            self._fire_start(trainer, module)
        if self.schedule.after_epoch(epoch):
            self.timing.due = True
        self._fire_if_due(trainer, module)

    # -- when ---------------------------------------------------------------------------

    def _fire_start(self, trainer: Any, module: nn.Module) -> None:
        self._share_copies(trainer)
        if (self.is_bounded and not self.pace.planned) or is_unsized(module):
            # Its size is chosen first, when the pace of the run is known.
            self._remember_start(trainer, module)
        elif self.subject.start_pending:
            self._fire(trainer, module, self.subject.take_start(trainer))

    def _fire_start_if_there_is_room(self, trainer: Any, module: nn.Module) -> None:
        """Measure the start now; in a run of unknown length once what has passed pays for it."""
        account, processes = self.account, self.subject.processes
        rare = processes.size == 1 or not account.batches & (account.batches - 1)
        if not self.subject.start_pending or not rare:
            return
        if not math.isnan(account.fraction) or processes.agree(self.timing.fits):
            self._fire_start(trainer, module)

    def _fire_if_due(self, trainer: Any, module: nn.Module) -> None:
        held, processes = self.subject.held, self.subject.processes
        if self.timing.is_time(step_of(trainer), processes, complete=held.complete):
            self._fire(trainer, module, Moment(step_of(trainer)))

"""Stand-alone validate and test runs, which a monitor measures on their own batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lla_callbacks.callbacks.compat import Callback, is_barebones, step_of
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.moment import Moment

if TYPE_CHECKING:
    from lla_callbacks.callbacks.sink import Sink
    from lla_callbacks.callbacks.subject import Subject


class EvaluatedToo(Callback):
    """A callback that measures ``trainer.validate`` and ``trainer.test``, not validation in fit."""

    # What a stand-alone call measured, one report a loader.
    evaluated: Sequence[Any] = ()
    # Batches of each loader, where there are several.
    _parts: Sequence[HeldBatches] = ()

    if TYPE_CHECKING:
        subject: Subject
        sink: Sink
        name: str
        _begin: Callable[[Any], None]
        _check_module: Callable[[Any, Any], None]
        _forget: Callable[[], None]
        _fire: Callable[..., dict[str, float]]
        _last: Callable[[], Any]
        _went_first: Callable[[str], bool]
        _let_go_first: Callable[..., None]
        _names: Callable[[], list[str]]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to hold batches."""
        self._start_evaluation(trainer, pl_module, "validate")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hold a batch."""
        self._hold_evaluation(trainer, batch, "validate", dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure."""
        self._finish_evaluation(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to hold batches."""
        self._start_evaluation(trainer, pl_module, "test")

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hold a batch."""
        self._hold_evaluation(trainer, batch, "test", dataloader_idx)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure."""
        self._finish_evaluation(trainer, pl_module, "test")

    def _start_evaluation(self, trainer: Any, module: Any, function: str) -> None:
        if _runs(trainer, function):
            self._check_module(trainer, module)
            self._begin(trainer)
            self.evaluated, self._parts = [], []
            if self.subject.settings.dataloader is not None:
                self.subject.hold_loader(trainer, module)
            elif (count := _num_loaders(trainer, function)) > 1:
                # A mixture of several sets would be of none of them.
                number, size = self.subject.held.num_samples, self.subject.held.batch_size
                self._parts = [HeldBatches(number, size) for _ in range(count)]

    def _hold_evaluation(
        self, trainer: Any, batch: Any, function: str, dataloader_idx: int
    ) -> None:
        if _runs(trainer, function) and self.subject.settings.dataloader is None:
            held = self._parts[dataloader_idx] if self._parts else self.subject.held
            if not held.complete:
                self.sink.guarded("holding a batch", held.add, batch)

    def _finish_evaluation(self, trainer: Any, module: Any, function: str) -> None:
        if _runs(trainer, function) and not self._went_first("_evaluate"):
            self._let_go_first("_evaluate", trainer, module, function)
            self._evaluate(trainer, module, function)

    def _evaluate(self, trainer: Any, module: Any, function: str) -> None:
        parts, self._parts = self._parts or [self.subject.held], []
        for k, held in enumerate(parts):
            if self.subject.processes.all(bool(held.batches)):
                # As Lightning names what several loaders log.
                part = f"/dataloader_idx_{k}" if len(parts) > 1 else ""
                self.subject.held = held
                self._evaluate_part(trainer, module, function, part)
        self._forget()

    def _evaluate_part(self, trainer: Any, module: Any, function: str, part: str) -> None:
        """Measure on the batches that are held, and hand on what was found."""
        self.subject.held.complete = True
        self.subject.all_hold(None)
        # Of other batches.
        self.subject.findings = Findings()
        self.sink.part = part
        try:
            values = self._fire(trainer, module, Moment(step_of(trainer), function))
        finally:
            self.sink.part = ""
        if values:
            self.evaluated = [*self.evaluated, self._last()]
        # The loop hands what matters most to the loggers, prints and returns it.
        first = tuple(f"{name}/" for name in self.names())
        shown = self.firing.shown(values)
        main = {f"{t}{part}": v for t, v in shown.items() if t.startswith(first)}
        shared = self.subject.processes.size > 1
        module.log_dict(main, batch_size=1, sync_dist=shared, add_dataloader_idx=False)
        rest = {f"{t}{part}": v for t, v in shown.items() if not t.startswith(first)}
        self.sink.scalars(trainer, rest, step_of(trainer))


def _num_loaders(trainer: Any, function: str) -> int:
    """Return how many loaders a stand-alone call evaluates."""
    counts = trainer.num_val_batches if function == "validate" else trainer.num_test_batches
    return len(counts) if isinstance(counts, Sequence) else 1


def _runs(trainer: Any, function: str) -> bool:
    """Return whether the Trainer was called for this and not for a fit."""
    return bool(trainer.state.fn == function and not is_barebones(trainer))

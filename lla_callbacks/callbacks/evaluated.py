"""Stand-alone validate and test runs, which a monitor measures on their own batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lla_callbacks.callbacks.compat import Callback, is_barebones

if TYPE_CHECKING:
    from lla_callbacks.callbacks.held_batches import HeldBatches
    from lla_callbacks.callbacks.processes import Processes
    from lla_callbacks.callbacks.sink import Sink


class EvaluatedToo(Callback):
    """A callback that measures ``trainer.validate`` and ``trainer.test``, not validation in fit."""

    if TYPE_CHECKING:
        name: str
        dataloader: Any
        sink: Sink
        _held: HeldBatches
        _processes: Processes
        _begin: Callable[[Any], None]
        _check_module: Callable[[Any, Any], None]
        _hold_loader: Callable[[Any, Any], None]
        _all_hold: Callable[[], bool]
        _forget: Callable[[], None]
        _fire: Callable[..., dict[str, float]]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to hold batches."""
        self._start_evaluation(trainer, pl_module, "validate")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hold a batch."""
        self._hold_evaluation(trainer, batch, "validate")

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
        self._hold_evaluation(trainer, batch, "test")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure."""
        self._finish_evaluation(trainer, pl_module, "test")

    def _start_evaluation(self, trainer: Any, module: Any, function: str) -> None:
        if _runs(trainer, function):
            self._check_module(trainer, module)
            self._begin(trainer)
            if self.dataloader is not None:
                self._hold_loader(trainer, module)

    def _hold_evaluation(self, trainer: Any, batch: Any, function: str) -> None:
        if _runs(trainer, function) and not self._held.complete and self.dataloader is None:
            self.sink.guarded("holding a batch", self._held.add, batch)

    def _finish_evaluation(self, trainer: Any, module: Any, function: str) -> None:
        if _runs(trainer, function) and self._processes.all(bool(self._held.batches)):
            self._held.complete = True
            self._all_hold()
            values = self._fire(trainer, module, function=function)
            # The loop hands what matters most to the loggers, prints and returns it.
            main = {tag: v for tag, v in values.items() if tag.startswith(f"{self.name}/")}
            module.log_dict(main, batch_size=1, sync_dist=self._processes.size > 1)
            rest = {tag: v for tag, v in values.items() if tag not in main}
            self.sink.scalars(trainer, rest, trainer.global_step)
            self._forget()


def _runs(trainer: Any, function: str) -> bool:
    """Return whether the Trainer was called for this and not for a fit."""
    return bool(trainer.state.fn == function and not is_barebones(trainer))

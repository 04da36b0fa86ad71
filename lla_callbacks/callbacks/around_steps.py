"""Weights that are away exactly while a Trainer's own step computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from lla_callbacks.callbacks.compat import skips_backward
from lla_callbacks.objective.sharded import units

_MISSING = object()
# Hooks in which users read weights between forward and backward pass: averages, mostly.
_READS_BETWEEN = "on_before_zero_grad"
_OWN = ("Callback." + _READS_BETWEEN, "ModelHooks." + _READS_BETWEEN)


class Mover(Protocol):
    """Who moves weights."""

    def move(self) -> bool:
        """Move them; return whether it is done."""

    def put_back(self) -> None:
        """Put them back."""

    def pause(self) -> None:
        """Put them back for a moment, in which a graph may be alive."""

    def resume(self) -> None:
        """End the moment: the same bits as before it."""

    def note(self, loss: Tensor) -> None:
        """Take note of a loss that a backward pass begins with, before it is scaled."""


class AroundSteps:
    """Moves weights before a step's forward pass and puts them back after its backward pass.

    Hooks would not do: other callbacks have theirs at the same places, before or after. So the
    Trainer's strategy is asked instead, whose public methods run the step, the backward pass and
    the optimizer, whatever the strategy and precision. What runs with the weights in place:
    every hook but ``on_before_backward``, clipping, the optimizer, checkpoints, validation.

    - Automatic optimization: from ``training_step`` to the end of the backward pass; in place in
      between where somebody's ``on_before_zero_grad`` may read them.
    - Manual optimization: from the start of ``training_step`` to each optimizer step, and from
      the next call of a module inside it on.
    - Whatever is raised, weights are back before anybody hears of it. A checkpoint that is saved
      meanwhile (by a signal, or from within the step) is one of the weights in place.

    Args:
        trainer: While it trains.
        module: Its module.
        mover: Who moves the weights.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        mover: Mover,
    ) -> None:
        self._trainer, self._module, self._mover = trainer, module, mover
        # The weights are away; they are back for a moment; a manual step runs; an optimizer of
        # Lightning's steps.
        self._away = self._paused = self._inside = self._stepping = False
        self._patches: list[tuple[Any, str, Any, Any]] = []
        self._handles: list[Any] = []
        self._lazy: list[Any] = []
        self._someone_reads = _someone_reads(trainer, module)
        self._units = units(module)
        strategy = trainer.strategy
        self._patch(strategy, "training_step", self._training_step)
        self._patch(strategy, "backward", self._backward)
        self._patch(strategy.precision_plugin, "backward", self._backward_itself)
        self._patch(strategy, "optimizer_step", self._optimizer_step)
        self._patch(trainer, "save_checkpoint", self._save_checkpoint)
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_pre_hook"):
                self._handles.append(optimizer.register_step_pre_hook(self._before_any_step))

    def put_back(self) -> None:
        """Put the weights back, and expect nothing more of this step."""
        if self._paused:
            self._resume()
        self._go_back()

    def remove(self) -> None:
        """Put the weights back, and the Trainer's methods."""
        self.put_back()
        self._stop_waiting()
        for owner, name, ours, before in reversed(self._patches):
            # Somebody may have wrapped ours meanwhile: theirs stays, and ours inside does nothing.
            if vars(owner).get(name) is ours:
                if before is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)
        for handle in self._handles:
            handle.remove()
        self._patches, self._handles = [], []

    # -- to and fro -----------------------------------------------------------------------

    def _go(self) -> None:
        if not self._away and self._mover.move():
            self._away = True
            # What a sharded part has gathered is from before.
            self._reshard()

    def _go_back(self) -> None:
        if self._away:
            self._away = False
            self._mover.put_back()
            self._reshard()

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    def _pause(self) -> None:
        # Not resharded: a graph is alive that may need what was gathered.
        self._mover.pause()
        self._paused = True

    def _resume(self) -> None:
        self._paused = False
        self._mover.resume()

    def _patch(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        before = vars(owner).get(name, _MISSING)
        original = getattr(owner, name)

        def ours(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(owner, name, ours)
        self._patches.append((owner, name, ours, before))

    # -- what the Trainer calls -----------------------------------------------------------

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        automatic = self._module.automatic_optimization
        if automatic and skips_backward(self._trainer):
            return original(*args, **kwargs)
        self._go()
        self._inside = self._away and not automatic
        output = None
        try:
            output = original(*args, **kwargs)
        finally:
            self._inside = False
            self._stop_waiting()
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None or not automatic:
                self._go_back()
            elif self._someone_reads and self._away:
                self._pause()
        return output

    def _backward(
        self, original: Callable[..., Any], closure_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._paused:
            self._resume()
        if self._away:
            self._mover.note(closure_loss.detach())
        try:
            return original(closure_loss, *args, **kwargs)
        except BaseException:
            self.put_back()
            raise

    def _backward_itself(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if self._module.automatic_optimization:
            self._go_back()
        return found

    def _optimizer_step(
        self,
        original: Callable[..., Any],
        optimizer: Any,
        closure: Callable[[], Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        def closed() -> Any:
            try:
                return closure()
            finally:
                self.put_back()

        self._stepping = True
        try:
            return original(optimizer, closed, *args, **kwargs)
        finally:
            self._stepping = False
            self._await_next_pass()

    def _save_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._away or self._paused:
            return original(*args, **kwargs)
        self._pause()
        try:
            return original(*args, **kwargs)
        finally:
            self._resume()

    def _before_any_step(self, optimizer: Any, *_: Any) -> None:
        """Put weights back before an optimizer that is stepped past Lightning."""
        if not self._stepping and self._inside:
            self._go_back()
            self._await_next_pass()

    # -- several optimizers in one manual step ------------------------------------------------

    def _await_next_pass(self) -> None:
        """Go again at the next forward pass of a manual step: its end may only average weights."""
        if self._inside and not self._lazy:
            self._lazy = [
                m.register_forward_pre_hook(lambda *_: self._go()) for m in _called(self._module)
            ]

    def _stop_waiting(self) -> None:
        for handle in self._lazy:
            handle.remove()
        self._lazy = []


def _called(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a module, without what is inside compiled ones."""
    found, waiting = [], [module]
    while waiting:
        m = waiting.pop()
        found.append(m)
        if type(m).__name__ != "OptimizedModule":
            waiting += list(m.children())
    return found


def _someone_reads(trainer: Any, module: Any) -> bool:
    for owner in (module, *trainer.callbacks):
        method = getattr(owner, _READS_BETWEEN, None)
        if getattr(method, "__qualname__", _OWN[0]) not in _OWN:
            return True
    return False

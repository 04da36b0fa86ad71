"""The module's own training step as a loss of (module, batch), without a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lla_callbacks.linalg.errors import MeasurementError


class SkippedBatchError(MeasurementError):
    """The training step returned no loss for a held batch."""


# Of training steps, by their functions: their code, and what they take.
_FORMS: WeakKeyDictionary[FunctionType, tuple[CodeType, str]] = WeakKeyDictionary()
_PLACE: ContextVar[int] = ContextVar("place", default=0)


@contextmanager
def at_place(place: int) -> Iterator[None]:
    """Tell whatever is evaluated in here which of the held batches it gets.

    A loss is a function of (module, batch); a replayed step is told the batch's number too, and
    finds it by this.
    """
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def present_place() -> int:
    """Return which of the held batches is evaluated now."""
    return _PLACE.get()


def replay_training_step(module: nn.Module, batch: Any, batch_idx: int = 0) -> Tensor:
    """Return the loss that ``module.training_step`` computes on a batch.

    Call it within :func:`lla_callbacks.objective.state.preserved`, which takes the mute and
    everything else that the step changes away again.

    Args:
        module: A LightningModule, known by its methods alone.
        batch: One batch, on the module's device.
        batch_idx: Passed on if the step asks for it.

    Raises:
        TypeError: If the module has no training step that could be replayed.
        SkippedBatchError: If the step returns ``None`` for this batch.
    """
    check_replayable(module)
    mute(module)
    step: Callable[..., Any] = module.training_step  # type: ignore[assignment]
    form = _form_of(step)
    if form == "iterator":
        output = step(iter([(batch, batch_idx, 0)]))
    elif form == "numbered":
        output = step(batch, batch_idx)
    else:
        output = step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise SkippedBatchError(
            "training_step returned no loss for a held batch.",
            "Give loss=callable(module, batch) that returns one for every batch, or a "
            "dataloader whose batches are not skipped.",
        )
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"training_step returned {type(loss).__name__}; give loss=callable(module, batch) "
            "that returns a scalar tensor."
        )
    return loss


def takes_iterator(module: nn.Module) -> bool:
    """Return whether ``training_step`` fetches its batches itself, from ``dataloader_iter``."""
    step = getattr(module, "training_step", None)
    return callable(step) and _form_of(step) == "iterator"


def _form_of(step: Callable[..., Any]) -> str:
    """Return what a step takes: ``"iterator"``, a ``"numbered"`` batch, or a ``"batch"``.

    Asked before every pass, and looked up at length, so that it is kept for plain methods.
    """
    function = getattr(step, "__func__", None)
    if type(function) is not FunctionType or function.__dict__:
        # Decorated ones say what they take in their own way.
        return _looked_up(step)
    known = _FORMS.get(function)
    if known is None or known[0] is not function.__code__:
        known = _FORMS[function] = function.__code__, _looked_up(step)
    return known[1]


def _looked_up(step: Callable[..., Any]) -> str:
    names = list(inspect.signature(step).parameters.values())
    if names and names[0].name == "dataloader_iter":
        return "iterator"
    positional = [p for p in names if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in names)
    return "numbered" if len(positional) >= 2 or variadic else "batch"


def mute(module: nn.Module) -> None:
    """Silence ``log`` and ``log_dict`` of every LightningModule inside a module."""
    for m in module.modules():
        # Asked of the class first: a module looks up what it does not have at length.
        if hasattr(type(m), "training_step") or "training_step" in m.__dict__:
            m.__dict__.update(MUTES)


def check_replayable(module: nn.Module) -> None:
    """Raise a TypeError, with the lines to add, if the training step cannot be replayed."""
    step = getattr(module, "training_step", None)
    # A LightningModule inherits one that only warns.
    if not callable(step) or getattr(step, "__qualname__", "") == "LightningModule.training_step":
        raise TypeError(
            f"{type(module).__name__} has no training_step, so the loss is unknown: give "
            "loss=callable(module, batch), for instance "
            "loss=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])."
        )
    if not getattr(module, "automatic_optimization", True):
        raise TypeError(
            f"{type(module).__name__} uses manual optimization: its training_step steps the "
            "optimizer and cannot be replayed. Give the loss itself:\n"
            "    def loss(module, batch): return module.compute_loss(batch)  # your own\n"
            "    # and give it to the callback: ...(loss=loss)"
        )


def _silence(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log`` and ``log_dict``."""


# What a muted module has in the place of its own methods.
MUTES = {"log": _silence, "log_dict": _silence}

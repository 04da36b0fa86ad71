"""A guard that stays entered from one question to the next, and one that keeps no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from lla_callbacks.objective.repetition import Repetition
from lla_callbacks.objective.sharded import is_sharded


class HeldOpen:
    """The guard of an objective's module, entered with the first question that needs it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._reset: Repetition | None = None
        self._uses = 0

    @contextmanager
    def used(self, enter: Callable[[ExitStack], Repetition]) -> Iterator[Repetition]:
        """Yield what puts the module back into its starting state, inside of the guard.

        It is left with whatever is raised in here.

        Args:
            enter: Enters the guard on a stack.
        """
        if self._reset is None:
            with ExitStack() as stack:
                self._reset = enter(stack)
                self._stack = stack.pop_all()
        self._uses += 1
        with ExitStack() as ending:
            ending.push(self._used)
            yield self._reset

    def _used(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._uses -= 1
        return self._leave(kind, error, trace) if error is not None else False

    def release(self) -> None:
        """Leave the guard, unless it is in use; the next question enters it anew."""
        self._leave(None, None, None)

    def _leave(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if self._uses:
            return False
        stack, self._stack, self._reset = self._stack, ExitStack(), None
        return bool(stack.__exit__(kind, error, trace))


@contextmanager
def held_in_one(objective: Any) -> Iterator[None]:
    """Within this context all evaluations share one guard, entered with the first of them.

    Entering it costs a small network as much as twenty passes. The module stays in it in between,
    but for what is differentiated, which has a guard of its own. For use where nobody else looks
    at the module meanwhile. Not under ``fully_shard``: what is gathered inside is freed after it.

    Args:
        objective: The :class:`~lla_callbacks.objective.held_loss.HeldLoss`.
    """
    if objective.held_open is not None or is_sharded(objective.module):
        yield
        return
    objective.held_open = held = HeldOpen()
    try:
        yield
    finally:
        objective.held_open = None
        held.release()


@contextmanager
def weights_kept_elsewhere(objective: Any) -> Iterator[None]:
    """Make no copies of the weights inside, since whoever moves them has one and puts it back.

    That the loss leaves them alone was seen where they stand.

    Args:
        objective: The :class:`~lla_callbacks.objective.held_loss.HeldLoss`.
    """
    # Those that are no variables are not moved, and so not kept.
    objective.kept_elsewhere = objective.names is None
    try:
        yield
    finally:
        objective.kept_elsewhere = False

"""Hooks of every batch that a monitor does without while nothing can be due."""

from __future__ import annotations

from typing import Any

# Lightning calls a callback's hook within its profiler and with its key, which takes as long as
# what an idle monitor does in it: 25 microseconds a hook. What is not callable it leaves out.
HOOKS = ("on_train_batch_start", "on_train_batch_end")


class Resting:
    """Lets Lightning leave out hooks of one instance, until they are wanted again."""

    def _rest_from(self, hook: str, trainer: Any) -> bool:
        """Take a hook away; return whether that could be done.

        Only where Lightning itself calls it, and where it is ours: a subclass may do its own things
        in it, and a callback of the user's may pass its calls on.
        """
        kind, ours = getattr(type(self), hook), getattr(self._resting_class(), hook)
        if kind is not ours or not any(c is self for c in trainer.callbacks):
            return False
        self.__dict__[hook] = None
        return True

    def _wake(self, *hooks: str) -> None:
        """Give hooks back, all of them where none is named."""
        for hook in hooks or HOOKS:
            self.__dict__.pop(hook, None)

    @classmethod
    def _resting_class(cls) -> type:
        """Return the class whose hooks may be left out."""
        raise NotImplementedError

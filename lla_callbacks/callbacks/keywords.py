"""Arguments by name: twenty by position are read by nobody, and adding one would move the rest."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from lla_callbacks.objective.spelling import refuse_unknown

Made = TypeVar("Made", bound=Callable[..., Any])


def by_name_after(last: str) -> Callable[[Made], Made]:
    """Return a decorator of a constructor whose further arguments are given by name.

    Given by position, as versions before took them, they still mean what they did, with one
    warning that spells them by name. A misspelled one is told what may have been meant.

    Args:
        last: The last argument that may stand by its position; the others follow a ``*``.
    """

    def decorated(constructor: Made) -> Made:
        names = list(inspect.signature(constructor).parameters)
        most = names.index(last) + 1

        @wraps(constructor)
        def made(*args: Any, **kwargs: Any) -> Any:
            # The first one is self, which has no name here.
            kind = type(args[0]).__name__ if args else constructor.__qualname__
            refuse_unknown(kind, kwargs, names)
            if len(args) > most:
                if len(args) > len(names):
                    raise TypeError(
                        f"{kind} takes at most {len(names) - 1} arguments, and {len(args) - 1} "
                        "were given by position: give them by name."
                    )
                known = dict(zip(names[most:], args[most:], strict=False))
                twice = [name for name in known if name in kwargs]
                if twice:
                    raise TypeError(f"{kind} got {twice[0]} twice, by position and by name.")
                spelled = ", ".join(f"{name}=..." for name in known)
                # Of the class's own, where a subclass of the user's own hands arguments on.
                warnings.warn(
                    f"{kind}: give what follows {last} by name, {kind}(..., {spelled}); by "
                    "position it will be refused.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                args, kwargs = args[:most], {**kwargs, **known}
            return constructor(*args, **kwargs)

        return made  # type: ignore[return-value]

    return decorated

"""Misspelled arguments: what was meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

Called = TypeVar("Called", bound=Callable[..., Any])


def meant(given: str, names: Iterable[str]) -> str:
    """Return ``; did you mean num_steps?`` for a name that is close to one there is, else ""."""
    close = difflib.get_close_matches(given, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def refuse_unknown(owner: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Raise for the first argument that there is none of, with what may have been meant.

    Args:
        owner: What was called.
        given: Names of arguments.
        names: Those that there are.

    Raises:
        TypeError: As python does.
    """
    known = [name for name in names if name != "self"]
    for name in given:
        if name not in known:
            raise TypeError(
                f"{owner}() got an unexpected keyword argument {name!r}{meant(name, known)}"
            )


def spelled(function: Called) -> Called:
    """Let a function or a constructor say what may have been meant by a misspelled argument.

    Its signature stays what it is.
    """
    names = tuple(inspect.signature(function).parameters)
    known = set(names)

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= known:
            own = function.__name__ == "__init__" and args
            refuse_unknown(type(args[0]).__name__ if own else function.__name__, kwargs, names)
        return function(*args, **kwargs)

    return called  # type: ignore[return-value]


def made(name: str, value: Any) -> Any:
    """Return what was given, unless that is a class.

    Raises:
        ValueError: If it is one.
    """
    if isinstance(value, type):
        raise ValueError(
            f"{name} is the class {value.__name__}; give one that is made: {value.__name__}(...)."
        )
    return value

"""Silence for packages that track experiments, whose own functions a step may call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

# By the name that is imported; none of them is imported here.
TRACKERS = (
    "wandb", "mlflow", "neptune", "comet_ml", "aim", "clearml", "swanlab", "dvclive", "trackio",
    "tensorboardX", "sacred", "visdom", "litlogger",
)  # fmt: skip
# Modules whose classes a user holds objects of, beside those that a package names itself.
_INSIDE = (
    "wandb.sdk.wandb_run", "wandb.sdk.wandb_summary", "mlflow.tracking.client", "neptune.handler",
    "comet_ml.experiment", "aim.sdk.run", "dvclive.live",
)  # fmt: skip
# What the names of functions that tell something begin with.
_TELLS = (
    "log", "report_", "track", "add_", "set_", "append", "extend", "upload", "alert", "save",
    "watch", "define_metric", "finish", "end_run", "assign", "delete_", "next_step", "update",
    "__setitem__",
)  # fmt: skip

# A function, and what it is when it is heard.
_Saved = tuple[FunctionType, CodeType, Any, Any]
_originals: dict[int, FunctionType] = {}
_is_mine: Callable[[], bool] = bool


def silence(is_mine: Callable[[], bool], saved: list[_Saved]) -> None:
    """Let functions that track do nothing for some threads.

    Whoever has such a function, by ``from wandb import log`` say, has one object: it is its code
    that is exchanged, not its name.

    Args:
        is_mine: Whether the calling thread is one of these.
        saved: To which is added what :func:`speak` takes, one after another.
    """
    packages = [name for name in TRACKERS if name in sys.modules]
    if not packages:
        return
    global _is_mine
    _is_mine = is_mine
    for f in _functions_of([sys.modules[n] for n in (*packages, *_INSIDE) if n in sys.modules]):
        original = FunctionType(
            f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__
        )
        original.__kwdefaults__ = f.__kwdefaults__
        _originals[id(f)] = original
        saved.append((f, f.__code__, f.__defaults__, f.__kwdefaults__))
        f.__defaults__ = f.__kwdefaults__ = None
        f.__code__ = _quiet_code(f.__code__, id(f))


def speak(saved: Iterable[_Saved]) -> None:
    """Let them be heard again."""
    for f, code, defaults, keywords in saved:
        f.__code__ = code
        f.__defaults__, f.__kwdefaults__ = defaults, keywords
    _originals.clear()


def passed_on(key: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function itself for a thread that is no replay's."""
    original = _originals.get(key)
    return None if original is None or _is_mine() else original(*args, **kwargs)


def _quiet(*args: Any, **kwargs: Any) -> Any:
    # Runs among the globals of a foreign module.
    from lla_callbacks.objective.trackers import passed_on

    return passed_on(-1, args, kwargs)


@lru_cache(maxsize=4096)
def _quiet_code(code: CodeType, key: int) -> CodeType:
    own = _quiet.__code__
    constants = tuple(key if c == -1 else c for c in own.co_consts)
    # As many as its closure has.
    return own.replace(co_consts=constants, co_freevars=code.co_freevars)


def _functions_of(modules: Iterable[ModuleType]) -> list[FunctionType]:
    found: dict[int, FunctionType] = {}
    for module in modules:
        top = module.__name__.split(".")[0]
        for name, value in list(vars(module).items()):
            functions: Iterator[Any] | tuple[Any, ...] = ()
            if isinstance(value, (FunctionType, MethodType)) and name.startswith(_TELLS):
                functions = (getattr(value, "__func__", value),)
            elif isinstance(value, type) and str(value.__module__).split(".")[0] == top:
                functions = (f for n, f in list(vars(value).items()) if n.startswith(_TELLS))
            found |= {id(f): f for f in functions if isinstance(f, FunctionType)}
    return list(found.values())

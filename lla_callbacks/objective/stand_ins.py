"""What a replayed step gets in the place of things that cannot be copied, or must not be used."""

from __future__ import annotations

import inspect
from pathlib import PurePath
from typing import Any

from torch import Tensor

from lla_callbacks.linalg.errors import MeasurementError


class RefusedError(MeasurementError):
    """A replayed step would have used what cannot be copied."""


def refused(name: str, kind: str) -> RefusedError:
    """Return the error for the use of a thing.

    Args:
        name: Where the step reached it, ``"self.unlabelled"``.
        kind: Its class.
    """
    where = "a batch" if name.startswith("batch") else "the module"
    return RefusedError(
        f"the step uses {name} ({kind}), which cannot be copied, so that a replay would "
        "change what training finds there; it was stopped before it did.",
        f"Give loss=callable(module, batch) that does without {name}, or dataloader= with batches "
        f"that hold all that the loss needs; or let {where} hold what copy.deepcopy can copy.",
    )


class StandIn:
    """Takes the place of one thing that cannot be copied, and refuses to be used.

    It can be looked at (``is None``, ``isinstance``, truth), handed on and kept; anything else
    raises, and is noted, so that a step which catches the error gets no measurement either.

    Args:
        name: Where the step reaches it.
        kind: The class of what it stands for.
        refusals: Where errors are noted.
    """

    __slots__ = ("_kind", "_name", "_refusals")

    def __init__(self, name: str, kind: type, refusals: list[RefusedError]) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_refusals", refusals)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return object.__getattribute__(self, "_kind")
        if name in _HARMLESS:
            return object.__getattribute__(self, name)
        raise _note(self)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _note(self)

    def __delattr__(self, name: str) -> None:
        raise _note(self)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<stand-in for {object.__getattribute__(self, '_name')}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (object.__getattribute__(self, "_name"),)


def renewed(stand_in: Any, refusals: list[RefusedError]) -> StandIn:
    """Return the same stand-in, which notes errors elsewhere."""
    kind = object.__getattribute__(stand_in, "_kind")
    return StandIn(object.__getattribute__(stand_in, "_name"), kind, refusals)


class Swallow:
    """Takes whatever is written to it, and gives itself for whatever is asked."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments."""
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take it."""

    def __iter__(self) -> Any:
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: Any) -> None:
        """Let errors pass."""


class Muted:
    """A logger that takes whatever is written to it, and answers questions as the real one.

    Attributes and properties (``log_dir``, ``name``, ``version``) are the real one's, also for
    ``isinstance``; methods do nothing. Its experiment is muted likewise.

    Args:
        real: The logger, or its experiment.
    """

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_own", {"real logger": real})

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "_own")
        real = own["real logger"]
        if name == "__class__":
            return type(real)
        if name in own:
            return own[name]
        if name.startswith("__") and name.endswith("__"):
            return object.__getattribute__(self, name)
        if name in ("experiment", "_experiment"):
            # Not asked of the real one, which might create it now.
            found = getattr(real, "__dict__", {}).get("_experiment")
            return Swallow() if found is None else Muted(found)
        if callable(inspect.getattr_static(type(real), name, None)):
            return _nothing
        value = getattr(real, name)
        if value is None or isinstance(value, _ANSWERS):
            return value
        return _nothing if callable(value) else Swallow()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "_own")[name] = value

    def __getitem__(self, key: Any) -> Any:
        return Swallow()

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take it."""

    def __bool__(self) -> bool:
        return True


def muted(logger: Any) -> Any:
    """Return a logger's muted form; of one that is muted, itself."""
    return logger if type(logger) is Muted else Muted(logger)


def is_logger(kind: type) -> bool:
    """Return whether a class is, by its methods, Lightning's logger or TensorBoard's writer."""
    return any(all(hasattr(kind, name) for name in names) for names in _LOGGERS)


def _note(stand_in: Any) -> RefusedError:
    name = object.__getattribute__(stand_in, "_name")
    error = refused(name, object.__getattribute__(stand_in, "_kind").__name__)
    object.__getattribute__(stand_in, "_refusals").append(error)
    return error


def _unpickled(name: str) -> StandIn:
    return StandIn(name, object, [])


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for what writes."""


def _refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise _note(self)


_LOGGERS = (("log_metrics", "log_hyperparams", "experiment"), ("add_scalar", "flush", "close"))
# What inspection and copying ask of any object.
_HARMLESS = frozenset({"__reduce_ex__", "__bool__", "__repr__", "__hash__", "__doc__"})
# What a muted logger may hand out: nothing that could be written to.
_ANSWERS = (bool, int, float, str, bytes, PurePath, Tensor, tuple, frozenset)
for _name in (
    "__next__", "__iter__", "__aiter__", "__anext__", "__call__", "__len__", "__contains__",
    "__getitem__", "__setitem__", "__delitem__", "__enter__", "__exit__", "__aenter__",
    "__aexit__", "__add__", "__iadd__", "__radd__", "__sub__", "__isub__", "__mul__", "__imul__",
    "__or__", "__ior__", "__and__", "__iand__", "__xor__", "__ixor__", "__float__", "__int__",
    "__index__", "__lt__", "__le__", "__gt__", "__ge__", "__str__", "__format__", "__reversed__",
    "__length_hint__", "__array__", "__fspath__",
):  # fmt: skip
    setattr(StandIn, _name, _refuse)

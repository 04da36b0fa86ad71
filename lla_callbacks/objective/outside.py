"""What a step uses that no attribute leads to: globals, closures, defaults of functions."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.names_in_code import Names, names_in
from lla_callbacks.objective.rules import MISSING, is_of_the_user, may_change
from lla_callbacks.objective.tensor_copies import differ
from lla_callbacks.objective.watching import (
    FEW_ENTRIES,
    Unchanged,
    are_equal,
    entries_of,
    snapshot,
)

# Of a LightningModule, what a replay calls by itself; of its other methods, those that are named.
_CALLED = frozenset({
    "training_step", "forward", "on_before_batch_transfer", "on_after_batch_transfer",
    "transfer_batch_to_device",
})  # fmt: skip
_PACKAGE = __name__.split(".")[0]


class Outside:
    """Globals, closures and defaults of the functions that a replay may run, copied in place.

    Which these are is read in the functions' code: names of globals, and attributes of modules
    of the user's. Functions are followed to the functions that they name; those of installed
    packages are not.

    Args:
        kinds: Classes of the user's, of the module and its parts.
        functions: Others that are called, such as ``loss=``.

    Attributes:
        kinds: Classes that functions name.
    """

    def __init__(self, kinds: Iterable[type], functions: Iterable[Any] = ()) -> None:
        self.kinds: set[type] = set()
        self._places: dict[tuple[int, str], _Place] = {}
        self._new: list[_Place] = []
        self._seen: dict[int, Any] = {}
        # Which code looked for attributes of which module.
        self._looks: set[tuple[int, Names]] = set()
        # Methods of LightningModules that nothing named so far, by name.
        self._waiting: dict[str, list[Any]] = {}
        self._names: set[str] = set()
        for kind in kinds:
            self.add_class(kind)
        for function in functions:
            self._follow(function, cells=False)

    def add_class(self, kind: type) -> None:
        """Take in what the methods of a class use."""
        module = issubclass(kind, nn.Module) and hasattr(kind, "training_step")
        for name, value in list(vars(kind).items()):
            for function in _functions_in(value):
                known = name in _CALLED or name[:2] == "__" or name in self._names
                if module and not (known or "getattr" in self._names):
                    self._waiting.setdefault(name, []).append(function)
                else:
                    self._follow(function)

    def put_copies(self, copier: Copier) -> None:
        """Let every place hold a copy of what it held."""
        self._new = list(self._places.values())
        self.put_new(copier)

    def put_new(self, copier: Copier) -> bool:
        """Do so with places that came to light since; return whether there were any."""
        for function in copier.functions:
            self._follow(function, cells=False)
        copier.functions.clear()
        new, self._new = self._new, []
        for place in new:
            place.put_copy(copier)
        return bool(new)

    def restore(self) -> None:
        """Let every place hold what it held."""
        for place in self._places.values():
            place.restore()

    def watch(self) -> Unchanged | None:
        """Return what tells whether all places are as they are now; None if that is not seen."""
        long: list[tuple[Any, Any]] = []
        watched = [place.watch(long) for place in self._places.values()]
        found = [w for w in watched if w is not None]
        if len(found) < len(watched):
            return None
        return Unchanged(lambda: all([unchanged() for unchanged in found]), lambda: are_equal(long))

    # -- what is used ---------------------------------------------------------------------

    def _follow(self, function: Any, *, cells: bool = True) -> None:
        """Take in what a function uses.

        Args:
            function: Whatever is called.
            cells: Whether what it closed over is a place too; of a copy it is a copy already.
        """
        function = getattr(function, "__func__", function)
        if type(function) is functools.partial:
            self._follow(function.func, cells=cells)
        if not isinstance(function, types.FunctionType) or id(function) in self._seen:
            return
        self._seen[id(function)] = function
        names = function.__globals__
        if not is_of_the_user(names.get("__name__", "")):
            # A decorator's, such as torch.no_grad's, around one of the user's.
            for cell in function.__closure__ or ():
                self._follow_cell(cell, function)
            return
        code = names_in(function.__code__)
        for name in code.used:
            if name in names or name in code.stored:
                self._place(_Entry(names, name), code)
        for name in code.imported:
            self._value(sys.modules.get(name), code)
        self._name(code.attributes | ({"getattr"} & code.used))
        if not cells:
            for cell in function.__closure__ or ():
                self._follow_cell(cell, function)
            return
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._place(_Cell(cell, name), code)
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name):
                self._place(_Slot(function, name), code)
        if function.__dict__:
            self._attributes(function, code)

    def _follow_cell(self, cell: Any, owner: Any) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # empty so far
            return
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            # loss= may count its calls in what it closed over: only a decorator's is a method.
            name = owner.__globals__.get("__name__", "")
            self._follow(value, cells=not (is_of_the_user(name) or name.startswith(_PACKAGE)))

    def _name(self, names: Iterable[str]) -> None:
        """Follow methods that are named for the first time; all, where names are made up."""
        self._names.update(names)
        for name in list(self._waiting if "getattr" in self._names else names):
            for function in self._waiting.pop(name, ()):
                self._follow(function)

    def _place(self, place: _Place, code: Names) -> None:
        value = place.saved
        if place.key not in self._places and (place.name in code.stored or may_change(value)):
            self._places[place.key] = place
            self._new.append(place)
        self._value(value, code)

    def _attributes(self, function: Any, code: Names) -> None:
        place = _Attributes(function)
        if place.key not in self._places:
            self._places[place.key] = place
            self._new.append(place)
            for value in function.__dict__.values():
                self._value(value, code)

    def _value(self, value: Any, code: Names) -> None:
        """Go on with what a name stands for."""
        if isinstance(value, types.ModuleType):
            look = (id(value), code)
            if is_of_the_user(value.__name__) and look not in self._looks:
                self._looks.add(look)
                names = vars(value)
                for name in code.attributes:
                    if name in names or name in code.stored:
                        self._place(_Entry(names, name), code)
        elif isinstance(value, type):
            if is_of_the_user(value.__module__):
                self.kinds.add(value)
        else:
            for function in _functions_in(value):
                self._follow(function)
                if function is value and is_of_the_user(value.__module__) and code.stored:
                    self._attributes(function, code)


class _Place:
    """Where a value is kept that is neither an attribute of a module nor of a class."""

    __slots__ = ("key", "name", "saved")

    def __init__(self, owner: Any, name: str) -> None:
        self.key = (id(owner), name)
        self.name = name
        self.saved = self.read()

    def read(self) -> Any:
        raise NotImplementedError

    def write(self, value: Any) -> None:
        raise NotImplementedError

    def put_copy(self, copier: Copier) -> None:
        """Hold a copy of what was there; what cannot change is put back."""
        value = self.saved
        if may_change(value):
            value = copier.copy(value, (None, self.name))
        if self.read() is not value:
            self.write(value)

    def restore(self) -> None:
        """Hold what was there."""
        if self.read() is not self.saved:
            self.write(self.saved)

    def watch(self, long: list[tuple[Any, Any]]) -> Callable[[], bool] | None:
        """Return what tells whether it is as it is now; None if that is not seen.

        Args:
            long: Takes containers of many entries and what they hold, which is compared later.
        """
        value = self.read()
        if value is self.saved:
            return lambda: self.read() is value
        entries = entries_of(value)
        if entries is not None and entries > FEW_ENTRIES:
            long.append((value, snapshot(value)))
            return lambda: self.read() is value
        if entries is not None:
            content = snapshot(value)
            return lambda: self.read() is value and are_equal([(value, content)])
        saved = self.saved
        if _is_comparable(value) and _is_comparable(saved) and value.dtype == saved.dtype:
            return lambda: (
                self.read() is value and _is_comparable(value) and not differ(value, saved)
            )
        return None


class _Entry(_Place):
    """A name in a dictionary: globals, or attributes of a function."""

    __slots__ = ("_names",)

    def __init__(self, names: dict[str, Any], name: str) -> None:
        self._names = names
        super().__init__(names, name)

    def read(self) -> Any:
        return self._names.get(self.name, MISSING)

    def write(self, value: Any) -> None:
        if value is MISSING:
            self._names.pop(self.name, None)
        else:
            self._names[self.name] = value


class _Cell(_Place):
    """What a function closed over."""

    __slots__ = ("_cell",)

    def __init__(self, cell: Any, name: str) -> None:
        self._cell = cell
        super().__init__(cell, name)
        self.key = (id(cell), "")

    def read(self) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:
            return MISSING

    def write(self, value: Any) -> None:
        if value is MISSING:
            del self._cell.cell_contents
        else:
            self._cell.cell_contents = value


class _Slot(_Place):
    """Defaults of a function's arguments."""

    __slots__ = ("_function",)

    def __init__(self, function: Any, name: str) -> None:
        self._function = function
        super().__init__(function, name)

    def read(self) -> Any:
        return getattr(self._function, self.name)

    def write(self, value: Any) -> None:
        setattr(self._function, self.name, value)


class _Attributes(_Place):
    """All attributes of a function, which it may get more of."""

    __slots__ = ("_function", "_own")

    def __init__(self, function: Any) -> None:
        self._function = function
        self._own = dict(function.__dict__)
        super().__init__(function, "__dict__")

    def read(self) -> Any:
        return self._function.__dict__

    def put_copy(self, copier: Copier) -> None:
        path = (None, self._function.__name__)
        copied = {
            k: copier.copy(v, (path, f".{k}")) if may_change(v) else v for k, v in self._own.items()
        }
        self._hold(copied)

    def restore(self) -> None:
        self._hold(self._own)

    def watch(self, long: list[tuple[Any, Any]]) -> Callable[[], bool] | None:
        now = dict(self.read())
        if not all(v is self._own.get(k) or entries_of(v) is not None for k, v in now.items()):
            return None
        content = {k: v if v is self._own.get(k) else snapshot(v) for k, v in now.items()}
        return lambda: bool(self.read() == content)

    def _hold(self, attributes: dict[str, Any]) -> None:
        live = self.read()
        live.clear()
        live.update(attributes)


def _is_comparable(value: Any) -> bool:
    """Return whether something is a tensor without a graph, a gradient, or attributes."""
    plain = type(value) is Tensor and value.layout is torch.strided
    return plain and not value.requires_grad and not value.__dict__


def _functions_in(value: Any) -> Iterator[Any]:
    """Yield the functions in what a class or a module defines."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        yield value.__func__
    elif isinstance(value, property):
        yield from (f for f in (value.fget, value.fset, value.fdel) if f is not None)
    elif isinstance(value, (functools.partial, functools.partialmethod, functools.cached_property)):
        yield value.func
    elif hasattr(type(value), "cache_info"):
        yield value.__wrapped__

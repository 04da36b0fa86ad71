"""Copies of functions that keep something: what they closed over, their attributes, defaults."""

from __future__ import annotations

import dis
import functools
import gc
import types
from functools import lru_cache
from typing import Any


def copy_of_function(function: Any, copier: Any, path: Any) -> Any:
    """Return a function over copies of what the original closed over, or the function itself.

    A counter behind ``nonlocal``, a list that a lambda appends to, an attribute of the function,
    a default that is a list: all of that is state. Globals are not.

    Args:
        function: A function in Python.
        copier: The :class:`~lla_callbacks.objective.copies.Copier`.
        path: Where it was reached.
    """
    cells = function.__closure__ or ()
    if not (cells or function.__dict__ or function.__defaults__ or function.__kwdefaults__):
        return function
    memo = copier.memo
    # One cell may belong to several functions.
    new_cells = [memo.get(id(cell)) or types.CellType() for cell in cells]
    copied = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(new_cells) or None,
    )
    memo[id(function)] = copied
    changed = writes_cells(function.__code__)
    for name, cell, new in zip(function.__code__.co_freevars, cells, new_cells, strict=True):
        if id(cell) in memo:
            changed = changed or new is not cell
            continue
        memo[id(cell)] = new
        try:
            value = cell.cell_contents
        except ValueError:  # empty so far
            continue
        new.cell_contents = copier.copy(value, (path, f".{name}"))
        changed = changed or new.cell_contents is not value
    defaults = copier.copy(function.__defaults__, (path, ".__defaults__"))
    keywords = copier.copy(function.__kwdefaults__, (path, ".__kwdefaults__"))
    changed = changed or defaults is not function.__defaults__
    attributes = {k: copier.copy(v, (path, f".{k}")) for k, v in function.__dict__.items()}
    changed = changed or any(attributes[k] is not v for k, v in function.__dict__.items())
    if function.__dict__ and not function.__dict__.keys() <= _OF_DECORATORS:
        # A counter kept as an attribute is no object that could be copied.
        changed = True
    if keywords is not None:
        changed = changed or any(keywords[k] is not v for k, v in function.__kwdefaults__.items())
    if not changed:
        for cell, new in zip(cells, new_cells, strict=True):
            if memo.get(id(cell)) is new and new is not cell:
                memo[id(cell)] = cell
        memo[id(function)] = function
        return function
    copied.__defaults__, copied.__kwdefaults__ = defaults, keywords
    copied.__dict__.update(attributes)
    copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
    copied.__doc__, copied.__annotations__ = function.__doc__, function.__annotations__
    return copied


@lru_cache(maxsize=4096)
def writes_cells(code: types.CodeType) -> bool:
    """Return whether a function, or one inside of it, assigns to what it closed over."""
    free = set(code.co_freevars)
    if not free:
        return False
    for part in (code, *(c for c in code.co_consts if isinstance(c, types.CodeType))):
        for instruction in dis.get_instructions(part):
            if instruction.opname in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in free:
                return True
        if part is not code and writes_cells(part) and free & set(part.co_freevars):
            return True
    return False


def copy_of_cached(copier: Any, value: Any, path: Any) -> Any:
    """Return what ``functools.lru_cache`` made of a function, with a copy of what it remembers."""
    copied = _Cached(value, copier, path)
    copier.keep(value, copied)
    return copied


class _Cached:
    """Answers from a cache's results, and keeps new ones to itself.

    Args:
        cached: Made by ``functools.lru_cache``; it is not called.
        copier: The :class:`~lla_callbacks.objective.copies.Copier`, of results too.
        path: Where it was reached.
    """

    def __init__(self, cached: Any, copier: Any, path: Any) -> None:
        functools.update_wrapper(self, cached)
        # Past the cache.
        self.__wrapped__ = cached.__wrapped__
        self._found = _remembered(cached)
        self._typed = cached.cache_parameters()["typed"]
        self._copier, self._path = copier, path
        self.cache_info, self.cache_parameters = cached.cache_info, cached.cache_parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = _key(args, kwargs, typed=self._typed)
        if key not in self._found:
            self._found[key] = self.__wrapped__(*args, **kwargs)
        return self._copier.copy(self._found[key], self._path)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else types.MethodType(self, owner)

    def cache_clear(self) -> None:
        """Forget all."""
        self._found = {}


def _remembered(cached: Any) -> dict[Any, Any]:
    """Return a cache's results by keys as :func:`_key` makes them.

    The cache is in C, and shows what it holds to the garbage collector alone: each key followed
    by its result, and its own mark between positional and other arguments.
    """
    number = cached.cache_info().currsize
    if not number:
        return {}
    held = gc.get_referents(cached)
    stores = [h for h in held if type(h) is dict and h is not cached.__dict__ and len(h) == number]
    found = {}
    for key, value in stores[0].items() if stores else ():
        if cached.cache_parameters()["maxsize"] is not None:
            places = [i for i, h in enumerate(held[:-1]) if h is key]
            if not places:
                continue
            value = held[places[0] + 1]
        if type(key) is tuple:
            key = tuple(_MARK if type(part) is object else part for part in key)
        found[key if type(key) is tuple else (key,)] = value
    return found


def _key(args: tuple[Any, ...], kwargs: dict[str, Any], *, typed: bool) -> tuple[Any, ...]:
    """Return what a call is known by, as ``functools.lru_cache`` has it."""
    key = args
    for i, (name, value) in enumerate(kwargs.items()):
        key += (name, value) if i else (_MARK, name, value)
    return key + tuple(map(type, (*args, *kwargs.values()))) if typed else key


_MARK = object()
_OF_DECORATORS = frozenset({"__wrapped__"})

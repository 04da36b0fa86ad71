"""Objects made anew from what they say about themselves, as pickle and ``copy.deepcopy`` do."""

from __future__ import annotations

import copyreg
from typing import Any


def reconstructed(value: Any, kind: type, copier: Any, path: Any) -> Any:
    """Return a copy of an object by its ``__reduce_ex__``, over copies of all that it holds.

    ``copy.deepcopy`` would do, but for one thing: one generator deep inside makes it fail for the
    whole, where here a stand-in takes that generator's place.

    Args:
        value: The object.
        kind: Its class.
        copier: The :class:`~lla_callbacks.objective.copies.Copier`.
        path: Where it was reached.
    """
    reducer = copyreg.dispatch_table.get(kind)
    reduced = reducer(value) if reducer is not None else value.__reduce_ex__(4)
    if isinstance(reduced, str):  # a global, by its name
        return value
    make, arguments, state, items, pairs, setter = (*reduced, *(None,) * 4)[:6]
    # Some of it may exist nowhere else, and must live as long as its id is known.
    copied = make(*[copier.copy(argument, path) for argument in arguments])
    if copied is value:
        return value
    copier.keep(value, copied)
    copier.keep(reduced, reduced)
    if state is not None:
        state = _state(state, copier, path)
        if setter is not None:
            setter(copied, state)
        elif hasattr(copied, "__setstate__"):
            copied.__setstate__(state)
        else:
            _set(copied, state)
        _complete(copied, value, copier, path)
    for i, item in enumerate(items or ()):
        copied.append(copier.copy(item, (path, (i,))))
    for key, item in pairs or ():
        copied[copier.copy(key, (path, (key,)))] = copier.copy(item, (path, (key,)))
    return copied


def _complete(copied: Any, value: Any, copier: Any, path: Any) -> None:
    """Give a copy the attributes that its class leaves out of what it pickles, such as caches."""
    mine, theirs = getattr(copied, "__dict__", None), getattr(value, "__dict__", None)
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in theirs.keys() - mine.keys():
            mine[key] = copier.copy(theirs[key], (path, f".{key}"))


def _set(copied: Any, state: Any) -> None:
    pair = isinstance(state, tuple) and len(state) == 2
    plain, slots = state if pair else (state, None)
    if plain:
        copied.__dict__.update(plain)
    for key, item in (slots or {}).items():
        object.__setattr__(copied, key, item)  # also where the class is frozen


def _state(state: Any, copier: Any, path: Any) -> Any:
    """Return a copied state, whose entries are reached as attributes."""
    if type(state) is dict and all(type(key) is str for key in state):
        return {k: copier.copy(v, (path, f".{k}")) for k, v in state.items()}
    if type(state) is tuple and len(state) == 2 and type(state[1]) is dict:
        return tuple(part if part is None else _state(part, copier, path) for part in state)
    return copier.copy(state, path)

"""Whether what a forward pass may have written is as it was, told without copying it anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lla_callbacks.objective.rules import ATOMS
from lla_callbacks.objective.training_step import MUTES

_CONTAINERS = (list, dict, set, tuple, frozenset, deque)
# Entries of containers that are compared after each pass, in all; longer ones are copied anew.
MOST_ENTRIES = 256


@dataclass(frozen=True)
class Watch:
    """The attributes of one object at one moment.

    Attributes:
        owner: A module, or a class.
        kind: Its class at that moment.
        names: What it had by which name.
        contents: Containers of what cannot change, and what they held.
        empty: Containers that held nothing.
    """

    owner: Any
    kind: type
    names: dict[str, Any]
    contents: list[tuple[Any, Any]]
    empty: Sequence[Any]


def watch(
    owner: Any,
    copied: Sequence[tuple[Any, Any]],
    filled: Sequence[Any] = (),
    empty: Sequence[Any] = (),
) -> Watch | None:
    """Note the attributes of a module or a class, where it can be seen whether they change.

    Args:
        owner: The module or the class.
        copied: Attributes that may change inside, as they are now, and what they were copied
            from; what is its own copy cannot change.
        filled: Dictionaries and sets that torch keeps of submodules, hooks and names, whose members
            are told apart by identity.
        empty: Dictionaries without members.
    """
    contents: list[tuple[Any, Any]] = [(container, container.copy()) for container in filled]
    for value, original in copied:
        if value is original:
            continue
        if not is_plain(value, MOST_ENTRIES):
            return None
        contents.append((value, snapshot(value)))
    return Watch(owner, type(owner), dict(vars(owner)), contents, tuple(empty))


def all_unchanged(watched: Sequence[Watch]) -> Callable[[], bool]:
    """Return what tells whether all of these are as they were.

    Whatever is the same object counts as the same without being asked, so that nothing of the
    user's is called but for what did change.
    """
    modules = [(vars(w.owner), w.names) for w in watched if isinstance(w.owner, nn.Module)]
    classes = [(w.owner, w.names) for w in watched if not isinstance(w.owner, nn.Module)]
    kinds = [(w.owner, w.kind) for w in watched if isinstance(w.owner, nn.Module)]
    contents = [pair for w in watched for pair in w.contents]
    empty = [container for w in watched for container in w.empty]

    def unchanged() -> bool:
        try:
            for live, names in modules:
                # A replayed step mutes its module, each time in the same way.
                if live != names and live != {**names, **MUTES}:
                    return False
            for container, held in contents:
                if container != held:
                    return False
            for kind, names in classes:
                live = vars(kind)
                if len(live) != len(names) or any(live.get(k) is not v for k, v in names.items()):
                    return False
        except Exception:  # noqa: BLE001 - tensors and arrays have no single answer; both differ
            return False
        return not any(empty) and all([type(owner) is kind for owner, kind in kinds])

    return unchanged


def is_plain(value: Any, most: int) -> bool:
    """Return whether a value is made of containers and of what cannot change, and is small."""
    left = most
    waiting = [value]
    while waiting:
        item = waiting.pop()
        kind = type(item)
        if kind in ATOMS:
            continue
        if kind not in _CONTAINERS:
            return False
        left -= len(item)
        if left < 0:
            return False
        waiting.extend(item)
        if kind is dict:
            waiting.extend(item.values())
    return True


def snapshot(value: Any) -> Any:
    """Return a copy of a plain value that later changes do not reach."""
    kind = type(value)
    if kind in ATOMS or kind is frozenset:
        return value
    if kind is dict:
        return {key: snapshot(item) for key, item in value.items()}
    if kind is deque:
        return deque(map(snapshot, value), value.maxlen)
    return kind(map(snapshot, value))

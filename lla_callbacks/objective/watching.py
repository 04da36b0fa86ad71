"""Whether what a forward pass may have written is as it was, told without copying it anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from lla_callbacks.objective.bulk import rows_of
from lla_callbacks.objective.rules import ATOMS
from lla_callbacks.objective.training_step import MUTES

_CONTAINERS = frozenset({list, dict, set, tuple, frozenset, deque})
# Entries of a container that are compared after each pass. Longer ones (a vocabulary, a table) are
# compared before the next start only, up to so many; yet longer ones are copied anew.
FEW_ENTRIES = 256
MOST_ENTRIES = 5_000_000


@dataclass(frozen=True)
class Watch:
    """The attributes of one object at one moment.

    Attributes:
        owner: A module, or a class.
        kind: Its class at that moment.
        names: What it had by which name.
        contents: Containers of what cannot change, and what they held.
        long: Those with many entries.
        empty: Containers that held nothing.
    """

    owner: Any
    kind: type
    names: dict[str, Any]
    contents: list[tuple[Any, Any]]
    long: list[tuple[Any, Any]]
    empty: Sequence[Any]


@dataclass(frozen=True)
class Unchanged:
    """Tells whether all that is watched is as it was.

    Attributes:
        short: Whether what is soon compared is.
        long: Whether containers of many entries are.
    """

    short: Callable[[], bool]
    long: Callable[[], bool]

    def __call__(self) -> bool:
        """Return whether all of it is."""
        return self.short() and self.long()


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
    long: list[tuple[Any, Any]] = []
    for value, original in copied:
        if value is original:
            continue
        entries = entries_of(value)
        if entries is None:
            return None
        (contents if entries <= FEW_ENTRIES else long).append((value, snapshot(value)))
    return Watch(owner, type(owner), dict(vars(owner)), contents, long, tuple(empty))


def all_unchanged(watched: Sequence[Watch]) -> Unchanged:
    """Return what tells whether all of these are as they were.

    Whatever is the same object counts as the same without being asked, so that nothing of the
    user's is called but for what did change.
    """
    modules = [(vars(w.owner), w.names) for w in watched if isinstance(w.owner, nn.Module)]
    classes = [(w.owner, w.names) for w in watched if not isinstance(w.owner, nn.Module)]
    kinds = [(w.owner, w.kind) for w in watched if isinstance(w.owner, nn.Module)]
    contents = [pair for w in watched for pair in w.contents]
    long = [pair for w in watched for pair in w.long]
    empty = [container for w in watched for container in w.empty]

    def unchanged() -> bool:
        try:
            for live, names in modules:
                # A replayed step mutes its module, each time in the same way.
                if live != names and live != {**names, **MUTES}:
                    return False
            if not are_equal(contents):
                return False
            for kind, names in classes:
                live = vars(kind)
                if len(live) != len(names) or any(live.get(k) is not v for k, v in names.items()):
                    return False
        except Exception:  # noqa: BLE001 - tensors and arrays have no single answer; both differ
            return False
        return not any(empty) and all([type(owner) is kind for owner, kind in kinds])

    return Unchanged(unchanged, lambda: are_equal(long))


def are_equal(pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Return whether containers are as their snapshots."""
    try:
        return all([container == held for container, held in pairs])
    except Exception:  # noqa: BLE001 - of what was put in meanwhile; then they are not
        return False


def entries_of(value: Any) -> int | None:
    """Return how many entries a value has that is made of containers and of what cannot change.

    None where it is anything else, or has more than can be compared.
    """
    if type(value) in ATOMS:
        return 0
    found, level = 0, [value]
    # Level by level, so that rows of a table take no step of Python each.
    while level:
        if not set(map(type, level)) <= _CONTAINERS:
            return None
        found += sum(map(len, level))
        if found > MOST_ENTRIES:
            return None
        members = list(chain.from_iterable(level))
        for item in level:
            if type(item) is dict:
                members.extend(item.values())
        inner = set(map(type, members)) - ATOMS
        level = [m for m in members if type(m) in inner] if inner else []
    return found


def is_flat(container: Any) -> bool:
    """Return whether a container holds nothing but what cannot change."""
    kinds = set(map(type, container))
    if type(container) is dict:
        kinds |= set(map(type, container.values()))
    return kinds <= ATOMS


def snapshot(value: Any) -> Any:
    """Return a copy of a plain value that later changes do not reach."""
    kind = type(value)
    if kind in ATOMS or kind is frozenset:
        return value
    if is_flat(value):
        return value if kind is tuple else value.copy()
    if kind is list and (rows := rows_of(value, alone=False)) is not None:
        return rows
    if kind is dict:
        return {key: snapshot(item) for key, item in value.items()}
    if kind is deque:
        return deque(map(snapshot, value), value.maxlen)
    return kind(map(snapshot, value))

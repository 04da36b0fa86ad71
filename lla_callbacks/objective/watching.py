"""Whether what a forward pass may have written is as it was, told without copying it anew."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.recorded import storage_of
from lla_callbacks.objective.bulk import rows_of
from lla_callbacks.objective.rules import ATOMS
from lla_callbacks.objective.shadows import own_of_shadow
from lla_callbacks.objective.stand_ins import Muted, StandIn, Swallow
from lla_callbacks.objective.tensor_copies import differ, separate
from lla_callbacks.objective.training_step import MUTES

_CONTAINERS = frozenset({list, dict, set, tuple, frozenset, deque})
# Entries of a container that are compared after each pass. Longer ones (a vocabulary, a table) are
# compared before the next start only, up to so many; yet longer ones are copied anew.
FEW_ENTRIES = 256
MOST_ENTRIES = 5_000_000
# Levels of containers in containers. Deeper ones, and those that hold themselves, are looked at
# object by object.
MOST_LEVELS = 100
# Objects, containers and tensors that hang together, of one attribute.
MOST_OBJECTS = 2000
# What cannot change, or stands for something.
_FIXED = ATOMS | {StandIn, Muted, Swallow}
# Py_TPFLAGS_HEAPTYPE and Py_TPFLAGS_IMMUTABLETYPE: all classes defined in Python have the first and
# none has the second. They take no more than two pointers beyond what they derive from.
_HEAP_TYPE, _IMMUTABLE, _POINTERS = 1 << 9, 1 << 8, 16


@dataclass(frozen=True)
class Watch:
    """The attributes of one object at one moment.

    Attributes:
        owner: A module, or a class.
        kind: Its class at that moment.
        names: What it had by which name.
        contents: Containers of whatever they hold, and what they held.
        plain: Containers of nothing but what cannot change, to whatever depth, likewise.
        long: Those with many entries.
        empty: Containers that held nothing.
        tensors: Tensors, their versions and copies of them.
        objects: Objects of the user's and their classes.
    """

    owner: Any
    kind: type
    names: dict[str, Any]
    contents: list[tuple[Any, Any]]
    plain: list[tuple[Any, Any]]
    long: list[tuple[Any, Any]]
    empty: Sequence[Any]
    tensors: Sequence[tuple[Tensor, int, Tensor]] = ()
    objects: Sequence[tuple[Any, type]] = ()


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
    known: frozenset[int] = frozenset(),
) -> Watch | None:
    """Note the attributes of a module or a class, where it can be seen whether they change.

    Args:
        owner: The module or the class.
        copied: Attributes that may change inside, as they are now, and what they were copied
            from; what is its own copy cannot change.
        filled: Dictionaries and sets that torch keeps of submodules, hooks and names, whose members
            are told apart by identity.
        empty: Dictionaries without members.
        known: Identities of what guards of their own put back: submodules, parameters, buffers.
    """
    notes = _Notes(known)
    notes.contents += [(container, container.copy()) for container in filled]
    for value, original in copied:
        if value is not original and not notes.take(value):
            return None
    return Watch(
        owner, type(owner), dict(vars(owner)), notes.contents, notes.plain, notes.long,
        tuple(empty), notes.tensors, notes.objects,
    )  # fmt: skip


class _Notes:
    """What attributes hold at one moment, to whatever depth."""

    def __init__(self, known: frozenset[int]) -> None:
        self.contents: list[tuple[Any, Any]] = []
        self.plain: list[tuple[Any, Any]] = []
        self.long: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, int, Tensor]] = []
        self.objects: list[tuple[Any, type]] = []
        self._known = known

    def take(self, value: Any) -> bool:
        """Note an attribute; return False if it cannot be seen whether it changes."""
        entries = entries_of(value)
        if entries is not None:
            pair = value, snapshot(value)
            (self.plain if entries <= FEW_ENTRIES else self.long).append(pair)
            return True
        seen: dict[int, Any] = {}
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if type(item) in _FIXED or id(item) in seen:
                continue
            seen[id(item)] = item
            inside = self._look(item)
            if inside is None or len(seen) > MOST_OBJECTS:
                return False
            waiting += inside
        return True

    def _look(self, item: Any) -> Sequence[Any] | None:
        """Note one object and return what it holds; None if that is not known."""
        kind = type(item)
        if id(item) in self._known or isinstance(item, (type, Enum)):
            return ()
        if isinstance(item, Tensor):
            return () if self._note_tensor(item) else None
        if isinstance(item, (types.FunctionType, types.BuiltinFunctionType)):
            return () if _is_bare(item) else None
        if kind is weakref.ReferenceType:
            return [item()]
        own = own_of_shadow(item)
        if own is not None:
            # What is asked of it comes to be there: then all is copied anew.
            self.contents.append((own, dict(own)))
            return [v for k, v in own.items() if not k.startswith("_lla")]
        base: Any = next((base for base in _CONTAINERS if issubclass(kind, base)), object)
        inside: list[Any] = []
        if base is not object:
            if kind.__eq__ is not _EQUALITY.get(kind, base.__eq__) or len(item) > MOST_ENTRIES:
                return None
            if base not in (tuple, frozenset):
                held = kind.copy(item) if kind in _EQUALITY else base(item)
                (self.contents if len(item) <= FEW_ENTRIES else self.long).append((item, held))
            inside += base.__iter__(item)
            if base is dict:
                inside += dict.values(item)
            if kind is base or kind in _EQUALITY:
                return inside
        if not _is_plain(kind, base):
            return None
        attributes = getattr(item, "__dict__", None)
        if attributes is not None:
            self.contents.append((attributes, dict(attributes)))
            self.objects.append((item, kind))
            inside += attributes.values()
        return inside

    def _note_tensor(self, tensor: Tensor) -> bool:
        plain = (
            type(tensor) is Tensor
            and tensor.layout is torch.strided
            and not (tensor.requires_grad or tensor.is_inference() or tensor.__dict__)
            and storage_of(tensor) is not None
        )
        if plain:
            self.tensors.append((tensor, tensor._version, separate(tensor)))
        return plain


# Containers of the library that are no plain ones, with an equality of their own.
_EQUALITY: dict[type, Any] = {
    OrderedDict: OrderedDict.__eq__, defaultdict: dict.__eq__,
}  # fmt: skip


def _is_bare(function: Any) -> bool:
    """Return whether a function has nothing of its own but its code."""
    if isinstance(function, types.FunctionType):
        own = function.__closure__, function.__defaults__, function.__kwdefaults__
        return not any(own) and not function.__dict__
    return function.__self__ is None or isinstance(function.__self__, types.ModuleType)


def _is_plain(kind: type, base: type) -> bool:
    """Return whether whatever an object holds is in its ``__dict__``, or in that of its base."""
    if kind.__basicsize__ > base.__basicsize__ + _POINTERS:
        return False
    if issubclass(kind, (nn.Module, torch.optim.Optimizer)):
        return False
    for parent in kind.__mro__:
        flags = parent.__flags__
        defined = flags & _HEAP_TYPE and not flags & _IMMUTABLE
        if not issubclass(base, parent) and (not defined or vars(parent).get("__slots__")):
            return False
    return True


def all_unchanged(watched: Sequence[Watch]) -> Unchanged:
    """Return what tells whether all of these are as they were.

    Whatever is the same object counts as the same without being asked, and any other object as
    another, so that nothing of the user's is called.
    """
    modules = [(vars(w.owner), w.names) for w in watched if isinstance(w.owner, nn.Module)]
    classes = [(w.owner, w.names) for w in watched if not isinstance(w.owner, nn.Module)]
    kinds = [(w.owner, w.kind) for w in watched if isinstance(w.owner, nn.Module)]
    kinds += [pair for w in watched for pair in w.objects]
    contents = [pair for w in watched for pair in w.contents]
    plain = [pair for w in watched for pair in w.plain]
    long = [pair for w in watched for pair in w.long]
    empty = [container for w in watched for container in w.empty]
    tensors = [noted for w in watched for noted in w.tensors]

    def unchanged() -> bool:
        try:
            for live, names in modules:
                # A replayed step mutes its module, each time in the same way.
                if not (_holds(live, names) or _holds(live, {**names, **MUTES})):
                    return False
            if not are_equal(plain) or not all([_is_as_held(c, held) for c, held in contents]):
                return False
            if any([t._version != version or _is_marked(t) for t, version, _ in tensors]):
                return False
            for kind, names in classes:
                live = vars(kind)
                if len(live) != len(names) or any(live.get(k) is not v for k, v in names.items()):
                    return False
        except Exception:  # noqa: BLE001 - tensors and arrays have no single answer; both differ
            return False
        return not any(empty) and all([type(owner) is kind for owner, kind in kinds])

    return Unchanged(
        unchanged,
        # Below autograd's sight there is no new version.
        lambda: are_equal(long) and not any([differ(t, held) for t, _, held in tensors]),
    )


def _holds(live: dict[Any, Any], held: dict[Any, Any]) -> bool:
    """Return whether a dictionary has the entries that it had.

    What was replaced is not asked whether it is equal: it may say so, and be something else.
    """
    if len(live) != len(held):
        return False
    if all(map(is_, dict.values(live), held.values())) and all(map(is_, live, held)):
        return True
    return all(k in held and _is_alike(v, held[k]) for k, v in dict.items(live))


def _is_as_held(container: Any, held: Any) -> bool:
    """Return whether a container has the members that it had, in the same order."""
    if isinstance(container, dict):
        return _holds(container, held) and list(container) == list(held)
    if len(container) != len(held):
        return False
    if isinstance(container, (set, frozenset)):
        return set(map(id, container)) == set(map(id, held))
    return all(map(is_, container, held)) or all(map(_is_alike, container, held))


def _is_alike(a: Any, b: Any) -> bool:
    """Return whether two members are the same, or equal and nothing that could change."""
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b) or not (kind in ATOMS or kind in _CONTAINERS):
        return False
    return entries_of(a) is not None and entries_of(b) is not None and bool(a == b)


def _is_marked(tensor: Tensor) -> bool:
    """Return whether a tensor that was bare has a gradient, hooks or attributes."""
    return bool(tensor.requires_grad or tensor.grad is not None or tensor.__dict__)


def are_equal(pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Return whether containers are as their snapshots."""
    try:
        return all(
            [
                container == held
                and (type(container) is not dict or all(map(eq, container, held)))  # their order
                for container, held in pairs
            ]
        )
    except Exception:  # noqa: BLE001 - of what was put in meanwhile; then they are not
        return False


def entries_of(value: Any) -> int | None:
    """Return how many entries a value has that is made of containers and of what cannot change.

    None where it is anything else, or has more or deeper ones than can be compared.
    """
    if type(value) in ATOMS:
        return 0
    found, level = 0, [value]
    # Level by level, so that rows of a table take no step of Python each.
    for _ in range(MOST_LEVELS):
        if not level:
            return found
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
    return None


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

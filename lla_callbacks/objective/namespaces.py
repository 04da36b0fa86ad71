"""Attributes of every submodule and its class: originals kept aside, copies in their places."""

from __future__ import annotations

import types
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.interrupts import shielded
from lla_callbacks.objective.inventory import Inventory
from lla_callbacks.objective.outside import Outside
from lla_callbacks.objective.precision import HALF
from lla_callbacks.objective.rules import ATOMS, LIBRARIES
from lla_callbacks.objective.watching import Unchanged, Watch, all_unchanged, watch

# Kept by guards of their own.
_ELSEWHERE = frozenset({"training", "_buffers", "_parameters"})
# torch's own attributes hold modules, hooks and flags; the user's may hold anything.
_TORCH_KEYS = frozenset(nn.Module().__dict__)
_DICTIONARIES = tuple(
    key
    for key, value in nn.Module().__dict__.items()
    if isinstance(value, (dict, set)) and key not in _ELSEWHERE
)
_OF_ALL = (
    "_global_forward_pre_hooks", "_global_forward_hooks", "_global_parameter_registration_hooks",
    "_global_buffer_registration_hooks", "_global_module_registration_hooks",
)  # fmt: skip
# What a class defines, and does not count with.
_DEFINITIONS = (
    types.FunctionType, types.BuiltinFunctionType, classmethod, staticmethod, property, type,
    types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType,
)  # fmt: skip


class Namespaces:
    """What the submodules have as attributes, and the user's classes among theirs.

    Args:
        held: What the module consists of, as it is now; it is not changed yet.
        loss: The user's own, whose globals are kept as well.
    """

    def __init__(self, held: Inventory, loss: Any = None) -> None:
        self._held = held
        self._modules = [_Namespace(m) for m in held.modules]
        kinds = set(map(type, held.modules))
        self._classes = [_Class(kind) for kind in {b for k in kinds for b in _own_bases(k)}]
        self._known = {c.kind for c in self._classes}
        present = (getattr(torch.nn.modules.module, name, None) for name in _OF_ALL)
        # Empty ones too: what a pass adds to them goes with it.
        self._hooks = [_Hooks(found) for found in present if found is not None]
        self._outside = Outside(self._known, (loss,))

    @shielded
    def put_copies(self, copier: Copier) -> None:
        """Let every attribute be a fresh copy of what it was."""
        for namespace in self._modules:
            namespace.register(copier)
        for namespace in self._modules:
            namespace.put_copies(copier)
        parts: list[_Class | _Hooks] = [*self._classes, *self._hooks]
        for part in parts:
            part.put_copies(copier)
        self._outside.put_copies(copier)
        # Classes of the user's objects, and functions, come to light while these are copied.
        while True:
            kinds = copier.classes | self._outside.kinds
            new = {k for k in kinds if _is_of_the_user(k)} - self._known
            self._known |= new
            found = [_Class(kind) for kind in new]
            self._classes += found
            for kind in found:
                kind.put_copies(copier)
                self._outside.add_class(kind.kind)
            if not (self._outside.put_new(copier) or new):
                break

    @shielded
    def restore(self) -> None:
        """Let every attribute be the original."""
        for namespace in self._modules:
            namespace.restore()
        parts: list[_Class | _Hooks] = [*self._classes, *self._hooks]
        for part in parts:
            part.restore()
        self._outside.restore()

    def watch(self) -> Unchanged | None:
        """Return what tells whether all attributes are as they are now.

        ``None`` if that cannot be seen: an attribute holds something that changes where Python
        does not look.
        """
        held = self._held
        known = frozenset(map(id, [*held.modules, *held.parameters, *held.buffers]))
        found = [part.watch(known) for part in self._modules]
        found += [kind.watch() for kind in self._classes]
        watched = [w for w in found if w is not None]
        outside = self._outside.watch()
        if len(watched) < len(found) or outside is None or any(h.keeps for h in self._hooks):
            return None
        attributes = all_unchanged(watched)
        return Unchanged(
            lambda: attributes.short() and outside.short(),
            lambda: attributes.long() and outside.long(),
        )


class _Namespace:
    """The attributes of one submodule."""

    def __init__(self, module: nn.Module) -> None:
        live: dict[str, Any] = module.__dict__
        self.module = module
        self.kind = type(module)
        self.live = live
        self.saved = saved = live.copy()
        for key in _ELSEWHERE:
            saved.pop(key, None)
        scripted = isinstance(module, torch.jit.ScriptModule)
        self.own = [
            (key, value)
            for key, value in saved.items()
            if key not in _TORCH_KEYS and type(value) not in ATOMS and not scripted
        ]
        # Of hooks and submodules: filled ones are copied as containers, empty ones emptied again.
        self.filled: list[tuple[str, Any]] = []
        self.empty: list[Any] = []
        if not scripted:
            kept = [*map(saved.get, _DICTIONARIES)]
            self.empty = [value for value in kept if not value and value is not None]
            if any(kept):
                pairs = zip(_DICTIONARIES, kept, strict=True)
                self.filled = [(key, value) for key, value in pairs if value]
        # Whether anything may be other than it was.
        self.is_touched = False

    def register(self, copier: Copier) -> None:
        """Let references to dictionaries of hooks lead to the copies."""
        for key, value in self.filled:
            copied = value.copy()
            copier.memo[id(value)] = copied
            self.live[key] = copied

    def put_copies(self, copier: Copier) -> None:
        if self.is_touched:
            self.restore()
        self.is_touched = True
        module, live = self.module, self.live
        for key, value in self.filled:
            copied = copier.memo[id(value)]
            if key.endswith("hooks"):
                for number, hook in value.items():
                    copied[number] = copier.copy(hook, (module, key))
            live[key] = copied
        for key, value in self.own:
            live[key] = copier.copy(value, (module, key))
        if copier.widen:
            # What self.dtype says, for instance, is no longer the weights'.
            halves = [k for k, v in self.saved.items() if type(v) is torch.dtype and v in HALF]
            live.update(dict.fromkeys(halves, torch.float32))

    def restore(self) -> None:
        if type(self.module) is not self.kind:  # parametrizations give a module another class
            self.module.__class__ = self.kind
        _drop_others(self.live, self.saved)
        self.live.update(self.saved)
        if any(self.empty):
            for dictionary in self.empty:
                dictionary.clear()
        self.is_touched = False

    def watch(self, known: frozenset[int]) -> Watch | None:
        if any(
            key.endswith("hooks")
            and "state_dict" not in key  # no pass calls those
            and list(self.live[key].values()) != list(value.values())
            for key, value in self.filled
        ):
            return None  # a hook keeps something
        copied = [(self.live.get(key), value) for key, value in self.own]
        filled = [self.live[key] for key, _ in self.filled]
        return watch(self.module, copied, filled, self.empty, known)


class _Class:
    """The attributes of a class; those that are no definitions, such as counters, are copied."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.saved = _data_of(kind)
        self.size = len(vars(kind))
        self.changing = [
            (key, value)
            for key, value in self.saved.items()
            if type(value) not in ATOMS and not isinstance(value, _DEFINITIONS)
        ]

    def put_copies(self, copier: Copier) -> None:
        self.restore()
        for key, value in self.changing:
            copied = copier.copy(value, ((None, self.kind.__name__), f".{key}"))
            if copied is not value:
                type.__setattr__(self.kind, key, copied)

    def watch(self) -> Watch | None:
        # Whether it is as it was is asked of a class in any case; see restore.
        copied = [(vars(self.kind).get(key), value) for key, value in self.changing]
        return watch(self.kind, copied)

    def restore(self) -> None:
        live, saved = vars(self.kind), self.saved
        if len(live) == self.size and all([live.get(k, self) is v for k, v in saved.items()]):
            return
        present = _data_of(self.kind)
        for key in present.keys() - self.saved.keys():
            type.__delattr__(self.kind, key)
        for key, value in self.saved.items():
            if present.get(key, self) is not value:
                type.__setattr__(self.kind, key, value)


class _Hooks:
    """Hooks that torch calls for every module there is, with what they keep."""

    def __init__(self, live: dict[Any, Any]) -> None:
        self._live = live
        self._saved = dict(live)

    @property
    def keeps(self) -> bool:
        """Whether one keeps something that it may change."""
        return any(self._live.get(key) is not hook for key, hook in self._saved.items())

    def put_copies(self, copier: Copier) -> None:
        self._hold(
            {
                key: copier.copy(hook, ((None, "torch's hooks for all modules"), ""))
                for key, hook in self._saved.items()
            }
        )

    def restore(self) -> None:
        self._hold(self._saved)

    def _hold(self, hooks: dict[Any, Any]) -> None:
        # In place: handles know the hooks by this dictionary.
        self._live.clear()
        self._live.update(hooks)


def _drop_others(live: dict[str, Any], saved: dict[str, Any]) -> None:
    if len(live) != len(saved) + len(_ELSEWHERE) or not saved.keys() <= live.keys():
        for key in live.keys() - saved.keys() - _ELSEWHERE:
            del live[key]


def _data_of(kind: type) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(kind).items()
        if not (key[:2] == "__" or key[:4] == "_abc")
    }


@lru_cache(maxsize=1024)
def _own_bases(kind: type) -> tuple[type, ...]:
    """Return the user's classes that a class derives from, itself included."""
    return tuple(base for base in kind.__mro__ if _is_of_the_user(base))


def _is_of_the_user(kind: type) -> bool:
    return str(kind.__module__).split(".")[0] not in LIBRARIES

"""Copies of whatever a step can reach: each object once, so that references stay references."""

from __future__ import annotations

import builtins
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lla_callbacks.objective.bulk import rows_of
from lla_callbacks.objective.functions_of_the_user import copy_of_cached, copy_of_function
from lla_callbacks.objective.precision import widened_half
from lla_callbacks.objective.reconstruction import reconstructed
from lla_callbacks.objective.rules import (
    ATOMS,
    LOCKS,
    is_atomic,
    is_machinery,
    is_refused,
    maps_itself,
)
from lla_callbacks.objective.shadows import is_shadowed, original_behind, shadow_of
from lla_callbacks.objective.stand_ins import (
    Muted,
    RefusedError,
    StandIn,
    is_logger,
    muted,
    renewed,
)
from lla_callbacks.objective.tensor_copies import Storages, tensor_below
from lla_callbacks.objective.weak_copies import (
    copy_of_container,
    copy_of_proxy,
    copy_of_reference,
)

# Where something was reached: a parent's path and the last step, None and a name at the root.
Path = tuple[Any, Any]
# Arrays of this many bytes are lent read-only instead of copied: no copy on write for them.
LENT_BYTES = 2**26


class Copier:
    """Copies objects for one evaluation.

    Args:
        known: Objects and what stands for them, such as live parameters for themselves.
        widen: Whether half-precision tensors become float32.
        refusals: Where uses of what cannot be copied are noted.
        root: The module whose parts are named in messages.
        keeps_machinery: Whether modules, optimizers, loggers and what belongs to a Trainer stay
            what they are, for copies that outlive an evaluation.

    Attributes:
        classes: Of the user's objects that were copied.
        functions: That were met, copied or not.
        replaced: Names of what stand-ins took the places of.
        refusals: See above.
        with_workers: Whether loaders with workers are copied too; a step's are not.
    """

    def __init__(
        self,
        known: Iterable[tuple[Any, Any]] = (),
        *,
        widen: bool = False,
        refusals: list[RefusedError] | None = None,
        root: nn.Module | None = None,
        keeps_machinery: bool = False,
    ) -> None:
        self.memo: dict[int, Any] = {id(old): new for old, new in known}
        self.refusals: list[RefusedError] = [] if refusals is None else refusals
        self.classes: set[type] = set()
        self.replaced: list[str] = []
        self.functions: list[Any] = []
        self.widen = widen
        self.on_tensor: Callable[[Tensor], Tensor] | None = None
        self.storages_of(lambda memo: ())
        self._root = root
        self._keeps_machinery = keeps_machinery
        self.with_workers = False
        # Ids must not be used again while they are in the memo.
        self._alive: list[Any] = []

    def copy(self, value: Any, path: Path) -> Any:
        """Return a copy, or the value itself if it cannot change, or a stand-in."""
        kind = type(value)
        if kind in ATOMS:
            return value
        found = self.memo.get(id(value), _MISSING)
        if found is not _MISSING:
            return found
        rule = _EXACT.get(kind)
        if rule is not None:
            return rule(self, value, path)
        return self._by_kind(value, kind, path)

    def again(self) -> Copier:
        """Return a copier that knows what this one was given, and has copied nothing."""
        new = Copier.__new__(Copier)
        new.__dict__.update(self.__dict__)
        new.memo = self.memo.copy()
        new.classes, new.replaced, new.functions, new._alive = set(), [], [], []
        new.storages_of(self._pairs)
        return new

    def storages_of(
        self, pairs: Callable[[dict[int, Any]], Iterable[tuple[Tensor, Tensor]]]
    ) -> None:
        """Name tensors and what stands for their memory, asked for at the first tensor.

        Args:
            pairs: Gives them, from the memo of that moment.
        """
        self._pairs = pairs
        self._storages = Storages(lambda: pairs(self.memo), widen=self.widen)

    def mapped(self, value: Any, path: Path, on_tensor: Callable[[Tensor], Tensor]) -> Any:
        """Return a copy whose tensors are made by a function, as for a batch."""
        outer, self.on_tensor = self.on_tensor, on_tensor
        try:
            return self.copy(value, path)
        finally:
            self.on_tensor = outer

    def _by_kind(self, value: Any, kind: type, path: Path) -> Any:
        found: Any
        if issubclass(kind, Tensor):
            return self._tensor(value, path)
        if kind is StandIn:
            found = renewed(value, self.refusals)
        elif is_atomic(value, kind) or (self._keeps_machinery and is_machinery(kind)):
            return value
        elif kind is Muted or is_logger(kind):
            found = muted(value)
        elif issubclass(kind, np.ndarray):
            found = self._array(value, path)
        elif kind in LOCKS:
            found = LOCKS[kind]()
        elif (original := original_behind(value)) is not value or is_shadowed(kind):
            found = shadow_of(original, self, path)
            self.memo[id(original)] = found
        elif is_refused(kind):
            return self._stand_in(value, kind, path)
        elif issubclass(kind, DataLoader):
            return self._loader(value, kind, path)
        elif issubclass(kind, torch.optim.Optimizer):
            return self.by_dict(value, kind, path)
        elif self.on_tensor is not None and maps_itself(kind):
            # A graph batch and its like know how to map their own tensors.
            found = copy(value).apply(self.on_tensor)
        else:
            return self._object(value, kind, path)
        self.keep(value, found)
        return found

    def keep(self, value: Any, found: Any) -> None:
        """Let a copy stand for an object from here on."""
        self.memo[id(value)] = found
        self._alive.append(value)

    def hold_on_to(self, *copies: Any) -> None:
        """Keep copies alive that nothing else may hold yet."""
        self._alive += copies

    def _stand_in(self, value: Any, kind: type, path: Path) -> StandIn:
        self.replaced.append(self.name_of(path))
        found = StandIn(self.replaced[-1], kind, self.refusals)
        self.keep(value, found)
        return found

    def name_of(self, path: Path) -> str:
        """Return a path as it is written, ``"self.net.buffers[0]"``."""
        steps = []
        while path[0] is not None:
            parent, step = path
            if isinstance(parent, nn.Module):
                names = self._root.named_modules() if self._root is not None else ()
                inner = next((n for n, m in names if m is parent), "")
                steps += [f".{step}", f".{inner}" if inner else "", "self"]
                return "".join(reversed(steps))
            steps.append(step if isinstance(step, str) else f"[{step[0]!r}]")
            path = parent
        return "".join([path[1], *reversed(steps)])

    # -- tensors and arrays -----------------------------------------------------------------

    def _tensor(self, value: Tensor, path: Path) -> Any:
        kind = type(value)
        if self.on_tensor is not None:
            copied = self.on_tensor(value)
        elif not value.is_leaf:
            # Its graph stays: only what is written into it in place must not be seen.
            with torch.enable_grad():
                copied = widened_half(value.clone()) if self.widen else value.clone()
        elif kind is Tensor:
            copied = self._storages.copy(value)
        elif kind is nn.Parameter:
            copied = nn.Parameter(self._storages.copy(value), requires_grad=False)
        else:
            return self._special(value, path)
        if self.on_tensor is None and value.is_leaf:
            if value.requires_grad:  # not asked for at all: inside of vmap it is refused
                copied.requires_grad_()
            if value.grad is not None:
                copied.grad = value.grad.detach().clone()
        self.keep(value, copied)
        if value.__dict__ and copied is not value:
            copied.__dict__.update(self._items(value.__dict__, path))
        return copied

    def _special(self, value: Tensor, path: Path) -> Any:
        """Copy a tensor of a class of its own."""
        try:
            copied = deepcopy(value, self.memo)
        except Exception:  # noqa: BLE001 - of foreign code
            return self._stand_in(value, type(value), path)
        self.keep(value, copied)
        return copied

    def _array(self, value: Any, path: Path) -> Any:
        if value.dtype == object:
            copied = value.copy()
            self.keep(value, copied)
            for i, item in enumerate(value.flat):
                copied.flat[i] = self.copy(item, (path, (i,)))
            return copied
        below = tensor_below(value) if type(value) is np.ndarray else None
        if below is not None:  # a view of weights moves with them
            copied = self._storages.copy(below)
            if copied.dtype == below.dtype:
                return copied.numpy()
        if value.nbytes >= LENT_BYTES:
            lent = value.view()
            lent.flags.writeable = False
            return lent
        return value.copy()

    # -- containers -------------------------------------------------------------------------

    def _items(self, value: dict[Any, Any], path: Path) -> dict[Any, Any]:
        return {k: self.copy(v, (path, f".{k}")) for k, v in value.items()}

    def _list(self, value: list[Any], path: Path) -> list[Any]:
        copied: list[Any] = []
        self.keep(value, copied)
        if set(map(type, value)) <= ATOMS:
            copied.extend(value)
        elif (rows := rows_of(value, alone=True)) is not None:
            copied.extend(rows)
        else:
            copied.extend(self.copy(item, (path, (i,))) for i, item in enumerate(value))
        return copied

    def _dict(self, value: dict[Any, Any], path: Path) -> dict[Any, Any]:
        copied: dict[Any, Any] = {}
        self.keep(value, copied)
        if set(map(type, value.values())) <= ATOMS and set(map(type, value)) <= ATOMS:
            copied.update(value)
        else:
            for key, item in list(value.items()):
                copied[self.copy(key, (path, (key,)))] = self.copy(item, (path, (key,)))
        return copied

    def _set(self, value: set[Any], path: Path) -> set[Any]:
        copied: set[Any] = set()
        self.keep(value, copied)
        copied.update(self.copy(item, (path, ("...",))) for item in value)
        return copied

    def _deque(self, value: deque[Any], path: Path) -> deque[Any]:
        copied: deque[Any] = deque(maxlen=value.maxlen)
        self.keep(value, copied)
        copied.extend(self.copy(item, (path, (i,))) for i, item in enumerate(value))
        return copied

    def _tuple(self, value: tuple[Any, ...], path: Path) -> Any:
        if set(map(type, value)) <= ATOMS:
            return value
        items = [self.copy(item, (path, (i,))) for i, item in enumerate(value)]
        # A tuple may hold itself, through a list.
        found = self.memo.get(id(value), _MISSING)
        if found is not _MISSING:
            return found
        same = all(new is old for new, old in zip(items, value, strict=True))
        copied = value if same else tuple(items)
        self.keep(value, copied)
        return copied

    def _frozenset(self, value: frozenset[Any], path: Path) -> Any:
        items = [self.copy(item, (path, ("...",))) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else frozenset(items)

    def _generator(self, value: torch.Generator, path: Path) -> torch.Generator:
        copied = torch.Generator(device=value.device)
        copied.set_state(value.get_state())
        self.keep(value, copied)
        return copied

    def _proxy(self, value: Any, path: Path) -> Any:
        return types.MappingProxyType(self.copy(dict(value), path))

    # -- what refers to something else ------------------------------------------------------

    def _method(self, value: Any, path: Path) -> Any:
        owner = self.copy(value.__self__, path)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)

    def _builtin(self, value: Any, path: Path) -> Any:
        """Copy a built-in function, or the bound method of a list, say."""
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            return value
        copied = self.copy(owner, path)
        return value if copied is owner else getattr(copied, value.__name__)

    def _function(self, value: Any, path: Path) -> Any:
        self.functions.append(value)
        return copy_of_function(value, self, path)

    # -- objects ----------------------------------------------------------------------------

    def _loader(self, value: Any, kind: type, path: Path) -> Any:
        if value.num_workers and not self.with_workers:
            return self._stand_in(value, kind, path)
        # Whoever is read now keeps its own place and its own workers.
        return self.by_dict(value, kind, path, _iterator=None, persistent_workers=False)

    def by_dict(self, value: Any, kind: type, path: Path, **other: Any) -> Any:
        """Copy an object by its attributes, past what its class says about pickling."""
        copied: Any = object.__new__(kind)
        self.keep(value, copied)
        fixed = {k: v for k, v in other.items() if k in value.__dict__}
        rest = {k: v for k, v in value.__dict__.items() if k not in fixed}
        copied.__dict__.update(self._items(rest, path) | fixed)
        return copied

    def _object(self, value: Any, kind: type, path: Path) -> Any:
        """Copy an object as ``copy.deepcopy`` does, and what it holds by the rules here."""
        before = len(self.refusals)
        try:
            own = getattr(kind, "__deepcopy__", None)
            if own is not None:
                copied = own(value, self.memo)
            else:
                copied = reconstructed(value, kind, self, path)
            if copied is value and hasattr(value, "__dict__"):
                # One that says it is its own copy, or the only one of its kind.
                copied = self.by_dict(value, kind, path)
            self.keep(value, copied)
        except Exception:  # noqa: BLE001 - whatever foreign code raises, it cannot be copied
            del self.refusals[before:]
            self.memo.pop(id(value), None)
            return self._stand_in(value, kind, path)
        self.classes.add(kind)
        return copied


_MISSING: Any = object()
_Rule = Callable[[Copier, Any, Path], Any]
_EXACT: dict[type, _Rule] = {
    Tensor: Copier._tensor,
    nn.Parameter: Copier._tensor,
    list: Copier._list,
    dict: Copier._dict,
    set: Copier._set,
    torch.Generator: Copier._generator,
    deque: Copier._deque,
    tuple: Copier._tuple,
    frozenset: Copier._frozenset,
    types.MappingProxyType: Copier._proxy,
    types.MethodType: Copier._method,
    types.BuiltinMethodType: Copier._builtin,
    types.FunctionType: Copier._function,
    weakref.ReferenceType: copy_of_reference,
    weakref.ProxyType: copy_of_proxy,
    weakref.CallableProxyType: copy_of_proxy,
    weakref.WeakSet: copy_of_container,
    weakref.WeakKeyDictionary: copy_of_container,
    weakref.WeakValueDictionary: copy_of_container,
    type(functools.lru_cache(maxsize=1)(print)): copy_of_cached,
    type(builtins.len): Copier._builtin,
}

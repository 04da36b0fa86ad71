"""Evaluate a module many times in a row, each time from the same state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.objective.state import (
    copy_of,
    is_state,
    known_modules,
    preserved,
    seed_everything,
    set_mode,
)


@contextmanager
def repeatable(
    module: nn.Module,
    *,
    seed: int,
    mode: str,
    dropout: bool,
    training: Mapping[nn.Module, bool] | None,
    check_weights: bool = True,
) -> Iterator[Callable[[], None]]:
    """Within this context a module can be evaluated many times; yields ``reset()``.

    ``reset()`` puts the random streams, buffers, frozen parameters, attributes and modes
    back to where they were at the start, so that every evaluation is of the same function.
    It touches only what an evaluation changed, where that can be seen: the guard of
    :func:`~lla_callbacks.objective.state.preserved` is entered once for all evaluations.

    Args:
        module: The module.
        seed: Where the random streams start at each evaluation.
        mode: Normalization mode; see :func:`~lla_callbacks.objective.state.set_mode`.
        dropout: Whether dropout stays on.
        training: How each submodule stands during training, where that is known.
        check_weights: See :func:`~lla_callbacks.objective.state.preserved`.
    """
    with preserved(module, seed=seed, check_weights=check_weights):
        set_mode(module, mode, dropout=dropout, training=training)
        keep_processes_apart(module)
        attributes = _Attributes(module)
        tensors = _Tensors(module)
        # A scripted module keeps its mode elsewhere, where no forward pass changes it.
        modes = [(m.__dict__, m.training) for m in module.modules() if "training" in m.__dict__]

        def reset() -> None:
            seed_everything(seed)
            attributes.reset()
            tensors.reset()
            for namespace, flag in modes:
                namespace["training"] = flag

        yield reset


class _Attributes:
    """Plain attributes of every submodule, put back by value."""

    def __init__(self, module: nn.Module) -> None:
        self._known = known_modules(module)
        memo = dict(self._known)
        # Containers that hold nothing that could change: long ones are compared, not copied.
        self._flat: set[int] = set()
        self._modules: list[tuple[dict[str, Any], set[str], dict[str, Any], dict[str, Any]]] = []
        for m in module.modules():
            fixed: dict[str, Any] = {}
            changing: dict[str, Any] = {}
            for key, value in m.__dict__.items():
                if is_state(key):
                    kept = copy_of(value, memo)
                    (fixed if kept is value else changing)[key] = kept
                    if kept is not value and _is_flat(kept):
                        self._flat.add(id(kept))
            self._modules.append((m.__dict__, set(m.__dict__), fixed, changing))

    def reset(self) -> None:
        memo = dict(self._known)
        for namespace, _, _, changing in self._modules:
            for key, kept in changing.items():
                if id(kept) in self._flat and _same_items(namespace.get(key), kept):
                    memo[id(kept)] = namespace[key]
        for namespace, keys, fixed, changing in self._modules:
            if namespace.keys() != keys:
                for key in namespace.keys() - keys:
                    del namespace[key]
            namespace.update(fixed)
            for key, kept in changing.items():
                namespace[key] = copy_of(kept, memo)


def _is_flat(value: Any) -> bool:
    """Return whether a list or dict holds only what :func:`copy_of` leaves as it is."""
    if type(value) not in (list, dict):
        return False
    items = value.values() if isinstance(value, dict) else value
    return all(copy_of(item, {}) is item for item in items)


def _same_items(a: Any, b: Any) -> bool:
    """Return whether two lists or dicts hold the same objects in the same order."""
    if type(a) is not type(b) or len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(k is m and v is w for (k, v), (m, w) in zip(a.items(), b.items(), strict=True))
    return all(v is w for v, w in zip(a, b, strict=True))


class _Tensors:
    """Buffers and frozen parameters of every submodule, put back by value."""

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []
        self._values: dict[int, tuple[Tensor, Tensor, int]] = {}
        for m in module.modules():
            frozen = {k: p for k, p in m._parameters.items() if p is not None}
            for store, entries in ((m._buffers, m._buffers), (m._parameters, frozen)):
                for name, tensor in entries.items():
                    if tensor is None or tensor.requires_grad:
                        continue
                    self._places.append((store, name, tensor))
                    saved = (tensor, tensor.detach().clone(), tensor._version)
                    self._values.setdefault(id(tensor), saved)

    def reset(self) -> None:
        for store, name, tensor in self._places:
            store[name] = tensor
        with torch.no_grad():
            for key, (tensor, value, version) in self._values.items():
                if tensor._version != version:
                    tensor.copy_(value)
                    self._values[key] = (tensor, value, tensor._version)


def keep_processes_apart(module: nn.Module) -> None:
    """Let synchronised batch norm use its own process's statistics.

    Processes that share the points of a slice evaluate different weights, whose statistics
    must not be mixed. The instance attribute goes with the guard.
    """
    for m in module.modules():
        if isinstance(m, nn.SyncBatchNorm):
            m.__dict__["forward"] = _BatchNorm.forward.__get__(m)
        # A metric that synchronises would wait for processes at other weights.
        for switch in ("sync_on_compute", "_to_sync"):
            if isinstance(m.__dict__.get(switch), bool):
                m.__dict__[switch] = False

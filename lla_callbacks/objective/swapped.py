"""Frozen parameters, buffers and gradients: originals kept aside, copies in their places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.gradient_hooks import hooks_of
from lla_callbacks.objective.interrupts import shielded
from lla_callbacks.objective.inventory import Inventory
from lla_callbacks.objective.one_memory import sharing
from lla_callbacks.objective.precision import ORIGINAL
from lla_callbacks.objective.tensor_copies import Storages, restored_values, separate


@contextmanager
@shielded
def preserved_frozen_parameters(held: Inventory, copier: Copier) -> Iterator[None]:
    """Put copies in the places of parameters that are not trained, such as a target network's.

    Those of a class of their own (quantized weights) stay what they are, as nothing else knows
    how to make one; what they hold is put back if it was written.
    """
    stores: list[tuple[nn.Module, Any]] = []
    entries: list[tuple[Any, str, nn.Parameter]] = []
    in_place = held.is_sharded
    special: dict[int, nn.Parameter] = {}
    try:
        for m in held.modules:
            store: Any = m._parameters
            if type(store) is dict and not in_place:
                # Parameters that are registered meanwhile go with it.
                stores.append((m, store))
                store = m.__dict__["_parameters"] = store.copy()
                if not store:
                    continue
            for name, p in list(store.items()):
                if p is None or p.requires_grad:
                    continue
                if type(p) is not nn.Parameter or in_place:
                    special[id(p)] = p
                    continue
                if type(store) is not dict:
                    entries.append((store, name, p))
                if copier.memo.get(id(p), p) is p:
                    copied = nn.Parameter(separate(p), requires_grad=False)
                    copied.__dict__.update(p.__dict__)
                    _stand_for(p, copied, copier)
                store[name] = copier.memo[id(p)]
        with restored_values(special.values()):
            yield
    finally:
        for store, name, p in entries:
            store[name] = p
        for m, store in stores:
            m.__dict__["_parameters"] = store


@contextmanager
@shielded
def preserved_buffers(held: Inventory, copier: Copier) -> Iterator[None]:
    """Put copies in the places of all buffers; what is registered meanwhile goes."""
    saved: list[tuple[nn.Module, Any, dict[str, Tensor | None]]] = []
    # Views of one buffer are views of one copy.
    together, storages = sharing(held.buffers), Storages(lambda: ())
    try:
        for m in held.modules:
            store: Any = m._buffers
            if type(store) is dict:
                saved.append((m, store, store))
                before, store = store, store.copy()
                m.__dict__["_buffers"] = store
            else:
                before = dict(store.items())
                saved.append((m, store, before))
            for name, buffer in before.items():
                if isinstance(buffer, Tensor):
                    if copier.memo.get(id(buffer), buffer) is buffer:
                        copy = storages.copy if id(buffer) in together else separate
                        _stand_for(buffer, copy(buffer), copier)
                    store[name] = copier.memo[id(buffer)]
        yield
    finally:
        for m, store, buffers in saved:
            if type(store) is dict:
                m.__dict__["_buffers"] = store
                continue
            # Key by key: the buffers of a scripted module are no full dictionary.
            for name, _ in list(store.items()):
                if name not in buffers:
                    del store[name]
            for name, buffer in buffers.items():
                store[name] = buffer


def _stand_for(tensor: Tensor, copied: Tensor, copier: Copier) -> None:
    """Let references to a tensor, and to what it was widened from, lead to its copy."""
    copier.memo[id(tensor)] = copied
    if tensor.__dict__:
        original = tensor.__dict__.get(ORIGINAL)
        if original is not None:
            copier.memo[id(original)] = copied


@contextmanager
@shielded
def preserved_gradients(held: Inventory, copier: Copier) -> Iterator[None]:
    """Park gradients, and keep what else parameters have: attributes, hooks, whether trained."""
    saved = [(p, p.grad, p.requires_grad, p.__dict__.copy()) for p in held.parameters]
    restore_hooks = hooks_of(held)
    try:
        for p, gradient, _, attributes in saved:
            if gradient is not None:
                p.grad = None
            for key, value in attributes.items():
                if key != ORIGINAL:
                    p.__dict__[key] = copier.copy(value, ((None, "parameter"), f".{key}"))
        yield
    finally:
        restore_hooks()
        for p, gradient, requires_grad, attributes in saved:
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            p.grad = gradient
            if p.__dict__ or attributes:
                p.__dict__.clear()
                p.__dict__.update(attributes)

"""Reading a monitor's own loader without training noticing, whatever the two share."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.callbacks.compat import MisconfigurationException, source_of_loaders
from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.inventory import inventory_of
from lla_callbacks.objective.rules import ATOMS
from lla_callbacks.objective.state import copier_for

# Objects of a loader that are looked through for what it shares; beyond lies data.
MOST = 5000
_PASSIVE = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinMethodType,
            torch.Size)  # fmt: skip


class SharedLoaderError(MisconfigurationException):
    """A monitor's loader cannot be read without taking something from training."""


def apart(trainer: Any, module: nn.Module, loader: Any, source: Any = None) -> Any:
    """Return a loader of the same batches that shares nothing with training's.

    A copy, of the sampler, the generator, the dataset and its random state; it has workers of
    its own. What cannot be copied, because a file is open in it, say, is read as it is, where
    training has no part in it.

    Args:
        trainer: Whose loaders may be the same.
        module: Its module.
        loader: An iterable of batches.
        source: What training's loaders will come from, where they are not there yet.

    Raises:
        SharedLoaderError: If it cannot be copied and shares something with training.
    """
    copier: Copier = copier_for(inventory_of(module))
    copier.with_workers = True
    copied = copier.copy(loader, (None, "dataloader"))
    if not copier.replaced:
        return copied
    if (shared := _shared(trainer, loader, source)) is not None:
        raise SharedLoaderError(
            f"dataloader= shares a {type(shared).__name__} with the Trainer's own loaders, and "
            f"{copier.replaced[0]} cannot be copied: reading it would take batches from "
            "training. Give dataloader= a loader with a dataset of its own, or a list of batches."
        )
    return loader


def refuse_shared(trainer: Any, module: nn.Module, loader: Any, stage: str) -> None:
    """Raise before anything starts, as far as the Trainer knows its own loaders by then.

    Args:
        trainer: The Trainer.
        module: Its module.
        loader: The monitor's own loader, or None.
        stage: What the Trainer is about to do.

    Raises:
        SharedLoaderError: See :func:`apart`.
    """
    source = source_of_loaders(trainer, stage)
    # Only what is shared is copied, on trial.
    if loader is not None and source is not None and _common(source, loader) is not None:
        apart(trainer, module, loader, source)


def _shared(trainer: Any, loader: Any, source: Any = None) -> Any:
    """Return something that a loader shares with those of the Trainer, None if there is nothing."""
    names = ("train_dataloader", "val_dataloaders", "test_dataloaders")
    return _common([*(getattr(trainer, name, None) for name in names), source], loader)


def _common(theirs: Sequence[Any], loader: Any) -> Any:
    """Return something that a loader shares with others, None if there is nothing."""
    known = {id(thing) for thing in _parts([t for t in theirs if t is not None])}
    return next((thing for thing in _parts([loader]) if id(thing) in known), None)


def _parts(things: Iterable[Any]) -> Iterator[Any]:
    """Yield all that things consist of and that may have a state, themselves included."""
    waiting, seen = list(things), set[int]()
    while waiting and len(seen) < MOST:
        thing = waiting.pop(0)
        if id(thing) in seen or type(thing) in ATOMS or isinstance(thing, _PASSIVE):
            continue
        seen.add(id(thing))
        if isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting += thing
        else:
            waiting += getattr(thing, "__dict__", {}).values()
        # An empty tuple is the same everywhere.
        if not isinstance(thing, tuple):
            yield thing

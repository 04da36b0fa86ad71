"""Training batches that a loader gives again: their fingerprint is enough for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lla_callbacks.callbacks.compat import prepared
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.own_loader import SharedLoaderError, apart
from lla_callbacks.callbacks.saved_state import converted
from lla_callbacks.objective.checks import MOST
from lla_callbacks.objective.state import preserved


def gives_again(loader: Any) -> bool:
    """Return whether a loader gives the same batches whenever it is read, as far as it tells.

    A list of batches does, and a ``DataLoader`` that goes through its dataset in order. Whether
    the dataset itself is random (an augmentation) nobody can tell before it is read again: the
    fingerprint does then. A shuffled loader, one with a sampler or an ``__iter__`` of its own, one
    that goes on where it was, and one over a stream give other ones.
    """
    if type(loader) in (list, tuple):
        return True
    if not isinstance(loader, DataLoader) or hasattr(loader, "state_dict"):
        return False
    if type(loader).__iter__ is not DataLoader.__iter__:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return False
    in_order = type(loader.sampler) is SequentialSampler
    return in_order and type(loader.batch_sampler) in (BatchSampler, type(None))


def read_again(
    trainer: Any,
    module: nn.Module,
    stored: Mapping[str, Any],
    *,
    batch_size: Any,
    seed: int,
    precision: tuple[str, str],
) -> dict[str, Any] | None:
    """Return what a fingerprint stands for, with the batches; None if they are not given again.

    Training does not notice: a copy of the loader is read, and random streams are put back.

    Args:
        trainer: Whose training loader is read.
        module: Its module.
        stored: The fingerprint, of :meth:`HeldBatches.fingerprint`.
        batch_size: The user's own word for how many a batch has.
        seed: Of the random streams meanwhile.
        precision: Dtypes of the weights then and now.
    """
    loader = trainer.train_dataloader
    numbers = stored["numbers"]
    if not numbers or not gives_again(loader):
        return None
    found = HeldBatches(MOST, batch_size)
    try:
        source = apart(trainer, module, loader)
        with preserved(module, seed=seed):
            for number, batch in enumerate(source):
                if number in numbers:
                    found.add(prepared(trainer, module, batch), number=number)
                if number >= max(numbers):
                    break
        if found.numbers != numbers:
            return None
        if found.num_held > stored["samples"]:
            found.keep(stored["samples"])
    except SharedLoaderError:
        # It cannot be copied, and what is read from it would be taken from training.
        return None
    batches = found.batches
    then = {str(d): d for d in (torch.float32, torch.float64)}.get(precision[0])
    if precision[0] != precision[1] and then is not None:
        # The loader gives them in the present precision; the fingerprint is of the former one.
        again = HeldBatches(MOST, batch_size)
        again.batches = [converted(batch, then) for batch in batches]
        found = again
    if found.mark() != stored["mark"]:
        return None
    return {**stored, "batches": batches}

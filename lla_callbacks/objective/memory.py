"""What a measurement keeps in memory, judged beforehand by what one forward pass saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.linalg.room import COPIES_IN_TRAINING
from lla_callbacks.linalg.room import basis_room as basis_room
from lla_callbacks.objective.self_check import Proof

# The graph of a gradient holds the forward pass, the backward pass and their intermediates.
# Measured on four kinds of networks: 1.6 to 2.3 times what the forward pass saves; three times
# is on the safe side.
GRAPH_OVER_FORWARD = 3
# Whatever a training step takes, so much more is not felt. Choice.
LEAST_MEMORY = 256 * 2**20


@dataclass
class Findings:
    """What one measurement found out about held batches, and later ones need not again.

    Attributes:
        saved: Bytes that the forward pass of the first batch saves.
        unsplittable: Why parts of some batch do not add up to it, once that was found.
        split: Places of the batches whose parts' gradients were found to add up.
        proof: What is known of the loss.
        rounding: Of a loss that is returned in fewer digits than the weights have; else zero.
    """

    saved: int | None = None
    unsplittable: str | None = None
    split: set[int] = field(default_factory=set)
    proof: Proof = field(default_factory=Proof)
    rounding: float = 0.0

    def learn(self, **found: Any) -> None:
        """Take note of something about the loss."""
        self.proof = replace(self.proof, **found)


@dataclass(frozen=True)
class MemoryPlan:
    """Which graphs are kept, and in how many parts a batch goes through.

    Graphs of batches are kept for a whole run (2 gradients a product) while they fit beside
    the graph of the one that is being differentiated; the others are built anew for each product
    (3 gradients). Where not even one graph fits, batches are split.

    Attributes:
        num_kept: Batches whose graphs are kept, the first ones.
        parts: Parts that the largest batch must be split into, 1 if it fits whole.
        part_size: Samples in a part.
        graph: Bytes of the largest batch's graph.
    """

    num_kept: int
    parts: int
    part_size: int
    graph: float

    @classmethod
    def of(
        cls,
        saved: Sequence[float],
        counts: Sequence[int],
        weights: float,
        max_memory: int | None,
    ) -> MemoryPlan:
        """Return the plan.

        Args:
            saved: Bytes that the forward pass of each batch saves.
            counts: Samples of each batch.
            weights: Bytes of the trainable weights.
            max_memory: Bytes allowed; ``None``: half of what a training step takes, so that the
                peak stays within 1.5 times its own, and :data:`LEAST_MEMORY` at least.
        """
        allowed = allowed_memory(max(saved), weights, max_memory)
        graphs = [GRAPH_OVER_FORWARD * s for s in saved]
        largest = max(graphs)
        parts = 1
        while largest / parts > allowed and parts < max(counts):
            parts *= 2
        size = -(-max(counts) // parts)
        if sum(graphs) <= allowed or len(graphs) == 1:
            return cls(len(graphs) if parts == 1 else 0, parts, size, largest)
        room, kept = allowed - largest, 0
        while parts == 1 and kept < len(graphs) and sum(graphs[: kept + 1]) <= room:
            kept += 1
        return cls(kept, parts, size, largest)


def allowed_memory(saved: float, weights: float, max_memory: int | None) -> float:
    """Return the bytes that a measurement may take; see :meth:`MemoryPlan.of`."""
    if max_memory is not None:
        return max_memory
    return max(LEAST_MEMORY, (COPIES_IN_TRAINING * weights + saved) / 2)


def saved_bytes(evaluate: Callable[[], Any], weights: Sequence[Tensor]) -> int:
    """Return how many bytes a forward pass saves for its backward pass, beside the weights.

    0 where that cannot be seen.
    """
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        try:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):
            # Distributed tensors and their like have no storage of their own.
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    try:
        with torch.inference_mode(False), torch.enable_grad(), hooks:
            evaluate()
    except RuntimeError as error:
        # torch.func inside of a loss refuses to be looked at.
        if "saved tensor hooks" not in str(error):
            raise
        return 0
    known = set()
    for weight in weights:
        try:
            known.add(weight.untyped_storage().data_ptr())
        except (NotImplementedError, RuntimeError):
            continue
    return sum(size for pointer, size in seen.items() if pointer not in known)

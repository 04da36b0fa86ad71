"""How much memory a Lanczos basis may take beside a process that trains."""

from __future__ import annotations

# A training step holds weights, gradients and two moments of each, and what a forward pass saves.
COPIES_IN_TRAINING = 4
# What Python, torch and Lightning take before anything is trained: 400 MiB and more.
PROCESS = 400 * 2**20
# The peak that a measurement aims at, in peaks of the process that trains.
AIM = 1.5
# Vectors as long as the weights that are at work beside a basis, by engine: 5.6 and 6.6 measured on
# a network of ten million weights (docs/benchmarks/engines.md).
AT_WORK = {"exact": 6, "difference": 7}


def basis_room(
    saved: float, graph: float, weights: float, max_memory: int | None, engine: str = "exact"
) -> float:
    """Return the bytes that a Lanczos basis may take on the CPU, negative if there is no room.

    By default so many that the peak of the process stays at :data:`AIM` times what it has in
    training: what Adam holds, and what a forward pass saves, or the two copies of the weights that
    its step makes.

    Args:
        saved: Bytes that the forward pass of one batch saves.
        graph: Bytes of the graphs that are kept.
        weights: Bytes of the trainable weights.
        max_memory: Bytes allowed for all, or ``None``.
        engine: How products are computed.
    """
    held = PROCESS + COPIES_IN_TRAINING * weights
    peak = held + max(saved, 2 * weights)
    allowed = AIM * peak - held if max_memory is None else max_memory
    return allowed - graph - AT_WORK[engine] * weights

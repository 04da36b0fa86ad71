"""Random vectors, always drawn on the CPU so that every device sees the same ones."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int, *keys: int) -> torch.Generator:
    """Return a CPU generator that depends on the seed and every key, and on nothing else.

    Neighbouring seeds and keys give unrelated streams (they are mixed by numpy's
    ``SeedSequence`` rule of hashing, here through torch's own Mersenne seeding of a hash).
    """
    mixed = seed & (2**63 - 1)
    for key in keys:
        # The multiplier and shifts are SplitMix64's, whose outputs pass as independent.
        mixed = (mixed ^ (key + 0x9E3779B97F4A7C15 + (mixed << 6) + (mixed >> 2))) & (2**64 - 1)
        mixed = (mixed * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed & (2**63 - 1))


def rademacher(
    dim: int, source: torch.Generator, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return independent signs ``+1`` or ``-1``, shape ``(dim,)``.

    Among unbiased probes they have the least variance:
    ``Var(z' A z) = 2 (||A||_F^2 - sum_i a_ii^2)`` (Hutchinson 1990, section 2).
    """
    signs = torch.randint(0, 2, (dim,), generator=source, dtype=torch.int8)
    return (2 * signs - 1).to(device=device, dtype=dtype)

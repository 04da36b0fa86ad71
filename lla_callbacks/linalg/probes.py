"""Random vectors, always drawn on the CPU so that every device sees the same ones."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *keys: int) -> torch.Generator:
    """Return a CPU generator that depends on the seed and every key, and on nothing else.

    Seed and keys are hashed, so that neighbouring ones give unrelated streams, none of them
    the stream of ``torch.manual_seed(seed)``.
    """
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def rademacher(
    dim: int, source: torch.Generator, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return independent signs ``+1`` or ``-1``, shape ``(dim,)``.

    Among probes with independent entries they have the least variance:
    ``Var(z' A z) = 2 (||A||_F^2 - sum_i a_ii^2)`` (Hutchinson 1990, section 2).
    """
    signs = torch.randint(0, 2, (dim,), generator=source, dtype=torch.int8)
    return (2 * signs - 1).to(device=device, dtype=dtype)

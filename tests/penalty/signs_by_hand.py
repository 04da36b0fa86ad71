"""The signs of weight noise, element by element, by Python's own whole numbers."""

import hashlib

import torch

WORD = 2**64


def sign(seed, key, name, element):
    """One sign: word ``element // 64`` of SplitMix64 from a key of seed, step and name."""
    digest = hashlib.sha256(repr((seed, *key, name)).encode()).digest()
    word = (int.from_bytes(digest[:8], "big") + (element // 64 + 1) * 0x9E3779B97F4A7C15) % WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return 1.0 if (word ^ word >> 31) >> element % 64 & 1 else -1.0


def signs_by_hand(parameters, seed, key):
    return {
        name: torch.tensor([sign(seed, key, name, i) for i in range(p.numel())])
        .reshape(p.shape)
        .to(p.dtype)
        for name, p in parameters.items()
    }

"""Which sign each entry of a parameter has: a hash of its place, drawn in pieces."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lla_callbacks.linalg.probes import EIGHT_SIGNS, signs_between
from lla_callbacks.linalg.space import local_part
from lla_callbacks.penalty.flat_shards import FlatPart
from lla_callbacks.penalty.places import held_places

# Entries whose words are mixed at once, 32 KiB of them, which is steps of 1 MiB where these are
# made at once too; elsewhere than on a CPU each launch has its price.
PIECE, PIECE_ON_DEVICE = 2**18, 2**24
BITS = 64
# SplitMix64 (Steele, Lea & Flood 2014): its increment, and the two multipliers of its mixer.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Piece(NamedTuple):
    """Rows of a local tensor whose signs are drawn together.

    ``first`` is the place of their first entry in the whole parameter, row by row, if the entries
    follow each other there; else ``indices`` are the places of all.
    """

    position: int
    rows: Any
    shape: tuple[int, ...]
    first: int
    indices: list[Tensor] | None


class Group:
    """Pieces of one dtype, drawn with few calls."""

    def __init__(self, pieces: list[Piece], like: Tensor) -> None:
        self.pieces = pieces
        self.sizes = [math.prod(p.shape) for p in pieces]
        self.dtype, self.device = like.dtype, like.device
        words = [
            (p.first + size - 1) // BITS - p.first // BITS + 1
            for p, size in zip(pieces, self.sizes, strict=True)
        ]
        self.is_scattered = pieces[0].indices is not None
        self.num_words = 0 if self.is_scattered else sum(words)
        self._counts = torch.tensor(words, device=like.device)
        self._starts = [sum(words[:i]) for i in range(len(words))]

    def words(self, keys: list[int], ramp: Tensor) -> Tensor:
        """Return random words from the keys of each piece's parameter, a bit a sign."""
        if self.is_scattered:
            return self._scattered(keys[0])
        # Word j of a parameter is mixed from key + (j + 1) golden.
        bases = [
            _signed(key + (p.first // BITS - start + 1) * _GOLDEN)
            for p, key, start in zip(self.pieces, keys, self._starts, strict=True)
        ]
        ramp = ramp[: self.num_words]
        if len(bases) == 1:
            return _mixed(ramp + bases[0])
        base = torch.tensor(bases, device=self.device)
        return _mixed(base.repeat_interleave(self._counts, output_size=self.num_words).add_(ramp))

    def signs(self, words: Tensor, factor: float) -> list[Tensor]:
        """Return ``factor`` times the signs of each piece."""
        if self.is_scattered:
            return [words.to(self.dtype).mul_(factor).view(self.pieces[0].shape)]
        flat = signs_between(words, 0, len(words) * BITS, self.table(factor))
        found = []
        for p, size, start in zip(self.pieces, self.sizes, self._starts, strict=True):
            place = start * BITS + p.first % BITS
            found.append(flat[place : place + size].view(p.shape))
        return found

    def table(self, factor: float) -> Tensor:
        """Return ``factor`` times the signs of each octet."""
        return EIGHT_SIGNS.to(self.device, self.dtype) * factor

    def _scattered(self, key: int) -> Tensor:
        """Return signs in int8, of entries that do not follow each other."""
        indices, shape = self.pieces[0].indices, self.pieces[0].shape
        assert indices is not None
        places = torch.zeros((), dtype=torch.int64, device=self.device)
        for i, index in enumerate(indices):
            places = places + index.view([-1 if j == i else 1 for j in range(len(shape))])
        words = _mixed((places // BITS + 1) * _signed(_GOLDEN) + _signed(key))
        bits = words.bitwise_right_shift_(places % BITS).bitwise_and_(1)
        return bits.to(torch.int8).mul_(2).sub_(1)


def grouped(tensors: Sequence[Tensor], parts: Sequence[FlatPart | None]) -> list[Group]:
    """Cut large tensors into pieces of rows, and put small ones together."""
    groups: list[Group] = []
    waiting: list[Piece] = []
    like: Tensor | None = None
    room = 0

    def close() -> None:
        if waiting and like is not None:
            groups.append(Group(list(waiting), like))
        waiting.clear()

    for position, (tensor, part) in enumerate(zip(tensors, parts, strict=True)):
        local = local_part(tensor)
        most = PIECE if local.device.type == "cpu" else PIECE_ON_DEVICE
        for piece in _cut(position, tensor, local, most, part):
            size = math.prod(piece.shape)
            scattered = piece.indices is not None
            changes = like is None or (like.dtype, like.device) != (local.dtype, local.device)
            if changes or size > room or scattered or (waiting and waiting[-1].indices is not None):
                close()
                like, room = local, most
            waiting.append(piece)
            room -= size
    close()
    return groups


def _cut(
    position: int, tensor: Tensor, local: Tensor, most: int, part: FlatPart | None
) -> Iterator[Piece]:
    """Yield a tensor in pieces of at most so many entries, where it has rows enough."""
    if not local.numel():
        return
    if local.ndim == 0:
        yield Piece(position, ..., (), 0, None)
        return
    rest = tuple(local.shape[1:])
    width = math.prod(rest)
    lead = max(1, most // width)
    held = held_places(tensor)
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim)]
    for start in range(0, len(local), lead):
        rows = slice(start, min(start + lead, len(local)))
        shape = (rows.stop - rows.start, *rest)
        if part is not None:
            places = None if part.places is None else [part.places[rows]]
            first = 0 if places else part.first + start
            yield Piece(position, rows, shape, first, places)
            continue
        if held is None:
            yield Piece(position, rows, shape, start * width, None)
            continue
        index = [held[0][rows], *held[1:]]
        # Whole rows that follow each other are as those of one process.
        follows = bool((index[0].diff() == 1).all()) and tuple(tensor.shape[1:]) == rest
        if follows:
            yield Piece(position, rows, shape, int(index[0][0]) * width, None)
        else:
            yield Piece(
                position, rows, shape, 0, [i * s for i, s in zip(index, strides, strict=True)]
            )


def sign_key(seed: int, *rest: int | str) -> int:
    """Return a word of 64 bits from which the signs of one parameter are mixed."""
    return int.from_bytes(hashlib.sha256(repr((seed, *rest)).encode()).digest()[:8], "big")


def _signed(word: int) -> int:
    """Return the number that torch's int64 has for a word of 64 bits."""
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word


def _mixed(words: Tensor) -> Tensor:
    """Mix words in place, as SplitMix64 does; shifts bring in zeros."""
    for shift, multiplier in ((30, _FIRST), (27, _SECOND), (31, None)):
        words ^= (words >> shift) & ((1 << (64 - shift)) - 1)
        if multiplier is not None:
            words *= _signed(multiplier)
    return words


def ramp(length: int, device: torch.device) -> Tensor:
    """Return what words of so many places have, one after the other, before they are mixed."""
    return torch.arange(length, device=device).mul_(_signed(_GOLDEN))

"""Weights that stand a signed random step away, in shards too, and come back to the bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lla_callbacks.linalg.probes import EIGHT_SIGNS, signs_between
from lla_callbacks.linalg.space import local_part, whole
from lla_callbacks.penalty.elsewhere import Elsewhere
from lla_callbacks.penalty.flat_shards import FlatPart, root_mean_squares, summed
from lla_callbacks.penalty.places import held_places, summed_over

# Parts that torch's and Lightning's wrappers put into the names of parameters: a wrapped network
# draws what the bare one draws.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
# Entries whose signs are drawn at once: 1 MiB stays in a processor's cache; elsewhere each
# launch has its price.
PIECE, PIECE_ON_DEVICE = 2**18, 2**24
_BITS = 64
# SplitMix64 (Steele, Lea & Flood 2014): its increment, and the two multipliers of its mixer.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Displacement:
    """Moves parameters to ``theta + distance s z`` and puts them back, bit for bit.

    ``z`` are independent signs. That of an element depends on ``(seed, *key)``, the name of its
    parameter and its place in the *whole* parameter, and on nothing else: not on the device, on
    other parameters, or on how a distributed tensor is spread, so that each process moves its own
    part as one process would. ``s`` is 1, or with ``relative`` the root mean square of each
    tensor (tensors of zeros stay in place). Takes the memory of one copy of the parameters, or of
    their local parts.

    Args:
        parameters: By name; distributed tensors are moved in place, each process its own part.
        seed: Fixes the signs, together with the keys.
        relative: Whether steps are in units of each tensor's root mean square.
        parts: Of parameters that FSDP1 has flattened, which entries of the whole they are.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        seed: int = 0,
        relative: bool = False,
        parts: Mapping[str, FlatPart] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self._parts = {name: parts[name] for name in parameters if name in parts} if parts else {}
        self.relative = relative
        self._seed = seed
        self._names = [_bare(name) for name in parameters]
        self._elsewhere = Elsewhere()
        self._scales: list[Tensor] = []
        # A bit a sign, for both signs of a pair.
        self._drawn: tuple[tuple[int, ...] | None, list[Tensor]] = (None, [])
        self._distance = 0.0
        self._key: tuple[int, ...] = ()
        self._groups = _grouped(
            list(self.parameters.values()), [self._parts.get(name) for name in self.parameters]
        )
        longest = max((g.num_words for g in self._groups), default=0)
        device = next(iter(self.parameters.values())).device
        self._ramp = torch.arange(longest, device=device).mul_(_signed(_GOLDEN))

    @property
    def is_displaced(self) -> bool:
        """Whether the parameters are away at present."""
        return self._elsewhere.is_away

    @torch.no_grad()
    def move(self, distance: float, key: Sequence[int]) -> None:
        """Go to ``theta + distance s z(key)``, from ``theta`` whatever stands there now."""
        place = self._elsewhere
        if not place.is_away:
            place.leave(list(self.parameters.values()))
            if self.relative:
                cut = root_mean_squares(self.parameters, self._parts)
                self._scales = [
                    cut[name] if name in cut else whole(_rms(p.detach()))
                    for name, p in self.parameters.items()
                ]
        self._distance, self._key = distance, tuple(key)
        self._write([True] * len(place.starts))
        place.arrive()

    def _write(self, wanted: Sequence[bool]) -> None:
        place = self._elsewhere
        for pieces, steps in self._steps(self._distance):
            pairs = [(p, s) for p, s in zip(pieces, steps, strict=True) if wanted[p.position]]
            starts = [place.starts[p.position][p.rows] for p, _ in pairs]
            targets = [place.targets[p.position][p.rows] for p, _ in pairs]
            # Not by adding to the targets: to be called again from within itself must do no harm.
            if len(pairs) == 1:
                torch.add(starts[0], pairs[0][1], out=targets[0])
            elif pairs:
                moved = [step for _, step in pairs]
                torch._foreach_add_(moved, starts)
                torch._foreach_copy_(targets, moved)

    def put_back(self) -> list[str]:
        """Return to ``theta``, bit for bit; nothing happens where the parameters are there.

        Returns:
            Names of parameters that somebody has changed in place meanwhile: their change is lost.
        """
        names = list(self.parameters)
        with torch.no_grad():
            changed = [names[i] for i in self._elsewhere.back()]
        self._elsewhere.let_go()
        return changed

    @torch.no_grad()
    def pause(self) -> None:
        """Have the parameters back for a moment; a graph may be alive that was made while away."""
        self._elsewhere.pause()

    @torch.no_grad()
    def resume(self) -> None:
        """Have them where they were before the pause, bit for bit."""
        wanted = self._elsewhere.resume()
        if any(wanted):
            self._write(wanted)
        self._elsewhere.arrive()

    def forget(self) -> None:
        """Let go of the memory, which is kept from move to move."""
        self.put_back()
        self._elsewhere = Elsewhere()

    @torch.no_grad()
    def slope(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return ``distance <s z, g>`` of the last move, a scalar: the same in all processes.

        Args:
            gradients: One per parameter; ``None`` counts as zero.
        """
        shares = self._shares(gradients, self._distance)
        known = [whole(share) for share in shares if share is not None]
        return torch.stack(known).sum() if known else torch.zeros(())

    @torch.no_grad()
    def pull_back(self, gradients: Sequence[Tensor | None]) -> None:
        """Make gradients at the displaced weights those with respect to ``theta``, in place.

        With ``relative`` the step depends on ``theta`` too, which adds
        ``distance (z . g) w / (n s)`` per tensor ``w`` of ``n`` entries; else nothing changes.
        Linear in the gradients: it may follow accumulation, averaging over processes and a loss
        scale. To be called when the parameters are back.
        """
        if not self.relative:
            return
        shares = self._shares(gradients, self._distance)
        items = zip(gradients, self.parameters.items(), shares, self._scales, strict=True)
        for g, (name, w), share, rms in items:
            if g is not None and share is not None:
                numel = self._parts[name].numel if name in self._parts else w.numel()
                # shares hold s z . g, which is zero where s is.
                factor = torch.where(rms > 0, whole(share) / (numel * rms.square()), 0.0)
                local_part(g).add_(local_part(w.detach()) * factor)

    def signs(self, key: Sequence[int]) -> dict[str, Tensor]:
        """Return ``z`` by name, of the local parts."""
        found = [torch.empty_like(local_part(p)) for p in self.parameters.values()]
        kept, self._key = self._key, tuple(key)
        for pieces, steps in self._steps(1.0, scaled=False):
            for piece, step in zip(pieces, steps, strict=True):
                found[piece.position][piece.rows] = step
        self._key = kept
        return dict(zip(self.parameters, found, strict=True))

    # -- in pieces ------------------------------------------------------------------------

    def _steps(
        self, distance: float, *, scaled: bool = True
    ) -> Iterator[tuple[list[_Piece], list[Tensor]]]:
        """Yield ``distance s z``, some pieces at a time, each in the shape of its rows."""
        if self._drawn[0] != self._key:
            keys = [_key(self._seed, *self._key, name) for name in self._names]
            words = [
                g.words([keys[p.position] for p in g.pieces], self._ramp) for g in self._groups
            ]
            self._drawn = (self._key, words)
        for group, drawn in zip(self._groups, self._drawn[1], strict=True):
            steps = group.signs(drawn, distance)
            if self.relative and scaled:
                scales = (self._scales[p.position] for p in group.pieces)
                steps = [step * scale for step, scale in zip(steps, scales, strict=True)]
            yield group.pieces, steps

    def _shares(self, gradients: Sequence[Tensor | None], distance: float) -> list[Tensor | None]:
        """Return ``distance <s z, g>`` a parameter, to be summed over processes by ``whole``."""
        sums: list[Tensor | None] = [None] * len(self.parameters)
        for pieces, steps in self._steps(distance):
            for piece, step in zip(pieces, steps, strict=True):
                g = gradients[piece.position]
                if g is None:
                    continue
                part = local_part(g)
                part = part.to_dense() if part.is_sparse else part
                share = (part[piece.rows] * step).sum()
                known = sums[piece.position]
                sums[piece.position] = share if known is None else known + share
        found: list[Tensor | None] = []
        cut = self._shares_of_parts(sums)
        items = zip(self.parameters.items(), gradients, sums, strict=True)
        for (name, p), g, local in items:
            if name in cut:
                found.append(cut[name])
                continue
            if g is None:
                found.append(None)
                continue
            found.append(summed_over(p, local_part(p).new_zeros(()) if local is None else local))
        return found

    def _shares_of_parts(self, sums: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return shares of flat parts, summed: a process that has no gradient has no entry."""
        own = dict(zip(self.parameters, sums, strict=True))
        zeros = {n: self.parameters[n].detach().new_zeros(()) for n in self._parts}
        values = [zero if (share := own[n]) is None else share for n, zero in zeros.items()]
        return dict(zip(self._parts, summed(values, list(self._parts.values())), strict=True))


class _Piece(NamedTuple):
    """Rows of a local tensor whose signs are drawn together.

    ``first`` is the place of their first entry in the whole parameter, row by row, if the entries
    follow each other there; else ``indices`` are the places of all.
    """

    position: int
    rows: Any
    shape: tuple[int, ...]
    first: int
    indices: list[Tensor] | None


class _Group:
    """Pieces of one dtype, drawn with few calls."""

    def __init__(self, pieces: list[_Piece], like: Tensor) -> None:
        self.pieces = pieces
        self.sizes = [math.prod(p.shape) for p in pieces]
        self.dtype, self.device = like.dtype, like.device
        words = [
            (p.first + size - 1) // _BITS - p.first // _BITS + 1
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
            _signed(key + (p.first // _BITS - start + 1) * _GOLDEN)
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
        table = EIGHT_SIGNS.to(self.device, self.dtype) * factor
        flat = signs_between(words, 0, len(words) * _BITS, table)
        found = []
        for p, size, start in zip(self.pieces, self.sizes, self._starts, strict=True):
            place = start * _BITS + p.first % _BITS
            found.append(flat[place : place + size].view(p.shape))
        return found

    def _scattered(self, key: int) -> Tensor:
        """Return signs in int8, of entries that do not follow each other."""
        indices, shape = self.pieces[0].indices, self.pieces[0].shape
        assert indices is not None
        places = torch.zeros((), dtype=torch.int64, device=self.device)
        for i, index in enumerate(indices):
            places = places + index.view([-1 if j == i else 1 for j in range(len(shape))])
        words = _mixed((places // _BITS + 1) * _signed(_GOLDEN) + _signed(key))
        bits = words.bitwise_right_shift_(places % _BITS).bitwise_and_(1)
        return bits.to(torch.int8).mul_(2).sub_(1)


def _grouped(tensors: Sequence[Tensor], parts: Sequence[FlatPart | None]) -> list[_Group]:
    """Cut large tensors into pieces of rows, and put small ones together."""
    groups: list[_Group] = []
    waiting: list[_Piece] = []
    like: Tensor | None = None
    room = 0

    def close() -> None:
        if waiting and like is not None:
            groups.append(_Group(list(waiting), like))
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
) -> Iterator[_Piece]:
    """Yield a tensor in pieces of at most so many entries, where it has rows enough."""
    if not local.numel():
        return
    if local.ndim == 0:
        yield _Piece(position, ..., (), 0, None)
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
            yield _Piece(position, rows, shape, first, places)
            continue
        if held is None:
            yield _Piece(position, rows, shape, start * width, None)
            continue
        index = [held[0][rows], *held[1:]]
        # Whole rows that follow each other are as those of one process.
        follows = bool((index[0].diff() == 1).all()) and tuple(tensor.shape[1:]) == rest
        if follows:
            yield _Piece(position, rows, shape, int(index[0][0]) * width, None)
        else:
            yield _Piece(
                position, rows, shape, 0, [i * s for i, s in zip(index, strides, strict=True)]
            )


def _bare(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _key(seed: int, *rest: int | str) -> int:
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


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()

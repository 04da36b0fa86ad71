"""Weights that stand a signed random step away, in shards too, and come back to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lla_callbacks.linalg.space import local_part, whole
from lla_callbacks.penalty.elsewhere import Elsewhere
from lla_callbacks.penalty.flat_shards import FlatPart, root_mean_squares, summed
from lla_callbacks.penalty.noise_signs import BITS, Piece, grouped, ramp, sign_key
from lla_callbacks.penalty.places import summed_over

# Parts that torch's and Lightning's wrappers put into the names of parameters: a wrapped network
# draws what the bare one draws.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


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
        self._groups = grouped(
            list(self.parameters.values()), [self._parts.get(name) for name in self.parameters]
        )
        longest = max((g.num_words for g in self._groups), default=0)
        device = next(iter(self.parameters.values())).device
        self._ramp = ramp(longest, device)

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
        for group, words in zip(self._groups, self._words(), strict=True):
            pieces = [p for p in group.pieces if wanted[p.position]]
            if not pieces:
                continue
            starts = [place.starts[p.position][p.rows] for p in pieces]
            targets = [place.targets[p.position][p.rows] for p in pieces]
            # Not by adding to the targets: to be called again from within itself must do no harm.
            if len(group.pieces) == 1 and not group.is_scattered:
                table = group.table(self._distance)
                if self.relative:
                    table = table * self._scales[pieces[0].position]
                first = pieces[0].first % BITS
                place.mover.write(targets[0], starts[0], words, first, table)
                continue
            steps = group.signs(words, self._distance)
            steps = [s for p, s in zip(group.pieces, steps, strict=True) if wanted[p.position]]
            if self.relative:
                scales = (self._scales[p.position] for p in pieces)
                steps = [step * scale for step, scale in zip(steps, scales, strict=True)]
            torch._foreach_add_(steps, starts)
            torch._foreach_copy_(targets, steps)

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
    ) -> Iterator[tuple[list[Piece], list[Tensor]]]:
        """Yield ``distance s z``, some pieces at a time, each in the shape of its rows."""
        for group, drawn in zip(self._groups, self._words(), strict=True):
            steps = group.signs(drawn, distance)
            if self.relative and scaled:
                scales = (self._scales[p.position] for p in group.pieces)
                steps = [step * scale for step, scale in zip(steps, scales, strict=True)]
            yield group.pieces, steps

    def _words(self) -> list[Tensor]:
        """Return the random words of each group, kept for the other sign."""
        if self._drawn[0] != self._key:
            keys = [sign_key(self._seed, *self._key, name) for name in self._names]
            words = [
                g.words([keys[p.position] for p in g.pieces], self._ramp) for g in self._groups
            ]
            self._drawn = (self._key, words)
        return self._drawn[1]

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


def _bare(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()

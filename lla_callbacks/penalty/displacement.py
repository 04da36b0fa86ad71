"""The loss at weights that stand a signed random step away, with exact gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from lla_callbacks.linalg.probes import (
    EIGHT_SIGNS,
    generator,
    sign_words,
    signs,
    signs_between,
)
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.gradient_hooks import unwatched
from lla_callbacks.penalty.adding import add_in_pieces
from lla_callbacks.penalty.elsewhere import Elsewhere, has_memory_alone

# One gradient per parameter of a space, in its order; None where the loss sees none of it.
Gradients = tuple[Tensor | None, ...]


# Entries of a probe that are drawn at once: 4 MiB, small beside any network that is larger.
GROUP_SIZE = 2**20
# Entries of networks whose gradients are held whole, and added with few calls: 4 MiB.
FEW = 2**20
# Entries of a gradient that is worth a look at whether it must be copied.
LARGE = 2**14


class DisplacedLoss:
    """``phi(c) = L(theta + c s z)`` on signs ``z``, for gradients with respect to ``theta``.

    ``z`` is a Rademacher vector on the chosen parameters and zero elsewhere, drawn from
    ``(seed, *key, probe)``; one of them is kept, at a bit an entry.
    ``s`` is 1, or with ``relative`` the root mean square of each chosen tensor: then ``phi``
    does not change when the weights before a normalization grow, and gradients hold the
    term that comes from ``s(theta)``,

        d/dw phi = g + c (z . g) w / (n s),  per tensor ``w`` of ``n`` entries,

    without which growing weights would still be rewarded. Tensors of zeros stay in place.

    Args:
        evaluate: Returns the scalar loss at the present weights, with its graph; the same
            function at every call. It leaves the module as it was.
        space: Every trainable parameter.
        chosen: Names of those that are moved.
        seed: Fixes the probes, together with the key.
        key: Numbers that tell this draw from others, the training step for instance.
        relative: Whether steps are in units of each tensor's root mean square.
        loss_scale: Factor on the loss in the backward pass, taken out of gradients again;
            for half precision, where small gradients vanish.
        place: Where the weights stand meanwhile, whose memory is kept from one loss to the next.
        together: Surrounds several evaluations and their backward passes, where one guard of the
            module's state is cheaper than one for each.
    """

    def __init__(
        self,
        evaluate: Callable[[], Tensor],
        space: ParameterSpace,
        chosen: Iterable[str],
        *,
        seed: int = 0,
        key: Sequence[int] = (),
        relative: bool = False,
        loss_scale: float = 1.0,
        place: Elsewhere | None = None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        names = set(chosen)
        self.evaluate = evaluate
        self.space = space
        self.positions = [i for i, name in enumerate(space.names) if name in names]
        self.weights = [space.tensors[i] for i in self.positions]
        self.relative = relative
        self._seed = seed
        self._key = tuple(key)
        self._loss_scale = loss_scale
        self._place = Elsewhere() if place is None else place
        self.together = together
        self._originals: list[Tensor] = []
        self._drawn: tuple[int | None, list[Tensor]] = (None, [])
        self._groups = _grouped(self.weights)
        # Where the weights are: the distance and the probe.
        self._at: tuple[float, int] | None = None
        # Sums of squares of the entries of a total that were added up last, by position.
        self.squares: dict[int, Tensor] = {}

    def signs(self, probe: int) -> Iterator[Tensor]:
        """Yield ``z`` tensor by tensor, shaped like the chosen parameters, as int8."""
        source = generator(self._seed, *self._key, probe)
        for group in self._groups:
            sizes = [w.numel() for w in group]
            z = signs(sum(sizes), source, dtype=torch.int8, device=group[0].device)
            for part, w in zip(torch.split(z, sizes), group, strict=True):
                yield part.reshape(w.shape)

    def root_mean_square(self) -> float:
        """Return that of all chosen weights together."""
        count = sum(w.numel() for w in self.weights)
        square = torch.stack([w.detach().square().sum(dtype=torch.float64) for w in self.weights])
        return math.sqrt(float(square.sum()) / count)

    @contextmanager
    def displacing(self) -> Iterator[None]:
        """Allow displaced passes inside; the weights, to the bit, come back on leaving."""
        place = self._place
        with torch.no_grad():
            place.leave(self.weights)
        self._originals, self._at = place.starts, None
        try:
            yield
        finally:
            with torch.no_grad():
                place.back()
            place.let_go()
            self._originals = []

    @torch.no_grad()
    def move(self, distance: float, probe: int) -> None:
        """Put the weights at ``theta + distance s z``."""
        place = self._place
        mirrors, self._at = self._at == (-distance, probe), (distance, probe)
        large: list[int] = []
        first = 0
        for k, group in enumerate(self._groups):
            i, first = first, first + len(group)
            if len(group) == 1:
                large.append(i)
                if mirrors and place.mirror(i):
                    continue
            words = self._words(probe)[k]
            table = EIGHT_SIGNS.to(group[0].device, group[0].dtype) * distance
            starts, targets = place.starts[i:first], place.targets[i:first]
            if len(group) > 1:
                _move_small(targets, starts, words, table, relative=self.relative)
                continue
            if self.relative:
                table = table * _rms(starts[0])
            place.mover.write(targets[0], starts[0], words, 0, table)
        place.arrive(() if mirrors else large)

    def _words(self, probe: int) -> list[Tensor]:
        """Return the random words of each group, a bit a sign; kept for the other side."""
        if self._drawn[0] != probe:
            source = generator(self._seed, *self._key, probe)
            words = [
                sign_words(sum(w.numel() for w in group), source).to(group[0].device)
                for group in self._groups
            ]
            self._drawn = (probe, words)
        return self._drawn[1]

    def gradient(self, distance: float, probe: int) -> tuple[Tensor, Gradients]:
        """Return ``phi(distance)`` and its gradient, at the price of one gradient."""
        self.move(distance, probe)
        loss, gradients = self._backward(self._loss_scale)
        if self._loss_scale != 1.0:
            gradients = [g if g is None else g / self._loss_scale for g in gradients]
        return loss, self.pulled_back(gradients, distance, probe)

    def accumulate(
        self, total: list[Tensor | None], factor: float, distance: float, probe: int
    ) -> Tensor:
        """Add ``factor`` times the gradient of ``phi(distance)`` to a total; return the loss.

        What comes first is kept as it is, not copied. Of large networks each parameter's share is
        then added as soon as the backward pass has it, so that no second gradient is ever held as
        a whole.

        Args:
            total: One own tensor per parameter of the space, ``None`` where there is none yet.
            factor: Weight of this gradient.
            distance: Of the displacement.
            probe: Which probe.
        """
        if self.relative:
            # The term from s(theta) needs each gradient and its signs once more.
            loss, whole = self.gradient(distance, probe)
            _add(total, list(whole), factor)
            return loss
        self.move(distance, probe)
        # Gradients come weighted from a weighted loss, which saves a pass over them. Not where it
        # is scaled against underflow: they may be in half precision on their way.
        self.squares = {}
        scaled = self._loss_scale != 1.0
        on_loss, weight = (self._loss_scale, factor / self._loss_scale) if scaled else (factor, 1.0)
        if self.space.length <= FEW or all(known is None for known in total):
            loss, gradients = self._backward(on_loss)
            _add(total, gradients, weight)
            return loss

        def take(i: int, gradient: Tensor) -> Tensor:
            self._add_to(total, i, gradient, weight)
            # What is returned must have the shape, and need not have the memory.
            return gradient.new_zeros(()).expand_as(gradient)

        return self._backward(on_loss, take)[0]

    def _add_to(self, total: list[Tensor | None], i: int, gradient: Tensor, weight: float) -> None:
        known = total[i]
        if known is None:
            total[i] = weight * gradient
            return
        squares = add_in_pieces(known, gradient, weight)
        if squares is not None:
            self.squares[i] = squares

    def _backward(
        self, factor: float, take: Callable[[int, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss at the present weights and ``factor`` times its gradients.

        Or what ``take`` makes of each gradient, as soon as it is there.
        """
        handles = []
        with torch.inference_mode(False), torch.enable_grad():
            loss = self.evaluate()
            scaled = loss if factor == 1.0 else loss * factor
            # Not before: a loss may differentiate by the weights on its own way.
            with unwatched(self.space.tensors):
                try:
                    if take is not None:
                        hooks = [partial(take, i) for i in range(len(self.space.tensors))]
                        for tensor, hook in zip(self.space.tensors, hooks, strict=True):
                            handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]
                    gradients = torch.autograd.grad(scaled, self.space.tensors, allow_unused=True)
                finally:
                    for handle in handles:
                        handle.remove()
        return loss.detach(), list(gradients)

    def pulled_back(
        self, gradients: Sequence[Tensor | None], distance: float, probe: int
    ) -> Gradients:
        """Return gradients with respect to ``theta``, from those at the displaced weights."""
        found = list(gradients)
        if self.relative and distance:
            triples = zip(self.positions, self._originals, self.signs(probe), strict=True)
            for i, w, z in triples:
                g, rms = found[i], _rms(w)
                if g is not None:
                    share = distance * (z * g).sum() / (w.numel() * rms)
                    # A tensor of zeros was not moved, and has no direction to grow in.
                    found[i] = g + torch.where(rms > 0, share, 0.0) * w
        return tuple(found)


def _add(total: list[Tensor | None], gradients: list[Tensor | None], weight: float) -> None:
    """Empty a list of gradients into a total, which takes over what it has nothing of yet."""
    known: list[Tensor] = []
    added: list[Tensor] = []
    fresh: list[int] = []
    copied: list[Tensor] = []
    while gradients:
        i = len(gradients) - 1
        gradient, before = gradients.pop(), total[i]
        if gradient is None:
            continue
        if before is not None:
            known.append(before)
            added.append(gradient)
            continue
        if weight == 1.0 and gradient.numel() >= LARGE and gradient.layout == torch.strided:
            # Another handle on the memory: whoever else has this gradient still has the first.
            gradient = gradient.data
            if has_memory_alone(gradient):
                total[i] = gradient
                continue
        fresh.append(i)
        copied.append(gradient)
    if known:
        torch._foreach_add_(known, added, alpha=weight)
    if fresh:
        for i, copy in zip(fresh, torch._foreach_mul(copied, weight), strict=True):
            total[i] = copy


def combined(*terms: tuple[float, Gradients]) -> Gradients:
    """Return ``sum_i a_i G_i``, where a gradient that is ``None`` counts as zero."""
    found: list[Tensor | None] = []
    for parts in zip(*(gradients for _, gradients in terms), strict=True):
        total: Tensor | None = None
        # Not in place: autograd may return gradients whose entries share their memory.
        for (factor, _), part in zip(terms, parts, strict=True):
            if part is not None:
                share = part if factor == 1.0 else factor * part
                total = share if total is None else total + share
        found.append(total)
    return tuple(found)


def _move_small(
    targets: list[Tensor], starts: list[Tensor], words: Tensor, table: Tensor, *, relative: bool
) -> None:
    """Move several small tensors, with few calls for all of them."""
    sizes = [start.numel() for start in starts]
    flat = torch.split(signs_between(words, 0, sum(sizes), table), sizes)
    steps = [step.view(start.shape) for step, start in zip(flat, starts, strict=True)]
    if relative:
        steps = [step * _rms(start) for step, start in zip(steps, starts, strict=True)]
    torch._foreach_add_(steps, starts)
    torch._foreach_copy_(targets, steps)


def _grouped(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return small tensors together, since each draw has a price, and large ones alone."""
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        room -= tensor.numel()
        if room < 0 or groups[-1][0].dtype != tensor.dtype:
            groups.append([])
            room = GROUP_SIZE - tensor.numel()
        groups[-1].append(tensor)
    return groups


def _rms(tensor: Tensor) -> Tensor:
    return tensor.detach().square().mean().sqrt()

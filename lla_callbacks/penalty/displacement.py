"""The loss at weights that stand a signed random step away, with exact gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from lla_callbacks.penalty.elsewhere import Elsewhere

# One gradient per parameter of a space, in its order; None where the loss sees none of it.
Gradients = tuple[Tensor | None, ...]


# Entries of a probe that are drawn at once: 4 MiB, small beside any network that is larger.
GROUP_SIZE = 2**20
# Entries that are moved at once: 1 MiB.
PIECE = 2**18


class DisplacedLoss:
    """``phi(c) = L(theta + c s z)`` on signs ``z``, for gradients with respect to ``theta``.

    ``z`` is a Rademacher vector on the chosen parameters and zero elsewhere; it is drawn
    again for each pass from ``(seed, *key, probe)``, so that no copy of it is kept.
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
        self._originals: list[Tensor] = []
        self._groups = _grouped(self.weights)

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
        self._originals = place.starts
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
        source = generator(self._seed, *self._key, probe)
        pairs = iter(zip(self._place.starts, self._place.targets, strict=True))
        for group in self._groups:
            starts, targets = (list(x) for x in zip(*(next(pairs) for _ in group), strict=True))
            words = sign_words(sum(w.numel() for w in group), source).to(group[0].device)
            table = EIGHT_SIGNS.to(group[0].device, group[0].dtype) * distance
            if len(group) > 1:
                _move_small(targets, starts, words, table, relative=self.relative)
                continue
            if self.relative:
                table = table * _rms(starts[0])
            place = 0
            # In pieces that stay in a processor's cache; signs as wide as the weights are never
            # held as a whole.
            for target, start in zip(_pieces(targets[0]), _pieces(starts[0]), strict=True):
                step = signs_between(words, place, place + start.numel(), table)
                torch.add(start, step.view(start.shape), out=target)
                place += start.numel()
        self._place.arrive()

    def gradient(self, distance: float, probe: int) -> tuple[Tensor, Gradients]:
        """Return ``phi(distance)`` and its gradient, at the price of one gradient."""
        self.move(distance, probe)
        loss, gradients = self._backward()
        if self._loss_scale != 1.0:
            gradients = tuple(g if g is None else g / self._loss_scale for g in gradients)
        return loss, self.pulled_back(gradients, distance, probe)

    def accumulate(
        self, total: list[Tensor | None], factor: float, distance: float, probe: int
    ) -> Tensor:
        """Add ``factor`` times the gradient of ``phi(distance)`` to a total; return the loss.

        Each parameter's share is added as soon as the backward pass has it, so that no
        second gradient is ever held as a whole.

        Args:
            total: One own tensor per parameter of the space, ``None`` where there is none yet.
            factor: Weight of this gradient.
            distance: Of the displacement.
            probe: Which probe.
        """

        def take(i: int, weight: float, gradient: Tensor) -> Tensor:
            known = total[i]
            if known is None:
                total[i] = weight * gradient
            else:
                known.add_(gradient, alpha=weight)
            # What is returned must have the shape, and need not have the memory.
            return gradient.new_zeros(()).expand_as(gradient)

        if self.relative:
            # The term from s(theta) needs each gradient and its signs once more.
            loss, gradients = self.gradient(distance, probe)
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    take(i, factor, gradient)
            return loss
        weight = factor / self._loss_scale
        self.move(distance, probe)
        return self._backward(lambda i, gradient: take(i, weight, gradient))[0]

    def _backward(
        self, take: Callable[[int, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the loss at the present weights and its gradients, scaled.

        Or what ``take`` makes of each gradient, as soon as it is there.
        """
        handles = []
        with torch.inference_mode(False), torch.enable_grad():
            loss = self.evaluate()
            scaled = loss if self._loss_scale == 1.0 else loss * self._loss_scale
            try:
                # Not before: a loss may differentiate by the weights on its own way.
                if take is not None:
                    for i, tensor in enumerate(self.space.tensors):
                        hook = partial(take, i)
                        handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]
                gradients = torch.autograd.grad(scaled, self.space.tensors, allow_unused=True)
            finally:
                for handle in handles:
                    handle.remove()
        return loss.detach(), gradients

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


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of a tensor, a number of rows each."""
    if tensor.numel() <= PIECE or tensor.ndim == 0:
        return [tensor]
    return torch.split(tensor, max(1, PIECE * len(tensor) // tensor.numel()))


def _rms(tensor: Tensor) -> Tensor:
    return tensor.detach().square().mean().sqrt()

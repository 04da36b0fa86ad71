"""Train a curve under a module that knows nothing of it: move the weights, pull gradients back.

The loss of a curve is ``l(theta) = E_t L(phi(t))``, ``t`` uniform (Garipov et al. 2018, section
3.1, equation 2). For one ``t`` a step, ``dl/dw_j = c_j(t) dL/dphi``. So the module's own
parameters stand at ``phi(t)`` during the forward and backward pass, and what they and the further
bends then receive is their coefficient times the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lla_callbacks.curves.curve import Kind, coefficients, mean_square
from lla_callbacks.curves.family import write_point
from lla_callbacks.linalg.probes import generator


class MovingCurve:
    """A module's parameters as the first bend of a curve.

    Args:
        live: The module's trained parameters; they hold the first bend.
        start: Weights at ``t = 0``, in their order, not to be changed.
        end: Weights at ``t = 1``.
        further: Bends after the first one.
        kind: Of the curve.
        seed: Fixes ``t``, together with the step.

    Attributes:
        t: Where the weights stand, None while the parameters hold the bend.
        factors: ``c_j(t)`` of the last point.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        start: list[Tensor],
        end: list[Tensor],
        further: Sequence[Sequence[Tensor]],
        kind: Kind,
        seed: int,
    ) -> None:
        self.kind = kind
        self.seed = seed
        self.count = 3 + len(further)
        self._parameters = list(live)
        self._bend = [w.detach().clone() for w in live]
        self._start, self._end, self._further = start, end, further
        self.t: float | None = None
        self.factors: list[float] = []

    @property
    def _live(self) -> list[Tensor]:
        # .data: a graph that the user still holds does not see a new version.
        return [w.data for w in self._parameters]

    @property
    def points(self) -> list[list[Tensor]]:
        """Control points, start first; the bends are those of the present moment."""
        first = self._live if self.t is None else self._bend
        return [self._start, first, *[[w.data for w in b] for b in self._further], self._end]

    def draw(self, step: int) -> float:
        """Return the ``t`` of a step: uniform, from the seed and the step alone."""
        source = generator(self.seed, step)
        return float(torch.rand((), generator=source, dtype=torch.float64))

    def displace(self, t: float, *, exact: bool = False) -> None:
        """Put the parameters at ``phi(t)``, and remember the bend.

        Args:
            t: Where.
            exact: Whether terms are added in the order of :meth:`Curve.weights
                <lla_callbacks.curves.curve.Curve.weights>`, to the bit; one pass over the
                weights more.
        """
        live = self._live
        if self.t is None:
            torch._foreach_copy_(self._bend, live)
        at_rest, points = self.t is None, self.points
        self.t, self.factors = t, coefficients(self.kind, self.count, t)
        if exact or not at_rest or self.factors[1] in (0.0, 1.0):
            points[1] = self._bend
            write_point(live, points, self.factors)
            return
        # The parameters hold the bend already.
        torch._foreach_mul_(live, self.factors[1])
        for j, point in enumerate(points):
            if j != 1 and self.factors[j] != 0.0:
                torch._foreach_add_(live, point, alpha=self.factors[j])

    def restore(self) -> None:
        """Put the bend back, to the bit."""
        if self.t is not None:
            torch._foreach_copy_(self._live, self._bend)
            self.t = None

    def gradient_factors(self, *, scaled: bool) -> list[float]:
        """Return the factor of ``dL/dphi`` in the gradient of each bend.

        Args:
            scaled: Whether ``c_j`` is divided by ``E c_j^2``, so that a learning rate means for
                a bend what it means for a network.
        """
        inner = range(1, self.count - 1)
        if not scaled:
            return [self.factors[j] for j in inner]
        return [self.factors[j] / mean_square(self.kind, self.count, j) for j in inner]

    def pull_back(
        self,
        indices: Sequence[int],
        gradients: Sequence[Tensor],
        decays: Sequence[float],
        *,
        scaled: bool,
    ) -> list[list[Tensor]]:
        """Turn gradients at ``phi`` into those of the bends: ``c_j (g + decay phi)``.

        Those of the first bend take the place of what is given; the others' are new tensors.

        Args:
            indices: Of the parameters, as given to the constructor.
            gradients: Theirs at ``phi``, changed in place.
            decays: Weight decay of each, of the penalty ``decay |phi|^2 / 2``.
            scaled: See :meth:`gradient_factors`.

        Returns:
            For each further bend its gradients. They are zeros, not missing, where a chain's
            bend does not count, so that momentum goes on.
        """
        if not gradients:
            return [[] for _ in self._further]
        for decay in {d for d in decays if d != 0.0}:
            chosen = [k for k, d in enumerate(decays) if d == decay]
            for c, point in zip(self.factors, self.points, strict=True):
                if c != 0.0:
                    torch._foreach_add_(
                        [gradients[k] for k in chosen],
                        [_like(point[indices[k]], gradients[k]) for k in chosen],
                        alpha=decay * c,
                    )
        first, *others = self.gradient_factors(scaled=scaled)
        found = [[g * factor for g in gradients] for factor in others]
        torch._foreach_mul_(list(gradients), first)
        return found

    def decay(self, indices: Sequence[int], rates: Sequence[float]) -> None:
        """Shrink ``phi`` itself: ``w_j -= rate c_j phi``, for optimizers that decouple decay.

        To be called while the parameters hold the bend, before the optimizer's update.
        """
        before = self.points
        for i, rate in zip(indices, rates, strict=True):
            if rate == 0.0:
                continue
            phi = torch.zeros_like(self._live[i])
            for c, point in zip(self.factors, before, strict=True):
                phi.add_(point[i], alpha=c)
            for c, bend in zip(self.factors[1:-1], before[1:-1], strict=True):
                bend[i].add_(phi, alpha=-rate * c)


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value if value.dtype == like.dtype else value.to(like.dtype)

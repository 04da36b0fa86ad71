"""The gradient of a penalty on the Hessian's trace, by estimators with passes of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import NonFiniteError
from lla_callbacks.objective.checks import MOST_WORK, flag, one_of, settle, whole
from lla_callbacks.penalty.displacement import DisplacedLoss, Gradients, combined
from lla_callbacks.penalty.gauss_newton import gauss_newton_gradient
from lla_callbacks.penalty.third_order import quadratic_form_gradient

Estimator = Literal["perturbation", "noise", "difference", "gauss_newton", "exact"]

# Step of the differences, in units of the weights' root mean square. In float32 the error of
# `difference` is least near 1e-3 for weights of 0.04 to 0.1 (measured: 0.15 to 0.6 %).
STEP = 1e-2
# Beyond, sums of squares in float32 may overflow before norms do.
_LARGE_SQUARE = 1e36
_NONE: Mapping[int, Tensor] = {}


@dataclass(frozen=True)
class PenaltySettings:
    """How the gradient of ``strength * tr H`` is estimated.

    Attributes:
        estimator: With ``g`` the gradient of the loss, ``z`` a Rademacher probe and
            ``c`` a step:

            - ``"perturbation"``: ``(g(theta + c z) + g(theta - c z)) / 2`` with
              ``c = sqrt(2 strength)``, which *is* the gradient of
              ``E L(theta + c z) = L + strength tr H + O(strength^2)``: two gradients.
            - ``"noise"``: ``g(theta + c z)`` alone, with ``-c`` in the next step: the same in
              expectation, at the price of the gradient that it replaces. The step itself runs
              at moved weights: :class:`~lla_callbacks.penalty.noise.Displacement`.
            - ``"difference"``: ``strength (g(theta + c z) - 2 g + g(theta - c z)) / c^2``
              with ``c`` = 1 % of the weights' size; bias ``c^2/12 D^5 L[z, z, z, z]``, and
              rounding of ``4 eps |g| / c^2``. Three gradients. For smooth networks:
              with ReLU each kink between the points counts with ``1 / c^2``.
            - ``"gauss_newton"``: only the part ``J'AJ >= 0`` of the Hessian, by differences
              of outputs; two gradients and a forward pass.
            - ``"exact"``: ``strength d/dtheta z'Hz`` by third-order autodiff. Does not see
              the kinks of ReLU: its trace is that of the Gauss-Newton part there.
        num_probes: Probes that are averaged over. Their variance falls as 1 / number.
        relative: Whether the trace is that of ``S H S``, with ``S`` the root mean square of
            each parameter tensor: see :class:`DisplacedLoss`.

    Raises:
        ValueError: If a setting is not allowed.
    """

    estimator: Estimator = "perturbation"
    num_probes: int = 1
    relative: bool = False

    def __post_init__(self) -> None:
        one_of("estimator", self.estimator, Estimator)
        settle(
            self,
            num_probes=whole("num_probes", self.num_probes, 1, MOST_WORK),
            relative=flag("relative", self.relative),
        )
        if self.estimator == "noise" and self.num_probes > 1:
            raise ValueError(
                f"num_probes is {self.num_probes}, and estimator='noise' has one a step: its step "
                "is computed once. Leave num_probes at 1, or give estimator='perturbation'."
            )


@dataclass(frozen=True)
class Comparison:
    """The penalty beside the loss, of one batch.

    Attributes:
        penalty: ``strength tr H``, as the probes saw it.
        ratio: Norm of the penalty's gradient over that of the loss.
        cosine: Between the two gradients.
        factor: What a limit on the ratio left of the penalty, 1 without one. ``penalty`` and
            ``ratio`` are after it.
    """

    penalty: float
    ratio: float
    cosine: float
    factor: float


@dataclass(frozen=True)
class PenaltyGradient:
    """What to train with instead of the gradient of the loss, or beside it.

    Attributes:
        gradient: One tensor per parameter of the space, ``None`` where the loss sees none.
        contains_task: Whether it is the gradient of loss plus penalty, to be used *instead*
            of the loss's own; otherwise it is the penalty's alone, to be added.
        comparison: Of the penalty with the loss, where it was asked for.
    """

    gradient: Gradients
    contains_task: bool
    comparison: Comparison | None = None


def penalty_gradient(
    loss: DisplacedLoss,
    strength: float,
    settings: PenaltySettings,
    *,
    with_task: bool = True,
    compare: bool = False,
    max_ratio: float | None = None,
    average: Callable[[Tensor], Tensor] = lambda vector: vector,
) -> PenaltyGradient:
    """Return the gradient that penalizes the trace at the present weights.

    Args:
        loss: The loss of one batch around the present weights.
        strength: Factor of the trace.
        settings: Estimator and probes.
        with_task: Whether the result may contain the gradient of the loss itself. Then
            ``perturbation`` costs two gradients, since the loss's own is not needed.
        compare: Whether penalty and loss are compared; one gradient more, but for
            ``difference``.
        max_ratio: Scales the penalty down so that its gradient's norm is at most this
            many times the loss's. Implies the comparison.
        average: Averages a vector over processes, for norms of the whole batch.

    Raises:
        NonFiniteError: If the gradient is not finite.
        MeasurementError: As the estimator says.
    """
    compare = compare or max_ratio is not None
    with loss.displacing():
        if settings.estimator == "perturbation" and with_task and not compare:
            with loss.together():
                around = _pairs(loss, math.sqrt(2 * strength), settings.num_probes)[1]
            return PenaltyGradient(_finite(around, loss.squares), contains_task=True)
        penalty, value, task, total = _penalty(loss, strength, settings, compare=compare)
    comparison, factor = None, 1.0
    if compare:
        assert task is not None
        comparison = _compare(loss, penalty, task, value, max_ratio, average)
        factor = comparison.factor
    if total is None or not with_task:
        return PenaltyGradient(_finite(combined((factor, penalty))), False, comparison)
    if factor != 1.0:
        total = combined((1.0, total), (factor - 1.0, penalty))
    return PenaltyGradient(_finite(total), True, comparison)


def _penalty(
    loss: DisplacedLoss, strength: float, settings: PenaltySettings, *, compare: bool
) -> tuple[Gradients, float, Gradients | None, Gradients | None]:
    """Return the penalty's gradient, its value, the loss's gradient, and that of the sum.

    The last two are ``None`` where they would cost more.
    """
    count = settings.num_probes
    if settings.estimator in ("perturbation", "noise", "difference"):
        # Noise is compared, and its strength found, by both signs.
        replaces = settings.estimator != "difference"
        step = math.sqrt(2 * strength) if replaces else _step(loss)
        with loss.together():
            loss_around, around = _pairs(loss, step, count)
            loss_here, here = loss.gradient(0.0, 0)
        amplification = 2 * strength / step**2
        penalty = combined((amplification, around), (-amplification, here))
        value = amplification * float(loss_around - loss_here)
        # The same bits whether or not the loss alone was looked at.
        return penalty, value, here, around if replaces else combined((1.0, here), (1.0, penalty))
    if settings.estimator == "gauss_newton":
        step = _step(loss)
        found = [gauss_newton_gradient(loss, step, probe) for probe in range(count)]
    else:
        found = quadratic_form_gradient(loss, count)
    share = strength / count
    penalty = combined(*((share, gradient) for _, gradient in found))
    task = loss.gradient(0.0, 0)[1] if compare else None
    return penalty, share * sum(value for value, _ in found), task, None


def _pairs(loss: DisplacedLoss, step: float, num_probes: int) -> tuple[Tensor, Gradients]:
    """Return loss and gradient, averaged over ``theta + step z`` and ``theta - step z``."""
    losses = []
    total: list[Tensor | None] = [None] * len(loss.space.tensors)
    share = 0.5 / num_probes
    for probe in range(num_probes):
        for distance in (step, -step):
            value = loss.accumulate(total, share, distance, probe)
            losses.append(value.to(torch.float64))
    return torch.stack(losses).mean(), tuple(total)


def _step(loss: DisplacedLoss) -> float:
    """Return the step of differences; relative displacements carry the size themselves."""
    return STEP if loss.relative else STEP * max(loss.root_mean_square(), STEP)


def _compare(
    loss: DisplacedLoss,
    penalty: Gradients,
    task: Gradients,
    value: float,
    max_ratio: float | None,
    average: Callable[[Tensor], Tensor],
) -> Comparison:
    first, second = (average(loss.space.flatten(g)).double() for g in (penalty, task))
    norm, task_norm = float(first.norm()), float(second.norm())
    # Averaged over processes, so that all of them find this or none.
    _check_finite(norm)
    ratio = norm / task_norm if task_norm else math.inf
    factor = 1.0
    if max_ratio is not None and norm > max_ratio * task_norm:
        factor = max_ratio * task_norm / norm
    cosine = float(first @ second) / (norm * task_norm) if norm and task_norm else math.nan
    return Comparison(factor * value, factor * ratio, cosine, factor)


def _finite(gradients: Gradients, squares: Mapping[int, Tensor] = _NONE) -> Gradients:
    """Return gradients that are finite, or raise a NonFiniteError.

    Args:
        gradients: One per parameter.
        squares: Sums of squares that are known already, by position.
    """
    rest = [g for i, g in enumerate(gradients) if g is not None and i not in squares]
    if squares:
        square = float(torch.stack([*squares.values()]).sum())
        square += float(torch.nn.utils.get_total_norm(rest)) ** 2
        if square < _LARGE_SQUARE:
            return gradients
    _check_finite(float(torch.nn.utils.get_total_norm([g for g in gradients if g is not None])))
    return gradients


def _check_finite(norm: float) -> None:
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"the gradient of the trace penalty has norm {norm}.",
            "Lower the strength or the learning rate, or set max_ratio.",
        )

"""The Gauss-Newton part of the trace penalty, by first-order differences alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.gauss_newton import Call
from lla_callbacks.objective.criteria import heard, known_criteria
from lla_callbacks.objective.gradient_hooks import unwatched
from lla_callbacks.penalty.displacement import DisplacedLoss, Gradients, combined


def gauss_newton_gradient(
    loss: DisplacedLoss, distance: float, probe: int
) -> tuple[float, Gradients]:
    """Return ``delta' A delta``, an estimate of ``tr(J'AJ)``, and its gradient.

    ``J`` is the Jacobian of what enters the criterion, ``A >= 0`` the criterion's own
    Hessian, ``delta = [y(theta + c z) - y(theta - c z)] / (2 c) = J z + O(c^2)``, and ``A``
    is taken at the mean of both outputs. The gradient is that of this very expression, by
    two vector-Jacobian products; nothing in the network is differentiated twice.

    Every criterion that the loss calls counts with the weight ``dL/dl`` it has in the loss.
    Cost: two gradients and one forward pass.

    Args:
        loss: The displaced loss; it calls at least one of
            :data:`~lla_callbacks.objective.criteria.CRITERIA`.
        distance: ``c``.
        probe: Which probe.

    Raises:
        MeasurementError: If the loss calls no known criterion.
    """
    # Compiled code is not seen calling a criterion.
    with torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
        loss.move(distance, probe)
        upper = _without_graph(loss)
        with torch.enable_grad():
            loss.move(-distance, probe)
            total, lower, _ = heard(loss.evaluate)
            # What was computed for show, under no_grad, has no part in the loss.
            counting = [i for i, call in enumerate(lower) if call.value.requires_grad]
            _refuse_none(counting)
            weights = torch.autograd.grad(
                total, [lower[i].value for i in counting], retain_graph=True, allow_unused=True
            )
            pairs = zip(counting, weights, strict=True)
            parts = [_curvature(upper[i], lower[i], weight, distance) for i, weight in pairs]
            outputs = [lower[i].outputs for i in counting]
            pulls = [mean / 2 - delta / (2 * distance) for _, mean, delta in parts]
            below = _pull(loss, outputs, pulls, -distance, probe)
            del lower, total
            loss.move(distance, probe)
            upper = heard(loss.evaluate)[1]
            outputs = [upper[i].outputs for i in counting]
            pulls = [mean / 2 + delta / (2 * distance) for _, mean, delta in parts]
            above = _pull(loss, outputs, pulls, distance, probe)
    return sum(value for value, _, _ in parts), combined((1.0, above), (1.0, below))


def _without_graph(loss: DisplacedLoss) -> list[Call]:
    """Return the criteria, without a graph where the loss does without one."""
    try:
        with torch.no_grad():
            return heard(loss.evaluate)[1]
    except RuntimeError as error:
        # "does not require grad": the loss has derivatives inside.
        if "require grad" not in str(error):
            raise
    with torch.enable_grad():
        return [
            Call(c.outputs.detach(), c.value.detach(), c.criterion) for c in heard(loss.evaluate)[1]
        ]


def _refuse_none(counting: Sequence[int]) -> None:
    if not counting:
        raise MeasurementError(
            "the loss calls no criterion whose curvature is known, so its Gauss-Newton part "
            "cannot be told apart.",
            f"Compute it by one of torch.nn.functional's {known_criteria()} (or their modules), or "
            "use estimator='perturbation'.",
        )


def _curvature(
    above: Call, below: Call, weight: Tensor | None, distance: float
) -> tuple[float, Tensor, Tensor]:
    """Return ``delta' A delta`` and its derivatives by the mean output and by ``delta``."""
    first, second = above.outputs.detach(), below.outputs.detach()
    if weight is None:
        return 0.0, torch.zeros_like(first), torch.zeros_like(first)
    mean = ((first + second) / 2).requires_grad_()
    delta = ((first - second) / (2 * distance)).requires_grad_()
    value = (weight * below.criterion(mean)).sum()
    (slope,) = torch.autograd.grad(value, mean, create_graph=True)
    (product,) = torch.autograd.grad(slope, mean, delta, create_graph=True)
    curvature = (product * delta).sum()
    at_mean, at_delta = torch.autograd.grad(
        curvature, (mean, delta), allow_unused=True, materialize_grads=True
    )
    return float(curvature.detach()), at_mean, at_delta


def _pull(
    loss: DisplacedLoss,
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    distance: float,
    probe: int,
) -> Gradients:
    with unwatched(loss.space.tensors):
        found = torch.autograd.grad(outputs, loss.space.tensors, cotangents, allow_unused=True)
    return loss.pulled_back(found, distance, probe)

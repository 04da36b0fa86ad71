"""Eigenvectors of the Hessian as directions, each with its eigenvalue and a range that shows it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.objective.objective import Objective, with_hessian
from lla_callbacks.slices.directions import Direction, gradient_direction

NAMES = ("top1", "top2", "bottom1")
_LABELS = {"top1": "top eigenvector", "top2": "2nd eigenvector", "bottom1": "bottom eigenvector"}
# Relative residual at which the run stops, and its largest depth: a top eigenvector of a trained
# ResNet-20 takes about 20 products to 1 %.
RTOL = 0.01
MOST_STEPS = 48


def curved_directions(
    objective: Objective,
    wanted: set[str],
    *,
    seed: int,
    num_steps: int = MOST_STEPS,
    listener: Callable[[int], object] | None = None,
) -> dict[str, Direction]:
    """Return the directions of the largest, second largest and smallest eigenvalue, and more.

    One Lanczos run serves all of them. Each is a unit vector, uphill, and reaches to where the
    parabola of its eigenvalue has risen (or fallen) by the loss itself,
    ``sqrt(2 L / |lambda|)``, but never further than the norm of the weights.

    Args:
        objective: The loss.
        wanted: Among ``"top1"``, ``"top2"``, ``"bottom1"``, ``"gradient"``.
        seed: Of the start vector.
        num_steps: Largest depth of the run.
        listener: Called after products, with their number.

    Raises:
        MeasurementError: If the loss or a product is not finite or cannot be had.
        ValueError: If there are fewer eigenvalues than asked for.
    """

    def use(hessian: LossOperator) -> dict[str, Direction]:
        hessian.listener = listener
        return _directions(hessian, wanted, seed, num_steps)

    return with_hessian(objective, use)[0]


def _directions(
    hessian: LossOperator, wanted: set[str], seed: int, num_steps: int
) -> dict[str, Direction]:
    found: dict[str, Direction] = {}
    norm = math.sqrt(sum(float(t.detach().square().sum()) for t in hessian.space.tensors))
    if "gradient" in wanted:
        found["gradient"] = gradient_direction(hessian.gradient, hessian.loss, norm)
    names = [name for name in NAMES if name in wanted]
    if not names:
        return found
    start = rademacher(
        hessian.shape[0], generator(seed, 3), dtype=hessian.dtype, device=hessian.device
    )
    ends = "max" if names == ["top1"] else "both"
    run = lanczos(
        hessian,
        start,
        num_steps,
        rtol=RTOL,
        which=ends,
        basis_device=hessian.basis_device(num_steps),
    )
    if "top2" in names and run.num_steps < 2:
        raise ValueError("the Hessian has one eigenvalue only: choose 'top1' without 'top2'.")
    for name in names:
        index = {"top1": -1, "top2": run.num_steps - 2, "bottom1": 0}[name] % run.num_steps
        value = float(run.values[index])
        vector = run.vectors([index])[:, 0].to(hessian.device)
        vector = vector / torch.linalg.vector_norm(vector)
        slope = float(hessian.gradient @ vector)
        if slope < 0:
            vector, slope = -vector, -slope
        found[name] = Direction(
            vector,
            f"{_LABELS[name]}, λ = {value:.3g}",
            "‖v‖",
            _reach(hessian.loss, value, norm),
            value,
            float(run.residuals[index]),
            slope,
        )
    return found


def _reach(loss: float, eigenvalue: float, norm: float) -> float:
    """Return where the parabola has changed by the loss, at most the norm of the weights."""
    rise = abs(loss) or 1.0
    reach = math.sqrt(2 * rise / abs(eigenvalue)) if eigenvalue else math.inf
    return min(reach, norm or 1.0)

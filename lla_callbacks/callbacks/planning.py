"""What a gradient costs here, measured once, before sizes are chosen."""

from __future__ import annotations

import time

from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.callbacks.sizing import UnitCosts
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.objective.costs import STEP_FORWARD, STEP_GRADIENT, STEP_PRODUCT
from lla_callbacks.objective.engines import with_hessian
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.objective import Objective

# Fewer samples make batch statistics another function altogether (docs/benchmarks/sizes.md).
LEAST_WITH_STATISTICS = 8
# Seconds below which a trial is repeated.
CHEAP = 0.2


def least_samples(objective: Objective) -> int:
    """Return how few samples an objective may have without becoming another kind of function."""
    statistics = objective.mode == "batch" and any(
        isinstance(m, _BatchNorm) and m.training for m in objective.module.modules()
    )
    return LEAST_WITH_STATISTICS if statistics else 1


def timed(objective: Objective, *, products: int = 2) -> tuple[float, float]:
    """Return the seconds of a gradient with its graph, and of a product on it.

    Args:
        objective: The loss.
        products: How many are tried; the last one counts.

    Raises:
        MeasurementError: If the loss or a product cannot be had.
    """
    began = time.monotonic()

    def use(hessian: LossOperator) -> tuple[float, float]:
        start = hessian.rademacher(generator(0))
        ready = time.monotonic()
        # The first product warms caches up, the last counts.
        for _ in range(products):
            last = time.monotonic()
            float((hessian @ start).sum())
        return ready - began, time.monotonic() - last

    return with_hessian(objective, use)[0]


def forward_time(objective: Objective) -> float:
    """Return the seconds of a forward pass as slices need it: the second one in a row."""
    with evaluating(objective) as evaluate:
        evaluate()
        began = time.monotonic()
        evaluate()
        return time.monotonic() - began


def unit_costs(
    few: Objective, batch: Objective | None, *, step: float, batch_samples: int
) -> UnitCosts:
    """Return what a gradient and a product take here.

    Args:
        few: The loss on a few samples.
        batch: On a batch of the user's own; ``None``: too dear to try. Then a gradient is taken
            to cost a step and a half and a product three, which is on the safe side.
        step: Seconds of a training step.
        batch_samples: Samples in its batch.

    Raises:
        MeasurementError: If the loss or a product cannot be had.
    """
    forward, (gradient, product) = forward_time(few), timed(few, products=1)
    if gradient + product < CHEAP:
        # What is imported and compiled the first time is no part of the price.
        gradient, product = timed(few)
    larger = (
        max(STEP_FORWARD * step, forward),
        max(STEP_GRADIENT * step, gradient),
        max(STEP_PRODUCT * step, product),
    )
    if batch is not None:
        larger = (forward_time(batch), *timed(batch, products=1))
    return UnitCosts(
        forward=forward,
        gradient=gradient,
        product=product,
        few=few.num_samples,
        batch_forward=larger[0],
        batch_gradient=larger[1],
        batch_product=larger[2],
        batch_samples=max(batch_samples, few.num_samples) if batch is None else batch.num_samples,
        step=step,
    )

"""What the arithmetic is worth for an eigenvalue: its Rayleigh quotient at weights rounded anew.

A residual is one of the arithmetic that was used. Where the derivative of a loss jumps (ReLU,
max-pooling), a sample whose pre-activation lies within rounding of a kink can be on the one side
in float32 and on the other in exact arithmetic: the Hessian jumps by a sample's share, and a
residual says nothing of it. Such samples are found by moving the weights by a few roundings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.linalg.errors import MeasurementError, is_out_of_memory
from lla_callbacks.linalg.lanczos import ROUNDING, LanczosRun
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.objective import Objective

# Stream of the signs.
STREAM = 7
# Relative move of each weight, in roundings: several, so that the move of a pre-activation is
# larger than what its own sum was rounded by, and whoever is on the wrong side is found. With 1 two
# of five errors were missed by a little, with 16 what is reported was three times as large as with
# 4, and neither missed any of 20 (docs/benchmarks/arithmetic.md).
MOVE = 4.0
# Share of the largest eigenvalue up to which a residual is asked what the arithmetic adds to it.
# Kinks between roundings were worth 1 % where data are far from normalized, and a millionth where
# they are (ibid.). A light measurement is asked less often, since it costs few products itself.
WORTH_ASKING, LIGHT_WORTH_ASKING = 1e-2, 1e-3
# The coarsest arithmetic that is asked. A few roundings of bfloat16 are 3 % of a weight and no
# neighbourhood, and the ten roundings that a residual holds are 8 % there.
COARSEST = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class End:
    """An extreme eigenvalue and its Ritz vector.

    Attributes:
        value: The eigenvalue with its errors so far.
        scale: Magnitude of the largest Ritz value of its run.
        vector: The unit Ritz vector, as vectors are held; ``None`` where the residual is so large
            that the arithmetic is not asked what it adds to it.
    """

    value: Eigenvalue
    scale: float
    vector: Tensor | None

    @classmethod
    def of(
        cls,
        hessian: LossOperator,
        value: Eigenvalue,
        run: LanczosRun,
        place: int,
        worth_asking: float = WORTH_ASKING,
    ) -> End:
        """Return one, which does not hold its run.

        Args:
            hessian: The Hessian.
            value: The eigenvalue.
            run: The Lanczos run behind it.
            place: Which Ritz value, 0 or -1.
            worth_asking: Share of the largest eigenvalue beyond which a residual is left as it is.
        """
        scale = float(run.values.abs().max())
        # Of processes all have the same runs, and decide alike. NaN is not asked.
        if not _asks(hessian) or not value.residual <= worth_asking * scale:
            return cls(value, scale, None)
        found = run.vectors([place % run.num_steps])[:, 0].to(hessian.device)
        return cls(value, scale, found.div_(hessian.vectors.norm(found)))


def _asks(hessian: LossOperator) -> bool:
    """Return whether the arithmetic is asked at all: exact products in float32."""
    return hessian.engine == "exact" and hessian.eps == COARSEST


def with_arithmetic(
    objective: Objective,
    hessian: LossOperator,
    ends: Sequence[End],
    seed: int,
) -> list[Eigenvalue]:
    """Return eigenvalues with what the arithmetic is worth in their errors.

    Each weight moves by ``4 eps`` of itself, up or down by a random sign, and then the other way:
    whatever kink is within reach is crossed by one of the two. What the Rayleigh quotient of the
    Ritz vector changes by counts as an error, the root of both changes' squares. Two gradients
    with their graphs and two products for each eigenvalue; half of it where the loss was seen to
    have no kinks and the first move shows none (a mask by comparison has no trace in a graph).

    To be called by all processes, last of all that needs products: the operator is released, so
    that there is never more than one in memory. Differences of gradients are left alone: their own
    error, which is in the residuals, is seen at far larger moves.

    Args:
        objective: The loss.
        hessian: Its Hessian.
        ends: The eigenvalues.
        seed: Fixes the signs.
    """
    if hessian.engine != "exact" or hessian.eps > COARSEST:
        return [end.value for end in ends]
    if hessian.eps < COARSEST:
        return [end.value.with_arithmetic(0.0) for end in ends]
    asked = [end for end in ends if end.vector is not None]
    worth = dict(zip(map(id, asked), _changes(objective, hessian, asked, seed), strict=True))
    return [
        end.value.with_arithmetic(worth[id(end)]) if id(end) in worth else end.value for end in ends
    ]


def _changes(
    objective: Objective, hessian: LossOperator, ends: Sequence[End], seed: int
) -> list[float]:
    """Return the size of the Rayleigh quotients' changes, NaN where memory does not suffice."""
    if not ends:
        return []
    rounding = [ROUNDING * hessian.eps * end.scale for end in ends]
    move = hessian.space.vectors(hessian.share).rademacher(
        generator(seed, STREAM), dtype=hessian.dtype, device=hessian.device
    )
    move.mul_(hessian.space.flatten(hessian.space.tensors))
    hessian.release()
    family = Offsets(hessian.space, [move])
    squares = [0.0] * len(ends)
    try:
        for step in (MOVE * hessian.eps, -MOVE * hessian.eps):
            family.place([step])
            with objective.hessian(engine="exact", share=hessian.share) as moved:
                for i, end in enumerate(ends):
                    assert end.vector is not None
                    quotient = hessian.vectors.inner(end.vector, moved @ end.vector)
                    squares[i] += (quotient - float(end.value)) ** 2
            still = all(s <= r * r for s, r in zip(squares, rounding, strict=True))
            if still and objective.findings.proof.kinks == 0:
                break
    except Exception as error:
        # What one process fails at, all fail at together.
        if not isinstance(error, MeasurementError) and not is_out_of_memory(error):
            raise
        return [math.nan] * len(ends)
    finally:
        family.restore()
    return [math.sqrt(square) for square in squares]

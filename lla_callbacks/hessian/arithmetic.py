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


@dataclass(frozen=True)
class End:
    """An extreme eigenvalue and where its Ritz vector is.

    Attributes:
        value: The eigenvalue with its errors so far.
        run: The Lanczos run behind it.
        place: Which Ritz value, 0 or -1.
    """

    value: Eigenvalue
    run: LanczosRun
    place: int

    def vector(self, hessian: LossOperator) -> Tensor:
        """Return the unit Ritz vector, as vectors are held."""
        found = self.run.vectors([self.place % self.run.num_steps])[:, 0].to(hessian.device)
        return found / hessian.vectors.norm(found)


def with_arithmetic(
    objective: Objective,
    hessian: LossOperator,
    ends: Sequence[End],
    seed: int,
    worth_asking: float = WORTH_ASKING,
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
        worth_asking: Share of the largest eigenvalue beyond which a residual is left as it is.
    """
    if hessian.engine != "exact" or hessian.eps > COARSEST:
        return [end.value for end in ends]
    if hessian.eps < COARSEST:
        return [end.value.with_arithmetic(0.0) for end in ends]
    scales = [float(end.run.values.abs().max()) for end in ends]
    # Of processes all have the same runs, and decide alike. NaN is not asked.
    asked = [
        end
        for end, scale in zip(ends, scales, strict=True)
        if end.value.residual <= worth_asking * scale
    ]
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
    vectors = [end.vector(hessian) for end in ends]
    rounding = [ROUNDING * hessian.eps * float(end.run.values.abs().max()) for end in ends]
    weights = hessian.space.flatten(hessian.space.tensors)
    signs = hessian.space.vectors(hessian.share).rademacher(
        generator(seed, STREAM), dtype=hessian.dtype, device=hessian.device
    )
    hessian.release()
    family = Offsets(hessian.space, [weights * signs])
    squares = [0.0] * len(ends)
    try:
        for step in (MOVE * hessian.eps, -MOVE * hessian.eps):
            family.place([step])
            with objective.hessian(engine="exact", share=hessian.share) as moved:
                for i, (end, vector) in enumerate(zip(ends, vectors, strict=True)):
                    quotient = hessian.vectors.inner(vector, moved @ vector)
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

"""What products that are not exact can say, and what is left out as a gap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.linalg.lanczos import LanczosRun
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.probes import generator

# Relative error of a product beyond which it says nothing. Smooth networks stay below 0.01 in
# float32; networks with kinks (ReLU) were seen from 0.1 on (docs/benchmarks/engines.md). Choice.
BOUND = 0.05
_OFF = "differences of gradients are off by"
END_GAP = f"{_OFF} more than {BOUND:.0%} along its direction"
# The smallest eigenvalue may be tiny beside the largest: its error counts against this share of
# it at least.
LEAST_SCALE = 0.1
# Probes whose quadratic forms are taken at two steps.
NUM_PAIRS = 3


@dataclass(frozen=True)
class EngineError:
    """How far an engine's products are off, along what a measurement needs.

    Attributes:
        random: Relative error of the product with a random vector.
        trace: Error of the trace, one standard deviation of what a probe's is off by.
    """

    random: float = 0.0
    trace: float = 0.0

    @property
    def gap(self) -> str:
        """Why nothing that rests on random vectors is reported; empty if it is."""
        if self.random <= BOUND:
            return ""
        return (
            f"{_OFF} {self.random:.0%} along random directions, more than {BOUND:.0%}: they see "
            "the kinks of ReLU or max-pooling, or too few digits"
        )


def gap_remedy(engine_reason: str, gap: str = END_GAP) -> str:
    """Return what helps where differences of gradients could not tell.

    Args:
        engine_reason: Why products are by differences, as a measurement has it.
        gap: Why there is a gap. Those that are not the engine's say themselves what to do.
    """
    if not engine_reason or not gap.startswith(_OFF):
        return ""
    if "was asked for" in engine_reason:
        return "Set engine='exact' or 'auto'."
    if "sharded" in engine_reason:
        return "Measure a checkpoint, in a plain module, by measure_hessian."
    if "OutOfMemoryError" in engine_reason:
        return "Raise max_memory, or lower num_samples or the size of the held batches."
    # The exact engine cannot either, so that it is no way out.
    return (
        "Measure in float64, where differences are surer (measure_hessian(module.double(), "
        "batches)), or give loss=callable(module, batch) by operations that differentiate twice."
    )


def engine_error(hessian: LossOperator, run: LanczosRun, seed: int) -> EngineError:
    """Return the error along random vectors, from products at two steps.

    Args:
        hessian: The Hessian; exact ones cost nothing here.
        run: A Lanczos run from a random start.
        seed: Of the further probes, which differ from those of the trace.
    """
    if run.first_product is None:
        return random_error(hessian, seed)
    start = (run.kept.row(0) * run.start_norm).to(hessian.device)
    return random_error(hessian, seed, (start, run.first_product.to(hessian.device)))


def random_error(hessian: LossOperator, seed: int, *known: tuple[Tensor, Tensor]) -> EngineError:
    """Return the error along random vectors, from products at two steps.

    Args:
        hessian: The Hessian; exact ones cost nothing here.
        seed: Of the probes.
        known: Random vectors with their products, to be used first.
    """
    if hessian.engine == "exact":
        return EngineError()
    vectors, source = hessian.vectors, generator(seed, 5)
    relative, forms = list[float](), list[float]()
    # One after the other: none is held beside the next one.
    for i in range(max(NUM_PAIRS, len(known))):
        if i < len(known):
            probe, product = known[i]
        else:
            probe = hessian.rademacher(source)
            product = hessian @ probe
        error = hessian.engine_error(probe, product)
        size = vectors.norm(product)
        relative.append(vectors.norm(error) / size if size else 0.0)
        forms.append(vectors.inner(probe, error))
        del probe, product, error
    return EngineError(max(relative), math.sqrt(sum(f * f for f in forms) / len(forms)))


def verified_ends(
    hessian: LossOperator, runs: Sequence[LanczosRun], ends: tuple[Eigenvalue, Eigenvalue]
) -> tuple[tuple[Eigenvalue, Eigenvalue], dict[str, str]]:
    """Return the extremes with the engine's own error in their residuals, and gaps.

    Args:
        hessian: The Hessian; exact ones cost nothing here.
        runs: The Lanczos runs behind the extremes.
        ends: Smallest and largest eigenvalue.

    Returns:
        The extremes, NaN where the engine is off by more than :data:`BOUND`, and by name why.
    """
    largest = max(abs(float(end)) for end in ends)
    lowest = min(runs, key=lambda run: float(run.values[0]))
    highest = max(runs, key=lambda run: float(run.values[-1]))
    found = (
        verified_end(hessian, lowest, 0, largest, ends[0]),
        verified_end(hessian, highest, -1, largest, ends[1]),
    )
    names = ("lambda_min", "lambda_max")
    return found, {n: END_GAP for n, end in zip(names, found, strict=True) if math.isnan(end)}


def verified_end(
    hessian: LossOperator, run: LanczosRun, position: int, largest: float, end: Eigenvalue
) -> Eigenvalue:
    """Return an extreme eigenvalue with the engine's own error in its residual, NaN for a gap.

    Its Ritz vector is multiplied once more, so that the residual is seen and not inferred from
    a factorisation that the engine's errors have passed through.

    Args:
        hessian: The Hessian; exact ones cost nothing here.
        run: The Lanczos run behind it.
        position: Which Ritz value, 0 or -1.
        largest: Magnitude of the spectrum.
        end: The eigenvalue with the run's residual.
    """
    if hessian.engine == "exact":
        return end
    vectors = hessian.vectors
    vector = run.vectors([position % run.num_steps])[:, 0].to(hessian.device)
    vector = vector / vectors.norm(vector)
    product = hessian @ vector
    error = vectors.norm(hessian.engine_error(vector, product))
    value = vectors.inner(vector, product)
    if not error <= BOUND * max(abs(value), LEAST_SCALE * largest):
        return Eigenvalue(math.nan, math.nan)
    left = vectors.norm(product - value * vector)
    return Eigenvalue(value, max(left, end.residual) + error, end.beyond + error)

"""Whether an engine's gradient and products are those of the loss: asked of backward passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import NonFiniteError, is_out_of_memory
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.probes import generator
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.objective import Objective, padding_vectors
from lla_callbacks.objective.self_check import NO_ROOM, Check, untried

# Multiple of eps to which products are symmetric, of the sizes of the vectors. Rounding of a
# product grows with depth: of the suite's modules none came to a tenth of this.
SYMMETRY = 3e3
# In float64 some losses compute in float32 inside.
LEAST_SYMMETRY = 1e-6
# Share of the square root of eps to which gradients by two ways agree.
GRADIENT = 10.0
# Step of differences in float32, as a share of the weights' norm; see FIRST_STEP of the
# difference engine. In float64 it is that times the cube root of the ratio of the epses.
FIRST_STEP = 1e-3
# A second step, where the first one does not tell.
SHRINK = 8.0
# Deviation of a product that is never complained of.
FLOOR = 0.02
SAFETY = 4.0
# Share of a product up to which a deviation that would have been seen counts as seen.
TELLING = 0.2
# Depth by which it is judged whether memory is tight, the default one.
USUAL_STEPS = 24
# Functions whose derivative jumps, by the beginning of their nodes' names.
_KINKED = (
    "Relu", "LeakyRelu", "Prelu", "Rrelu", "Threshold", "Hard", "Soft" "shrink", "Clamp",
    "MaxPool", "AdaptiveMaxPool", "Fractional", "Max", "Min", "Amax", "Amin", "Abs", "Topk",
    "Sort", "Kthvalue", "Median", "Where", "SegmentReduce",
)  # fmt: skip


@dataclass(frozen=True)
class Products:
    """What the checks of products have found.

    Attributes:
        checks: Their outcomes.
        lost: Why the second derivative is not the exact engine's, in words; empty if it is.
        num_gradients: What they cost, in gradients.
    """

    checks: tuple[Check, ...]
    lost: str
    num_gradients: float


class _Recorder(SymmetricOperator):
    """Multiplies by an operator, uncounted, and keeps vectors and products."""

    def __init__(self, hessian: LossOperator) -> None:
        super().__init__(hessian.shape[0], hessian.dtype, hessian.device, vectors=hessian.vectors)
        self.eps = hessian.eps
        self._hessian = hessian
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def _matmat(self, columns: Tensor) -> Tensor:
        product = self._hessian.product(columns, range(len(self._hessian.space.tensors)))
        # Whoever asks may use the product up.
        self.pairs.append((columns[:, 0].clone(), product[:, 0].clone()))
        return product


def prove_products(objective: Objective, hessian: LossOperator) -> Products:
    """Return whether an operator multiplies with the Hessian of its objective.

    The two products are the first ones of a Lanczos run from the objective's seed. They are left
    with the operator, so that a measurement that begins with that run has them for nothing.

    Args:
        objective: The loss; its slope was found to be its gradient, or was not decided.
        hessian: The operator, of either engine.
    """
    recorder = _Recorder(hessian)
    lanczos(recorder, hessian.rademacher(generator(objective.seed)), 2, keep_product=False)
    # A Lanczos run of one step is a matrix of one row, or as good as one.
    checks = [_symmetry(hessian, recorder.pairs)] if len(recorder.pairs) > 1 else []
    if hessian.keeps_half(USUAL_STEPS):
        # Where memory is tight a run rounds its basis and has another second vector.
        del recorder.pairs[1:]
    hessian.remember(recorder.pairs)
    if hessian.engine != "exact":
        return Products(tuple(checks), "", 0.0)
    if hessian.matrix != "hessian":
        # No derivative of the gradient. What gets lost on the way in is not lost on the way out.
        failed = [c for c in checks if c.outcome == "failed"]
        return Products(tuple(checks), "; ".join(c.words for c in failed), 0.0)
    try:
        further, spent = _by_gradients(objective, hessian, recorder.pairs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The engine may get by with less, in parts.
        further, spent = [untried("gradient", NO_ROOM)], 0.0
    checks += further
    failed = [c for c in checks if c.name in ("symmetry", "product") and c.outcome == "failed"]
    return Products(tuple(checks), "; ".join(c.words for c in failed), spent)


def _by_gradients(
    objective: Objective, hessian: LossOperator, pairs: list[tuple[Tensor, Tensor]]
) -> tuple[list[Check], float]:
    """Return what plain backward passes say of a gradient and a product, and the cost."""
    plain = hessian.vectors.cut(objective.gradient(hessian.share)[1])
    first = _gradient(hessian, plain, pairs)
    padding = padding_vectors(objective)
    if padding is not None and not hessian.vectors.agreed(
        not bool(hessian.gradient[hessian.vectors.local(padding)].any())
    ):
        # Constants in one place and weights in another: differences cannot tell them apart.
        return [first, Check("product", "not tried", words="a padding vector is tied")], 1.0
    if hessian.keeps_half(USUAL_STEPS):
        hessian.save_memory()
    second, spent = _difference(objective, hessian, plain, *pairs[0])
    return [first, second], 1.0 + spent


def _symmetry(hessian: LossOperator, pairs: list[tuple[Tensor, Tensor]]) -> Check:
    (u, hu), (v, hv) = pairs
    inner, size_of = hessian.vectors.inner, hessian.vectors.norm
    one, other = inner(v, hu, wide=True), inner(u, hv, wide=True)
    size = size_of(hu) * size_of(v) + size_of(hv) * size_of(u)
    if size == 0:
        return Check("symmetry", "passed", 0.0, 0.0)
    bound = max(SYMMETRY * hessian.eps, LEAST_SYMMETRY)
    if hessian.engine != "exact":
        # Differences have errors of their own, which hide less than this share.
        bound = max(FLOOR, SAFETY * math.hypot(*getattr(hessian, "product_error", (0.0,))))
    error = abs(one - other) / size
    words = f"u'Hv = {one:.4g}, v'Hu = {other:.4g}"
    if error <= bound:
        # Of two products that are hardly known, nothing is learned.
        return Check("symmetry", "passed" if bound <= TELLING else "not decided", error, bound)
    return Check("symmetry", "failed", error, bound, words)


def _gradient(hessian: LossOperator, plain: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Check:
    """Return whether the engine's gradient is the plain backward pass's."""
    size_of = hessian.vectors.norm
    size = size_of(plain)
    # Near a minimum the gradient is what is left of larger summands, about as large as the
    # product with the weights.
    weights = hessian.weight_norm()
    summands = max(size_of(hu) for _, hu in pairs) * weights
    off = size_of(plain - hessian.gradient)
    eps = hessian.eps
    bound = GRADIENT * math.sqrt(eps) * size + 1e3 * eps * summands
    if not size:
        return Check("gradient", "passed" if off <= bound else "failed", 0.0 if not off else 1.0)
    words = f"they are {off / size:.1%} apart" if off > bound else ""
    outcome: Any = "failed" if off > bound else "passed"
    return Check("gradient", outcome, off / size, bound / size, words)


def _difference(
    objective: Objective, hessian: LossOperator, plain: Tensor, q: Tensor, product: Tensor
) -> tuple[Check, float]:
    """Return whether a product agrees with a difference of gradients, and what that cost."""
    size_of = hessian.vectors.norm
    weights = hessian.weight_norm() or 1.0
    own = max(torch.finfo(hessian.space.precision).eps, objective.findings.rounding)
    ratio = own / torch.finfo(torch.float32).eps
    step = FIRST_STEP * ratio ** (1 / 3) * weights
    spent, check = 0.0, Check("product", "not tried")
    deviations = 0
    for _ in range(2):
        spent += 2
        try:
            behind, ahead, kinks = _moved_gradients(objective, hessian, q, step)
        except NonFiniteError:
            # The loss ends this near; here it exists, and may well have a Hessian.
            if check.outcome == "not tried":
                words = f"the loss is not finite {step:.1g} away"
                check = Check("product", "not decided", words=words)
            step /= SHRINK
            continue
        objective.findings.learn(kinks=kinks)
        difference = (ahead - behind).div_(2 * step)
        slope, product_norm = size_of(plain), size_of(product)
        size = max(size_of(difference), product_norm)
        if size * step <= 10 * hessian.eps * slope or not size:
            # A loss without curvature along this direction, as far as rounding lets see.
            agrees = product_norm * step <= 1e3 * hessian.eps * slope
            outcome: Any = "passed" if agrees else "not decided"
            return Check("product", outcome, 0.0, 0.0), spent
        # The differences to either side are two steps; in the middle, their changes cancel.
        sides = size_of(ahead.sub_(plain).add_(behind.sub_(plain)))
        apart = sides / (2 * step * size)
        # Kinks that are many blur to a curvature of their own, which both sides agree on: what
        # is seen of it is its scatter.
        scatter = math.sqrt(1 + 10 * kinks * step / weights)
        bound = SAFETY * apart * scatter + FLOOR
        error = size_of(difference.sub_(product)) / size
        words = (
            f"a product is {error:.0%} off from differences of gradients, which agree with each "
            f"other to {apart:.1%}"
        )
        if error <= bound:
            if bound <= TELLING:
                return Check("product", "passed", error, bound), spent
            why = "kinks or rounding" if kinks else "rounding"
            check = Check("product", "not decided", error, bound, f"{why} hide it")
        else:
            deviations += 1
            check = Check("product", "failed", error, bound, words)
            if deviations == 2:
                return check, spent
        step /= SHRINK
    if check.outcome == "failed" and deviations < 2:
        # Only the smaller step contradicts: its rounding may be to blame.
        check = Check("product", "not decided", check.error, check.bound, check.words)
    return check, spent


def _moved_gradients(
    objective: Objective, hessian: LossOperator, unit: Tensor, step: float
) -> tuple[Tensor, Tensor, int]:
    """Return the gradients at both sides, and how many values may have a kink in between."""
    kinks: list[int] = []
    vectors = hessian.vectors
    # Weights are moved as they lie, and of what comes back each process keeps its piece.
    unit = vectors.joined(unit)

    def look(loss: Tensor) -> None:
        kinks.append(count_kinks(loss))

    padding = padding_vectors(objective)
    if padding is not None:
        # The product sees them as the constants that they are.
        unit = unit.index_fill(0, padding.to(unit.device), 0.0)
    family = Offsets(hessian.space, [unit])
    # Those of the weights at which the Hessian is, which holds them fixed.
    gradient = partial(objective.gradient, hessian.share, statistics=objective.statistics())
    try:
        family.place([-step])
        behind = vectors.cut(gradient()[1])
        family.place([step])
        ahead = vectors.cut(gradient(look=look)[1])
    finally:
        family.restore()
    total = torch.tensor([float(sum(kinks))], dtype=torch.float64)
    share = hessian.share
    return behind, ahead, int(share.total(total)[0] if share.size > 1 else total[0])


def count_kinks(loss: Tensor) -> int:
    """Return how many values of a graph went through functions whose derivative jumps."""
    waiting = [loss.grad_fn]
    seen = set(waiting)
    count = 0
    while waiting:
        node: Any = waiting.pop()
        if node is None:
            continue
        if node.name().startswith(_KINKED):
            shapes = [m.shape for m in getattr(node, "_input_metadata", ())]
            count += sum(math.prod(shape) for shape in shapes) or 1
        for below, _ in node.next_functions:
            if below not in seen:
                seen.add(below)
                waiting.append(below)
    return count

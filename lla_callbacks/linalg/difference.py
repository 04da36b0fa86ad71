"""The Hessian of a loss as an operator: products by central differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lla_callbacks.linalg.distributed import is_spread, local_part
from lla_callbacks.linalg.errors import MeasurementError, NonFiniteError, is_out_of_memory
from lla_callbacks.linalg.lanczos import ROUNDING
from lla_callbacks.linalg.loss_operator import Differentiated, LossOperator, LossTerm, loss_value
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.sharing import Share

# Where the search for the step begins, as a share of the weights' norm, in float32. On tanh,
# GELU and SiLU networks the best steps lay between 1e-4 and 1e-2 (docs/benchmarks/engines.md).
FIRST_STEP = 1e-3
# Factor between the three steps that the two kinds of error are told apart by.
RATIO = 4.0
# The search moves on at most so often: each round costs 16 gradients.
MOST_ROUNDS = 3
# Late in training the gradient has little of the sharpest directions: so many products turn it
# towards them, in each round.
POWER_STEPS = 2

Differentiate = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]]


def first_derivative(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of a loss, by autograd, ``None`` for unused parameters."""
    return torch.autograd.grad(loss.reshape(()), parameters, allow_unused=True)


class DifferenceOperator(LossOperator):
    """The Hessian of a loss by differences of its gradient ``g``: nothing is derived twice.

        ``H v = ||v|| (g(w + h u) - g(w - h u)) / (2 h) + O(h^2)``,  ``u = v / ||v||``

    Two gradients a product, in the memory of a training step. Two errors oppose each other: that
    of the truncated series, ``A h^2``, and that of rounding, ``B / h``. Both are measured from
    three steps on a sharp direction (the gradient, multiplied a few times) and on a flat one
    (random), and the step ``h`` that serves both best is taken, in units of the weights' norm,
    so that it does not depend on how either is scaled. :meth:`engine_error` tells of any
    product how far it is off, by repeating it at twice the step.

    On networks with kinks (ReLU, max-pooling) every kink between the two points counts with
    ``1 / h``, so no step is right: the error says so.

    Args:
        terms: The batches of this process; their ``keep`` plays no part.
        parameters: Name to leaf tensor with ``requires_grad``.
        context: Entered around every forward and backward pass.
        share: The processes; see :class:`~lla_callbacks.linalg.loss_operator.LossOperator`.
        constant: Positions of entries that are no variables although they are stored among them
            (padding vectors): they are not moved. Shape ``(n,)``.
        differentiate: Gives the gradients of a loss. Parameters that are spread over processes
            need another one than autograd's.
        averages: Over how many processes gradients come averaged, as those of sharded parameters
            do. Each process's term is scaled beforehand, so that the mean is the sum of all terms.
            0: gradients are of this process's terms alone.
        settle: Called once weights have been put back, for modules that keep copies of them.
        moving: Entered while weights are somewhere else and will be put back.

    Attributes:
        step: ``h``, a length in parameter space.
        product_error: Estimated relative error of the product with a random vector, and with
            one along the sharpest directions.

    Raises:
        NonFiniteError: If a loss or a gradient is not finite.
        MeasurementError: If the parameters are too coarse to be moved by small steps, or
            entries that should be constant have a gradient.
    """

    engine = "difference"

    def __init__(
        self,
        terms: Sequence[LossTerm],
        parameters: Mapping[str, Tensor],
        *,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        share: Share | None = None,
        constant: Tensor | None = None,
        differentiate: Differentiate = first_derivative,
        averages: int = 0,
        settle: Callable[[], None] | None = None,
        moving: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__(terms, parameters, context=context, share=share)
        if self.eps > 1e-5:
            raise MeasurementError(
                f"differences of gradients need small steps, which {self.space.precision} "
                "weights round away.",
                "Leave out precision='training', so that float32 copies are measured.",
            )
        self._constant = constant
        # Of vectors as the weights lie.
        self._lengths = self.space.vectors(self.share)
        self._settle = settle
        self._elsewhere = moving
        self._differentiate = differentiate
        self._averages = averages
        self.is_summed = averages > 0
        self._saves = False
        # Whether some parameters are left out of the shards, and so of the mean.
        self._is_mixed = averages > 1 and not all(map(is_spread, self.space.tensors))
        self._originals: list[Tensor] = []
        self._begin(self._first_gradient)
        self.step = 0.0
        self.product_error = (math.inf, math.inf)
        self._calibrate()
        # What a product is off by bounds from below what a residual can say.
        self.eps = max(self.eps, self.product_error[1] / ROUNDING)

    def engine_error(self, vector: Tensor, product: Tensor) -> Tensor:
        """Return the product at twice the step less the product.

        Where the truncated series dominates this is three times the product's error, where
        rounding does it is about as large as the error.
        """
        return self._difference(vector, 2 * self.step).sub_(product)

    def save_memory(self) -> None:
        """See the base class; and gradients at both points are taken out of one another at once."""
        super().save_memory()
        self._saves = True

    def _local_product(self, columns: Tensor, chosen: Sequence[int]) -> Tensor:
        whole = len(chosen) == len(self.space.tensors)
        index = None if whole else self.space.index([self.space.names[i] for i in chosen])
        products = []
        for column in columns.T:
            vector = column if index is None else self._embedded(column, index)
            product = self._local_difference(vector, self.step)
            products.append(product if index is None else product[index.to(product.device)])
        return torch.stack(products, dim=1)

    def _embedded(self, column: Tensor, index: Tensor) -> Tensor:
        vector = self.space.zeros()
        vector[index.to(vector.device)] = column
        return vector

    def _difference(self, vector: Tensor, step: float) -> Tensor:
        """Return the central difference along a vector, those of all processes together."""
        self.num_matvecs += 1
        whole = self.vectors.joined(vector)
        return self._together(lambda: self._local_difference(whole, step), "difference")

    def _local_difference(self, vector: Tensor, step: float) -> Tensor:
        if self._constant is not None:
            vector = vector.index_fill(0, self._constant, 0.0)
        size = self._lengths.norm(vector)
        if size == 0:
            return torch.zeros_like(vector)
        with self._moving() as move:
            move(vector, step / size)
            difference = self._gradient()[1]
            move(vector, -step / size)
            if self._saves or len(self._terms) == 1:
                self._gradient(difference, -1.0)
            else:
                # Equal sums over batches cancel to the bit.
                difference.sub_(self._gradient()[1])
        return difference.mul_(size / (2 * step))

    @contextmanager
    def _moving(self) -> Iterator[Callable[[Tensor, float], None]]:
        """Allow the weights to be moved inside; they come back to the bit on leaving."""
        weights = [local_part(t) for t in self.space.tensors]
        originals = [w.detach().clone() for w in weights]

        def move(vector: Tensor, distance: float) -> None:
            parts = self.space.unflatten(vector)
            for w, original, part in zip(weights, originals, parts, strict=True):
                # .data: a graph that the user still holds does not see a new version.
                torch.add(original, local_part(part), alpha=distance, out=w.data)

        try:
            with torch.no_grad(), torch.inference_mode(False), self._elsewhere():
                yield move
        finally:
            with torch.no_grad(), torch.inference_mode(False):
                for w, original in zip(weights, originals, strict=True):
                    w.data.copy_(original)
            if self._settle is not None:
                self._settle()

    def _gradient_again(self) -> Tensor:
        return self._gradient()[1]

    def _first_gradient(self) -> tuple[float, Tensor]:
        loss, gradient = self._gradient()
        if self._constant is not None and bool(gradient[self._constant].any()):
            raise MeasurementError(
                "an embedding's padding vector is a constant in one place and a weight in another "
                "(tied weights), which differences of gradients cannot tell apart.",
                "Take engine='exact'.",
            )
        return loss, gradient

    def _gradient(self, to: Tensor | None = None, factor: float = 1.0) -> tuple[float, Tensor]:
        """Return this process's summand of the loss and of its gradient.

        Args:
            to: What the gradient is added to, where it stands; ``None``: to zeros.
            factor: It is times this.
        """
        if to is not None and self._is_mixed:
            # Parts of it are means yet to be taken, of the gradient alone.
            loss, gradient = self._gradient()
            return loss, to.add_(gradient, alpha=factor)
        loss, gradient = 0.0, self.space.zeros() if to is None else to
        i = 0
        while i < len(self._terms):
            term = self._terms[i]
            trouble: Exception | None = None
            try:
                with self._differentiating():
                    differentiated = partial(self._differentiated, term.weight)
                    if term.guarded is not None:
                        value, gradients = term.guarded(differentiated)
                    else:
                        value, gradients = differentiated(term.evaluate())
                weight = 1.0 if self._averages else term.weight
                self.space.add_to(gradient, gradients, factor * weight)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                trouble = error.with_traceback(None)
            if trouble is not None:
                self._halve(i, trouble)
                continue
            # A pass's gradients are not kept while the next one makes its own.
            del gradients
            loss += term.weight * value
            i += 1
        if self._is_mixed:
            for name, tensor in zip(self.space.names, self.space.tensors, strict=True):
                if not is_spread(tensor):
                    part = gradient[self.space.slices[name]]
                    part.copy_(self.share.total(part) / self._averages)
        return loss, gradient

    def _differentiated(self, weight: float, loss: Tensor) -> Differentiated:
        value = loss_value(loss)
        if self._averages:
            loss = loss * (weight * self._averages)
        return value, self._differentiate(loss, self.space.tensors)

    def _calibrate(self) -> None:
        """Choose the step by what it costs in either direction, and note what is left."""
        scale = self.weight_norm()
        coarse = torch.finfo(self.space.precision).eps / torch.finfo(torch.float32).eps
        step = FIRST_STEP * coarse ** (1 / 3) * (scale or 1.0)
        flat = self.rademacher(generator(0, 4))
        sharp = self.gradient if self.vectors.largest(self.gradient) > 0 else flat
        for _ in range(MOST_ROUNDS):
            try:
                for _ in range(POWER_STEPS if sharp is not flat else 0):
                    sharp = self._difference(sharp, step / RATIO)
            except NonFiniteError:
                # So far away the loss does not exist, in no process: they go on together.
                step /= RATIO**2
                continue
            models = [self._error_model(direction, step) for direction in (flat, sharp)]
            steps = [step * RATIO ** (k / 4) for k in range(-12, 13)]
            best = min(steps, key=lambda h: math.hypot(*(m.error(h) for m in models)))
            left = (models[0].error(best), models[1].error(best))
            if math.hypot(*left) < math.hypot(*self.product_error):
                self.step, self.product_error = best, left
            if any(model.wild for model in models):
                # Not yet where the series holds, and the truth nearer.
                step /= RATIO**2
            elif step / RATIO <= best <= step * RATIO:
                return
            else:
                step = best

        if not self.step:
            raise NonFiniteError(
                f"the loss is not finite within {step:.1g} of the weights, so that no difference "
                "of gradients can be taken.",
                "Take engine='exact'.",
            )

    def _error_model(self, direction: Tensor, step: float) -> ErrorModel:
        """Return the relative error along a direction, from differences at three steps."""
        try:
            near, here, far = (
                self._difference(direction, h) for h in (step / RATIO, step, step * RATIO)
            )
        except NonFiniteError:
            return ErrorModel(math.inf, 0.0, step, wild=True)
        size = self.vectors.norm(here)
        first = self.vectors.norm(near - here) ** 2
        second = self.vectors.norm(here - far) ** 2
        if size == 0:
            return ErrorModel(0.0, 0.0, step, wild=False)
        if not math.isfinite(first + second):
            return ErrorModel(math.inf, 0.0, step, wild=True)
        return ErrorModel.of(first / size**2, second / size**2, step)


@dataclass(frozen=True)
class ErrorModel:
    """The relative error of a difference as a function of its step.

        ``error(h)^2 = truncation (h / step)^4 + rounding (step / h)^2``

    Attributes:
        truncation: Square of the truncation error at ``step``.
        rounding: Square of the rounding error there.
        step: The middle one of the three steps.
        wild: Whether the steps are too large for the series to hold.
    """

    truncation: float
    rounding: float
    step: float
    wild: bool

    @classmethod
    def of(cls, first: float, second: float, step: float) -> ErrorModel:
        """Return the model that explains how differences change between three steps.

        Args:
            first: Squared relative change from ``step / RATIO`` to ``step``.
            second: That from ``step`` to ``step * RATIO``.
            step: The middle one.
        """
        square = RATIO**2
        # Truncation errors subtract, errors of rounding are independent.
        rows = torch.tensor(
            [[(1 - 1 / square) ** 2, square + 1], [(square - 1) ** 2, 1 + 1 / square]],
            dtype=torch.float64,
        )
        found = torch.linalg.solve(rows, torch.tensor([first, second], dtype=torch.float64))
        truncation, rounding = (max(float(value), 0.0) for value in found)
        # By the series the second change is 256 times the first, by rounding a sixteenth of it.
        return cls(truncation, rounding, step, wild=first < second < square**2 / 4 * first)

    def error(self, step: float) -> float:
        """Return the relative error at a step."""
        ratio = step / self.step
        return math.sqrt(self.truncation * ratio**4 + self.rounding / ratio**2)

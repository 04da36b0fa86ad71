"""The Hessian of a loss as an operator: exact products by double backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import NonFiniteError, NoSecondDerivativeError, remedy_for
from lla_callbacks.linalg.lost_graphs import refusing_lost_graphs
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.space import ParameterSpace


@dataclass(frozen=True)
class LossTerm:
    """One summand ``weight * evaluate()`` of a loss, usually one batch.

    Attributes:
        evaluate: Returns the scalar loss of this batch at the present parameters, with
            its autograd graph; called twice, it returns the same number.
        weight: Share of this batch in the whole loss; shares add up to one.
        keep: Whether the gradient's graph of this batch is kept between products
            (2 gradients a product) or built anew for each (3 gradients, less memory).
    """

    evaluate: Callable[[], Tensor]
    weight: float
    keep: bool = True


class HessianOperator(SymmetricOperator):
    """The Hessian of ``L = sum_b weight_b L_b`` with respect to named parameters.

    A product is ``H v = d/dtheta <dL/dtheta, v>``: the graph of the gradient is built once
    a batch and serves all products of the operator's life, so that a product costs about
    two gradients (the floor of reverse mode with a shared primal). Reverse over reverse
    was chosen since it is right through batch statistics, where torch 2.13 gets
    ``torch.func.hessian`` and reverse-over-forward wrong without a word, and works for
    recurrent layers and attention (math kernel), where forward mode does not.

    Unused parameters have zero rows. Parameters that appear under two names count once.

    Args:
        terms: The batches.
        parameters: Name to leaf tensor with ``requires_grad``.
        chunk_size: How many columns of a block are pushed through one backward pass
            (``is_grads_batched``). 1 is the default: measured on a ResNet-20 and a
            transformer, larger chunks change the time of a product by -25 % to +20 %
            and multiply its memory. The result does not depend on it.
        context: Entered around every forward and backward pass.

    Attributes:
        space: Layout of the flat vectors.
        loss: The loss ``L``, a float.
        gradient: ``dL/dtheta``, shape ``(dim,)``.

    Raises:
        NonFiniteError: If a loss, a gradient or a product is not finite.
        NoSecondDerivativeError: If autograd cannot differentiate the gradient.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        parameters: Mapping[str, Tensor],
        *,
        chunk_size: int = 1,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        if not terms:
            raise ValueError("a Hessian needs at least one batch.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; give 1 or more.")
        self.space = ParameterSpace(parameters)
        super().__init__(self.space.dim, self.space.dtype, self.space.device)
        self.eps = torch.finfo(self.space.precision).eps
        self._terms = tuple(terms)
        self._chunk_size = chunk_size
        self._context = context
        # The kept batches' gradients are added up once, so that one backward pass serves all.
        self._kept: list[Tensor | None] = [None] * len(self.space.tensors)
        self._released = False
        self.loss = 0.0
        self.gradient = torch.zeros(self.space.dim, dtype=self.dtype, device=self.device)
        for term in self._terms:
            value, gradients = self._differentiate(term)
            self.loss += term.weight * value
            self.gradient += term.weight * self.space.flatten(gradients)
            if term.keep:
                self._keep(gradients, term.weight)
        if not torch.isfinite(self.gradient).all():
            raise NonFiniteError(
                "the gradient of the loss is not finite.",
                "Look for a division by zero or an overflow in the model at these weights.",
            )

    def block(self, names: Sequence[str]) -> HessianBlockOperator:
        """Return the Hessian of some parameters alone, on the same kept graphs."""
        return HessianBlockOperator(self, names)

    def release(self) -> None:
        """Drop the kept graphs and their memory; the operator cannot multiply any more."""
        self._kept, self._released = [], True

    def _keep(self, gradients: list[Tensor | None], weight: float) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            for i, gradient in enumerate(gradients):
                # A gradient without a graph is constant in the parameters: its rows are zero.
                if gradient is not None and gradient.requires_grad:
                    known, share = self._kept[i], weight * gradient
                    self._kept[i] = share if known is None else known + share

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.enable_grad(), self._context():
            yield

    def _differentiate(self, term: LossTerm) -> tuple[float, list[Tensor | None]]:
        """Return the loss of one batch and its gradients, differentiable once more."""
        with self._differentiating():
            loss = term.evaluate()
            if loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(
                    f"the loss has shape {tuple(loss.shape)} and requires_grad="
                    f"{loss.requires_grad}; it must be a scalar that depends on a "
                    "trainable parameter."
                )
            value = float(loss.detach())
            if not torch.isfinite(loss.detach()).all():
                raise NonFiniteError(
                    f"the loss is {value}.",
                    "Lower the learning rate, clip gradients, or look for bad samples in "
                    "the held batches.",
                )
            with explaining_missing_derivative(), refusing_lost_graphs(loss):
                gradients = torch.autograd.grad(
                    loss.reshape(()), self.space.tensors, create_graph=True, allow_unused=True
                )
                refuse_dead_ends(gradients)
        return value, list(gradients)

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.product(columns, range(len(self.space.tensors)))

    def product(self, columns: Tensor, chosen: Sequence[int]) -> Tensor:
        """Return the product restricted to the chosen parameters, both sides.

        Args:
            columns: ``(size, k)``, where ``size`` counts the chosen parameters' elements.
            chosen: Positions of parameters in ``space.names``, ascending.
        """
        if self._released:
            raise RuntimeError("this operator was released; build a new one.")
        total = self._in_chunks(self._kept, columns, chosen)
        for term in self._terms:
            if not term.keep:
                gradients = self._differentiate(term)[1]
                total = total + term.weight * self._in_chunks(gradients, columns, chosen)
        # The largest magnitude is NaN if any entry is.
        if not math.isfinite(float(total.abs().max())):
            raise NonFiniteError(
                "a Hessian-vector product is not finite although the loss is.",
                "Look for a function whose second derivative diverges (sqrt, norm or log "
                "at zero) in the model.",
            )
        return total

    def _in_chunks(
        self, gradients: list[Tensor | None], columns: Tensor, chosen: Sequence[int]
    ) -> Tensor:
        """Return the product of one gradient graph with all columns, chunk by chunk."""
        chunks = torch.split(columns, self._chunk_size, dim=1)
        return torch.cat([self._backward(gradients, chunk, chosen) for chunk in chunks], dim=1)

    def _backward(
        self, gradients: list[Tensor | None], columns: Tensor, chosen: Sequence[int]
    ) -> Tensor:
        """Return the product of one gradient graph, ``(size, k)``, by one backward pass."""
        likes = [self.space.tensors[i] for i in chosen]
        sizes = [like.numel() for like in likes]
        num_columns = columns.shape[1]
        outputs, cotangents = [], []
        for i, like, part in zip(chosen, likes, torch.split(columns, sizes), strict=True):
            gradient = gradients[i]
            if gradient is not None and gradient.requires_grad:
                outputs.append(gradient)
                cotangents.append(part.T.reshape(num_columns, *like.shape).to(gradient.dtype))
        if not outputs:
            return torch.zeros_like(columns)
        batched = num_columns > 1
        with self._differentiating(), explaining_missing_derivative():
            products = torch.autograd.grad(
                outputs,
                likes,
                cotangents if batched else [vector[0] for vector in cotangents],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        rows = [
            columns.new_zeros(size, num_columns)
            if product is None
            else product.detach().reshape(num_columns, size).T.to(columns.dtype)
            for product, size in zip(products, sizes, strict=True)
        ]
        return torch.cat(rows)


class HessianBlockOperator(SymmetricOperator):
    """The Hessian of some parameters alone: a principal block, cheaper than the whole.

    Only the block's gradients are differentiated, and only towards the block, so that a
    product never walks parts of the graph that do not matter.

    Args:
        hessian: The operator whose graphs are used.
        names: Parameters of the block.
    """

    def __init__(self, hessian: HessianOperator, names: Sequence[str]) -> None:
        rows = hessian.space.index(names)
        if rows.numel() == 0:
            raise ValueError("a block needs at least one parameter.")
        super().__init__(rows.numel(), hessian.dtype, hessian.device)
        self.eps = hessian.eps
        self._hessian = hessian
        self._chosen = [i for i, name in enumerate(hessian.space.names) if name in set(names)]

    def _matmat(self, columns: Tensor) -> Tensor:
        return self._hessian.product(columns, self._chosen)


def refuse_dead_ends(gradients: Sequence[Tensor | None]) -> None:
    """Raise if a gradient's graph ends where a function forbids a second derivative.

    Autograd raises only when it runs such a node, and it runs none that leads to no
    parameter: the missing part of the product would silently count as zero.
    """
    reached = {g.grad_fn for g in gradients if g is not None and g.grad_fn is not None}
    waiting = list(reached)
    while waiting:
        node = waiting.pop()
        if node.name().rpartition("::")[2] == "Error":
            raise RuntimeError("a function is marked once_differentiable")
        for below, _ in node.next_functions:
            if below is not None and below not in reached:
                reached.add(below)
                waiting.append(below)


@contextmanager
def explaining_missing_derivative() -> Iterator[None]:
    """Turn autograd's complaint about a missing second derivative into a named one."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        signs = ("is not implemented", "double backward", "create_graph", "once_differentiable")
        if not any(sign in text for sign in signs):
            raise
        raise NoSecondDerivativeError(
            f"an operation has no second derivative ({text.splitlines()[0]}).",
            remedy_for(text),
        ) from error

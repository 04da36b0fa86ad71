"""The Gauss-Newton part of a Hessian as an operator: what the criterion alone curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lla_callbacks.linalg.accumulation import norm
from lla_callbacks.linalg.errors import MeasurementError, is_out_of_memory
from lla_callbacks.linalg.hessian import (
    HessianOperator,
    explaining_missing_derivative,
    refuse_dead_ends,
)
from lla_callbacks.linalg.loss_operator import LossTerm, loss_value
from lla_callbacks.linalg.lost_graphs import refusing_lost_graphs
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.linalg.space import ParameterSpace


@dataclass(frozen=True)
class Call:
    """One call of a criterion.

    Attributes:
        outputs: What entered it, with the network's graph.
        value: What came out, with its graph.
        criterion: Repeats it at other outputs.
    """

    outputs: Tensor
    value: Tensor
    criterion: Callable[[Tensor], Tensor]


# Evaluates a loss and returns it with the criteria it called, and the names of unknown ones.
Heard = Callable[[Callable[[], Tensor]], tuple[Tensor, list[Call], list[str]]]
# What to do about a loss that is not made of criteria, naming those that are known.
REMEDY = (
    "Take matrix='hessian', or compute the loss by one of torch.nn.functional's cross_entropy, "
    "nll_loss, mse_loss, binary_cross_entropy_with_logits, huber_loss and smooth_l1_loss (or their "
    "modules) alone; a weight penalty belongs into the optimizer."
)


class GaussNewtonOperator(HessianOperator):
    """``G = sum_b weight_b J_b' A_b J_b`` of a loss made of convex criteria.

    ``J`` is the Jacobian of what enters a criterion, the network's outputs, and ``A >= 0`` the
    criterion's own Hessian there, so that ``G >= 0``: the Hessian of the loss with the network
    taken as linear in its parameters (Schraudolph 2002, section 3; Martens 2020, section 8). Each
    criterion counts with the constant weight that it has in the loss.

    A product is ``J v`` by a backward pass through the graph of ``u -> J'u``, then ``A``, then
    ``J'`` by another backward pass: about two gradients, as a product with the Hessian.

    Args:
        terms: The batches of this process.
        parameters: Name to leaf tensor with ``requires_grad``.
        heard: Evaluates a loss and tells the criteria that it called.
        context: Entered around every forward and backward pass.
        share: The processes.

    Raises:
        MeasurementError: If the loss is no sum of known criteria; the message names what it calls.
    """

    matrix = "ggn"

    def __init__(
        self,
        terms: Sequence[LossTerm],
        parameters: Mapping[str, Tensor],
        *,
        heard: Heard,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        share: Share | None = None,
    ) -> None:
        self._heard = heard
        self._linear: list[tuple[float, _Linearised]] = []
        super().__init__(terms, parameters, context=context, share=share)

    def release(self) -> None:
        """Drop the kept graphs and their memory; the operator cannot multiply any more."""
        super().release()
        self._linear = []

    @property
    def _holds_graphs(self) -> bool:
        return bool(self._linear)

    def _forget_graphs(self) -> None:
        super()._forget_graphs()
        self._linear = []

    def _differentiate_all(self, *, keep: bool = True) -> tuple[float, Tensor]:
        loss, gradient = 0.0, self.space.zeros()

        def visit(term: LossTerm) -> None:
            nonlocal loss, gradient
            found = self._linearised(term)
            if keep and term.keep and self._keeps:
                self._linear.append((term.weight, found))
            gradient += term.weight * found.gradient
            loss += term.weight * found.loss

        self._visit_terms(visit, lambda term: True)
        return loss, gradient

    def _local_product(self, columns: Tensor, chosen: Sequence[int]) -> Tensor:
        total = torch.zeros_like(columns)
        if self._keeps:
            try:
                for weight, found in self._linear:
                    total += weight * self._multiplied(found, columns, chosen)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                total = torch.zeros_like(columns)
                self._forget_graphs()
        keeps = self._keeps

        def visit(term: LossTerm) -> None:
            nonlocal total
            part = self._multiplied(self._linearised(term), columns, chosen)
            total = total + term.weight * part

        self._visit_terms(visit, lambda term: not (term.keep and keeps))
        return total

    def _multiplied(self, found: _Linearised, columns: Tensor, chosen: Sequence[int]) -> Tensor:
        with self._differentiating(), explaining_missing_derivative():
            products = [found.product(self.space, column, chosen) for column in columns.T]
        return torch.stack(products, dim=1)

    def _linearised(self, term: LossTerm) -> _Linearised:
        with self._differentiating():
            total, calls, others = self._heard(term.evaluate)
            value = loss_value(total)
            parameters = self.space.tensors
            # Computed under no_grad, for show, or in an earlier try: no part of the loss.
            calls = [call for call in calls if call.value.requires_grad]
            if not calls:
                raise _refusal(others, "calls no criterion whose curvature is known")
            if not all(call.outputs.requires_grad for call in calls):
                raise _refusal(others, "gives a criterion its targets first and its outputs second")
            weights = torch.autograd.grad(
                total.reshape(()), [c.value for c in calls], create_graph=True, allow_unused=True
            )
            if any(w is not None and w.requires_grad for w in weights):
                raise _refusal(others, "is no sum of criteria with constant weights")
            pairs = [(c, w) for c, w in zip(calls, weights, strict=True) if w is not None]
            if not pairs:
                raise _refusal(others, "calls no criterion whose curvature is known")
            gradient = self.space.flatten(
                torch.autograd.grad(
                    total.reshape(()), parameters, retain_graph=True, allow_unused=True
                )
            )
            outputs = [c.outputs for c, _ in pairs]
            curved = [_Curved(c, w.detach()) for c, w in pairs]
            seeds = [torch.zeros_like(z, requires_grad=True) for z in outputs]
            with explaining_missing_derivative(), refusing_lost_graphs(total):
                pulled = torch.autograd.grad(
                    outputs, parameters, seeds, create_graph=True, allow_unused=True
                )
                refuse_dead_ends(pulled)
            slopes = [c.slope.detach() for c in curved]
            through = self.space.flatten(
                torch.autograd.grad(
                    outputs, parameters, slopes, retain_graph=True, allow_unused=True
                )
            )
        apart = norm(through - gradient)
        if apart > math.sqrt(self.eps) * max(norm(gradient), norm(through)):
            raise _refusal(others, "has a part beside its criteria (a weight penalty, say)")
        return _Linearised(value, gradient, outputs, curved, seeds, list(pulled))


class _Curved:
    """A criterion at the outputs it was called with, ready to be differentiated twice."""

    def __init__(self, call: Call, weight: Tensor) -> None:
        self._at = call.outputs.detach().requires_grad_()
        value = (weight * call.criterion(self._at)).sum()
        (self.slope,) = torch.autograd.grad(value, self._at, create_graph=True)

    def product(self, delta: Tensor) -> Tensor:
        """Return ``A delta``, shaped as the outputs."""
        if not self.slope.requires_grad:
            return torch.zeros_like(delta)
        found = torch.autograd.grad(
            self.slope, self._at, delta, retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return found[0].detach()


@dataclass
class _Linearised:
    """One batch, its network as a linear map and its criteria as quadratic forms."""

    loss: float
    gradient: Tensor
    outputs: list[Tensor]
    curved: list[_Curved]
    seeds: list[Tensor]
    pulled: list[Tensor | None]

    def product(self, space: ParameterSpace, column: Tensor, chosen: Sequence[int]) -> Tensor:
        likes = [space.tensors[i] for i in chosen]
        parts = torch.split(column, [like.numel() for like in likes])
        sources, cotangents = [], []
        for i, like, part in zip(chosen, likes, parts, strict=True):
            pulled = self.pulled[i]
            if pulled is not None and pulled.requires_grad:
                sources.append(pulled)
                cotangents.append(part.reshape(like.shape).to(pulled.dtype))
        if not sources:
            return torch.zeros_like(column)
        pushed = torch.autograd.grad(
            sources, self.seeds, cotangents, retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        curved = [c.product(delta) for c, delta in zip(self.curved, pushed, strict=True)]
        found = torch.autograd.grad(
            self.outputs, likes, curved, retain_graph=True, allow_unused=True
        )
        return torch.cat(
            [
                column.new_zeros(like.numel()) if f is None else f.reshape(-1).to(column.dtype)
                for f, like in zip(found, likes, strict=True)
            ]
        )


def _refusal(others: Sequence[str], trouble: str) -> MeasurementError:
    names = ", ".join(dict.fromkeys(others))
    called = f" It calls {names}." if names else ""
    return MeasurementError(
        f"matrix='ggn' is the curvature of the criterion alone, and the loss {trouble}.{called}",
        REMEDY,
    )

"""The Gauss-Newton part of a Hessian as an operator: what the criterion alone curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lla_callbacks.linalg.accumulation import norm
from lla_callbacks.linalg.errors import MeasurementError, is_out_of_memory
from lla_callbacks.linalg.gathering import gathering, sources
from lla_callbacks.linalg.hessian import (
    HessianOperator,
    explaining_missing_derivative,
    is_since,
    mark,
    refuse_dead_ends,
    without_value,
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
            nonlocal loss
            found, (value, slope) = self._linearised(term)
            if keep and term.keep and self._keeps:
                self._linear.append((term.weight, found))
            gradient.add_(slope, alpha=term.weight)
            loss += term.weight * value

        self._visit_terms(visit, lambda term: True)
        return loss, gradient

    def _local_product(self, columns: Tensor, chosen: Sequence[int]) -> Tensor:
        total: Tensor | None = None
        if self._keeps and self._linear:
            try:
                total = torch.zeros_like(columns)
                for weight, found in self._linear:
                    self._multiply(found, weight, columns, chosen, total)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                total = None
                self._forget_graphs()
        keeps = self._keeps

        def visit(term: LossTerm) -> None:
            nonlocal total
            found, _ = self._linearised(term, again=True)
            part = torch.zeros_like(columns)
            self._multiply(found, term.weight, columns, chosen, part, last=found.is_own)
            # Once nothing can go wrong any more, since it would be tried again.
            total = part if total is None else total.add_(part)

        self._visit_terms(visit, lambda term: not (term.keep and keeps))
        return torch.zeros_like(columns) if total is None else total

    def _multiply(
        self,
        found: _Linearised,
        weight: float,
        columns: Tensor,
        chosen: Sequence[int],
        total: Tensor,
        *,
        last: bool = False,
    ) -> None:
        """Add a batch's products to a total; ``last``: its graphs are not needed any more."""
        with self._differentiating(), explaining_missing_derivative():
            for j, column in enumerate(columns.T):
                free = last and j + 1 == columns.shape[1]
                found.multiply(self.space, column, chosen, weight, total[:, j], self._large, free)

    def _linearised(
        self, term: LossTerm, *, again: bool = False
    ) -> tuple[_Linearised, tuple[float, Tensor]]:
        """Return one batch made linear, with its loss and gradient.

        Args:
            term: The batch.
            again: Whether it was asked before: it is not checked again, and has no gradient.
        """
        return self._trimming(term, partial(self._made_linear, again=again))

    def _made_linear(
        self, term: LossTerm, *, again: bool
    ) -> tuple[_Linearised, tuple[float, Tensor]]:
        with self._differentiating():
            begin = mark()
            total, calls, others = self._heard(term.evaluate)
            value, own = loss_value(total), is_since(total, begin)
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
            outputs = [c.outputs for c, _ in pairs]
            curved = [_Curved(c, w.detach()) for c, w in pairs]
            gradient = torch.empty(0) if again else self._checked(total, outputs, curved, others)
            seeds = [torch.zeros_like(z, requires_grad=True) for z in outputs]
            with explaining_missing_derivative(), refusing_lost_graphs(total):
                pulled = torch.autograd.grad(
                    outputs, parameters, seeds, create_graph=True, allow_unused=True
                )
                refuse_dead_ends(pulled)
            linear = [
                None if p is None or not p.requires_grad else without_value(p) for p in pulled
            ]
        return _Linearised(outputs, curved, seeds, linear, own), (value, gradient)

    def _checked(
        self,
        loss: Tensor,
        outputs: Sequence[Tensor],
        curved: Sequence[_Curved],
        others: Sequence[str],
    ) -> Tensor:
        """Return the gradient of a loss that is its criteria and nothing beside.

        Raises:
            MeasurementError: If it is not.
        """

        def flat(of: Sequence[Tensor], times: Sequence[Tensor] | None) -> Tensor:
            found = torch.autograd.grad(
                of, self.space.tensors, times, retain_graph=True, allow_unused=True
            )
            return self.space.flatten(found)

        gradient = flat([loss.reshape(())], None)
        through = flat(outputs, [c.slope.detach() for c in curved])
        size = max(norm(gradient), norm(through))
        if norm(through.sub_(gradient)) > math.sqrt(self.eps) * size:
            raise _refusal(others, "has a part beside its criteria (a weight penalty, say)")
        return gradient


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
    """One batch, its network as a linear map and its criteria as quadratic forms.

    Attributes:
        outputs: What the criteria are of, with the network's graph.
        curved: The criteria.
        seeds: ``u``, of which ``pulled`` is a linear function.
        pulled: ``J'u``, their graphs without their values.
        is_own: Whether the graph is nobody else's.
    """

    outputs: list[Tensor]
    curved: list[_Curved]
    seeds: list[Tensor]
    pulled: list[Tensor | None]
    is_own: bool

    def multiply(
        self,
        space: ParameterSpace,
        column: Tensor,
        chosen: Sequence[int],
        weight: float,
        total: Tensor,
        places: Mapping[int, int],
        free: bool,
    ) -> None:
        """Add a product times a weight to a vector, where it stands.

        Args:
            space: The parameters.
            column: ``v`` of the chosen ones, shape ``(size,)``.
            chosen: Which.
            weight: The weight.
            total: Shape ``(size,)``.
            places: Of large parameters, whose parts are added as they come.
            free: Whether the graphs are not needed any more.
        """
        likes = [space.tensors[i] for i in chosen]
        sizes = [like.numel() for like in likes]
        sources_of, cotangents = [], []
        for i, like, part in zip(chosen, likes, torch.split(column, sizes), strict=True):
            pulled = self.pulled[i]
            if pulled is not None:
                sources_of.append(pulled)
                cotangents.append(part.reshape(like.shape).to(pulled.dtype))
        if not sources_of:
            return
        pushed = torch.autograd.grad(
            sources_of, self.seeds, cotangents, retain_graph=not free, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        curved = [weight * c.product(delta) for c, delta in zip(self.curved, pushed, strict=True)]
        parts = torch.split(total, sizes)
        to = {
            i: part.view(like.shape)
            for i, like, part in zip(chosen, likes, parts, strict=True)
            if id(like) in places and like.dtype == total.dtype
        }
        with gathering(sources(self.outputs, places) if to else (), to, begun=to):
            found = torch.autograd.grad(
                self.outputs, likes, curved, retain_graph=not free, allow_unused=True
            )
        for part, gradient in zip(parts, found, strict=True):
            if gradient is not None:
                part.add_(gradient.reshape(-1).to(part.dtype))


def _refusal(others: Sequence[str], trouble: str) -> MeasurementError:
    names = ", ".join(dict.fromkeys(others))
    called = f" It calls {names}." if names else ""
    return MeasurementError(
        f"matrix='ggn' is the curvature of the criterion alone, and the loss {trouble}.{called}",
        REMEDY,
    )

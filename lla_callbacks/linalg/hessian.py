"""The Hessian of a loss as an operator: exact products by double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from lla_callbacks.linalg.distributed import local_part, of_part, part_like
from lla_callbacks.linalg.errors import NoSecondDerivativeError, is_out_of_memory, remedy_for
from lla_callbacks.linalg.gathering import Source, gathering, large, sources
from lla_callbacks.linalg.heap import trimmed
from lla_callbacks.linalg.loss_operator import LossOperator, LossTerm, loss_value
from lla_callbacks.linalg.lost_graphs import refusing_lost_graphs
from lla_callbacks.linalg.sharing import Share

Gradients = list[Tensor | None]
Made = TypeVar("Made")


class HessianOperator(LossOperator):
    """The exact Hessian of ``L = sum_b weight_b L_b`` with respect to named parameters.

    A product is ``H v = d/dtheta <dL/dtheta, v>``: the graph of the gradient is built once
    a batch and serves all products of the operator's life, so that a product costs about
    two gradients (the floor of reverse mode with a shared primal). Reverse over reverse
    was chosen since it is right through batch statistics, where torch 2.13 gets
    ``torch.func.hessian`` and reverse-over-forward wrong without a word, and works for
    recurrent layers and attention (math kernel), where forward mode does not.

    Where memory runs out, vectors go through in smaller chunks, then graphs are no longer kept
    between products, then batches are halved if they can be; the result stays the same.

    Args:
        terms: The batches of this process.
        parameters: Name to leaf tensor with ``requires_grad``.
        chunk_size: How many columns of a block are pushed through one backward pass
            (``is_grads_batched``). 1 is the default: measured on a ResNet-20 and a
            transformer, larger chunks change the time of a product by -25 % to +20 %
            and multiply its memory. The result does not depend on it.
        context: Entered around every forward and backward pass.
        share: The processes; see :class:`~lla_callbacks.linalg.loss_operator.LossOperator`.

    Raises:
        NonFiniteError: If a loss, a gradient or a product is not finite.
        NoSecondDerivativeError: If autograd cannot differentiate the gradient.
        OutOfMemoryError: If memory runs out although everything was halved.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        parameters: Mapping[str, Tensor],
        *,
        chunk_size: int = 1,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        share: Share | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; give 1 or more.")
        super().__init__(terms, parameters, context=context, share=share)
        self._chunk_size = chunk_size
        # The kept batches' gradients are added up once, so that one backward pass serves all.
        self._kept: Gradients = [None] * len(self.space.tensors)
        self._keeps = True
        self._large = large(self.space.tensors)
        # What gives something to large parameters in the graphs that are kept, once it was asked.
        self._sources: list[Source] | None = None
        # Whether what is free is given back while graphs are made that do not fit.
        self._trims = True
        self._begin(self._differentiate_all)

    def release(self) -> None:
        """Drop the kept graphs and their memory; the operator cannot multiply any more."""
        super().release()
        self._kept, self._sources = [], None

    def _gradient_again(self) -> Tensor:
        return self._differentiate_all(keep=False)[1]

    def _differentiate_all(self, *, keep: bool = True) -> tuple[float, Tensor]:
        """Return loss and gradient, and keep the graphs that are to be kept."""
        loss, gradient = 0.0, self.space.zeros()

        def visit(term: LossTerm) -> None:
            nonlocal loss
            value, gradients, _ = self._differentiate(term)
            if keep and term.keep and self._keeps:
                self._keep(gradients)
            # Once nothing can go wrong any more, since it would be tried again.
            self.space.add_to(gradient, gradients)
            loss += term.weight * value

        self._visit_terms(visit, lambda term: True)
        return loss, gradient

    def _local_product(self, columns: Tensor, chosen: Sequence[int]) -> Tensor:
        total: Tensor | None = None
        if self._keeps and self._holds_graphs:
            try:
                total = self._in_chunks(self._kept, columns, chosen)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._forget_graphs()
        # As it is now: should graphs be dropped on the way, their part is in already.
        keeps = self._keeps

        def visit(term: LossTerm) -> None:
            nonlocal total
            _, gradients, own = self._differentiate(term)
            part = self._in_chunks(gradients, columns, chosen, last=own)
            total = part if total is None else total.add_(part)

        self._visit_terms(visit, lambda term: not (term.keep and keeps))
        return torch.zeros_like(columns) if total is None else total

    def _visit_terms(
        self, visit: Callable[[LossTerm], None], wanted: Callable[[LossTerm], bool]
    ) -> None:
        """Visit terms one by one, making room where memory runs out."""
        i = 0
        while i < len(self._terms):
            if wanted(self._terms[i]):
                trouble: Exception | None = None
                try:
                    visit(self._terms[i])
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    # Without the frames, which hold the graphs that take the memory.
                    trouble = error.with_traceback(None)
                if trouble is not None:
                    if self._keeps and self._holds_graphs:
                        self._forget_graphs()
                    else:
                        self._halve(i, trouble)
                    continue
            i += 1

    @property
    def _holds_graphs(self) -> bool:
        return any(gradient is not None for gradient in self._kept)

    def _forget_graphs(self) -> None:
        """Keep no graph from here on: every batch is differentiated anew for each product."""
        self._kept, self._keeps = [None] * len(self.space.tensors), False
        self._sources = None

    def _keep(self, gradients: Gradients) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            for i, gradient in enumerate(gradients):
                # A gradient without a graph is constant in the parameters: its rows are zero.
                if gradient is not None and gradient.requires_grad:
                    # Another tensor of the same graph, whose entries are nobody else's.
                    known, part = self._kept[i], gradient.clone()
                    with _of_no_value(known):
                        self._kept[i] = part if known is None else known + part
                    _forget_value(self._kept[i])

    def _differentiate(self, term: LossTerm) -> tuple[float, Gradients, bool]:
        """Return the loss of one batch, and the gradients of its summand, to be derived once more.

        And whether all of their graph was made here, so that nobody else may need it.
        """
        return self._trimming(term, self._differentiated)

    def _trimming(self, term: LossTerm, make: Callable[[LossTerm], Made]) -> Made:
        """Return what is made of a batch; what is free meanwhile is given back if it is large."""
        large = self._trims and self.device.type == "cpu" and not (term.keep and self._keeps)
        if large:
            try:
                with trimmed():
                    return make(term)
            except RuntimeError as error:
                # torch.func inside of a loss refuses hooks.
                if "saved tensor hooks" not in str(error):
                    raise
                self._trims = False
        return make(term)

    def _differentiated(self, term: LossTerm) -> tuple[float, Gradients, bool]:
        with self._differentiating():
            begin = mark()
            loss = term.evaluate()
            value = loss_value(loss)
            own = is_since(loss, begin)
            with explaining_missing_derivative(), refusing_lost_graphs(loss):
                gradients = torch.autograd.grad(
                    term.weight * loss.reshape(()),
                    self.space.tensors,
                    create_graph=True,
                    allow_unused=True,
                )
                refuse_dead_ends(gradients)
        return value, list(gradients), own

    def _in_chunks(
        self, gradients: Gradients, columns: Tensor, chosen: Sequence[int], *, last: bool = False
    ) -> Tensor:
        """Return the product of one gradient graph with all columns, chunk by chunk.

        Args:
            gradients: The graph.
            columns: The vectors, ``(size, k)``.
            chosen: Which parameters'.
            last: Whether nothing else is asked of this graph. It is then taken down while it is
                walked for the last time, so that what the walk holds takes the place of what it has
                left behind.
        """
        while True:
            chunks = torch.split(columns, self._chunk_size, dim=1)
            # Larger chunks may have to be tried again, smaller.
            final = len(chunks) - 1 if last and self._chunk_size == 1 else -1
            try:
                parts = [
                    self._backward(gradients, chunk, chosen, free=i == final)
                    for i, chunk in enumerate(chunks)
                ]
                return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            except Exception as error:
                if self._chunk_size == 1 or not is_out_of_memory(error):
                    raise
            self._chunk_size //= 2

    def _backward(
        self, gradients: Gradients, columns: Tensor, chosen: Sequence[int], *, free: bool = False
    ) -> Tensor:
        """Return the product of one gradient graph, ``(size, k)``, by one backward pass."""
        likes = [self.space.tensors[i] for i in chosen]
        sizes = [local_part(like).numel() for like in likes]
        num_columns = columns.shape[1]
        outputs: list[Tensor] = []
        cotangents: list[Tensor] = []
        for i, like, part in zip(chosen, likes, torch.split(columns, sizes), strict=True):
            gradient = gradients[i]
            if gradient is not None and gradient.requires_grad:
                outputs.append(gradient)
                part = part.T.to(gradient.dtype)
                if num_columns > 1:
                    cotangents.append(part.reshape(num_columns, *like.shape))
                else:
                    cotangents.append(of_part(part, like))
        if not outputs:
            return torch.zeros_like(columns)
        batched = num_columns > 1
        found: Tensor | None = None
        to: dict[int, Tensor] = {}
        known: Sequence[Source] = () if batched else self._sources_of(gradients)
        if known:
            found = columns.new_empty(num_columns, sum(sizes))
            parts = torch.split(found[0], sizes)
            to = {
                i: part.view(like.shape)
                for i, like, part in zip(chosen, likes, parts, strict=True)
                if id(like) in self._large and like.dtype == columns.dtype
            }
        with (
            self._differentiating(),
            explaining_missing_derivative(),
            gathering(known, to) as written,
        ):
            products: Gradients = list(
                torch.autograd.grad(
                    outputs,
                    likes,
                    cotangents,
                    retain_graph=not free,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
            )
        if found is None:
            found = columns.new_empty(num_columns, sum(sizes))
        for k, (place, like, i) in enumerate(
            zip(torch.split(found, sizes, dim=1), likes, chosen, strict=True)
        ):
            # Each is given up once it is written.
            product, products[k] = products[k], None
            if product is None:
                if i not in written:
                    place.zero_()
                continue
            # Written where it belongs, however it lies: no second copy is made.
            part = product.detach() if batched else part_like(product.detach(), like)[None]
            shape = part.shape[1:] or (1,)
            where = place.view(num_columns, *shape)
            part = part.reshape(num_columns, *shape)
            if i in written:
                where.add_(part)
            else:
                where.copy_(part)
        return found.T

    def _sources_of(self, gradients: Gradients) -> list[Source]:
        """Return what gives something to large parameters in the graph of some gradients."""
        if gradients is not self._kept:
            return sources(gradients, self._large)
        if self._sources is None:
            self._sources = sources(gradients, self._large)
        return self._sources


def mark() -> int:
    """Return the number of the node that autograd makes now; later ones have higher numbers."""
    node: Any = torch.zeros((), requires_grad=True).exp().grad_fn
    return int(node._sequence_nr())


def is_since(loss: Tensor, mark: int) -> bool:
    """Return whether no node of a loss's graph is older than a mark.

    Older ones are of a graph that the user holds (weights that another network made, say) and may
    walk again. Where parameters are stored counts as no node.
    """
    waiting: list[Any] = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node._sequence_nr() < mark:
            return False
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
    return True


def without_value(tensor: Tensor) -> Tensor:
    """Return a tensor of the same graph without its entries, of which the graph knows nothing."""
    # Another one, whose entries are nobody else's.
    found = tensor.clone()
    _forget_value(found)
    return found


def _forget_value(tensor: Tensor | None) -> None:
    """Drop a tensor's entries, of which its graph knows nothing, and keep its graph."""
    if type(tensor) is Tensor:
        tensor.untyped_storage().resize_(0)


@contextmanager
def _of_no_value(tensor: Tensor | None) -> Iterator[None]:
    """Give a tensor whose entries were dropped some entries, any, while it is added to another."""
    if type(tensor) is Tensor:
        tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
    try:
        yield
    finally:
        _forget_value(tensor)


def refuse_dead_ends(gradients: Sequence[Tensor | None]) -> None:
    """Raise if a gradient's graph ends where a function forbids a second derivative.

    Autograd raises only when it runs such a node, and it runs none that leads to no
    parameter: the missing part of the product would silently count as zero. So it would where
    an operator's kernel is registered without a derivative (``torch.library`` or C++), of which
    autograd warns when it runs it.
    """
    reached = {g.grad_fn for g in gradients if g is not None and g.grad_fn is not None}
    waiting = list(reached)
    while waiting:
        node = waiting.pop()
        if node.name().rpartition("::")[2] == "Error":
            raise RuntimeError("a function is marked once_differentiable")
        if node.name().endswith("WarnNotImplemented"):
            raise RuntimeError("a kernel is registered with no autograd formula")
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
        signs = (
            "is not implemented",
            "double backward",
            "create_graph",
            "once_differentiable",
            "no autograd formula",
        )
        if not any(sign in text for sign in signs):
            raise
        raise NoSecondDerivativeError(
            f"an operation has no second derivative ({text.splitlines()[0]}).",
            remedy_for(text),
        ) from error

"""Custom functions whose backward pass loses the graph, so that a part of the Hessian would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


@contextmanager
def refusing_lost_graphs(loss: Tensor) -> Iterator[None]:
    """Raise if, in a backward pass inside, a custom function's result has no graph.

    A backward pass is linear in what comes in. Where that depends on the parameters and what
    goes out does not, the function was computed where autograd does not look (a kernel of
    another language, ``no_grad``), and its share of the second derivative would silently
    count as zero.

    Not seen, since nothing gives them away: functions whose backward pass detaches what it
    saved, and such functions of which the loss is linear.

    Raises:
        RuntimeError: Naming the function and ``double backward``.
    """
    lost: list[str] = []
    handles = [node.register_hook(_watch(node.name(), lost)) for node in _custom_nodes(loss)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if lost:
        raise RuntimeError(f"{lost[0]} has no graph for a double backward pass")


def _watch(name: str, lost: list[str]) -> Callable[..., None]:
    def look(going: Sequence[Tensor | None], coming: Sequence[Tensor | None]) -> None:
        known = [gradient for gradient in coming if gradient is not None]
        if known and all(gradient.requires_grad for gradient in known):
            for gradient in going:
                # Zeros may be meant: a function that lets no gradient through.
                if gradient is not None and not gradient.requires_grad and bool(gradient.any()):
                    lost.append(name)

    return look


def _custom_nodes(loss: Tensor) -> list[Node]:
    """Return the nodes of a graph that functions of the user's own made, in Python or C++."""
    waiting = [loss.grad_fn]
    seen = set(waiting)
    found: list[Node] = []
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if isinstance(node, BackwardCFunction) or "CppNode" in node.name():
            found.append(node)
        for below, _ in node.next_functions:
            if below not in seen:
                seen.add(below)
                waiting.append(below)
    return found

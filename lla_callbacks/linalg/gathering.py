"""Backward passes that add up what large parameters get where it belongs, as it comes.

A weight of a linear layer gets something from the forward pass and something from the backward pass
of each batch. Autograd adds these up out of place, since what comes is a transposed view, and keeps
what waits for the rest: four vectors as long as the weights for a product over two batches
(docs/benchmarks/engines.md). Here whatever comes is added to the result and given up: two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Entries from which a parameter counts as large: 4 MiB. Choice; those of smaller ones are not felt.
LEAST = 2**20
# The node of a transposition.
TURNED = "TBackward0"


@dataclass(frozen=True)
class Source:
    """A node that gives something to large parameters.

    Attributes:
        node: The node.
        edges: Of each: which of its results, which parameter, and whether it is transposed.
    """

    node: Any
    edges: tuple[tuple[int, int, bool], ...]


def large(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Return the places of large parameters, by their identity."""
    return {
        id(t): i for i, t in enumerate(tensors) if type(t.data) is Tensor and t.numel() >= LEAST
    }


def sources(outputs: Iterable[Tensor | None], places: Mapping[int, int]) -> list[Source]:
    """Return all nodes of a graph that give something to large parameters, each once.

    Args:
        outputs: Where a backward pass will begin.
        places: As :func:`large` gives them.
    """
    if not places:
        return []

    def end(node: Any) -> tuple[int | None, bool]:
        """Return which large parameter is at the end of a row of transpositions, and if turned."""
        turned = False
        while node is not None and node.name() == TURNED:
            node, turned = node.next_functions[0][0], not turned
        return places.get(id(getattr(node, "variable", None))), turned

    waiting = [t.grad_fn for t in outputs if t is not None and t.grad_fn is not None]
    seen = set(waiting)
    found = []
    while waiting:
        node: Any = waiting.pop()
        edges = []
        for k, (below, _) in enumerate(node.next_functions):
            if below is None:
                continue
            place, turned = end(below)
            if place is not None:
                edges.append((k, place, turned))
            if below not in seen:
                seen.add(below)
                waiting.append(below)
        # What turns a weight around has nothing left to give.
        if edges and node.name() != TURNED:
            found.append(Source(node, tuple(edges)))
    return found


@contextmanager
def gathering(
    found: Sequence[Source], to: Mapping[int, Tensor], *, begun: Iterable[int] = ()
) -> Iterator[set[int]]:
    """Add what backward passes inside give to large parameters to tensors; these are not given it.

    Args:
        found: The nodes that do.
        to: Place of a parameter to where its sum is to be, shaped as the parameter, any entries.
        begun: Those of which something is there already, to which the rest is added.

    Yields:
        The places where something has been written; the others hold what they held.
    """
    written = set(begun)

    def hook(
        edges: Sequence[tuple[int, int, bool]],
    ) -> Callable[[Sequence[Tensor | None], object], Any]:
        def take(going: Sequence[Tensor | None], _: object) -> tuple[Tensor | None, ...]:
            left = list(going)
            for k, place, turned in edges:
                part = going[k]
                if part is None or place not in to:
                    continue
                part = part.t() if turned else part
                if place in written:
                    to[place].add_(part)
                else:
                    to[place].copy_(part)
                    written.add(place)
                left[k] = None
            return tuple(left)

        return take

    with ExitStack() as stack:
        for source in found:
            stack.callback(source.node.register_hook(hook(source.edges)).remove)
        yield written

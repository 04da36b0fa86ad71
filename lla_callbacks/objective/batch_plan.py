"""Which graphs of an objective's batches are kept, and which batches go through in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

from lla_callbacks.linalg.errors import MeasurementError, OutOfMemoryError, is_out_of_memory
from lla_callbacks.linalg.loss_operator import LossTerm
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.linalg.splitting import check_split
from lla_callbacks.objective.batches import part_counts, split
from lla_callbacks.objective.counting import UnknownSizeError, sample_count
from lla_callbacks.objective.held_loss import HeldLoss, trainable
from lla_callbacks.objective.loss import Statistics
from lla_callbacks.objective.memory import (
    MemoryPlan,
    allowed_memory,
    basis_room,
    saved_bytes,
)
from lla_callbacks.objective.training_step import SkippedBatchError

Context = Callable[[], AbstractContextManager[None]]


class BatchPlan:
    """What of an objective's batches is in memory at a time.

    Args:
        held: The loss and its batches.
        max_memory: Bytes that a measurement may take; see
            :class:`~lla_callbacks.objective.memory.MemoryPlan`.
    """

    def __init__(self, held: HeldLoss, max_memory: int | None) -> None:
        self.held = held
        self.max_memory = max_memory

    def cut(self, microbatch_size: int) -> None:
        """Cut the held batches into parts of at most so many samples, which must add up.

        Raises:
            MeasurementError: If they do not.
        """
        places = self.held.places
        whole = self.held.batches
        counts = [sample_count(batch, self.held.batch_size) for batch in whole]
        in_parts = [
            list(self._split(batch, microbatch_size, n))
            for batch, n in zip(whole, counts, strict=True)
        ]
        sizes = [part_counts(n, microbatch_size) for n in counts]
        self.held.counts = [n for part in sizes for n in part]
        self.held.batches = [part for parts in in_parts for part in parts]
        self.held.places = [k for k, parts in zip(places, in_parts, strict=True) for _ in parts]
        for i, (batch, parts) in enumerate(zip(whole, in_parts, strict=True)):
            # A gradient once a batch; its loss at every measurement, and the first one's
            # gradient too, since samples may not see each other at first.
            known = i > 0 and i in self.held.findings.split
            name = f"batch {i + 1} of {len(whole)}"
            context = None if known else self.held.plain_context
            evaluate = partial(self.held.evaluate, place=places[i])
            with suppress(SkippedBatchError):
                check_split(evaluate, self.held.module, batch, parts, context, sizes[i], name=name)
            self.held.findings.split.add(i)
        self.held.num_samples = sum(self.held.counts)

    def terms(
        self,
        share: Share,
        engine: str | None,
        context: Context,
        statistics: Statistics,
        *,
        sharded: bool,
    ) -> list[LossTerm]:
        """Return this process's part of the batches, as memory allows."""
        parts = list(zip(self.held.batches, self.held.counts, self.held.places, strict=True))
        mine = parts[share.rank :: share.size]
        if sharded:
            # Whatever one process computes, all must, so that they can gather parameters.
            mine += [(parts[0][0], 0, parts[0][2])] * (-(-len(parts) // share.size) - len(mine))
        if engine == "difference":
            return [
                self._term(b, n, statistics, context, place=i, halve=not sharded)
                for b, n, i in mine
            ]
        # Of all batches, so that all processes come to the same decision.
        plan, kept = self._memory_plan(self.held.counts), 0
        if mine:
            kept = self._memory_plan([n for _, n, _ in mine]).num_kept if plan.parts == 1 else 0
            if plan.parts > 1:
                mine = self._in_parts(mine, plan)
        return [
            self._term(b, n, statistics, context, place=place, keep=i < kept)
            for i, (b, n, place) in enumerate(mine)
        ]

    def _term(
        self,
        batch: Any,
        count: int,
        statistics: Statistics,
        context: Context,
        *,
        place: int,
        keep: bool = False,
        halve: bool = True,
    ) -> LossTerm:
        """Return one batch as a summand, which can be halved where memory runs out."""

        def halves() -> list[LossTerm]:
            size = -(-count // 2)
            trouble = self._split_trouble(size, batch, count)
            if trouble is not None:
                unknown = "batch_size=" in trouble
                raise OutOfMemoryError(
                    f"there is not enough memory for one batch, and {trouble}"
                    if unknown
                    else "there is not enough memory for one batch, and its samples see each "
                    "other.",
                    "Lower num_samples, give a dataloader of smaller batches, or take mode='eval' "
                    "or engine='difference'.",
                )
            parts = zip(self._split(batch, size, count), part_counts(count, size), strict=True)
            return [self._term(b, n, statistics, context, place=place) for b, n in parts]

        return LossTerm(
            lambda: self.held.evaluate(batch, statistics, context, place=place),
            count / self.held.num_samples,
            keep=keep,
            guarded=lambda use: self.held.evaluate(batch, statistics, context, use, place),
            halves=halves if halve and count > 1 else None,
        )

    def _memory_plan(self, counts: Sequence[int]) -> MemoryPlan:
        """Return what fits, judged by what one forward pass saves."""
        if self.held.findings.saved is None:
            try:
                self.held.findings.saved = saved_bytes(
                    lambda: self.held.evaluate(self.held.batches[0]),
                    list(trainable(self.held.module).values()),
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Whole batches do not fit even once: they are halved as they come.
                return MemoryPlan(num_kept=0, parts=1, part_size=max(counts), graph=math.inf)
        per_sample = self.held.findings.saved / max(1, self.held.counts[0])
        weights = self._weight_bytes()
        return MemoryPlan.of([n * per_sample for n in counts], counts, weights, self.max_memory)

    def basis_room(self, engine: str) -> float:
        """Return the bytes that a Lanczos basis may take; see :func:`.memory.basis_room`.

        Args:
            engine: How products are computed. Differences keep no graph.
        """
        saved, graph = self.held.findings.saved or 0, 0.0
        if engine == "exact" and saved:
            plan = self._memory_plan(self.held.counts)
            graph = (
                plan.graph * max(1, plan.num_kept) if plan.parts == 1 else plan.graph / plan.parts
            )
        return basis_room(saved, graph, self._weight_bytes(), self.max_memory, engine)

    def _weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in trainable(self.held.module).values())

    def _in_parts(
        self, mine: Sequence[tuple[Any, int, int]], plan: MemoryPlan
    ) -> list[tuple[Any, int, int]]:
        """Return batches with those split that do not fit, each verified to be its parts' mean.

        Raises:
            OutOfMemoryError: If one is not, and ``max_memory`` was set.
        """
        found: list[tuple[Any, int, int]] = []
        for batch, count, place in mine:
            if count <= plan.part_size:
                found.append((batch, count, place))
                continue
            trouble = self._split_trouble(plan.part_size, batch, count)
            if trouble is None:
                parts = self._split(batch, plan.part_size, count)
                sizes = part_counts(count, plan.part_size)
                found += [(part, n, place) for part, n in zip(parts, sizes, strict=True)]
            elif self.max_memory is not None:
                raise OutOfMemoryError(
                    f"the graph of one batch takes about {plan.graph / 2**20:,.0f} MiB, "
                    f"max_memory={self.max_memory} allows {self.max_memory / 2**20:,.0f} MiB, "
                    f"and a batch of {count} samples cannot be split: {trouble}",
                    "Raise max_memory, lower the batch size, or take engine='difference'.",
                )
            else:
                found.append((batch, count, place))
        return found

    def _split(self, batch: Any, size: int, count: int) -> Iterator[Any]:
        # Where the user said how many there are, what has another size belongs to all parts;
        # whether the parts add up is verified.
        return split(batch, size, count, strict=self.held.batch_size is None)

    def _split_trouble(self, size: int, batch: Any, count: int) -> str | None:
        """Return why parts of a batch do not add up to it, judged by its loss and gradient.

        Asked anew for each batch and measurement, since samples may not see each other yet (a head
        of zeros hides batch statistics); once they do, no more.

        Args:
            size: Samples in a part.
            batch: The batch, or a part of one.
            count: Its samples.
        """
        if self.held.findings.unsplittable is None:
            try:
                if self.held.batch_size is None:
                    sample_count(batch)
                parts, sizes = list(self._split(batch, size, count)), part_counts(count, size)
                if len(parts) < 2:
                    return "it has no parts."
                check_split(
                    self.held.evaluate,
                    self.held.module,
                    batch,
                    parts,
                    self.held.plain_context,
                    sizes,
                )
            except UnknownSizeError as error:
                self.held.findings.unsplittable = str(error)
            except (MeasurementError, TypeError) as error:
                self.held.findings.unsplittable = str(error).partition(" Leave out")[0]
        return self.held.findings.unsplittable

    @property
    def room(self) -> float:
        """Bytes that a measurement may take."""
        return allowed_memory(self.held.findings.saved or 0, self._weight_bytes(), self.max_memory)

"""The values of a loss and its gradient, all of them asked inside of one guard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from lla_callbacks.linalg.difference import first_derivative
from lla_callbacks.linalg.loss_operator import loss_value
from lla_callbacks.linalg.sharing import Share, all_or_none
from lla_callbacks.linalg.space import local_part
from lla_callbacks.objective.evaluation import Evaluator, evaluating
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.loss import Statistics, load_statistics
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import space_of
from lla_callbacks.objective.sharded import is_sharded
from lla_callbacks.objective.state import unchanged_weights
from lla_callbacks.objective.training_step import at_place


class Prober:
    """Asks a loss for values and a gradient; for use in a ``with`` statement, again and again.

    The guard of the module's state costs a small network as much as twenty passes, so that it is
    entered once, with the first question. The weights stand where they were after each of them.

    Args:
        objective: The loss.
        share: Processes that share the batches; all come to the same numbers.

    Attributes:
        space: Layout of the weights.
        vectors: How vectors of their length are held.
        is_sharded: Whether ``fully_shard`` was applied to the module.
        num_values: How many values were asked for along directions.
    """

    def __init__(self, objective: Objective, share: Share) -> None:
        self.objective = objective
        self.share = share
        self.space = space_of(objective)
        self.vectors = self.space.vectors(share)
        self.is_sharded = is_sharded(objective.module)
        self.num_values = 0
        self._live = [local_part(t).detach() for t in self.space.tensors]
        # Not the frozen ones, in whose places the guard puts copies.
        self._trained = [p for p in objective.module.parameters() if p.requires_grad]
        self._forget()

    @property
    def eps(self) -> float:
        """Relative rounding of the loss's arithmetic."""
        found = self.objective.coarse
        own = max(torch.finfo(self.space.precision).eps, self.objective.findings.rounding)
        return own if found is None else max(own, torch.finfo(found).eps)

    def _forget(self) -> None:
        self._stack = ExitStack()
        self._evaluate: Evaluator | None = None
        self._known: Statistics | None = None
        self._family: Offsets | None = None
        self._start: Tensor | None = None

    def __enter__(self) -> Prober:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stack = self._stack
        self._forget()
        stack.__exit__(kind, error, trace)

    def _enter(self) -> tuple[Evaluator, Statistics]:
        """Enter the guard, and find the statistics that derivatives are taken at."""
        if self._evaluate is None:
            guard = evaluating(self.objective, check_weights=False)
            self._evaluate = self._stack.enter_context(guard)
        if self._known is None:
            held = self.objective.mode == "recalibrate"
            self._known = self._evaluate.statistics() if held else ()
        return self._evaluate, self._known

    def twice(self) -> list[float]:
        """Return the loss from two evaluations.

        Raises:
            MeasurementError: If the loss changes the weights.
        """

        def compute() -> list[float]:
            with unchanged_weights(self.objective.module):
                inside = self._enter()
                return [self._part(*inside), self._part(*inside)]

        found = self._totals(all_or_none(self.share, compute))
        self.objective.keeps_weights = True
        return found

    def gradient(self) -> tuple[float, Tensor]:
        """Return the loss and its gradient ``(dim,)``; see :meth:`Objective.gradient`."""
        objective, share = self.objective, self.share
        if objective.arithmetic is not None:
            # In training's own arithmetic, which is off inside of the guard.
            self.__exit__(None, None, None)
            return objective.gradient(share)

        def compute() -> tuple[float, Tensor]:
            value, total = 0.0, self.space.zeros()
            with unchanged_weights(objective.module):
                evaluate, statistics = self._enter()
                for i in range(share.rank, len(objective.batches), share.size):
                    weight = objective.counts[i] / objective.num_samples
                    part, gradients = self._differentiated(evaluate, statistics, i)
                    value += weight * part
                    self.space.add_to(total, gradients, weight)
            return value, total

        value, total = all_or_none(share, compute)
        if share.size > 1:
            (value,) = self._totals([value])
            total = share.total(total)
        return value, total

    def _differentiated(
        self, evaluate: Evaluator, statistics: Statistics, i: int
    ) -> tuple[float, Sequence[Tensor | None]]:
        objective = self.objective
        for p in self._trained:
            # A step may turn parts off, and accumulate gradients of its own.
            if not p.requires_grad:
                p.requires_grad_(True)
            p.grad = None
        copier = evaluate.start(i)
        load_statistics(statistics)
        place = objective.place(i)
        with torch.enable_grad(), objective.plain_context(), at_place(place):
            batch = objective.copied(i, copier)
            loss = objective.loss(objective.module, batch)
            if copier.refusals:
                raise copier.refusals[0]
            objective.check_finite(loss, place)
            if loss.is_floating_point():
                rounding, findings = torch.finfo(loss.dtype).eps, objective.findings
                if rounding > torch.finfo(self.space.precision).eps:
                    findings.rounding = max(findings.rounding, rounding)
            return loss_value(loss), first_derivative(loss, self.space.tensors)

    def turn(self, unit: Tensor) -> None:
        """Let values be asked for along a direction, shape ``(dim,)``."""
        if self._family is None:
            self._start = self._flat()
            self._family = Offsets(self.space, [unit])
            # Once more on the way out, where no signal comes between.
            self._stack.callback(self._family.restore)
        else:
            self._family.turn([unit])

    def values(self, gradient: Tensor, steps: Sequence[float]) -> list[tuple[float, float]]:
        """Return the loss at steps along the direction, and how much it should have risen.

        By the gradient, and by steps as they were rounded into the weights.

        Args:
            gradient: Shape ``(dim,)``.
            steps: How far.
        """

        def compute() -> tuple[list[float], list[float]]:
            inside, family, start = self._enter(), self._family, self._start
            assert family is not None
            assert start is not None
            found, rises = [], []
            try:
                for step in steps:
                    family.place([step])
                    moved = self._flat().sub_(start)
                    rises.append(self.vectors.inner(gradient, moved, wide=True))
                    found.append(self._part(*inside))
            finally:
                family.restore()
            return found, rises

        found, rises = all_or_none(self.share, compute)
        self.num_values += len(steps)
        return list(zip(self._totals(found), rises, strict=True))

    def _flat(self) -> Tensor:
        """Return the weights in one vector."""
        return torch.cat([part.reshape(-1).to(self.space.dtype) for part in self._live])

    def _part(self, evaluate: Evaluator, statistics: Statistics) -> float:
        """Return this process's part of the loss."""
        objective, share = self.objective, self.share
        if share.size == 1 and not self.is_sharded:
            return evaluate.row(statistics)[0]
        total, count = 0.0, len(objective.counts)
        mine = list(range(share.rank, count, share.size))
        # Whatever one process computes, all must, so that they can gather parameters.
        spare = -(-count // share.size) - len(mine) if self.is_sharded else 0
        for i in mine:
            weight = objective.counts[i] / objective.num_samples
            total += weight * float(evaluate.run(i, statistics)[0].detach())
        for _ in range(spare):
            evaluate.run(0, statistics)
        return total

    def _totals(self, parts: Sequence[float]) -> list[float]:
        if self.share.size == 1:
            return list(parts)
        found: list[float] = self.share.total(torch.tensor(parts, dtype=torch.float64)).tolist()
        return found

"""An objective at many points of an affine set of weights: in place, or batched by vmap."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lla_callbacks.linalg.sharing import Alone, Share, fail_together
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.bare_passes import BarePasses
from lla_callbacks.objective.batched import BatchedEvaluator
from lla_callbacks.objective.checks import one_of, positive, settle
from lla_callbacks.objective.evaluation import Evaluator, Predict, evaluating
from lla_callbacks.objective.families import Family
from lla_callbacks.objective.grid import Keep, gathered
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.recorded_passes import LEAST_POINTS, MOST_BYTES, RecordedPasses

Evaluation = Literal["auto", "loop", "vmap"]

# A pass of fewer seconds than this is bound by launching its operations, and only then does
# batching points pay (docs/benchmarks/planes.md); a processor launches faster than a device.
LAUNCH_BOUND, LAUNCH_BOUND_ON_CPU = 0.002, 0.00025
# Points that are evaluated alone first.
TRIAL = 4
# Many points at once that take so much longer than alone are not tried again.
HOPELESS = 1.5
# Points that are evaluated from one start and then looked at together: so many, or for so long.
MOST_TOGETHER, LONGEST_TOGETHER = 32, 0.5
# Seconds between two calls of `keep`.
KEEP_EVERY = 5.0


@dataclass(frozen=True)
class PointSettings:
    """How points are evaluated.

    Attributes:
        metrics: Name to torchmetrics metric or function of (module, batch).
        predict: Gives torchmetrics their pairs; see
            :class:`~lla_callbacks.objective.evaluation.Evaluator`.
        evaluation: ``"loop"``: one point after another, in place. ``"vmap"``: many at once.
            ``"auto"``: whichever a short measurement finds faster; the loop's operations are
            recorded and done again without their Python, where that gives the same to the bit.
        time_budget: Seconds after which no further point is begun; ``None``: no limit.
    """

    metrics: Mapping[str, Any] | None = None
    predict: Predict | None = None
    evaluation: Evaluation = "auto"
    time_budget: float | None = None

    def __post_init__(self) -> None:
        one_of("evaluation", self.evaluation, Evaluation)
        budget = positive("time_budget", self.time_budget, unit=" of seconds", none=True)
        settle(self, time_budget=budget)


@dataclass(frozen=True)
class Values:
    """What was found at points.

    Attributes:
        table: Loss and metrics, shape ``(num_points, 1 + num_metrics)``, float64; NaN where a
            point was not evaluated.
        evaluated: Which points were, shape ``(num_points,)``.
        names: Of the metrics.
        method: ``"loop"``, ``"vmap"``, or ``"recorded"``: the loop, by its operations alone.
        num_new: Points evaluated now, and not before, by all processes.
    """

    table: Tensor
    evaluated: Tensor
    names: tuple[str, ...]
    method: str
    num_new: int


@contextmanager
def moving(objective: Objective, family: Family, settings: PointSettings) -> Iterator[Evaluator]:
    """Within this context the weights may be moved; they are put back whatever happens."""
    try:
        with evaluating(
            objective, metrics=settings.metrics, predict=settings.predict, check_weights=False
        ) as evaluate:
            yield evaluate
    finally:
        family.restore()


def evaluate_points(
    objective: Objective,
    family: Family,
    points: Tensor,
    settings: PointSettings,
    *,
    order: Sequence[int] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    exact: Sequence[int] = (),
    share: Share | None = None,
    keep: Keep | None = None,
    listener: Callable[[int], object] | None = None,
) -> Values:
    """Return loss and metrics at points, and leave everything as it was.

    Args:
        objective: The loss.
        family: From coordinates to weights.
        points: Coordinates, shape ``(num_points, num_coordinates)``, float64.
        settings: How.
        order: In which the points are visited; processes take turns along it.
        known: A table and mask of what an earlier call found; those points are left out.
        exact: Points that are evaluated one by one, since they are compared to the bit.
        share: The processes that divide the work.
        keep: Called with table and mask every few seconds, and at the end, also when the
            end is an exception.
        listener: Called after points, with their number.

    Raises:
        MeasurementError: If another process failed.
    """
    share = share or Alone()
    began = time.monotonic()
    width = 1 + len(settings.metrics or {})
    table = torch.full((len(points), width), float("nan"), dtype=torch.float64)
    done = torch.zeros(len(points), dtype=torch.bool)
    if known is not None:
        table[known[1]], done = known[0][known[1]], known[1].clone()
    before = done.clone()
    todo = [i for i in (order if order is not None else range(len(points))) if not done[i]]
    mine = todo[share.rank :: share.size]
    names: tuple[str, ...] = ()
    method = "loop"
    trouble: Exception | None = None
    try:
        # A loss that changes the weights is no function of them: refused here, once.
        if not objective.keeps_weights:
            objective()
        with moving(objective, family, settings) as evaluate:
            names = tuple(evaluate.names)
            visit = _Visit(evaluate, family, points, table, done, began, settings, listener, keep)
            method = visit.all(mine, exact)
    except Exception as error:  # noqa: BLE001 - raised below, in all processes together
        trouble = error
    finally:
        if keep is not None:
            keep(table, done)
    fail_together(share, trouble)
    table, done = gathered(share, table, done, before)
    return Values(table, done, names, method, int((done & ~before).sum()))


def is_late(space: ParameterSpace, late: bool) -> bool:
    """Return whether the time is over, in the same way in all processes that hold parts of weights.

    Args:
        space: Layout of the weights.
        late: Whether it is by this process's clock.
    """
    return not space.vectors().agreed(not late)


def space_of(objective: Objective) -> ParameterSpace:
    """Return the layout of an objective's variables."""
    return ParameterSpace(objective.variables)


@dataclass
class _Visit:
    """Goes through points, by the loop or batched."""

    evaluate: Evaluator
    family: Family
    points: Tensor
    table: Tensor
    done: Tensor
    began: float
    settings: PointSettings
    listener: Callable[[int], object] | None
    keep: Keep | None
    kept: float = 0.0

    def __post_init__(self) -> None:
        # Numbers go in and out of these without a tensor each.
        self._coordinates = self.points.tolist()
        self._table, self._done = self.table.numpy(), self.done.numpy()
        # What other processes do meanwhile counts against the longer passes; a device is waited
        # for.
        self._on_cpu = self.evaluate.objective.device.type == "cpu"
        self._clock = time.thread_time if self._on_cpu else time.perf_counter
        self._together = 1  # points from one start, next time; 0: each has its own
        self._tries = 3
        self._passes: BarePasses | None = None
        self._recorded: RecordedPasses | None = None
        self._may_record = False

    def all(self, mine: Sequence[int], exact: Sequence[int]) -> str:
        """Evaluate points in this order and return how."""
        waiting = list(mine)
        for i in [i for i in waiting if i in exact]:
            waiting.remove(i)
            self._one(i)
        batched = self._batched(waiting)
        self._may_record = self.settings.evaluation == "auto"
        while waiting and not self._late():
            if batched is None:
                if not self._again(waiting):
                    self._several(waiting)
                continue
            chunk = waiting[: batched.size]
            began = self._clock()
            try:
                found = batched(self.points[chunk])
            except Exception:
                if self.settings.evaluation == "vmap":
                    raise
                # Out of memory, say: the loop needs less.
                batched = None
                continue
            batched.learn(len(chunk), self._clock() - began)
            self._take(waiting, chunk, found)
        if batched is not None:
            return "vmap"
        if (recorded := self._recorded) is not None:
            self.done[recorded.found] = True
            if not recorded.are_right():
                self._forget(waiting)
                while waiting and not self._late():
                    self._several(waiting)
        return "loop" if self._recorded is None else "recorded"

    def _batched(self, waiting: list[int]) -> BatchedEvaluator | None:
        """Return a batched evaluator if one is asked for, or is found to be faster."""
        wanted = self.settings.evaluation
        if wanted == "loop" or not waiting:
            return None
        if self.family.space.is_spread:
            if wanted == "vmap":
                raise ValueError(
                    "evaluation is 'vmap', which cannot stack parameters that are spread over "
                    "processes: give evaluation='loop' or 'auto'."
                )
            return None
        if wanted == "vmap":
            batched = BatchedEvaluator(self.evaluate, self.family)
            batched.fit(len(waiting))
            return batched
        if len(waiting) < 32 or not BatchedEvaluator.serves(self.evaluate, self.family):
            return None
        # The points of this measurement count: nothing is evaluated twice, but the chunk
        # that is compared with the loop.
        left = len(waiting) - TRIAL
        trial, waits = waiting[:TRIAL], []
        while len(waiting) > left and not self._late():
            before, began = len(waiting), self._clock()
            self._several(waiting)
            waits.append((self._clock() - began) / (before - len(waiting)))
        # What else the machine does meanwhile only makes it longer. None: the time was over before.
        alone = min(waits, default=math.inf)
        bound = LAUNCH_BOUND_ON_CPU if self._on_cpu else LAUNCH_BOUND
        if alone > bound or self._late():
            return None
        try:
            batched = BatchedEvaluator(self.evaluate, self.family)
            batched.fit(len(waiting))
            # The loop's own points go along in the first pass, to be found again.
            chunk = waiting[: max(1, batched.size - len(trial))]
            found = batched(self.points[trial + chunk])
            if not batched.agrees(found[: len(trial)], self.table[trial]):
                return None
            self._take(waiting, chunk, found[len(trial) :])
            for _ in range(2):
                chunk = waiting[: batched.size]
                if not chunk:
                    return None
                began = self._clock()
                found = batched(self.points[chunk])
                together = self._clock() - began
                self._take(waiting, chunk, found)
                batched.learn(len(chunk), together)
                if together < alone * len(chunk):
                    return batched
                if together > HOPELESS * alone * len(chunk):
                    return None
        except Exception:  # noqa: BLE001 - vmap knows not every operation; the loop does
            return None
        return None

    def _several(self, waiting: list[int]) -> None:
        """Evaluate the first points of a list and take them away, one at least."""
        bare = self._bare()
        if bare is not None:
            if self._may_record and len(waiting) >= LEAST_POINTS:
                chunk = waiting[:1]
                losses, right = self._record(bare, chunk[0])
            else:
                chunk = waiting[: self._together]
                self._together = min(2 * self._together, MOST_TOGETHER)
                losses, right = bare.losses(self._placed(chunk))
            if losses:
                done = chunk[: len(losses)]
                self._take(waiting, done, torch.tensor(losses, dtype=torch.float64)[:, None])
            if right:
                return
            # Something is written, drawn or wrong here: each from its own start from now on.
            self._together = 0
        if waiting:
            self._one(waiting.pop(0))

    def _record(self, bare: BarePasses, i: int) -> tuple[list[float], bool]:
        """Evaluate a point and note by which operations."""
        self._may_record = False
        self.family.place(self._coordinates[i])
        losses, right, programs = bare.recorded(self.family.moved, MOST_BYTES)
        if programs is not None:
            self._recorded = RecordedPasses(bare, self.family, programs)
        return losses, right

    def _again(self, waiting: list[int]) -> bool:
        """Evaluate first points by recorded operations; return whether that was done."""
        recorded = self._recorded
        if recorded is None:
            return False
        losses = recorded(waiting, self._coordinates, self._late)
        if losses is None:
            self._forget(waiting)
            return False
        # Not done, nor kept, until the module was asked.
        self._table[waiting[: len(losses)], 0] = losses
        del waiting[: len(losses)]
        if recorded.are_confirmed:
            self.done[recorded.found] = True
        self._tell(len(losses))
        return True

    def _forget(self, waiting: list[int]) -> None:
        """Let what recorded operations gave be worth nothing: it is not what the module does."""
        assert self._recorded is not None
        found, self._recorded = self._recorded.found, None
        self.table[found], self.done[found] = math.nan, False
        left = set(waiting)
        waiting[:0] = [i for i in found if i not in left]

    def _bare(self) -> BarePasses | None:
        """Return passes without a start of their own each, where they may do."""
        if not self._together or self.family.space.is_spread:
            return None
        if self._passes is None:
            own = self.family.statistics([0.0] * self.points.shape[1]) is not None
            self._passes = None if own else BarePasses.of(self.evaluate)
            # Before the first row it is not known yet.
            self._tries -= 1
            if self._passes is None and self._tries == 0:
                self._together = 0
        return self._passes

    def _placed(self, chunk: Sequence[int]) -> Iterator[int]:
        """Place points one after another, as long as there is time."""
        began = time.monotonic()
        for k, i in enumerate(chunk):
            if k and (time.monotonic() - began > LONGEST_TOGETHER or self._late()):
                return
            self.family.place(self._coordinates[i])
            yield i

    def _one(self, i: int) -> None:
        point = self._coordinates[i]
        self.family.place(point)
        self._table[i] = self.evaluate.row(self.family.statistics(point))
        self._done[i] = True
        self._tell(1)

    def _take(self, waiting: list[int], chunk: Sequence[int], found: Tensor) -> None:
        """Book the first points of a list and take them away."""
        self._book(chunk, found)
        del waiting[: len(chunk)]

    def _book(self, chunk: Sequence[int], found: Tensor) -> None:
        self.table[chunk], self.done[chunk] = found, True
        self._tell(len(chunk))

    def _tell(self, count: int) -> None:
        if self.listener is not None:
            self.listener(count)
        if self.keep is not None and time.monotonic() - self.kept > KEEP_EVERY:
            self.keep(self.table, self.done)
            self.kept = time.monotonic()

    def _late(self) -> bool:
        budget = self.settings.time_budget
        if budget is None:
            return False
        return is_late(self.family.space, time.monotonic() - self.began > budget)

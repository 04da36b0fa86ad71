"""Whether a loss repeats, and whether its gradient is its slope: asked of its values alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from lla_callbacks.linalg.distributed import whole
from lla_callbacks.linalg.errors import forgetful, is_out_of_memory
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.sharing import Alone, Share, all_or_none
from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.counting import about
from lla_callbacks.objective.evaluation import Evaluator, Statistics, evaluating
from lla_callbacks.objective.families import Offsets
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.objective import Objective, padding_vectors
from lla_callbacks.objective.points import space_of
from lla_callbacks.objective.precision import in_double
from lla_callbacks.objective.self_check import NO_ROOM, Check, SelfCheck, untried
from lla_callbacks.objective.sharded import is_sharded
from lla_callbacks.objective.slope import Slope

# Cost of a forward pass, in gradients.
FORWARD = 1 / 3
# Two evaluations that differ by so many roundings differ by the order of additions (kernels that
# are not deterministic); those that differ by more are of two functions.
SAME = 1e4
# Roundings that a loss carries, as long as no more are seen.
ROUNDINGS = 8.0
# How far a step leads at most, as a share of the weights' norm.
REACH = 0.01
# Steps become smaller by this factor, so often at most; a deviation that is there at so many of
# them does not come from the step.
SHRINK = 4.0
ATTEMPTS = 4
AGAIN = 2
# Fourth differences of a loss that are this many times what its rounding explains.
UNEVEN = 20.0


def prove_values(objective: Objective, share: Share | None = None) -> SelfCheck:
    """Return whether two evaluations agree, and the gradient is the slope of the loss.

    The slope is taken along the gradient and along one random direction, from four values of the
    loss each. Their fourth difference shows how the loss is rounded, and slopes at two steps how
    far the series is cut off; a deviation beyond both that stays when the step shrinks is a
    failure. Hooks that the forward pass puts on tensors are left out at first. Should the
    gradient deviate without them and not with them, they are part of the derivative and kept
    from here on (implicit differentiation).

    Args:
        objective: The loss. That hooks are kept is noted in it.
        share: Processes that share the batches; all come to the same result.
    """
    share = share or Alone()
    if is_sharded(objective.module):
        unasked = untried("slope", "the parameters are sharded")
        return SelfCheck((_repeats(objective, share)[0], unasked), 2 * FORWARD)
    try:
        repeats, value = _repeats(objective, share)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return SelfCheck((untried("repeats", NO_ROOM),))
    spent = 2 * FORWARD
    if repeats.outcome == "failed":
        return SelfCheck((repeats, Check("slope", "not tried")), spent)
    try:
        gradient = objective.gradient(share)[1]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return SelfCheck((repeats, untried("slope", NO_ROOM)), spent)
    spent += 1
    prober = _Prober(objective, share, value)
    try:
        with prober:
            slope = prober.verdict(gradient)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return SelfCheck((repeats, untried("slope", NO_ROOM)), spent)
    hooks = ""
    if objective.findings.proof.hooks_seen and not objective.keeps_hooks:
        hooks = "left out"
        if slope.outcome == "failed":
            objective.findings.learn(keep_hooks=True)
            gradient = objective.gradient(share)[1]
            with prober:
                kept = prober.verdict(gradient)
            spent += 1
            if kept.outcome == "passed":
                slope, hooks = kept, "kept"
            else:
                objective.findings.learn(keep_hooks=False)
    spent += prober.num_values * FORWARD
    unsure = slope.outcome in ("failed", "not decided") and prober.num_values
    if unsure and objective.eps > torch.finfo(torch.float64).eps:
        slope, more = _verdict_in_double(objective, share, slope, jumps=prober.jumps)
        spent += more
    return SelfCheck((repeats, slope), spent, hooks)


def _verdict_in_double(
    objective: Objective, share: Share, slope: Check, *, jumps: bool
) -> tuple[Check, float]:
    """Return what the slope is in float64, and what asking took, in gradients.

    A loss carries the roundings of its outputs, which do not shrink with it: a network that fits
    its samples has a loss of 1e-4 from outputs of 30, and in float32 its values are a staircase.
    """

    def widened(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    def make() -> Objective:
        batches = [
            Copier(keeps_machinery=True).mapped(batch, (None, "batch"), widened)
            for batch in objective.batches
        ]
        found = Objective(
            objective.module,
            batches,
            objective.loss,
            mode=objective.mode,
            dropout=objective.dropout,
            seed=objective.seed,
            training=objective.training,
            findings=Findings(),
            check=False,
            batch_size=about,
        )
        found.places, found.counts = objective.places, objective.counts
        found.num_samples = objective.num_samples
        return found

    try:
        with in_double(objective.module):
            double = all_or_none(share, make)
            value, gradient = double.gradient(share)
            prober = _Prober(double, share, value)
            with prober:
                found = prober.verdict(gradient)
    except Exception as error:  # noqa: BLE001 - user code that knows one precision only
        forgetful(error)
        if not jumps:
            return slope, 0.0
        words = "the loss is a staircase in float32, and float64 cannot be tried"
        return replace(slope, outcome="not decided", words=words), 0.0
    words = found.words if found.outcome != "passed" else "in float64; float32 rounds too much here"
    return replace(found, words=words), 2 * (1 + prober.num_values * FORWARD)


def _repeats(objective: Objective, share: Share) -> tuple[Check, float]:
    """Return whether two evaluations agree, and the loss."""

    def twice() -> tuple[float, float]:
        with evaluating(objective) as evaluate:
            statistics = evaluate.statistics() if objective.mode == "recalibrate" else ()
            return (
                _part(objective, share, evaluate, statistics),
                _part(objective, share, evaluate, statistics),
            )

    first, second = _totals(share, all_or_none(share, twice))
    off = abs(first - second)
    scale = max(abs(first), abs(second))
    if first == second or not math.isfinite(first + second):
        # A loss that is not finite says so itself.
        return Check("repeats", "passed", 0.0, 0.0), first
    bound = SAME * objective.eps
    words = f"{first:.8g} and {second:.8g}"
    if off <= bound * scale:
        words += ", by the order of additions on this device"
        return Check("repeats", "not decided", off / scale, bound, words), first
    return Check("repeats", "failed", off / scale, bound, words), first


def _part(objective: Objective, share: Share, evaluate: Evaluator, statistics: Statistics) -> float:
    """Return this process's part of the loss."""
    total, count = 0.0, len(objective.counts)
    mine = list(range(share.rank, count, share.size))
    # Whatever one process computes, all must, so that they can gather parameters.
    spare = -(-count // share.size) - len(mine) if is_sharded(objective.module) else 0
    for i in mine:
        weight = objective.counts[i] / objective.num_samples
        total += weight * float(evaluate.run(i, statistics)[0].detach())
    for _ in range(spare):
        evaluate.run(0, statistics)
    return total


def _totals(share: Share, parts: Sequence[float]) -> list[float]:
    mine = torch.tensor(parts, dtype=torch.float64)
    found: list[float] = (share.total(mine) if share.size > 1 else mine).tolist()
    return found


class _Prober:
    """Takes slopes of a loss from its values, inside of one guard for all of them."""

    def __init__(self, objective: Objective, share: Share, value: float) -> None:
        self._objective = objective
        self._share = share
        self._value = value
        self._space = space_of(objective)
        self._vectors = self._space.vectors(share)
        self._norm = math.sqrt(
            math.fsum(
                float(whole(p.detach().square().sum(dtype=torch.float64)))
                for p in self._space.tensors
            )
        )
        self.num_values = 0
        # Whether the last verdict rests on jumps alone.
        self.jumps = False
        self._stack = ExitStack()
        self._inside: tuple[Evaluator, Statistics, Offsets] | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._inside = None
        self._stack.close()

    def _enter(self, unit: Tensor) -> tuple[Evaluator, Statistics, Offsets]:
        """Enter the guard once, and let the weights be moved along a direction."""
        if self._inside is None:
            family = Offsets(self._space, [unit])
            self._stack.callback(family.restore)
            evaluate = self._stack.enter_context(evaluating(self._objective, check_weights=False))
            # Of the weights that derivatives are taken at, where they are held fixed.
            known = evaluate.statistics() if self._objective.mode == "recalibrate" else ()
            self._inside = evaluate, known, family
        self._inside[2].turn([unit])
        return self._inside

    def verdict(self, gradient: Tensor) -> Check:
        """Return whether a gradient is the slope, along itself and a random direction."""
        if not self._vectors.finite(gradient) or not math.isfinite(self._value):
            return Check("slope", "not tried", words="the loss or its gradient is not finite")
        random = self._vectors.rademacher(
            generator(self._objective.seed, 6),
            dtype=self._space.dtype,
            device=self._space.device,
        )
        # By definition these are constants, though they are stored among the weights.
        padding = padding_vectors(self._objective)
        if padding is not None:
            random = random.index_fill(0, padding.to(random.device), 0.0)
            gradient = gradient.index_fill(0, padding.to(gradient.device), 0.0)
        found = []
        for name, direction in (("the gradient", gradient), ("a random direction", random)):
            norm = self._vectors.norm(direction)
            if norm == 0:
                continue
            found.append((name, *self._along(direction / norm, gradient)))
        failed = [(name, s) for name, outcome, s in found if outcome == "failed"]
        self.jumps = False
        if failed:
            name, s = max(failed, key=lambda item: item[1].relative)
            words = f"along {name} values rise by {s.found:.4g}, the gradient says {s.expected:.4g}"
            return _check("failed", s, words)
        jumping = [(name, s) for name, outcome, s in found if outcome == "jumps"]
        self.jumps = bool(jumping)
        if jumping:
            name, s = jumping[0]
            words = (
                f"along {name} the loss jumps between points that are {s.step:.1g} apart, and "
                "gradients know no jumps"
            )
            return _check("failed", s, words)
        told = [s for _, outcome, s in found if outcome == "passed"]
        if told:
            return _check("passed", max(told, key=lambda s: s.relative), "")
        if not found:
            # Nothing can be said against a gradient of zero but that values differ from it.
            return Check("slope", "not decided", words="there is no direction to look along")
        words = "the slope is too small beside the rounding of the loss, or the loss has kinks"
        return _check("not decided", found[0][2], words)

    def _along(self, unit: Tensor, gradient: Tensor) -> tuple[str, Slope]:
        """Return the outcome along a direction, from as many steps as it takes."""
        slope = self._vectors.inner(unit.double(), gradient.double())
        reach = REACH * (self._norm or 1.0)
        # So far that the change of the loss has half of its digits.
        wanted = math.sqrt(self._objective.eps) * (abs(self._value) or 1.0)
        step = min(wanted / abs(slope), reach) if slope else reach / SHRINK
        deviating = 0
        seen: list[Slope] = []
        for _ in range(ATTEMPTS):
            found = self._slope(unit, gradient, step)
            seen.append(found)
            if found.deviates:
                deviating += 1
                if deviating == AGAIN:
                    return "failed", found
            elif found.tells:
                return "passed", found
            elif found.rounding > found.cut:
                # Smaller steps have fewer digits still.
                break
            step /= SHRINK
        if _jumps(seen):
            return "jumps", found
        return "not decided", found

    def _slope(self, unit: Tensor, gradient: Tensor, step: float) -> Slope:
        """Return the slopes at one step, and what they are off by."""
        parts = self._values(unit, gradient, [-2 * step, -step, step, 2 * step])
        (low2, by_low2), (low1, by_low1), (high1, by_high1), (high2, by_high2) = parts
        here = self._value
        top = max(map(abs, (low2, low1, here, high1, high2)))
        fourth = low2 - 4 * low1 + 6 * here - 4 * high1 + high2
        # Of independent roundings the fourth difference has sqrt(70).
        least = ROUNDINGS * self._objective.eps * top
        rounding = max(least, abs(fourth) / math.sqrt(70))
        found, further = (high1 - low1) / (2 * step), (high2 - low2) / (4 * step)
        expected, further_expected = (
            (by_high1 - by_low1) / (2 * step),
            (by_high2 - by_low2) / (4 * step),
        )
        cut = abs((further - further_expected) - (found - expected))
        uneven = abs(fourth) / least if least else 0.0
        return Slope(step, found, expected, cut, rounding / step, uneven)

    def _values(
        self, unit: Tensor, gradient: Tensor, steps: Sequence[float]
    ) -> list[tuple[float, float]]:
        """Return the loss at steps along a direction, and how much it should have risen.

        By the gradient, and by steps as they were rounded into the weights.
        """
        space = self._space

        def compute() -> list[tuple[float, float]]:
            evaluate, statistics, family = self._enter(unit)
            start = space.flatten(space.tensors)
            values = []
            try:
                for step in steps:
                    family.place([step])
                    moved = space.flatten(space.tensors) - start
                    rise = self._vectors.inner(gradient.double(), moved.double())
                    part = _part(self._objective, self._share, evaluate, statistics)
                    values.append((part, rise))
            finally:
                family.restore()
            return values

        found = all_or_none(self._share, compute)
        self.num_values += len(steps)
        values = _totals(self._share, [value for value, _ in found])
        return list(zip(values, [rise for _, rise in found], strict=True))


def _jumps(seen: Sequence[Slope]) -> bool:
    """Return whether values are uneven at all steps, as a loss of many steps is.

    By kinks, fourth differences shrink with the step at least, by truncation faster; by steps of
    a staircase, of which fewer are met, with its root at most.
    """
    if len(seen) < ATTEMPTS - 1:
        return False
    span = seen[0].step / seen[-1].step
    last, most = seen[-1].unevenness, max(s.unevenness for s in seen)
    return all(s.unevenness > UNEVEN for s in seen) and last > most * span**-0.75


def _check(outcome: str, slope: Slope, words: str) -> Check:
    bound = slope.allowed / slope.size if slope.size else math.inf
    found = Check("slope", "not decided", slope.relative, bound, words)
    return replace(found, outcome=outcome)  # type: ignore[arg-type]

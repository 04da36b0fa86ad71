"""Whether a loss repeats, and whether its gradient is its slope: asked of its values alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import forgetful, is_out_of_memory
from lla_callbacks.linalg.probes import generator
from lla_callbacks.linalg.sharing import Alone, Share, all_or_none
from lla_callbacks.linalg.slope import Slope
from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.counting import about
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.objective import Objective, padding_vectors
from lla_callbacks.objective.precision import in_double
from lla_callbacks.objective.probing import Prober
from lla_callbacks.objective.self_check import NO_ROOM, Check, Proof, SelfCheck, untried

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
# Losses below this are asked about in float64 first: what their outputs are rounded by is more than
# what a step changes. Which comes first decides nothing.
SMALL = 2e-4
# Fourth differences of a loss that are this many times what its rounding explains.
UNEVEN = 20.0


def prove_values(objective: Objective, share: Share | None = None) -> SelfCheck:
    """Return whether two evaluations agree, and the gradient is the slope of the loss.

    The slope is taken along the gradient and along one random direction, from four values of the
    loss each. Their fourth difference shows how the loss is rounded, and slopes at two steps how
    far the series is cut off; a deviation beyond both that stays when the step shrinks is a
    failure. Hooks that the forward pass puts on tensors are left out at first. Should the
    gradient deviate without them and not with them, they are part of the derivative and kept
    from here on (implicit differentiation). What float32 leaves open or speaks against is asked
    in float64.

    Args:
        objective: The loss. That hooks are kept is noted in it.
        share: Processes that share the batches; all come to the same result.
    """
    share = share or Alone()
    prober = Prober(objective, share)
    coarse = prober.eps > torch.finfo(torch.float64).eps
    checks = [untried("repeats", NO_ROOM)]
    spent = 2 * FORWARD
    hooks = ""
    try:
        with prober:
            repeats, value = _repeats(prober)
            checks = [repeats]
            if prober.is_sharded:
                return SelfCheck((repeats, untried("slope", "the parameters are sharded")), spent)
            if repeats.outcome == "failed":
                return SelfCheck((repeats, Check("slope", "not tried")), spent)
            checks = [repeats, untried("slope", NO_ROOM)]
            # So small a loss is rounded as its outputs are, and float64 tells at once.
            small = coarse and abs(value) < SMALL
            double, more = _verdict_in_double(objective, share) if small else (None, 0.0)
            spent += more
            slopes = None
            if double is not None and double.outcome == "passed":
                slope = double
            else:
                slopes = _Slopes(prober, prober.gradient()[1], value)
                spent += 1
                slope = slopes.verdict(early=coarse and not small)
            if objective.findings.proof.hooks_seen and not objective.keeps_hooks:
                hooks = "left out"
                if slope.outcome == "failed":
                    objective.findings.learn(keep_hooks=True)
                    kept = _Slopes(prober, prober.gradient()[1], value).verdict()
                    spent += 1
                    if kept.outcome == "passed":
                        slope, hooks = kept, "kept"
                    else:
                        objective.findings.learn(keep_hooks=False)
        if coarse and slope.outcome in ("failed", "not decided") and slopes and prober.num_values:
            if not small:
                double, more = _verdict_in_double(objective, share)
                spent += more
            slope = double or _verdict_alone(prober, slopes)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return SelfCheck(tuple(checks), 0.0 if len(checks) == 1 else spent)
    return SelfCheck((repeats, slope), spent + prober.num_values * FORWARD, hooks)


def _verdict_in_double(objective: Objective, share: Share) -> tuple[Check | None, float]:
    """Return what the slope is in float64, if that can be had, and what it took, in gradients.

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
            findings=Findings(proof=Proof(quiet=objective.findings.proof.quiet)),
            check=False,
            batch_size=about,
        )
        found.places, found.counts = objective.places, objective.counts
        found.num_samples = objective.num_samples
        return found

    try:
        with in_double(objective.module), Prober(all_or_none(share, make), share) as prober:
            value, gradient = prober.gradient()
            found = _Slopes(prober, gradient, value).verdict()
            if prober.objective.findings.proof.hooks_seen:
                objective.findings.learn(hooks_seen=True)
    except Exception as error:  # noqa: BLE001 - user code that knows one precision only
        forgetful(error)
        return None, 0.0
    words = found.words if found.outcome != "passed" else "in float64; float32 rounds too much here"
    return replace(found, words=words), 2 * (1 + prober.num_values * FORWARD)


def _verdict_alone(prober: Prober, slopes: _Slopes) -> Check:
    """Return what float32 says of both directions, where float64 cannot be tried."""
    with prober:
        found = slopes.verdict()
    if not slopes.jumps:
        return found
    words = "the loss is a staircase in float32, and float64 cannot be tried"
    return replace(found, outcome="not decided", words=words)


def _repeats(prober: Prober) -> tuple[Check, float]:
    """Return whether two evaluations agree, and the loss."""
    first, second = prober.twice()
    off = abs(first - second)
    scale = max(abs(first), abs(second))
    if first == second or not math.isfinite(first + second):
        # A loss that is not finite says so itself.
        return Check("repeats", "passed", 0.0, 0.0), first
    bound = SAME * prober.eps
    words = f"{first:.8g} and {second:.8g}"
    if off <= bound * scale:
        words += ", by the order of additions on this device"
        return Check("repeats", "not decided", off / scale, bound, words), first
    return Check("repeats", "failed", off / scale, bound, words), first


class _Slopes:
    """Compares slopes of a loss by its values with those by its gradient.

    Args:
        prober: Asks for values.
        gradient: At the weights, shape ``(dim,)``.
        value: The loss there.

    Attributes:
        jumps: Whether the last verdict rests on jumps alone.
    """

    def __init__(self, prober: Prober, gradient: Tensor, value: float) -> None:
        self._prober = prober
        self._vectors = prober.vectors
        self._value = value
        self._eps = prober.eps
        self._finite = self._vectors.finite(gradient) and math.isfinite(value)
        # By definition these are constants, though they are stored among the weights.
        padding = padding_vectors(prober.objective)
        self._padding = None if padding is None else padding.to(gradient.device)
        self._gradient = self._without_padding(gradient)
        space = prober.space
        self._norm = self._vectors.norm(space.flatten(space.tensors))
        self.jumps = False

    def _without_padding(self, vector: Tensor) -> Tensor:
        return vector if self._padding is None else vector.index_fill(0, self._padding, 0.0)

    def verdict(self, *, early: bool = False) -> Check:
        """Return whether the gradient is the slope, along itself and a random direction.

        Args:
            early: Whether to end with the first direction that does not say so.
        """
        if not self._finite:
            return Check("slope", "not tried", words="the loss or its gradient is not finite")
        found = []
        for name in ("the gradient", "a random direction"):
            direction = self._gradient if name == "the gradient" else self._random()
            norm = self._vectors.norm(direction)
            if norm == 0:
                continue
            found.append((name, *self._along(direction / norm)))
            if early and found[-1][1] != "passed":
                break
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

    def _random(self) -> Tensor:
        space = self._prober.space
        source = generator(self._prober.objective.seed, 6)
        drawn = self._vectors.rademacher(source, dtype=space.dtype, device=space.device)
        return self._without_padding(drawn)

    def _along(self, unit: Tensor) -> tuple[str, Slope]:
        """Return the outcome along a direction, from as many steps as it takes."""
        slope = self._vectors.inner(unit, self._gradient, wide=True)
        reach = REACH * (self._norm or 1.0)
        # So far that the change of the loss has half of its digits.
        wanted = math.sqrt(self._eps) * (abs(self._value) or 1.0)
        step = min(wanted / abs(slope), reach) if slope else reach / SHRINK
        self._prober.turn(unit)
        deviating = 0
        seen: list[Slope] = []
        for _ in range(ATTEMPTS):
            found = self._slope(step)
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

    def _slope(self, step: float) -> Slope:
        """Return the slopes at one step along the present direction, and what they are off by."""
        parts = self._prober.values(self._gradient, [-2 * step, -step, step, 2 * step])
        (low2, by_low2), (low1, by_low1), (high1, by_high1), (high2, by_high2) = parts
        here = self._value
        top = max(map(abs, (low2, low1, here, high1, high2)))
        fourth = low2 - 4 * low1 + 6 * here - 4 * high1 + high2
        # Of independent roundings the fourth difference has sqrt(70).
        least = ROUNDINGS * self._eps * top
        rounding = max(least, abs(fourth) / math.sqrt(70))
        found, further = (high1 - low1) / (2 * step), (high2 - low2) / (4 * step)
        expected, further_expected = (
            (by_high1 - by_low1) / (2 * step),
            (by_high2 - by_low2) / (4 * step),
        )
        cut = abs((further - further_expected) - (found - expected))
        uneven = abs(fourth) / least if least else 0.0
        return Slope(step, found, expected, cut, rounding / step, uneven)


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

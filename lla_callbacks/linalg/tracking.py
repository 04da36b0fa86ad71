"""The trace of a slowly changing operator, from few probes a time: dynamic estimation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lla_callbacks.linalg.student import student_widening

# Share of the past that the variances of probes keep from time to time. Choice: what a run of
# five to ten firings says, since the variance of a probe was seen to change threefold within
# 16 steps of a 3c3d network (docs/benchmarks/tracking.md).
MEMORY = 0.8


@dataclass(frozen=True)
class Moments:
    """Sums of squares of what probes give, and of how that changes, the past fading out.

    The change of a probe's value from time to time is kept for itself and not as a covariance: a
    variance of the change that were a difference of two noisy numbers could come out as nothing.

    Attributes:
        square: Sum of squared deviations of one probe at one time, shape ``(r,)``.
        square_count: Degrees of freedom behind it.
        square_weight: The same with squared weights, from which follows how many there are.
        change: Sum of squared changes of one probe from one time to the next. About zero and not
            about their mean, so that the trace's own change is in: too large, never too small.
        change_count: Degrees of freedom behind it.
        change_weight: The same with squared weights.
    """

    square: Tensor
    square_count: float
    square_weight: float
    change: Tensor
    change_count: float
    change_weight: float

    @classmethod
    def none(cls, rows: int) -> Moments:
        """Return the moments before anything is known."""
        zero = torch.zeros(rows, dtype=torch.float64)
        return cls(zero, 0.0, 0.0, zero.clone(), 0.0, 0.0)

    def with_new(
        self, square: Tensor, square_count: int, change: Tensor | None = None, change_count: int = 0
    ) -> Moments:
        """Return moments with one more time's, beside which the past counts less."""
        return Moments(
            MEMORY * self.square + square,
            MEMORY * self.square_count + square_count,
            MEMORY**2 * self.square_weight + square_count,
            MEMORY * self.change + (0.0 if change is None else change),
            MEMORY * self.change_count + change_count,
            MEMORY**2 * self.change_weight + change_count,
        )

    @property
    def variance(self) -> Tensor:
        """Variance ``s^2`` of one probe, NaN where nothing is known."""
        return self.square / (self.square_count or math.nan)

    @property
    def change_variance(self) -> Tensor:
        """Mean square ``d`` of a probe's change; that of unrelated values where unknown."""
        return self.change / self.change_count if self.change_count else 2 * self.variance

    @property
    def freedom(self) -> tuple[Tensor, Tensor]:
        """Effective degrees of freedom of the two variances, shape ``(r,)`` each.

        A probe is measured at two times; what the second adds is less the more both agree.
        """
        correlation = torch.nan_to_num(1 - self.change_variance / (2 * self.variance)).clamp(0, 1)
        square = self.square_count**2 / (self.square_weight or 1.0) / (1 + correlation**2)
        if not self.change_count:
            return square, square
        count = self.change_count**2 / self.change_weight
        return square, torch.full_like(square, count)


@dataclass(frozen=True)
class TraceState:
    """What the next time needs of the past; ``r`` quantities are tracked together.

    Plain tensors and numbers, so that :meth:`state_dict` can be saved anywhere.

    Attributes:
        time: How many times were measured: the key of this time's new probes.
        level: The chained estimate, shape ``(r,)``, float64, that knows nothing of ``values``.
        level_variance: Its variance.
        level_freedom: Degrees of freedom behind that variance, shape ``(r,)``.
        values: What this time's new probes gave, ``(half, r)``: they come back next time.
        moments: Of probes so far.
        earlier: The same before this time, which decides how the next one is weighted:
            weights that depend on the values they weigh would bias the mean.
    """

    time: int
    level: Tensor
    level_variance: Tensor
    level_freedom: Tensor
    values: Tensor
    moments: Moments
    earlier: Moments

    def state_dict(self) -> dict[str, object]:
        """Return the state as plain tensors and numbers, in nested dicts."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: dict(vars(v)) if isinstance(v, Moments) else v for k, v in plain.items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, object]) -> TraceState:
        """Return the state that :meth:`state_dict` described."""
        made = {k: Moments(**v) if isinstance(v, dict) else v for k, v in state.items()}
        return cls(**made)  # type: ignore[arg-type]

    def unlinked(self) -> TraceState:
        """Return a state from which the next time takes variances only, no values.

        For when so much changed in between that the covariance of neighbours in time, on
        which the standard error rests, cannot hold.
        """
        return replace(self, values=self.values[:0])


@dataclass(frozen=True)
class TrackedTrace:
    """Estimates of one time, with their standard errors, shape ``(r,)`` each, float64.

    A standard error is widened by Student's law for the few degrees of freedom behind it, so that
    two of them cover 95 % (docs/benchmarks/tracking.md).
    """

    value: Tensor
    sem: Tensor


def begin(
    values: Tensor, level: Tensor, level_sem: Tensor, past: TraceState | None = None
) -> TraceState:
    """Return a state that starts from an estimate of another kind, such as a full one.

    Args:
        values: What the probes gave that come back next time, ``(half, r)``; at best
            independent of the level.
        level: The estimate.
        level_sem: Its standard error.
        past: State before, whose variances stay of use.
    """
    rows = values.shape[1]
    moments = past.moments if past is not None else Moments.none(rows)
    return TraceState(
        time=past.time + 1 if past is not None else 1,
        level=level,
        level_variance=level_sem**2,
        level_freedom=torch.full((rows,), math.inf, dtype=torch.float64),
        values=values,
        moments=moments,
        earlier=moments,
    )


def advance(
    past: TraceState | None, old: Tensor | None, new: Tensor
) -> tuple[TrackedTrace, TraceState]:
    r"""Return the estimate of this time, and the state for the next.

    Half of the probes are new, half come back from the last time, so that no product with
    an operator of the past is needed. With ``y`` the mean of the old probes now, ``x'`` their
    mean last time and ``x`` the mean of the new ones, all unbiased,

        ``D = c D' + (y - c x')``    and    ``T = (1 - w) D + w x``,

    where ``D`` chains estimates of the *change* (Dharangutte and Musco 2021, algorithm 1,
    DeltaShift, with ``1 - gamma = c``) and ``T`` adds what the new probes say of the level,
    which ``D`` does not know and the next ``D`` subtracts. ``c`` minimizes

        ``Var D = c^2 Var D' + ((1 - c)^2 s^2 + c d) / half``

    for the variance ``s^2`` of a probe and the mean square ``d`` of its change between two times
    in a row; ``w`` weighs by inverse variances. With correlation ``q = 1 - d / (2 s^2)`` between
    neighbours in time ``Var T`` settles at ``2 f / (1 + f)`` of the plain mean's over all
    probes, ``f = (1 - q^2)^(1/2)``: never above it. Without a correlation, ``c = 0`` and
    ``w = 1/2``: the plain mean.

    ``s^2`` and ``d`` are pooled over the times, the past fading (:data:`MEMORY`), since two
    or four probes say little of a variance; for what they do not say the standard error is
    widened. Unbiased, as ``c`` and ``w`` rest on earlier times. The errors of neighbouring times
    are correlated, the more so the larger ``c``: the mean over many times is not surer by the
    root of their number.

    Args:
        past: State of the last time, None at the first.
        old: What the probes behind ``past.values`` give now, ``(half, r)``; None if the
            past has none.
        new: What as many new probes give, ``(half, r)``.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    half, rows = new.shape
    linked = past is not None and len(past.values) > 0
    if linked != (old is not None) or (old is not None and old.shape != new.shape):
        raise ValueError(
            f"the old probes must give {'a tensor of shape ' + str(tuple(new.shape))}"
            if linked
            else "there are no old probes, but values of some were given."
        )
    known = past.moments if past is not None else Moments.none(rows)
    if past is None or old is None:
        return _restart(past, known, new)
    if past.values.shape != new.shape:
        raise ValueError(
            f"{len(past.values)} probes of {past.values.shape[1]} values come back, but "
            f"{half} of {rows} were given: keep their number, or begin anew."
        )
    both = torch.cat([old, new])
    moments = known.with_new(
        # At one time all probes are independent with one mean.
        (both - both.mean(dim=0)).square().sum(dim=0),
        2 * half - 1,
        (old - past.values).square().sum(dim=0),
        half,
    )
    # Weights from the times before the last one, whose values they multiply.
    before = past.earlier
    related = (before.variance - before.change_variance / 2).clamp(min=0)
    c = torch.nan_to_num(related / (half * past.level_variance + before.variance)).clamp(0, 1)
    level = c * past.level + old.mean(dim=0) - c * past.values.mean(dim=0)
    chained = _chained(c, past.level_variance, before, half)
    w = torch.nan_to_num(chained / (chained + before.variance / half), nan=0.5)
    square, change = moments.freedom
    parts = [
        (c**2 * past.level_variance, past.level_freedom),
        ((1 - c) ** 2 * moments.variance / half, square),
        (c * moments.change_variance / half, change),
    ]
    variance, freedom = _added(parts)
    parts = [((1 - w) ** 2 * part, count) for part, count in parts]
    spread = _added([*parts, (w**2 * moments.variance / half, square)])
    found = TrackedTrace((1 - w) * level + w * new.mean(dim=0), _sem(*spread))
    return found, TraceState(past.time + 1, level, variance, freedom, new, moments, known)


def _restart(
    past: TraceState | None, known: Moments, new: Tensor
) -> tuple[TrackedTrace, TraceState]:
    """Return the plain mean where no probe comes back: half of ``new`` acts as the old ones."""
    half = len(new) // 2
    if half < 1 or len(new) % 2:
        raise ValueError(f"{len(new)} probes start a trace; give an even number of at least 2.")
    old, new = new[:half], new[half:]
    both = torch.cat([old, new])
    moments = known.with_new((both - both.mean(dim=0)).square().sum(dim=0), 2 * half - 1)
    freedom = moments.freedom[0]
    state = TraceState(
        time=past.time + 1 if past is not None else 1,
        level=old.mean(dim=0),
        level_variance=moments.variance / half,
        level_freedom=freedom,
        values=new,
        moments=moments,
        earlier=known,
    )
    return TrackedTrace(both.mean(dim=0), _sem(moments.variance / (2 * half), freedom)), state


def _chained(c: Tensor, level_variance: Tensor, moments: Moments, half: int) -> Tensor:
    """Return ``Var D``."""
    change = (1 - c) ** 2 * moments.variance + c * moments.change_variance
    return c**2 * level_variance + change / half


def _added(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the sum of variances, and how many degrees of freedom stand behind it.

    As if the variances erred together, since they come from the same probes: their relative
    errors, each ``(2 / count)^(1/2)``, add up, weighted by their shares.
    """
    whole = torch.stack([variance for variance, _ in parts]).sum(dim=0)
    shares = [torch.nan_to_num(variance / whole) * count.rsqrt() for variance, count in parts]
    return whole, torch.stack(shares).sum(dim=0).clamp(min=1e-6) ** -2


def _sem(variance: Tensor, freedom: Tensor) -> Tensor:
    return variance.sqrt() * student_widening(freedom)

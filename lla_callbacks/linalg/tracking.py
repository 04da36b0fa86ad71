"""The trace of a slowly changing operator, from few probes a time: dynamic estimation."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

# Share of the past that the variances of probes keep from time to time. Choice: what a run of
# five to ten firings says, since the variance of a probe was seen to change threefold within
# 16 steps of a 3c3d network (docs/benchmarks/tracking.md).
MEMORY = 0.8


@dataclass(frozen=True)
class Moments:
    """Sums of squares and products of a probe's deviations, the past fading out.

    Attributes:
        square: Sum of squared deviations of one probe at one time, shape ``(r,)``.
        square_count: Degrees of freedom behind it.
        product: Sum of products of one probe's deviations at this time and the last.
        product_count: Degrees of freedom behind it.
    """

    square: Tensor
    square_count: float
    product: Tensor
    product_count: float

    @classmethod
    def none(cls, rows: int) -> Moments:
        """Return the moments before anything is known."""
        zero = torch.zeros(rows, dtype=torch.float64)
        return cls(zero, 0.0, zero.clone(), 0.0)

    def faded(self, share: float) -> Moments:
        """Return moments that count this much less beside new ones."""
        return Moments(
            share * self.square,
            share * self.square_count,
            share * self.product,
            share * self.product_count,
        )

    @property
    def variance(self) -> Tensor:
        """Variance of one probe, NaN where nothing is known."""
        return self.square / (self.square_count or math.nan)

    @property
    def covariance(self) -> Tensor:
        """Covariance of one probe's values at two times in a row, 0 where unknown.

        Between zero and the variance: a negative one is noise, and would not be used.
        """
        if not self.product_count:
            return torch.zeros_like(self.product)
        return (self.product / self.product_count).clamp(min=0).minimum(self.variance)


@dataclass(frozen=True)
class TraceState:
    """What the next time needs of the past; ``r`` quantities are tracked together.

    Plain tensors and numbers, so that :meth:`state_dict` can be saved anywhere.

    Attributes:
        time: How many times were measured: the key of this time's new probes.
        level: The chained estimate, shape ``(r,)``, float64, that knows nothing of ``values``.
        level_variance: Its variance.
        values: What this time's new probes gave, ``(half, r)``: they come back next time.
        difference: Mean of the old probes less that of the new ones, NaN without old ones.
        moments: Of probes so far.
        earlier: The same before this time, which decides how the next one is weighted:
            weights that depend on the values they weigh would bias the mean.
    """

    time: int
    level: Tensor
    level_variance: Tensor
    values: Tensor
    difference: Tensor
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
    """Estimates of one time, with their standard errors, shape ``(r,)`` each, float64."""

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
        values=values,
        difference=torch.full((rows,), math.nan, dtype=torch.float64),
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

        ``Var D = c^2 Var D' + (s^2 - 2 c r + c^2 s^2) / half``

    for the variance ``s^2`` of a probe and the covariance ``r`` of its values at two times
    in a row; ``w`` weighs by inverse variances. With correlation ``q = r / s^2`` between
    neighbours in time ``Var T`` settles at ``2 f / (1 + f)`` of the plain mean's over all
    probes, ``f = (1 - q^2)^(1/2)``: never above it. Without a correlation, ``c = 0`` and
    ``w = 1/2``: the plain mean.

    ``s^2`` and ``r`` are pooled over the times, the past fading (:data:`MEMORY`), since two
    or four probes say little of a variance. Unbiased, as ``c`` and ``w`` rest on earlier
    times. The errors of neighbouring times are correlated, the more so the larger ``c``: the
    mean over many times is not surer by the root of their number.

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
    difference = old.mean(dim=0) - new.mean(dim=0)
    moments = _pooled(known, past, old, new, difference)
    # Weights from the times before the last one, whose values they multiply.
    before = past.earlier
    share = before.covariance / half / (past.level_variance + before.variance / half)
    c = torch.nan_to_num(share).clamp(0, 1)
    level = c * past.level + old.mean(dim=0) - c * past.values.mean(dim=0)
    guess = _chained(c, past.level_variance, before, half)
    w = torch.nan_to_num(guess / (guess + before.variance / half), nan=0.5)
    variance = _chained(c, past.level_variance, moments, half)
    fresh = moments.variance / half
    found = TrackedTrace(
        value=(1 - w) * level + w * new.mean(dim=0),
        sem=((1 - w) ** 2 * variance + w**2 * fresh).sqrt(),
    )
    return found, TraceState(past.time + 1, level, variance, new, difference, moments, known)


def _restart(
    past: TraceState | None, known: Moments, new: Tensor
) -> tuple[TrackedTrace, TraceState]:
    """Return the plain mean where no probe comes back: half of ``new`` acts as the old ones."""
    half = len(new) // 2
    if half < 1 or len(new) % 2:
        raise ValueError(f"{len(new)} probes start a trace; give an even number of at least 2.")
    old, new = new[:half], new[half:]
    both = torch.cat([old, new])
    deviations = (both - both.mean(dim=0)).square().sum(dim=0)
    faded = known.faded(MEMORY)
    moments = replace(
        faded, square=faded.square + deviations, square_count=faded.square_count + 2 * half - 1
    )
    state = TraceState(
        time=past.time + 1 if past is not None else 1,
        level=old.mean(dim=0),
        level_variance=moments.variance / half,
        values=new,
        difference=old.mean(dim=0) - new.mean(dim=0),
        moments=moments,
        earlier=known,
    )
    return TrackedTrace(both.mean(dim=0), (moments.variance / (2 * half)).sqrt()), state


def _chained(c: Tensor, level_variance: Tensor, moments: Moments, half: int) -> Tensor:
    """Return ``Var D``."""
    change = (1 + c**2) * moments.variance - 2 * c * moments.covariance
    return c**2 * level_variance + change / half


def _pooled(
    known: Moments, past: TraceState, old: Tensor, new: Tensor, difference: Tensor
) -> Moments:
    """Return the moments with this time's added.

    At one time all probes are independent with one mean, so they give ``2 half - 1`` degrees
    of freedom for ``s^2``. For ``r`` the probes that came back give ``half - 1``, and one more
    comes from ``E[d d'] = -r / half`` for the differences ``d`` of old and new at this time and
    the last, since the new ones of the last time are the old ones of this.
    """
    half = len(new)
    both = torch.cat([old, new])
    squares = (both - both.mean(dim=0)).square().sum(dim=0)
    then = past.values - past.values.mean(dim=0)
    products = ((old - old.mean(dim=0)) * then).sum(dim=0)
    count = half - 1
    if not bool(past.difference.isnan().any()):
        products = products - half * difference * past.difference
        count += 1
    faded = known.faded(MEMORY)
    return Moments(
        square=faded.square + squares,
        square_count=faded.square_count + 2 * half - 1,
        product=faded.product + products,
        product_count=faded.product_count + count,
    )

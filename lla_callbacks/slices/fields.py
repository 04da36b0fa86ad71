"""What is drawn of a plane: its values in drawn units, their range, and how they are told."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.ticker import MaxNLocator

from lla_callbacks.objective.grid import complete_axes
from lla_callbacks.report.style import MODES
from lla_callbacks.slices.interpolation import refined
from lla_callbacks.slices.slices import Plane, SliceFacts

_ROUND = MaxNLocator(8, steps=[1, 2, 5, 10])
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Field:
    """Values over the finest complete part of a plane.

    Attributes:
        x: Coordinates along the first direction, shape ``(n,)``.
        y: Along the second, shape ``(m,)``.
        values: Shape ``(n, m)``, log10 of the loss if ``logarithmic``; NaN where not finite.
        logarithmic: Whether they are logarithms.
        low: Lowest value that has a colour of its own.
        high: Highest.
        name: Of the quantity.
        fixed: Whether the range was given.
        notes: What a reader must know of the range.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray
    logarithmic: bool
    low: float
    high: float
    name: str
    fixed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return bool(np.isfinite(self.values).all())

    @property
    def extend(self) -> str:
        """Which ends of the range values pass, in matplotlib's words."""
        with np.errstate(invalid="ignore"):
            below = bool((self.values < self.low - 1e-9 * abs(self.low)).any())
            above = bool((self.values > self.high + 1e-9 * abs(self.high)).any())
        return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]

    @property
    def label(self) -> str:
        """Of a colour bar."""
        kind = f"{self.name} (log scale)" if self.logarithmic else self.name
        return "  ·  ".join([kind, *self.notes])

    def ticks(self) -> tuple[list[float], list[str]]:
        """Return positions in drawn units and the true values written there."""
        marks = tick_values(self.low, self.high, self.logarithmic)
        return [math.log10(v) if self.logarithmic else v for v in marks], [*map(written, marks)]

    def bands(self) -> list[float]:
        """Return about 32 levels between both ends, the ticks among them."""
        inner = [p for p in self.ticks()[0] if self.low < p < self.high]
        levels = [self.low]
        for end in [*inner, self.high]:
            count = max(1, round(32 * (end - levels[-1]) / (self.high - self.low)))
            levels.extend(np.linspace(levels[-1], end, count + 1)[1:].tolist())
        return levels

    def smooth(self, factor: int = 4) -> Field:
        """Return the field on a finer grid, by a spline of what is drawn."""
        x, y, values = refined(self.x, self.y, self.values, factor)
        # A spline passes the outermost points a little; a range that follows them does too.
        low, high = self.low, self.high
        if not self.fixed and self.extend in ("neither", "max"):
            low = min(low, float(values.min()))
        if not self.fixed and self.extend in ("neither", "min"):
            high = max(high, float(values.max()))
        return replace(self, x=x, y=y, values=values, low=low, high=high)

    def drawn(self, loss: np.ndarray) -> np.ndarray:
        """Return other losses in the units of this field; NaN where they have none."""
        loss = np.where(np.isfinite(loss), loss, np.nan)
        if not self.logarithmic:
            return loss
        return np.asarray(np.log10(np.maximum(loss, 10.0**self.low)))


def field_of(
    plane: Plane,
    *,
    metric: str | None = None,
    cap: float | None = None,
    scale: tuple[float, float] | None = None,
) -> Field:
    """Return what is drawn of a plane.

    Args:
        plane: The plane.
        metric: One of its metrics; ``None``: its loss.
        cap: Largest value with a colour of its own.
        scale: Lowest and highest value of the colours; the range of all values otherwise, less
            a few spikes that would leave nothing to the rest.

    Raises:
        ValueError: If there is no such metric, or the range is empty.
    """
    if metric is not None and metric not in plane.metrics:
        known = ", ".join(plane.metrics) or "none was measured"
        raise ValueError(f"no metric is named {metric!r}; they are: {known}.")
    if scale is not None and not scale[0] < scale[1]:
        raise ValueError(f"the scale {scale} is empty: give a lower and a higher value.")
    centre = [int(plane.alphas.abs().argmin()), int(plane.betas.abs().argmin())]
    rows, columns = complete_axes(plane.loss.shape, plane.evaluated, centre)
    table = plane.loss if metric is None else plane.metrics[metric]
    raw = table[rows][:, columns].double().numpy()
    raw = np.where(np.isfinite(raw), raw, np.nan)
    known_values = raw[np.isfinite(raw)]
    if metric is None and plane.path is not None:
        others = plane.path.loss.double().numpy()
        known_values = np.concatenate([known_values, others[np.isfinite(others)]])
    positive = known_values[known_values > 0]
    bounds = [b for b in (cap, *(scale or ())) if b is not None]
    # A loss of exactly 0 is an underflow among positive ones: it is drawn as the lowest of them.
    logarithmic = (
        metric is None
        and positive.size > 0
        and not (known_values < 0).any()
        and all(b > 0 for b in bounds)
    )
    notes: list[str] = []
    if logarithmic:
        if positive.size < known_values.size:
            notes.append(f"0 drawn as {written(float(positive.min()))}")
            known_values = np.maximum(known_values, positive.min())
            raw = np.where(raw == 0, positive.min(), raw)
        raw, known_values = np.log10(raw), np.log10(known_values)
        bounds = [math.log10(b) for b in bounds]
    if scale is not None:
        low, high = bounds[-2:]
    else:
        low, high = _range(known_values)
    if cap is not None:
        high = min(high, bounds[0])
        if (known_values > high).any():
            notes.append(f"capped at {written(cap)}")
    elif scale is None and known_values.size and high < known_values.max():
        top = float(known_values.max())
        notes.append(f"highest: {written(10.0**top if logarithmic else top)}")
    if not low < high:
        half = 0.05 if logarithmic else 0.05 * (abs(high) or 1.0)
        low, high = high - half, high + half
    if logarithmic:
        # Powers of ten that a float holds.
        low = min(max(low, -307.0), 307.9)
        high = min(high, 308.0)
        high = high if high > low else low + 0.1
    return Field(
        plane.alphas[rows].numpy(), plane.betas[columns].numpy(), raw, logarithmic, low, high,
        metric or "loss", scale is not None or cap is not None, tuple(notes),
    )  # fmt: skip


def facts_of(facts: SliceFacts, points: str) -> list[str]:
    """Return the conditions of a slice, for the footer."""
    directions = f"{facts.normalization}-normalized, seed {facts.seed}"
    if facts.normalization == "none":
        directions = f"not normalized, seed {facts.seed}"
    return [
        f"{facts.num_params:,} parameters",
        f"{facts.num_samples:,} samples",
        MODES.get(facts.mode, facts.mode),
        directions if facts.normalization else "",
        points,
        facts.precision,
        facts.self_check,
    ]


def counted(evaluated: int, total: int) -> str:
    """Return how many points there are."""
    return f"{total:,} points" if evaluated == total else f"{evaluated:,} of {total:,} points"


def tick_values(low: float, high: float, logarithmic: bool) -> list[float]:
    """Return five to ten round values between two ends, which are logarithms if so said."""
    if not logarithmic:
        return [float(v) for v in _ROUND.tick_values(low, high) if low <= v <= high]
    if high - low > 3.5:
        stride = max(1, math.ceil((high - low) / 10))
        first = math.ceil(low / stride - 1e-9) * stride
        return [10.0**k for k in range(first, math.floor(high + 1e-9) + 1, stride)]
    ends = 10.0**low, 10.0**high
    if high - low > 0.7:
        powers = range(math.floor(low), math.floor(high) + 1)
        return [v for k in powers for d in (1, 2, 5) if ends[0] <= (v := d * 10.0**k) <= ends[1]]
    return [float(v) for v in _ROUND.tick_values(*ends) if ends[0] <= v <= ends[1]]


def written(value: float) -> str:
    """Return a value for a tick: plain where that is short, a power of ten otherwise."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}".replace("-", "−")
    digits, power = f"{value:.2e}".split("e")
    factor = f"{float(digits):g}"
    exponent = "10" + str(int(power)).translate(_SUPERSCRIPTS)
    return {"1": exponent, "-1": f"−{exponent}"}.get(factor, f"{factor}·{exponent}")


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the range of finite values; a few spikes far above the rest do not count."""
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    most = float(np.quantile(values, 0.95))
    if high - most > 1.5 * (most - low) > 0:
        high = most + 0.1 * (most - low)
    return low, high

"""What is drawn of a plane: its values in drawn units, their range, and how they are told."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lla_callbacks.objective.grid import complete_axes
from lla_callbacks.report.style import MODES
from lla_callbacks.report.words import written
from lla_callbacks.slices.fine import FineLoss
from lla_callbacks.slices.interpolation import refined, subdivided, supported
from lla_callbacks.slices.pictures import Picture, picture_through
from lla_callbacks.slices.scales import Scale, scale_of
from lla_callbacks.slices.slices import Plane, SliceFacts

# Pixels along each side of a picture between computed points.
PIXELS = 220


@dataclass(frozen=True)
class Field:
    """Values over the finest complete part of a plane.

    Attributes:
        x: Coordinates along the first direction, shape ``(n,)``.
        y: Along the second, shape ``(m,)``.
        values: Shape ``(n, m)``, as drawn; NaN where not finite.
        scale: From values to what is drawn.
        low: Lowest value that has a colour of its own, as drawn.
        high: Highest.
        name: Of the quantity.
        centre: Value at the present weights; NaN where it is not known.
        notes: What a reader must know of the range.
        fine: The loss between the points, if interpolated outputs gave it.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray
    scale: Scale
    low: float
    high: float
    name: str
    centre: float
    notes: tuple[str, ...] = ()
    fine: FineLoss | None = None

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return bool(np.isfinite(self.values).all())

    @property
    def logarithmic(self) -> bool:
        """Whether logarithms are drawn."""
        return self.scale.kind == "log"

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
        return "  ·  ".join([self.name + self.scale.words, *self.notes])

    def ticks(self) -> tuple[list[float], list[str]]:
        """Return positions in drawn units and the true values written there."""
        marks = self.scale.ticks(self.low, self.high)
        return [self.scale.place(v) for v in marks], [*map(written, marks)]

    @property
    def picture(self) -> Picture | None:
        """The surface through positive losses; None of anything else."""
        loss = self.logarithmic and self.name == "loss" and self.finite
        return picture_through(self.x, self.y, 10.0**self.values, self.fine) if loss else None

    def smooth(self, factor: int = 4) -> Field:
        """Return the field on a finer grid: positive losses by the form that their points favour.

        Anything else by a spline of what is drawn.

        Between four points nothing is lower or higher than they are: no value that none of them
        supports, no closed contour without a point in it; unless the network's outputs tell so.
        """
        picture = self.picture
        if picture is None:
            x, y, values = refined(self.x, self.y, self.values, factor)
        else:
            x, y = subdivided(self.x, factor), subdivided(self.y, factor)
            values = np.log10(picture.at(x, y))
            if picture.from_outputs:
                return replace(self, x=x, y=y, values=values)
        return replace(self, x=x, y=y, values=supported(self.values, values, factor))

    def raster(self) -> np.ndarray:
        """Return the values on pixels, in between by the four points around each.

        Returns:
            Shape ``(PIXELS, PIXELS)``, rows along ``y`` from the lowest; NaN in cells that have a
            corner which is not finite.
        """
        (i, s), (j, t) = (_places(c) for c in (self.x, self.y))
        v = self.values
        s, i = s[:, None], i[:, None]
        left = v[i, j] * (1 - t) + v[i, j + 1] * t
        right = v[i + 1, j] * (1 - t) + v[i + 1, j + 1] * t
        return np.asarray((left * (1 - s) + right * s).T)

    def drawn(self, loss: np.ndarray) -> np.ndarray:
        """Return other losses in the units of this field; NaN where they have none."""
        loss = np.where(np.isfinite(loss), loss, np.nan)
        if self.logarithmic:
            loss = np.maximum(loss, 10.0**self.low)
        return self.scale.draw(loss)


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
    here = float(table[centre[0], centre[1]]) if metric else plane.centre_loss
    known_values = raw[np.isfinite(raw)]
    if metric is None and plane.path is not None:
        others = plane.path.loss.double().numpy()
        known_values = np.concatenate([known_values, others[np.isfinite(others)]])
    bounds = [b for b in (cap, *(scale or ())) if b is not None]
    # A loss of exactly 0 is an underflow among positive ones: it is drawn as the lowest of them.
    how = scale_of(np.append(known_values, bounds), is_loss=metric is None)
    if how.kind == "log" and not all(b > 0 for b in bounds):
        how = Scale()
    positive = known_values[known_values > 0]
    if how.kind == "log" and not positive.size:
        how = Scale()
    notes: list[str] = []
    if how.kind == "log" and positive.size < known_values.size:
        notes.append(f"0 drawn as {written(float(positive.min()))}")
        known_values = np.maximum(known_values, positive.min())
        raw = np.where(raw == 0, positive.min(), raw)
    raw, known_values = how.draw(raw), how.draw(known_values)
    bounds = [how.place(b) for b in bounds]
    low, high = bounds[-2:] if scale is not None else _range(known_values)
    if cap is not None:
        high = min(high, bounds[0])
        if (known_values > high).any():
            notes.append(f"capped at {written(cap)}")
    elif scale is None and known_values.size and high < known_values.max():
        notes.append(f"highest: {written(how.value(float(known_values.max())))}")
    if not low < high:
        half = 0.05 if how.kind == "log" else 0.05 * (abs(high) or 1.0)
        low, high = high - half, high + half
    if how.kind == "log":
        # Powers of ten that a float holds.
        low = min(max(low, -307.0), 307.9)
        high = min(high, 308.0)
        high = high if high > low else low + 0.1
    return Field(
        plane.alphas[rows].numpy(), plane.betas[columns].numpy(), raw, how, low, high,
        metric or "loss", here, tuple(notes), plane.fine if metric is None else None,
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
    """Return how many points there are, and of how many where time was over before."""
    return f"{total:,} points" if evaluated == total else f"{evaluated:,} of {total:,} points"


def _places(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each pixel the interval that its middle is in, and how far."""
    middles = points[0] + (points[-1] - points[0]) * (np.arange(PIXELS) + 0.5) / PIXELS
    index = np.clip(np.searchsorted(points, middles, side="right") - 1, 0, len(points) - 2)
    return index, (middles - points[index]) / (points[index + 1] - points[index])


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the range of finite values; a few spikes far above the rest do not count."""
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    most = float(np.quantile(values, 0.95))
    if high - most > 1.5 * (most - low) > 0:
        high = most + 0.1 * (most - low)
    return low, high

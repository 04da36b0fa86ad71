"""The surface through the points of a plane, and how far it is off between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lla_callbacks.objective.grid import complete_axes
from lla_callbacks.slices.interpolation import spline_matrix
from lla_callbacks.slices.slices import Plane

# Another form takes the place of the first where it errs less than this share of what that errs.
BETTER = 0.5
# An error shrinks by this much at most, and at least, when the spacing is halved: what held-out
# points show of a smooth loss (1/16) is not trusted for one that may have a sharp minimum.
MOST_GAIN, LEAST_GAIN = 1 / 4, 2 / 3
# On top, so that the estimate is rarely exceeded: in one of 17 pictures of five networks
# (docs/benchmarks/planes.md).
SAFETY = 1.5
# Interpolated losses are not below this share of the lowest one computed.
LOWEST = 0.5

# Points a side, at least, of which every second one can judge.
FEWEST = 7

Matrix = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Form:
    """What is interpolated, and how.

    Attributes:
        name: In words.
        draw: From losses to what is interpolated.
        value: Back.
        matrix: From values at coordinates to values in between.
    """

    name: str
    draw: Callable[[np.ndarray], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    matrix: Matrix

    def at(
        self, points: tuple[np.ndarray, np.ndarray], loss: np.ndarray, x: np.ndarray, y: np.ndarray
    ) -> np.ndarray:
        """Return losses between points.

        Args:
            points: Coordinates along both directions, shapes ``(n,)`` and ``(m,)``.
            loss: Shape ``(n, m)``.
            x: Coordinates along the first direction, shape ``(k,)``.
            y: Along the second, shape ``(l,)``.

        Returns:
            Shape ``(k, l)``.
        """
        first, second = self.matrix(points[0], x), self.matrix(points[1], y)
        found = self.value(first @ self.draw(loss) @ second.T)
        return np.maximum(found, LOWEST * loss.min()) if loss.min() > 0 else found


def straight_matrix(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the matrix that takes values at ``x`` to straight lines between them ``at``."""
    return np.stack([np.interp(at, x, column) for column in np.eye(len(x))], axis=1)


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _square(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(values, 0.0) ** 2)


# The first is taken unless another one is clearly better. About its minimum a loss is quadratic,
# and its root as straight as anything of it is; its logarithm has a pole where the loss is zero.
_ROOT = Form("a bicubic spline of the root of the loss", np.sqrt, _square, spline_matrix)
_LOG = Form("a bicubic spline of the log loss", np.log, np.exp, spline_matrix)
_LOSS = Form("a bicubic spline of the loss", _same, _same, spline_matrix)
POSITIVE = (
    _ROOT,
    _LOG,
    _LOSS,
    Form("straight lines in the root of the loss", np.sqrt, _square, straight_matrix),
    Form("straight lines in the log loss", np.log, np.exp, straight_matrix),
)
ANY = (_LOSS, Form("straight lines in the loss", _same, _same, straight_matrix))


@dataclass(frozen=True, eq=False)
class Picture:
    """The surface through a plane's points.

    Attributes:
        x: Coordinates of the points along the first direction, shape ``(n,)``.
        y: Along the second, shape ``(m,)``.
        loss: At the points, shape ``(n, m)``, finite.
        form: What is interpolated, and how.
        error: Mean error between the points, estimated from above: in decades of the loss, of the
            loss itself where it is not positive everywhere. NaN with fewer than seven points a
            side.
        error_high: That of the worst twentieth, its 95th percentile, likewise.
        decades: Whether these are decades.
    """

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    form: Form
    error: float
    error_high: float
    decades: bool

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the loss at coordinates along both directions, shape ``(len(x), len(y))``."""
        return self.form.at((self.x, self.y), self.loss, np.asarray(x), np.asarray(y))

    @property
    def words(self) -> str:
        """What is drawn between the points, and how far it is off."""
        if math.isnan(self.error):
            return self.form.name
        unit = " decades" if self.decades else ""
        return f"{self.form.name}, off by up to about {self.error:.2g}{unit} in the mean"


def picture_of(plane: Plane) -> Picture | None:
    """Return the surface through a plane's finest complete grid; None if a loss is not finite.

    It costs no pass. Each form of interpolation draws every second row and column only, and is
    compared with the points in between; what that errs is continued to half the spacing by how it
    fell from twice the spacing, but by a quarter at most, and half as much is added.
    """
    centre = [int(plane.alphas.abs().argmin()), int(plane.betas.abs().argmin())]
    rows, columns = complete_axes(plane.loss.shape, plane.evaluated, centre)
    loss = plane.loss[rows][:, columns].double().numpy()
    if not np.isfinite(loss).all():
        return None
    return picture_through(plane.alphas[rows].numpy(), plane.betas[columns].numpy(), loss)


def picture_through(x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> Picture:
    """Return the surface through losses on a grid.

    Args:
        x: Coordinates of the rows, shape ``(n,)``, ascending.
        y: Of the columns, shape ``(m,)``.
        loss: Shape ``(n, m)``, finite.
    """
    decades = bool(loss.min() > 0)
    first, *others = POSITIVE if decades else ANY
    if min(loss.shape) < FEWEST:
        # A parabola through three points would be the judge.
        return Picture(x, y, loss, _LOG if decades else first, math.nan, math.nan, decades)
    held = {form: _held_out(form, x, y, loss, 2) for form in (first, *others)}
    best = min(held, key=lambda form: float(held[form].mean()))
    form = best if held[best].mean() < BETTER * held[first].mean() else first
    share, errors = 1.0, held[form]
    if min(loss.shape) >= 9:
        before = float(_held_out(form, x, y, loss, 4).mean())
        gain = float(errors.mean()) / before if before > 0 else 0.0
        share = SAFETY * min(max(gain, MOST_GAIN), LEAST_GAIN)
    return Picture(
        x, y, loss, form, share * float(errors.mean()), share * float(np.quantile(errors, 0.95)),
        decades,
    )  # fmt: skip


def _held_out(
    form: Form, x: np.ndarray, y: np.ndarray, loss: np.ndarray, stride: int
) -> np.ndarray:
    """Return what a form errs through every so manieth point, at those in the middle between."""
    coarse = [_every(len(c), stride) for c in (x, y)]
    fine = [_every(len(c), stride // 2) for c in (x, y)]
    there = loss[np.ix_(*fine)]
    found = form.at((x[coarse[0]], y[coarse[1]]), loss[np.ix_(*coarse)], x[fine[0]], y[fine[1]])
    if loss.min() > 0:
        found, there = np.log10(found), np.log10(there)
    new = ~np.isin(fine[0], coarse[0])[:, None] | ~np.isin(fine[1], coarse[1])
    return np.asarray(np.abs(found - there)[new])


def _every(count: int, stride: int) -> np.ndarray:
    return np.array(sorted({*range(0, count, stride), count - 1}))

"""The surface through the points of a plane, and how far it is off between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lla_callbacks.objective.grid import complete_axes
from lla_callbacks.slices.fine import FEWEST, FineLoss
from lla_callbacks.slices.interpolation import fine_axes, spline_matrix
from lla_callbacks.slices.judging import Guess, estimated, held_out
from lla_callbacks.slices.slices import Plane

# Another form takes the place of the first where it errs less than this share of what that errs.
BETTER = 0.5
# Interpolated losses are not below this share of the lowest one computed.
LOWEST = 0.5

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
# Of losses that follow from interpolated outputs on a finer grid: between its points next to
# nothing depends on the form.
_OUTPUTS = Form(
    "the loss of bicubic splines of the network's outputs", np.log, np.exp, spline_matrix
)
_OUTPUTS_OF_ANY = replace(_OUTPUTS, draw=_same, value=_same)


@dataclass(frozen=True, eq=False)
class Picture:
    """The surface through a plane's points.

    Attributes:
        x: Coordinates along the first direction, shape ``(n,)``: of the points, or of the finer
            grid on which the loss follows from interpolated outputs.
        y: Along the second, shape ``(m,)``.
        loss: There, shape ``(n, m)``, finite.
        form: What is interpolated, and how.
        error: Mean error between the points, estimated from above: in decades of the loss, of the
            loss itself where it is not positive everywhere. NaN with fewer than seven points a
            side.
        error_high: That of the worst twentieth, its 95th percentile, likewise.
        decades: Whether these are decades.
        from_outputs: Whether the network's outputs were interpolated, and not the loss.
    """

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    form: Form
    error: float
    error_high: float
    decades: bool
    from_outputs: bool = False

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the loss at coordinates along both directions, shape ``(len(x), len(y))``."""
        return self.form.at((self.x, self.y), self.loss, np.asarray(x), np.asarray(y))

    @property
    def words(self) -> str:
        """What is drawn between the points, and how far it is off."""
        if math.isnan(self.error):
            return self.form.name
        if not self.decades:
            return f"{self.form.name}, off by up to about {self.error:.2g} in the mean"
        factor = 10**self.error
        off = f"a factor of {factor:.2g}" if factor >= 2 else f"{100 * (factor - 1):.2g} %"
        return f"{self.form.name}, off by up to about {off} in the mean"


def picture_of(plane: Plane) -> Picture | None:
    """Return the surface through a plane's finest complete grid; None if a loss is not finite.

    It costs no pass. Each form of interpolation draws every second row and column only, and is
    compared with the points in between; what that errs is continued to half the spacing by how it
    fell from twice the spacing, but by a quarter at most, and doubled. A plane that was
    refined has the surface that its network's outputs give, unless that errs more.
    """
    centre = [int(plane.alphas.abs().argmin()), int(plane.betas.abs().argmin())]
    rows, columns = complete_axes(plane.loss.shape, plane.evaluated, centre)
    loss = plane.loss[rows][:, columns].double().numpy()
    if not np.isfinite(loss).all():
        return None
    return picture_through(
        plane.alphas[rows].numpy(), plane.betas[columns].numpy(), loss, plane.fine
    )


def picture_through(
    x: np.ndarray, y: np.ndarray, loss: np.ndarray, fine: FineLoss | None = None
) -> Picture:
    """Return the surface through losses on a grid.

    Args:
        x: Coordinates of the rows, shape ``(n,)``, ascending.
        y: Of the columns, shape ``(m,)``.
        loss: Shape ``(n, m)``, finite.
        fine: What follows from interpolated outputs, if that is known.
    """
    decades = bool(loss.min() > 0)
    first, *others = POSITIVE if decades else ANY
    if min(loss.shape) < FEWEST:
        # A parabola through three points would be the judge.
        return Picture(x, y, loss, _LOG if decades else first, math.nan, math.nan, decades)
    held = {f: held_out(_drawn_by(f, x, y, loss), loss, 2) for f in (first, *others)}
    best = min(held, key=lambda form: float(held[form].mean()))
    form = best if held[best].mean() < BETTER * held[first].mean() else first
    mean, high = estimated(_drawn_by(form, x, y, loss), loss, held[form])
    if fine is None or not fine.error <= mean:
        return Picture(x, y, loss, form, mean, high, decades)
    return Picture(
        fine_axes(x), fine_axes(y), fine.loss.numpy(), _OUTPUTS if decades else _OUTPUTS_OF_ANY,
        fine.error, fine.error_high, decades, from_outputs=True,
    )  # fmt: skip


def _drawn_by(form: Form, x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> Guess:
    def guess(
        used: tuple[np.ndarray, np.ndarray], asked: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        points = x[used[0]], y[used[1]]
        return form.at(points, loss[np.ix_(*used)], x[asked[0]], y[asked[1]])

    return guess

"""Cubic splines through the points of a grid, as small dense matrices."""

from __future__ import annotations

import numpy as np

# Intervals that each interval becomes where the loss between points follows from outputs; a spline
# through that grid errs next to nothing.
FACTOR = 4


def refined(
    x: np.ndarray, y: np.ndarray, values: np.ndarray, factor: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a grid ``factor`` times finer, with the bicubic spline through the values on it.

    Args:
        x: Coordinates of the rows, shape ``(n,)``, strictly ascending, not necessarily even.
        y: Of the columns, shape ``(m,)``.
        values: Shape ``(n, m)``, finite.
        factor: Intervals that each interval becomes.

    Returns:
        Finer coordinates, all given ones among them, shapes ``(factor (n - 1) + 1,)`` and
        ``(factor (m - 1) + 1,)``, and the values there.
    """
    fine_x, fine_y = subdivided(x, factor), subdivided(y, factor)
    return fine_x, fine_y, spline_matrix(x, fine_x) @ values @ spline_matrix(y, fine_y).T


def supported(values: np.ndarray, fine: np.ndarray, factor: int) -> np.ndarray:
    """Return a finer grid's values, each within the range of the points around its cell.

    A spline overshoots where values turn: it shows accuracies above 1, and valleys and contours
    that no point saw. On the border of two cells the range of both holds.

    Args:
        values: At the points, shape ``(n, m)``, finite.
        fine: Between them, shape ``(factor (n - 1) + 1, factor (m - 1) + 1)``.
        factor: Intervals that each interval became.
    """
    if min(values.shape) < 2:
        return np.asarray(np.clip(fine, values.min(), values.max()))
    parts = values[:-1, :-1], values[1:, :-1], values[:-1, 1:], values[1:, 1:]
    ends = []
    for join, meet in ((np.minimum, np.maximum), (np.maximum, np.minimum)):
        cells = join(join(parts[0], parts[1]), join(parts[2], parts[3]))
        for axis in (0, 1):
            count = cells.shape[axis]
            place = np.arange(factor * count + 1)
            before = np.maximum(-(-place // factor) - 1, 0)
            after = np.minimum(place // factor, count - 1)
            cells = meet(cells.take(before, axis), cells.take(after, axis))
        ends.append(cells)
    return np.asarray(np.clip(fine, ends[0], ends[1]))


def subdivided(x: np.ndarray, factor: int) -> np.ndarray:
    """Return coordinates with each interval cut in ``factor`` even parts."""
    shares = np.arange(factor) / factor
    inner = x[:-1, None] + np.diff(x)[:, None] * shares
    return np.concatenate([inner.ravel(), x[-1:]])


def fine_axes(x: np.ndarray) -> np.ndarray:
    """Return coordinates with each interval cut in :data:`FACTOR` even parts."""
    return subdivided(x, FACTOR)


def spline_matrix(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the matrix that takes values at ``x`` to values of their spline ``at``.

    The spline is cubic and *not-a-knot*: its third derivative is continuous at the second and
    the second-last point too, so that cubics come back exactly. Three points give a parabola,
    two a straight line, one a constant. With ``h_i = x_{i+1} - x_i`` the second derivatives
    ``M`` of the spline solve ``h_{i-1} M_{i-1} + 2 (h_{i-1} + h_i) M_i + h_i M_{i+1} =
    6 (d_i - d_{i-1})``, where ``d_i`` is the slope of interval ``i`` (de Boor 1978, ch. IV).

    Args:
        x: Shape ``(n,)``, strictly ascending.
        at: Shape ``(k,)``, within ``x``; beyond it the outermost pieces go on.

    Returns:
        Shape ``(k, n)``.
    """
    n = len(x)
    if n <= 3:
        return _lagrange(x, at)
    h = np.diff(x)
    unit = np.eye(n)
    slopes = np.diff(unit, axis=0) / h[:, None]
    system = np.zeros((n, n))
    right = np.zeros((n, n))
    for i in range(1, n - 1):
        system[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        right[i] = 6 * (slopes[i] - slopes[i - 1])
    system[0, :3] = h[1], -(h[0] + h[1]), h[0]
    system[-1, -3:] = h[-1], -(h[-2] + h[-1]), h[-2]
    second = np.linalg.solve(system, right)
    piece = np.clip(np.searchsorted(x, at, side="right") - 1, 0, n - 2)
    width = h[piece][:, None]
    left, rest = (at - x[piece])[:, None], (x[piece + 1] - at)[:, None]
    straight = (rest * unit[piece] + left * unit[piece + 1]) / width
    bend = (1 + rest / width) * second[piece] + (1 + left / width) * second[piece + 1]
    return np.asarray(straight - left * rest / 6 * bend)


def _lagrange(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the matrix of the one polynomial through all points."""
    columns = []
    for i in range(len(x)):
        others = np.delete(x, i)
        columns.append(np.prod((at[:, None] - others) / (x[i] - others), axis=1))
    return np.stack(columns, axis=1)

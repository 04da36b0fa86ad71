"""Weights along a curve, for the evaluation at many points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lla_callbacks.curves.curve import Kind, coefficients
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.evaluation import Statistics
from lla_callbacks.objective.families import Offsets


def write_point(
    live: list[Tensor], points: Sequence[list[Tensor]], factors: Sequence[float]
) -> None:
    """Write ``sum_j c_j w_j`` into tensors; a point that counts alone to the bit.

    Args:
        live: Where to; through ``.data`` of parameters, so that no graph sees a new version.
        points: Control points, tensors in the order of ``live``.
        factors: ``c_j``, their sum 1.
    """
    pairs = [(c, w) for c, w in zip(factors, points, strict=True) if c != 0.0]
    torch._foreach_copy_(live, pairs[0][1])
    if pairs[0][0] != 1.0:
        torch._foreach_mul_(live, pairs[0][0])
    for c, w in pairs[1:]:
        torch._foreach_add_(live, w, alpha=c)


class OnCurve(Offsets):
    """``phi(t)``: weights of a curve, exact at both ends.

    Args:
        space: Layout of the weights; its tensors are the live parameters.
        kind: Of the curve.
        points: Control points, tensors in the order of the space, on its device.
        ends: Running statistics of either end. They hold at the ends themselves in every mode;
            in between they are interpolated where nothing is estimated.
        recalibrated: Whether statistics between the ends are estimated anew by who evaluates.
    """

    def __init__(
        self,
        space: ParameterSpace,
        kind: Kind,
        points: Sequence[list[Tensor]],
        ends: tuple[Statistics, Statistics] = ((), ()),
        *,
        recalibrated: bool = True,
    ) -> None:
        super().__init__(space, [])
        self.kind = kind
        self.points = points
        self._ends = ends
        self._recalibrated = recalibrated

    def place(self, point: Sequence[float]) -> None:
        """Write ``phi(point[0])`` into the parameters."""
        write_point(self._live, self.points, coefficients(self.kind, len(self.points), point[0]))

    def stack(self, points: Tensor) -> dict[str, Tensor]:
        """Return the weights of several points, one more dimension in front."""
        factors = torch.tensor(
            [coefficients(self.kind, len(self.points), t) for t in points[:, 0].tolist()],
            dtype=torch.float64,
        )
        stacked = {}
        for i, name in enumerate(self.space.names):
            like = self.points[0][i]
            c = factors.to(like.device, like.dtype)
            value = c[:, 0].reshape(-1, *[1] * like.ndim) * like
            for j in range(1, len(self.points)):
                value = value + c[:, j].reshape(-1, *[1] * like.ndim) * self.points[j][i]
            stacked[name] = value
        return stacked

    def statistics(self, point: Sequence[float]) -> Statistics | None:
        """Return an end's own statistics there; in between None, or those between the ends'."""
        t = point[0]
        start, end = self._ends
        if not start or t in (0.0, 1.0):
            return (end if t == 1.0 else start) or None
        if self._recalibrated:
            return None
        return [
            (m, torch.lerp(mean, other_mean, t), torch.lerp(var, other_var, t))
            for (m, mean, var), (_, other_mean, other_var) in zip(start, end, strict=True)
        ]

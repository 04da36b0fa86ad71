"""A plane between its points by what the network gives out there, which costs no forward pass.

A loss of a few samples has corners and poles where what the network gives out goes on smoothly: a
cross entropy near zero is the exponential of its logits. So these are interpolated, each of each
sample, and the loss is computed from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lla_callbacks.linalg.sharing import Alone, Share
from lla_callbacks.objective.evaluation import is_metric
from lla_callbacks.objective.grid import complete_axes
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.outputs import (
    PASS_NUMBERS,
    OutputLoss,
    OutputRecorder,
    giver_of,
    loss_of_outputs,
)
from lla_callbacks.objective.points import PointSettings, space_of
from lla_callbacks.slices.fine import FEWEST, FineLoss
from lla_callbacks.slices.interpolation import FACTOR, fine_axes, spline_matrix
from lla_callbacks.slices.judging import estimated, held_out
from lla_callbacks.slices.slices import Plane

# Under which name the recorder goes with the metrics: no tag has such a one.
NAME = "\0outputs"
# Losses of recorded outputs agree with those that were computed, to rounding.
RTOL, ATOL = 1e-4, 1e-6


class Refinement:
    """Keeps the outputs at a plane's points, and finds the loss between the points from them.

    Args:
        objective: The loss.
        settings: How points are evaluated.
        shape: Of the grid.
        share: Processes that divide the points.
        wanted: Whether to do anything. Nothing is done with fewer than seven points a side
            either, which could not tell whether it is for the better.

    Attributes:
        settings: How points are to be evaluated, so that outputs are kept.
        reason: Why there is nothing between the points, and what to do about it; empty if there
            is, or nothing was to be done.
    """

    def __init__(
        self,
        objective: Objective,
        settings: PointSettings,
        shape: tuple[int, int],
        share: Share | None = None,
        *,
        wanted: bool = True,
    ) -> None:
        self._objective = objective
        self._share = share or Alone()
        self.settings = settings
        self._recorder: OutputRecorder | None = None
        self.reason = ""
        if not wanted:
            return
        if min(shape) < FEWEST:
            self.reason = (
                f"there are {shape[0]} x {shape[1]} points; give {FEWEST} x {FEWEST} at least (of "
                "a monitor: plane_points, or a larger max_overhead)"
            )
            return
        if space_of(objective).is_spread:
            self.reason = "parameters are spread over processes; give refine=False"
            return
        giver, self.reason = giver_of(objective, shape[0] * shape[1])
        if giver is not objective.module and any(map(is_metric, (settings.metrics or {}).values())):
            self.reason = self.reason or (
                f"metrics are of what {type(objective.module).__name__} gives, and the loss is of "
                f"its part {type(giver).__name__}; give metrics=None"
            )
        if giver is not None and not self.reason:
            self._recorder = OutputRecorder(giver)
            metrics = {**(settings.metrics or {}), NAME: self._recorder}
            self.settings = replace(settings, metrics=metrics)

    def finish(self, plane: Plane) -> Plane:
        """Return a measured plane with the loss between its points, where that can be had."""
        if self._recorder is not None:
            self._recorder.join(self._share)
            norms = plane.metrics[NAME]
            metrics = {name: table for name, table in plane.metrics.items() if name != NAME}
            axes = plane.alphas, plane.betas
            centre = [int(axis.abs().argmin()) for axis in axes]
            rows, columns = complete_axes(plane.loss.shape, plane.evaluated, centre)
            fine, self.reason = refined_loss(
                self._objective, self._recorder, (axes[0][rows], axes[1][columns]),
                plane.loss[rows][:, columns], norms[rows][:, columns],
            )  # fmt: skip
            plane = replace(plane, metrics=metrics, fine=fine)
        return plane


def refined_loss(
    objective: Objective,
    recorder: OutputRecorder,
    axes: tuple[Tensor, Tensor],
    loss: Tensor,
    norms: Tensor,
) -> tuple[FineLoss | None, str]:
    """Return the loss between points, or why there is none.

    Args:
        objective: The loss.
        recorder: Has the outputs at the points.
        axes: Coordinates of a complete grid.
        loss: There, shape ``(n, m)``.
        norms: By which the recorder knows the outputs, of the same shape.
    """
    outputs = recorder.of(norms.flatten().tolist())
    if min(loss.shape) < FEWEST or not bool(loss.isfinite().all()):
        return None, ""  # no surface is drawn through these in any way
    if outputs is None:
        return None, "outputs are not finite everywhere; give alphas and betas nearer to 0"
    shape = loss.shape
    with loss_of_outputs(objective, recorder.gives) as losses:
        again = losses(outputs).reshape(shape)
        if not torch.allclose(again, loss, rtol=RTOL, atol=ATOL):
            return None, (
                f"the loss is no function of the output of {type(recorder.gives).__name__} "
                "alone; give a loss that takes nothing else from the module"
            )
        grids = [t.reshape(*shape, *t.shape[1:]) for t in outputs]
        x, y = (axis.numpy() for axis in axes)
        values = loss.numpy()

        def guess(
            used: tuple[np.ndarray, np.ndarray], asked: tuple[np.ndarray, np.ndarray]
        ) -> np.ndarray:
            some = [g[torch.from_numpy(used[0])][:, torch.from_numpy(used[1])] for g in grids]
            return _between(losses, some, *(
                spline_matrix(c[u], c[a]) for c, u, a in zip((x, y), used, asked, strict=True)
            ))  # fmt: skip

        error, high = estimated(guess, values, held_out(guess, values, 2))
        fine = _between(losses, grids, *(spline_matrix(c, fine_axes(c)) for c in (x, y)))
    fine[::FACTOR, ::FACTOR] = values
    if not np.isfinite(fine).all() or (values.min() > 0 and not fine.min() > 0):
        return None, "between points it gives losses that are not above 0; give more points"
    return FineLoss(torch.from_numpy(fine), error, high), ""


def _between(
    losses: OutputLoss, outputs: Sequence[Tensor], first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Return losses of outputs on a finer grid, a few rows at a time.

    Args:
        losses: Of outputs.
        outputs: On a grid, shapes ``(n, m, *shape)``.
        first: From values at the rows to values at finer rows, shape ``(k, n)``.
        second: Likewise of columns, shape ``(l, m)``.

    Returns:
        Shape ``(k, l)``.
    """
    numbers = sum(t[0, 0].numel() for t in outputs)
    rows = max(1, PASS_NUMBERS // max(len(second) * numbers, 1))
    found = []
    for start in range(0, len(first), rows):
        parts = []
        for given in outputs:
            # Half precision has no digits to spare for the sums.
            kind = torch.promote_types(given.dtype, torch.float32)
            across, along = (
                torch.from_numpy(m).to(given.device, kind)
                for m in (first[start : start + rows], second)
            )
            half = torch.tensordot(across, given.to(kind), dims=1)
            part = torch.einsum("lm,rms->rls", along, half.flatten(2))
            parts.append(part.reshape(-1, *given.shape[2:]).to(given.dtype))
        found.append(losses(parts))
    return torch.cat(found).reshape(len(first), len(second)).numpy()

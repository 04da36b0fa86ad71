"""The path of training through weight space, and the plane that holds most of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import NotYetError
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.slices.directions import Direction

# Weights kept of a path, at most; half as many at least, evenly spaced.
MOST_WEIGHTS = 64


@dataclass(frozen=True, eq=False)
class Path:
    """A path of training, projected onto the plane of its own principal components.

    Attributes:
        steps: Optimizer steps of its points, shape ``(k,)``.
        points: Coordinates in the plane, shape ``(k, 2)``, float64; the last point, the plane's
            origin, is (0, 0).
        explained: Share of the path's variance along each axis, shape ``(2,)``.
        residuals: Distance of each point's weights from the plane, relative to their distance
            from the last ones, shape ``(k,)``; 0 for the last. Where it is large the loss drawn
            beneath a point is not the loss there.
        loss: The loss at the points' own weights, shape ``(k,)``; NaN where not evaluated.
    """

    steps: Tensor
    points: Tensor
    explained: Tensor
    residuals: Tensor
    loss: Tensor


class Trajectory:
    """Weights of a run, thinned out as it goes on, so that memory stays bounded.

    Weights are recorded every ``interval`` steps. When there are :data:`MOST_WEIGHTS` (or as many
    as ``memory`` holds), every second one goes and the interval doubles, so that those that
    remain cover the run evenly.

    Args:
        memory: Bytes that the weights may take.

    Attributes:
        steps: Steps of what is held.
        weights: Flat weights on the CPU, one for each step.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.steps: list[int] = []
        self.weights: list[Tensor] = []
        self.interval = 1

    def wants(self, step: int) -> bool:
        """Return whether the weights after this step should be recorded."""
        return step % self.interval == 0 and (not self.steps or step > self.steps[-1])

    def record(self, step: int, weights: Tensor) -> None:
        """Keep the weights after a step."""
        size = weights.numel() * weights.element_size()
        most = max(4, min(MOST_WEIGHTS, self.memory // max(size, 1)))
        self.steps.append(step)
        self.weights.append(weights.detach().cpu().clone())
        while len(self.steps) >= most:
            self.interval *= 2
            kept = [i for i, s in enumerate(self.steps) if s % self.interval == 0]
            self.steps = [self.steps[i] for i in kept]
            self.weights = [self.weights[i] for i in kept]

    def state(self) -> dict[str, Any]:
        """Return what is held, as lists of numbers and tensors."""
        return {
            "steps": list(self.steps), "weights": list(self.weights), "interval": self.interval,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.steps, self.weights = list(state["steps"]), list(state["weights"])
        self.interval = state["interval"]


def principal_components(
    weights: Sequence[Tensor], end: Tensor, space: ParameterSpace, steps: Sequence[int]
) -> tuple[tuple[Direction, Direction], Path]:
    """Return the first two principal components of a path, and the path on their plane.

    The components are those of the differences to the last weights, centred on their mean (Li et
    al. 2018, section 7.2), from the Gram matrix of the path's points: ``k`` inner products of
    length ``num_params`` a point, never a matrix of ``num_params`` squared. The plane goes
    through the last weights.

    Args:
        weights: Flat weights along the path, in order.
        end: The last weights, the plane's origin.
        space: Layout of the flat vectors.
        steps: Optimizer step of each, and of the end.

    Raises:
        NotYetError: If the path has fewer than three different points: no plane is defined.
    """
    held = space.vectors()
    stacked = torch.zeros(len(weights) + 1, len(end), dtype=torch.float64, device=end.device)
    for row, w in zip(stacked, weights, strict=False):
        row.copy_(w).sub_(end)
    rows = stacked.unbind()
    gram = held.products(stacked, stacked.T)
    k = len(rows)
    centring = torch.eye(k, dtype=torch.float64) - 1.0 / k
    values, vectors = torch.linalg.eigh(centring @ gram @ centring)
    values = values.clamp(min=0).flip(0)
    total = float(values.sum())
    if k < 3 or total <= 0 or float(values[1]) <= 1e-12 * total:
        raise NotYetError(
            f"the path has {k} points that lie on a line, so it has no plane: give at least three "
            "checkpoints in general position."
        )
    axes = []
    for j in range(2):
        mixed = centring @ vectors[:, -1 - j]
        axis = sum((float(c) * row for c, row in zip(mixed, rows, strict=True)), 0 * rows[0])
        axes.append(axis / held.norm(axis))
    # Orthogonal up to rounding already; once more, so that projections add up.
    axes[1] = axes[1] - held.inner(axes[1], axes[0]) * axes[0]
    axes[1] = axes[1] / held.norm(axes[1])
    points = held.products(stacked, torch.stack(axes, dim=1))
    # The start of the path lies to the left and below, whatever sign the solver chose.
    signs = torch.where(points[0] > 0, -1.0, 1.0).double()
    points = points * signs + 0.0  # no negative zeros
    lengths = gram.diagonal().clamp(min=0).sqrt()
    inside = points.square().sum(1)
    residuals = (lengths.square() - inside).clamp(min=0).sqrt() / lengths.clamp(min=1e-300)
    # What is below the rounding of the inner products is zero.
    residuals = torch.where(residuals < 1e-7, 0.0, residuals)
    explained = values[:2] / total
    found = [
        Direction(
            (signs[j].item() * axes[j]).to(space.device, space.dtype),
            f"PC{j + 1} ({float(explained[j]):.1%})",
            "‖v‖",
            reach=max(float(points[:, j].abs().max()), 1e-300),
        )
        for j in range(2)
    ]
    path = Path(
        torch.tensor(list(steps)),
        points,
        explained,
        residuals,
        torch.full((k,), float("nan"), dtype=torch.float64),
    )
    return (found[0], found[1]), path

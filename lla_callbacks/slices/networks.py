"""The plane through three networks, with the curve that joins two of them past the third."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.families import Listed
from lla_callbacks.objective.networks import Networks, networks_of
from lla_callbacks.objective.objective import Objective, trainable
from lla_callbacks.objective.points import PointSettings, evaluate_points, space_of
from lla_callbacks.objective.state import Snapshot, weights_at
from lla_callbacks.slices.directions import Direction

# Points along each side, as in the published figures (Garipov et al. 2018, figure 1).
NETWORK_POINTS = 21
# Of the triangle's extent, beyond it on either side.
MARGIN = 0.2
# Points of a drawn curve.
CURVE_POINTS = 101


@runtime_checkable
class CurveLike(Protocol):
    """A curve between networks, as :class:`~lla_callbacks.Curve` is one."""

    points: tuple[Mapping[str, Tensor], ...]
    kind: Any

    def weights(self, t: float) -> dict[str, Tensor]:
        """Return a state dict at ``t``."""


@dataclass(frozen=True, eq=False)
class Marks:
    """Networks on a plane.

    Attributes:
        names: Of the networks.
        points: Their coordinates, shape ``(k, 2)``, float64.
        loss: At their own weights, shape ``(k,)``; NaN where not evaluated.
        residuals: Distance of their weights from the plane, relative to that from the first
            network, shape ``(k,)``.
        curve: The curve's coordinates from start to end, shape ``(m, 2)``; ``m = 0`` without one.
    """

    names: tuple[str, ...]
    points: Tensor
    loss: Tensor
    residuals: Tensor
    curve: Tensor


@dataclass(frozen=True, eq=False)
class NetworkPlane:
    """A plane through networks, whose origin is the first of them.

    Attributes:
        directions: Unit vectors: from the first network to the second axis network, and at right
            angles to that towards the third.
        marks: The networks on it.
        origin: The first network.
        networks: Flat weights of all that are marked.
    """

    directions: tuple[Direction, Direction]
    marks: Marks
    origin: Snapshot
    networks: tuple[Tensor, ...]

    @contextmanager
    def placed(self, module: nn.Module) -> Iterator[None]:
        """Within this context a module is the first network."""
        with weights_at(module, self.origin):
            yield

    def coordinates(self, count: int = NETWORK_POINTS) -> tuple[Tensor, Tensor]:
        """Return coordinates that show all networks and the curve, with a margin."""
        shown = torch.cat([self.marks.points, self.marks.curve])
        low, high = shown.amin(0), shown.amax(0)
        # One margin for both axes, or a flat triangle would touch the frame.
        margin = MARGIN * float((high - low).max())
        first, second = (
            torch.linspace(float(a) - margin, float(b) + margin, count, dtype=torch.float64)
            for a, b in zip(low, high, strict=True)
        )
        return first, second

    def measured(self, objective: Objective) -> Marks:
        """Return the marks with the loss of each network at its own weights."""
        space = space_of(objective)
        numbers = torch.arange(len(self.networks), dtype=torch.float64)[:, None]
        values = evaluate_points(
            objective, Listed(space, self.networks), numbers, PointSettings(evaluation="loop")
        )
        return replace(self.marks, loss=values.table[:, 0])


def names_networks(directions: Any) -> bool:
    """Return whether ``directions`` of a plane are networks: a curve, or three of them."""
    if isinstance(directions, CurveLike) and not isinstance(directions, nn.Module):
        return True
    if isinstance(directions, (str, bytes, Mapping, Tensor, nn.Module)):
        return False
    return (
        isinstance(directions, Sequence)
        and len(directions) == 3
        and all(isinstance(d, (nn.Module, Mapping, Path, str)) for d in directions)
    )


def network_plane(module: nn.Module, given: Any, mode: str) -> NetworkPlane:
    """Return the plane through three networks, or through a curve.

    Of a curve with one bend it is the plane through start, bend and end, in which the whole curve
    lies. With more bends it goes through start, end and ``phi(1/2)``, and the rest is projected.

    Args:
        module: Of their architecture.
        given: A curve, or three networks.
        mode: Normalization mode.

    Raises:
        ValueError: If networks are not alike, lie on a line, or have running statistics that
            mode ``"eval"`` would need in between.
    """
    if mode == "eval" and any(
        isinstance(m, _BatchNorm) and m.running_mean is not None for m in module.modules()
    ):
        raise ValueError(
            "mode is 'eval', and batch norm's running statistics belong to one network, not to a "
            "plane through three: give mode='recalibrate' or 'batch'."
        )
    curve = given if isinstance(given, CurveLike) and not isinstance(given, nn.Module) else None
    space = ParameterSpace(trainable(module))
    if curve is None:
        names: tuple[str, ...] = ("first", "second", "third")
        networks = networks_of(module, list(given), [f"network {k}" for k in range(3)])
        third, labels = networks.weights[2], ("first to second", "towards third")
        flats = [space.flatten(w) for w in networks.weights]
        corners = (flats[0], flats[1], space.flatten(third))
        shown = flats
    else:
        names, networks, shown, corners = _of_curve(module, curve, space)
        labels = ("start to end", "towards the bend")
    u, v = _axes(corners)

    def project(vector: Tensor) -> Tensor:
        moved = vector.double() - corners[0].double()
        return torch.stack([moved @ u, moved @ v]).cpu()

    points = torch.stack([project(w) for w in shown])
    away = torch.stack([(w.double() - corners[0].double()).norm().cpu() for w in shown])
    off = (away.square() - points.square().sum(1)).clamp(min=0).sqrt() / away.clamp(min=1e-300)
    line = torch.zeros(0, 2, dtype=torch.float64)
    if curve is not None:
        line = torch.stack(
            [project(_flat(space, curve.weights(k / (CURVE_POINTS - 1))))
             for k in range(CURVE_POINTS)]
        )  # fmt: skip
    marks = Marks(
        names,
        points + 0.0,
        torch.full((len(shown),), float("nan"), dtype=torch.float64),
        # What is below the rounding of the inner products is zero.
        torch.where(off < 1e-6, 0.0, off),
        line,
    )
    directions = tuple(
        Direction(axis.to(space.device, space.dtype), label)
        for axis, label in zip((u, v), labels, strict=True)
    )
    first = dict(zip(networks.names, networks.weights[0], strict=True))
    origin = Snapshot({**first, **networks.common.parameters}, networks.common.buffers)
    return NetworkPlane((directions[0], directions[1]), marks, origin, tuple(shown))


def _of_curve(
    module: nn.Module, curve: CurveLike, space: ParameterSpace
) -> tuple[tuple[str, ...], Networks, list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return what a plane through a curve shows, and the three corners that span it."""
    bends = len(curve.points) - 2
    ends = networks_of(module, [curve.weights(0), curve.weights(1)], ["start", "end"])
    a, b = (space.flatten(w) for w in ends.weights)
    between = [_flat(space, point) for point in curve.points[1:-1]]
    names = ("start", *(["bend"] if bends == 1 else [f"bend {j + 1}" for j in range(bends)]), "end")
    if bends == 0:
        raise ValueError(
            "the curve has no bend, so no plane goes through it: give three networks, or a curve "
            "that was trained."
        )
    third = between[0] if bends == 1 else _flat(space, curve.weights(0.5))
    return names, ends, [a, *between, b], (a, b, third)


def _axes(corners: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return orthonormal vectors of the plane through three points, float64."""
    a, b, c = (w.double() for w in corners)
    u = b - a
    length = u.norm()
    v = c - a
    if float(length) > 0:
        u = u / length
        # Twice, so that rounding leaves no part along u.
        for _ in range(2):
            v = v - (v @ u) * u
    height = float(v.norm())
    if not height > 1e-6 * float(torch.maximum(length, (c - a).norm())):
        raise ValueError(
            "the three networks lie on a line, so no one plane goes through them: give networks in "
            "general position, or a curve whose bend was trained."
        )
    return u, v / height


def _flat(space: ParameterSpace, state: Mapping[str, Tensor]) -> Tensor:
    return space.flatten(
        [state[n].to(w.device) for n, w in zip(space.names, space.tensors, strict=True)]
    )

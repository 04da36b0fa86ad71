"""Curves through weight space: control points, coefficients, weights at each ``t``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lla_callbacks.objective.checks import one_of, whole
from lla_callbacks.objective.networks import save_whole

Kind = Literal["bezier", "chain"]
_FORMAT = "lla_callbacks curve 1"


def coefficients(kind: Kind, count: int, t: float) -> list[float]:
    r"""Return ``c_0 ... c_{count-1}`` of ``phi(t) = sum_j c_j(t) w_j``; their sum is 1.

    Bezier: ``c_j = C(count-1, j) t^j (1-t)^(count-1-j)``. Chain: ``c_j = max(0, 1 -
    |t (count-1) - j|)``, whose segments have equal shares of ``t`` (Garipov et al. 2018,
    section 3.2).

    Args:
        kind: ``"bezier"`` or ``"chain"``.
        count: Control points, both ends among them.
        t: From 0 (start) to 1 (end).
    """
    last = count - 1
    if kind == "bezier":
        return [math.comb(last, j) * t**j * (1 - t) ** (last - j) for j in range(count)]
    # From the number of the segment, so that the two that count add up exactly.
    segment = min(int(t * last), last - 1)
    share = t * last - segment
    found = [0.0] * count
    found[segment], found[segment + 1] = 1.0 - share, share
    return found


def mean_square(kind: Kind, count: int, j: int) -> float:
    """Return ``E c_j(t)^2`` for uniform ``t``, of an inner control point.

    By so much the curvature that a bend sees is smaller than the network's, and with it the
    step that a learning rate makes: 2/15 for the one bend of a Bezier curve, 1/3 for a chain's.
    """
    if kind == "chain":
        return 2 / (3 * (count - 1))
    n = count - 1
    # The integral of t^2j (1-t)^2(n-j) is a beta function, (2j)! (2n-2j)! / (2n+1)!.
    beta = 1 / ((2 * n + 1) * math.comb(2 * n, 2 * j))
    return float(math.comb(n, j) ** 2 * beta)


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """A curve in weight space, as plain tensors.

    Attributes:
        points: Control points: start, bends, end; each a dict from the name of a trained
            parameter to its tensor.
        kind: ``"bezier"`` or ``"chain"``.
        start_rest: What else the start's state dict has: frozen parameters, buffers.
        end_rest: Likewise of the end.
        tied: A further name of a tied parameter to the first one.
    """

    points: tuple[Mapping[str, Tensor], ...]
    kind: Kind = "bezier"
    start_rest: Mapping[str, Tensor] = field(default_factory=dict)
    end_rest: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if len(self.points) < 2:
            raise ValueError(
                f"a curve has {len(self.points)} control points; give a start, an end, and bends "
                "between them."
            )
        first = self.points[0]
        for j, point in enumerate(self.points):
            shapes = {name: tuple(value.shape) for name, value in point.items()}
            if shapes != {name: tuple(value.shape) for name, value in first.items()}:
                raise ValueError(
                    f"control point {j} has other names or shapes than control point 0: give "
                    "points of one network."
                )

    def __repr__(self) -> str:
        return (
            f"<Curve: {self.kind}, {self.bends} bend{'' if self.bends == 1 else 's'}, "
            f"{sum(value.numel() for value in self.points[0].values()):,} weights, length "
            f"{self.length():.4g}>"
        )

    @property
    def bends(self) -> int:
        """Number of control points between the ends; 0 for a straight line."""
        return len(self.points) - 2

    def weights(self, t: float) -> dict[str, Tensor]:
        """Return a state dict at ``t``: exactly the networks themselves at 0 and 1.

        Trained parameters are ``phi(t)``. Of the rest, running statistics are interpolated in
        between, which is where an estimate begins and not what the network there has: estimate
        them anew (:func:`torch.optim.swa_utils.update_bn`, or a measurement in mode
        ``"recalibrate"``) before you evaluate the network in evaluation mode.

        Raises:
            ValueError: If ``t`` does not lie between 0 and 1.
        """
        if not 0 <= t <= 1:
            raise ValueError(f"t is {t!r}; give a number from 0 (start) to 1 (end).")
        found = {
            name: combined(
                coefficients(self.kind, len(self.points), t), [p[name] for p in self.points]
            )
            for name in self.points[0]
        }
        for name, value in self.start_rest.items():
            other = self.end_rest.get(name, value)
            if value.is_floating_point() and 0 < t < 1:
                found[name] = torch.lerp(value, other, t)
            else:
                found[name] = (value if t < 0.5 else other).clone()
        found |= {name: found[first] for name, first in self.tied.items()}
        return found

    def length(self, points: int = 61) -> float:
        """Return the length of the curve, as a sum over equal steps in ``t``."""
        at = torch.linspace(0, 1, points, dtype=torch.float64)
        return float(step_lengths(self.kind, [list(p.values()) for p in self.points], at).sum())

    def save(self, path: str | Path) -> Path:
        """Write the curve to a file that ``torch.load(..., weights_only=True)`` reads."""
        plain = {
            "format": _FORMAT,
            "kind": self.kind,
            "points": [_compact(point) for point in self.points],
            "start_rest": _compact(self.start_rest),
            "end_rest": _compact(self.end_rest),
            "tied": dict(self.tied),
        }
        return save_whole(plain, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Return a curve that was saved.

        Raises:
            ValueError: If the file holds something else.
        """
        plain: Any = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(plain, dict) or plain.get("format") != _FORMAT:
            raise ValueError(f"{path} holds no curve: give a file that Curve.save wrote.")
        return cls(
            tuple(plain["points"]), plain["kind"], plain["start_rest"], plain["end_rest"],
            plain["tied"],
        )  # fmt: skip


def combined(factors: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return ``sum_j c_j w_j``; one that counts alone comes back to the bit."""
    pairs = [(c, w) for c, w in zip(factors, tensors, strict=True) if c != 0.0]
    c, w = pairs[0]
    found = w.clone() if c == 1.0 else w * c
    for c, w in pairs[1:]:
        found.add_(w, alpha=c)
    return found


def on_segment(start: Sequence[Tensor], end: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return the weights at a share of the way from start to end, tensor by tensor."""
    return [torch.lerp(a, b, share) for a, b in zip(start, end, strict=True)]


def straight_bends(
    start: Sequence[Tensor], end: Sequence[Tensor], bends: int
) -> list[list[Tensor]]:
    """Return bends with which the curve is the straight line, evenly spaced on it."""
    return [on_segment(start, end, (j + 1) / (bends + 1)) for j in range(bends)]


def step_lengths(kind: Kind, points: Sequence[Sequence[Tensor]], t: Tensor) -> Tensor:
    """Return ``|phi(t_{i+1}) - phi(t_i)|``, shape ``(len(t) - 1,)``, float64.

    From the inner products of the control points' differences to the start, in float64: one
    pass over the weights, whatever the number of steps.

    Args:
        kind: Of the curve.
        points: Its control points, tensors in one order.
        t: Ascending, float64.
    """
    count = len(points)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for tensors in zip(*points, strict=True):
        rows = torch.stack([(w.double() - tensors[0].double()).reshape(-1) for w in tensors])
        gram += (rows @ rows.T).cpu()
    c = torch.tensor([coefficients(kind, count, float(s)) for s in t], dtype=torch.float64)
    d = c.diff(dim=0)
    return torch.einsum("ij,jk,ik->i", d, gram, d).clamp(min=0).sqrt()


# Each is a network; more than this many are a slip of the hand.
MOST_BENDS = 1000


def check_kind(kind: str) -> None:
    """Raise a ValueError for a kind of curve that does not exist."""
    one_of("kind", kind, Kind)


def check_bends(bends: Any) -> None:
    """Raise a ValueError if this is no number of bends."""
    whole(
        "bends",
        bends,
        1,
        MOST_BENDS,
        other=": control points between the ends (the reference code counts the ends too)",
    )


def _compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}

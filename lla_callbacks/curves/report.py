"""Results about curves, with everything that can be made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from lla_callbacks.curves.arrays import load_along, save_along
from lla_callbacks.curves.figures import barrier_figure, curve_figure
from lla_callbacks.curves.measure import Along
from lla_callbacks.curves.plot_figures import compared_curves, draw_barriers, draw_curve
from lla_callbacks.curves.scalars import curve_scalars
from lla_callbacks.report.result import Result
from lla_callbacks.slices.fields import facts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Definition = Literal["above_ends", "above_line", "above_mean"]


@dataclass(frozen=True, eq=False, repr=False)
class LossCurve(Along, Result):
    """What :func:`~lla_callbacks.loss_curve` returns.

    All fields are those of :class:`~lla_callbacks.curves.measure.Along`.
    """

    @classmethod
    def of(cls, along: Along) -> LossCurve:
        """Return a report of a measurement."""
        return cls(**{f.name: getattr(along, f.name) for f in fields(along)})

    @classmethod
    def load(cls, path: str | Path) -> LossCurve:
        """Return a result that was saved.

        Raises:
            ValueError: If the file holds something else.
        """
        return cls.of(load_along(Path(path)))

    def save(self, path: str | Path) -> Path:
        """Write every number to an .npz file and return its path."""
        return save_along(self, Path(path))

    def __repr__(self) -> str:
        kind = self.kind if self.bends else "straight line"
        found = self.statistics()
        return (
            f"<LossCurve along a {kind}: {len(self.t)} points, barrier "
            f"{found.barrier_above_ends:.4g}, maximum {found.maximum:.4g}, "
            f"{self.facts.num_samples} samples>"
        )

    def _draw(self, axes: Axes) -> None:
        draw_curve(axes, self)

    @classmethod
    def _compared(cls, results: Sequence[LossCurve], names: Sequence[str]) -> Figure:
        return compared_curves(results, names)

    def scalars(self, name: str = "curve") -> dict[str, float]:
        """Return everything as scalars by tag."""
        return curve_scalars(self, name)

    def figure(self, *, title: str = "", metric: str | None = None) -> Figure:
        """Return loss and one metric along the curve, beside the straight line, drawn."""
        return curve_figure(self, title=title, metric=metric)

    def summary(self) -> str:
        """Return what was found, in sentences."""
        lines = []
        for metric in (None, *self.metrics):
            what = metric or "loss"
            for part, name in ((self, "curve"), (self.straight, "straight line")):
                if part is None:
                    continue
                v = part.statistics(metric)
                lines.append(
                    f"{what} on the {name}: {v.start:.4g} and {v.end:.4g} at its ends, at most "
                    f"{v.maximum:.4g}, {v.mean:.4g} in the mean over t, {v.integral:.4g} over its "
                    f"length; barrier {v.barrier_above_ends:.4g} above the higher end, "
                    f"{v.barrier_above_line:.4g} above the line between the ends' values, "
                    f"{v.barrier_above_mean:.4g} above their mean"
                )
        lines.append(f"length of the curve {self.length:.4g}")
        if self.straight is not None:
            lines[-1] += f", of the straight line {self.straight.length:.4g}"
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False)
class Barriers(Result):
    """What :func:`~lla_callbacks.barrier` returns.

    Attributes:
        names: Of the networks.
        lines: Pair of positions ``i < j`` to the loss along the straight line between them.
    """

    names: tuple[str, ...]
    lines: Mapping[tuple[int, int], LossCurve]

    @classmethod
    def of(cls, names: tuple[str, ...], lines: Mapping[tuple[int, int], Along]) -> Barriers:
        """Return a report of measurements."""
        return cls(names, {pair: LossCurve.of(along) for pair, along in lines.items()})

    def matrix(self, *, metric: str | None = None, definition: Definition = "above_ends") -> Tensor:
        """Return the barriers, shape ``(n, n)``, float64, symmetric, zeros on the diagonal.

        Args:
            metric: Of this metric instead of the loss.
            definition: ``"above_ends"``, ``"above_line"`` or ``"above_mean"``; see
                :class:`~lla_callbacks.curves.measure.CurveStatistics`.

        Raises:
            ValueError: If there is no such metric or definition.
        """
        if definition not in get_args(Definition):
            raise ValueError(
                f"definition is {definition!r}; give one of {', '.join(get_args(Definition))}."
            )
        found = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)
        for (i, j), line in self.lines.items():
            value = getattr(line.statistics(metric), f"barrier_{definition}")
            found[i, j] = found[j, i] = value
        return found

    def __repr__(self) -> str:
        values = [line.statistics().barrier_above_ends for line in self.lines.values()]
        return (
            f"<Barriers between {len(self.names)} networks: {min(values):.4g} to "
            f"{max(values):.4g} of loss above the higher end>"
        )

    def figure(self, *, title: str = "", metric: str | None = None) -> Figure:
        """Return the matrix, drawn."""
        any_line = next(iter(self.lines.values()))
        facts = facts_of(any_line.facts, f"{len(any_line.t)} points a line")
        return barrier_figure(
            self.names, self.matrix(metric=metric), what=metric or "loss", title=title, facts=facts
        )

    def _draw(self, axes: Axes) -> None:
        draw_barriers(axes, self.names, self.matrix())

    def _arrays(self) -> dict[str, Any]:
        """Return the matrices of all definitions and metrics."""
        metrics = next(iter(self.lines.values())).metrics
        arrays = {
            f"{metric or 'loss'}/{definition}": self.matrix(
                metric=metric, definition=definition
            ).numpy()
            for metric in (None, *metrics)
            for definition in get_args(Definition)
        }
        return {"names": list(self.names), **arrays}

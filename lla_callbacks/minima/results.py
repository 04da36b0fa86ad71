"""Results about minima, with everything that can be made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from lla_callbacks.minima.basins import BasinRatio
from lla_callbacks.minima.figures import (
    map_figure,
    ratio_figure,
    relaxation_figure,
    shift_figure,
)
from lla_callbacks.minima.maps import Points
from lla_callbacks.minima.plot_figures import draw_map, draw_ratio, draw_relaxation, draw_shift
from lla_callbacks.minima.relaxation import RelaxationPath
from lla_callbacks.minima.shift import Shift
from lla_callbacks.minima.words import correlation_in_words, ratio_in_words, volume_in_words
from lla_callbacks.report.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

R = TypeVar("R", bound="_Found")


class _Found(Result):
    @classmethod
    def of(cls: type[R], found: Any, **more: Any) -> R:
        """Return a report of what was found."""
        return cls(**{f.name: getattr(found, f.name) for f in fields(found)}, **more)

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                arrays[field.name] = value.numpy()
            elif isinstance(value, (str, int, float)):
                arrays[field.name] = value
            elif isinstance(value, tuple):
                arrays[field.name] = np.asarray(value)
        return arrays


@dataclass(frozen=True, eq=False, repr=False)
class BasinComparison(BasinRatio, _Found):
    """What :func:`~lla_callbacks.compare_basins` returns.

    All fields are those of :class:`~lla_callbacks.minima.basins.BasinRatio`.
    """

    def __repr__(self) -> str:
        a, b = self.names
        return f"<BasinComparison: radius of {a} over {b} {ratio_in_words(self)}>"

    def summary(self) -> str:
        """Return what was found, in sentences."""
        a, b = self.names
        rim = (
            f"one cutoff, {self.a.cutoff:.4g}"
            if self.rim == "cutoff"
            else f"rims {self.a.cutoff - self.a.centre_loss:.4g} above each loss"
        )
        return (
            f"Effective radius of {a} over that of {b}: {ratio_in_words(self)} ({rim}, "
            f"{len(self.a.radii)} and {len(self.b.radii)} rays, 95 % interval over rays).\n"
            f"Difference of log10 volumes: {volume_in_words(self)}."
        )

    def _draw(self, axes: Axes) -> None:
        draw_ratio(axes, self)

    def figure(self, *, title: str = "") -> Figure:
        """Return the radii of both, drawn."""
        return ratio_figure(self, title=title)


@dataclass(frozen=True, eq=False, repr=False)
class Relaxation(RelaxationPath, _Found):
    """What :func:`~lla_callbacks.relax` returns.

    All fields are those of :class:`~lla_callbacks.minima.relaxation.RelaxationPath`.
    """

    def __repr__(self) -> str:
        held = ""
        if self.num_held:
            first, last = float(self.held_accuracy[0]), float(self.held_accuracy[-1])
            held = f", held-out accuracy {first:.3f} -> {last:.3f}"
        return (
            f"<Relaxation: {int(self.steps[-1])} steps, loss {float(self.loss[0]):.4g} -> "
            f"{float(self.loss[-1]):.4g}{held}, moved {float(self.displacement[-1]):.2%}>"
        )

    def _draw(self, axes: Axes) -> None:
        draw_relaxation(axes, self)

    def figure(self, *, title: str = "") -> Figure:
        """Return loss, accuracy and displacement over steps, drawn."""
        return relaxation_figure(self, title=title)


@dataclass(frozen=True, eq=False, repr=False)
class MinimaMap(Points, _Found):
    """What :func:`~lla_callbacks.map_of_minima` returns.

    Attributes:
        values: A number a point, which colours it, or None.
        values_name: Of these numbers.
        path: Set whose points are joined in their order, or None.

    All other fields are those of :class:`~lla_callbacks.minima.maps.Points`.
    """

    values: tuple[float, ...] | None = None
    values_name: str = "value"
    path: str | None = None

    def __repr__(self) -> str:
        return (
            f"<MinimaMap: {len(self.names)} networks by {self.distance} ({self.method}), "
            f"trustworthiness {self.trustworthiness:.2f}, rank correlation "
            f"{self.rank_correlation:.2f}>"
        )

    def _draw(self, axes: Axes) -> None:
        draw_map(axes, self)

    def figure(self, *, title: str = "") -> Figure:
        """Return the points, drawn, with what the picture is worth below it."""
        return map_figure(
            self, title=title, values=self.values, values_name=self.values_name, path=self.path
        )

    def write_projector(self, logger: Any, tag: str = "minima", step: int = 0) -> None:
        """Give TensorBoard's projector the points, at most 50 columns each.

        They are scores of classical scaling. The projector reduces them again: take its PCA tab
        and switch *Sphereize data* off to see distances as they are.

        Args:
            logger: A TensorBoard logger or a ``SummaryWriter``.
            tag: The tag.
            step: The step.

        Raises:
            ValueError: If it is neither.
        """
        writer = getattr(logger, "experiment", logger)
        if not callable(getattr(writer, "add_embedding", None)):
            raise ValueError(
                f"{type(logger).__name__} has no projector: give a TensorBoardLogger or a "
                "torch.utils.tensorboard.SummaryWriter."
            )
        header = ["name", "set"] + ([self.values_name] if self.values is not None else [])
        columns = [self.names, self.sets] + ([self.values] if self.values is not None else [])
        rows = [list(map(str, row)) for row in zip(*columns, strict=True)]
        scores = self.scores.float()
        writer.add_embedding(
            scores, metadata=rows, metadata_header=header, global_step=step, tag=tag
        )


@dataclass(frozen=True, eq=False, repr=False)
class ShiftReport(Shift, _Found):
    """What :func:`~lla_callbacks.measure_shift` returns.

    All fields are those of :class:`~lla_callbacks.minima.shift.Shift`.
    """

    def __repr__(self) -> str:
        return f"<ShiftReport: {', '.join(self.sets)}; {self.num_samples} samples each>"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict of plain numbers a set, for JSON; what is not finite is None."""
        found = []
        for name, s in self.sets.items():
            row: dict[str, Any] = {
                "set": name, "num_samples": s.num_samples, "num_wrong": s.num_wrong,
                "mode": self.mode, "num_steps": self.num_steps,
            }  # fmt: skip
            row |= {k: v if math.isfinite(v) else None for k, v in s.values.items()}
            errors = {f"{k}_error": v for k, v in s.errors.items()}
            row |= {k: v if math.isfinite(v) else None for k, v in errors.items()}
            found.append(row)
        return found

    def table(self, names: Sequence[str] = ("trace", "lambda_max", "kh05", "r_e")) -> str:
        """Return a Markdown table of the sets, and below it what follows accuracy how well.

        Args:
            names: Of the numbers that are compared with accuracy.
        """
        shown = ["accuracy", "loss", "confidence", *names]
        lines = [f"| set | wrong | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
        for name, s in self.sets.items():
            cells = [f"{s.values[n]:.3g}" for n in shown]
            lines.append(f"| {name} | {s.num_wrong} | {' | '.join(cells)} |")
        lines += [
            "",
            "| | rank correlation with accuracy | beyond what the loss says |",
            "|---|---|---|",
        ]
        for name in ("loss", "confidence", *names):
            plain = correlation_in_words(self.rank_correlation(name))
            rest = (
                ""
                if name == "loss"
                else correlation_in_words(self.rank_correlation(name, given="loss"))
            )
            lines.append(f"| {name} | {plain} | {rest} |")
        return "\n".join(lines)

    def _draw(self, axes: Axes) -> None:
        draw_shift(axes, self)

    def figure(
        self,
        names: Sequence[str] = ("loss", "confidence", "trace", "lambda_max", "kh05", "r_e"),
        *,
        title: str = "",
    ) -> Figure:
        """Return numbers of every set against its accuracy, drawn."""
        return shift_figure(self, names, title=title)

    def _arrays(self) -> dict[str, Any]:
        """Return every set's numbers, an array a column."""
        rows = self.rows
        return {
            key: np.asarray([np.nan if r[key] is None else r[key] for r in rows]) for key in rows[0]
        }

"""Results of slices, with everything that can be made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lla_callbacks.report.result import Result
from lla_callbacks.slices.arrays import load_slice, save_slice
from lla_callbacks.slices.basin import Basin
from lla_callbacks.slices.convexity import Convexity
from lla_callbacks.slices.fields import counted
from lla_callbacks.slices.landscape_figures import (
    basin_figure,
    convexity_figure,
    radius_in_words,
    surface_figure,
)
from lla_callbacks.slices.line_figures import line_figure
from lla_callbacks.slices.pictures import Picture, picture_of
from lla_callbacks.slices.plane_figures import plane_figure
from lla_callbacks.slices.plot_figures import (
    compared_basins,
    compared_lines,
    compared_maps,
    compared_planes,
    draw_basin,
    draw_convexity,
    draw_line,
    draw_plane,
)
from lla_callbacks.slices.slices import Line, Plane
from lla_callbacks.slices.surface_html import surface_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

R = TypeVar("R", bound="_Saved")


class _Saved(Result):
    """From measurement to report, and to a file and back."""

    @classmethod
    def of(cls: type[R], measurement: Any) -> R:
        """Return a report of a measurement."""
        return cls(**{f.name: getattr(measurement, f.name) for f in fields(measurement)})

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Return a result that was saved, its directions without their vectors.

        Raises:
            ValueError: If the file holds another kind of result.
        """
        kind, values = load_slice(Path(path))
        wanted = cls.__mro__[1].__name__
        if kind != wanted:
            raise ValueError(f"{path} holds a {kind.lower()}, not a {wanted.lower()}.")
        return cls(**values)

    def save(self, path: str | Path) -> Path:
        """Write every number to an .npz file and return its path."""
        return save_slice(self, Path(path))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False, repr=False)
class LossLine(Line, _Saved):
    """What :func:`~lla_callbacks.loss_line` and :func:`~lla_callbacks.interpolate` return.

    All fields are those of :class:`~lla_callbacks.slices.slices.Line`.
    """

    def __repr__(self) -> str:
        return (
            f"<LossLine along {self.directions[0].name!r}: {counted_of(self.evaluated)}, loss "
            f"{finite_range(self.loss)}, {self.facts.num_samples} samples>"
        )

    def _draw(self, axes: Axes) -> None:
        draw_line(axes, self)

    @classmethod
    def _compared(cls, results: Sequence[LossLine], names: Sequence[str]) -> Figure:
        return compared_lines(results, names)

    def figure(self, *, title: str = "", metric: str | None = None) -> Figure:
        """Return loss and one metric along the line, drawn."""
        return line_figure([self], title=title, metric=metric)


@dataclass(frozen=True, eq=False, repr=False)
class LossPlane(Plane, _Saved):
    """What :func:`~lla_callbacks.loss_plane` returns.

    All fields are those of :class:`~lla_callbacks.slices.slices.Plane`.
    """

    def __repr__(self) -> str:
        late = f" ({int(self.evaluated.sum())} of them evaluated before {LATE} was over)"
        done = "" if self.complete else late
        return (
            f"<LossPlane of {self.directions[0].name!r} and {self.directions[1].name!r}: "
            f"{len(self.alphas)} x {len(self.betas)} points{done}, loss {finite_range(self.loss)}, "
            f"{self.facts.num_samples} samples>"
        )

    @property
    def picture(self) -> Picture | None:
        """The surface through the points, with an estimate of its error; None if not all finite.

        Chosen and judged by the points themselves, at no further pass; see
        :func:`~lla_callbacks.slices.pictures.picture_of`.
        """
        return picture_of(self)

    def _draw(self, axes: Axes) -> None:
        draw_plane(axes, self)

    @classmethod
    def _compared(cls, results: Sequence[LossPlane], names: Sequence[str]) -> Figure:
        return compared_planes(results, names)

    def figure(
        self,
        *,
        title: str = "",
        metric: str | None = None,
        interpolate: bool = False,
        cap: float | None = None,
        scale: tuple[float, float] | None = None,
        run: tuple[float, float] | None = None,
    ) -> Figure:
        """Return the log loss, or a metric, in colours with contours.

        Args:
            title: Above the figure.
            metric: Draw this metric instead of the loss.
            interpolate: Draw :attr:`picture` through the computed points, which are marked.
            cap: Draw larger losses as this one, and say so.
            scale: Lowest and highest loss of the colours, to compare figures.
            run: Lowest and highest loss of a whole run: a second bar shows which part of it is
                in this picture.
        """
        return plane_figure(
            self, title=title, metric=metric, interpolate=interpolate, cap=cap, scale=scale, run=run
        )

    def surface(
        self,
        *,
        title: str = "",
        cap: float | None = None,
        scale: tuple[float, float] | None = None,
    ) -> Figure:
        """Return the log loss as a surface in three dimensions; see :meth:`figure`."""
        return surface_figure(self, title=title, cap=cap, scale=scale)

    def html(
        self,
        path: str | Path,
        *,
        title: str = "",
        cap: float | None = None,
        scale: tuple[float, float] | None = None,
    ) -> Path:
        """Write a surface that a browser can turn, one file; needs plotly.

        See :meth:`figure` for the arguments.

        Raises:
            ImportError: If plotly is not installed.
        """
        return surface_html(self, Path(path), title=title, cap=cap, scale=scale)


@dataclass(frozen=True, eq=False, repr=False)
class ConvexityMap(Convexity, _Saved):
    """What :func:`~lla_callbacks.convexity_map` returns.

    All fields are those of :class:`~lla_callbacks.slices.convexity.Convexity`.
    """

    def __repr__(self) -> str:
        return (
            f"<ConvexityMap: {counted_of(self.evaluated)}, "
            f"|lambda_min/lambda_max| {finite_range(self.ratio)}, {self.num_matvecs} products>"
        )

    def _draw(self, axes: Axes) -> None:
        draw_convexity(axes, self)

    @classmethod
    def _compared(cls, results: Sequence[ConvexityMap], names: Sequence[str]) -> Figure:
        return compared_maps(results, names)

    def figure(self, *, title: str = "") -> Figure:
        """Return both ratios as maps."""
        return convexity_figure(self, title=title)


@dataclass(frozen=True, eq=False, repr=False)
class BasinRadii(Basin, _Saved):
    """What :func:`~lla_callbacks.basin_radii` returns.

    All fields are those of :class:`~lla_callbacks.slices.basin.Basin`.
    """

    def __repr__(self) -> str:
        return (
            f"<BasinRadii: {len(self.radii)} rays ({int(self.open.sum())} open), median "
            f"{self.quantiles[0.5]:.3g}, effective {radius_in_words(self)} filter norms, "
            f"cutoff {self.cutoff:.4g}>"
        )

    def _draw(self, axes: Axes) -> None:
        draw_basin(axes, self)

    @classmethod
    def _compared(cls, results: Sequence[BasinRadii], names: Sequence[str]) -> Figure:
        return compared_basins(results, names)

    def figure(self, *, title: str = "") -> Figure:
        """Return the distribution of radii."""
        return basin_figure({"basin": self}, title=title)


# What ends a slice before all of its points are there.
LATE = "time_budget"


def counted_of(evaluated: Any) -> str:
    """Return how many points were evaluated, and of how many if not all."""
    text = counted(int(evaluated.sum()), evaluated.numel())
    return text if bool(evaluated.all()) else f"{text} ({LATE} was over)"


def finite_range(values: Any) -> str:
    """Return the smallest and the largest finite value, in words."""
    finite = values[values.isfinite()]
    if not finite.numel():
        return "nowhere finite"
    return f"{float(finite.min()):.4g} to {float(finite.max()):.4g}"

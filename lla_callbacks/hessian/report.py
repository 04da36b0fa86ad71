"""The result of one Hessian measurement, with everything that can be made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lla_callbacks.hessian.arrays import loaded_eigenvectors, measurement_arrays
from lla_callbacks.hessian.figures import density_figure
from lla_callbacks.hessian.layer_figures import (
    layer_density_figure,
    layer_distance_figure,
    layer_figure,
)
from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.hessian.plot_figures import (
    History,
    compared_runs,
    compared_spectra,
    draw_spectrum,
)
from lla_callbacks.hessian.scalars import hessian_scalars
from lla_callbacks.hessian.words import describe
from lla_callbacks.report.cost import in_steps
from lla_callbacks.report.files import write_arrays
from lla_callbacks.report.result import Drawn, Result
from lla_callbacks.report.stored import load_result, result_arrays

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class HessianReport(HessianMeasurement, Result):
    """What :func:`~lla_callbacks.measure_hessian` returns.

    All fields are those of
    :class:`~lla_callbacks.hessian.measures.HessianMeasurement`, and one of a training run.

    Attributes:
        training_steps: What the measurement took, in training steps of the user's own batch; NaN
            outside of a fit.

    Example::

        >>> import torch
        >>> from lla_callbacks import measure_hessian
        >>> x, y = torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.ones(3, 1)
        >>> def loss(module, batch):
        ...     return (module(batch[0]) - batch[1]).square().mean()
        >>> report = measure_hessian(torch.nn.Linear(3, 1, bias=False), [(x, y)], loss=loss)
        >>> round(report.lambda_max, 4), round(report.trace, 4)
        (6.0, 9.3333)
    """

    training_steps: float = math.nan

    @classmethod
    def of(
        cls, measurement: HessianMeasurement, *, training_steps: float = math.nan
    ) -> HessianReport:
        """Return a report of a measurement."""
        return cls(
            training_steps=training_steps,
            **{f.name: getattr(measurement, f.name) for f in fields(measurement)},
        )

    def __repr__(self) -> str:
        return (
            f"<HessianReport lambda_max={self.lambda_max!r}, lambda_min={self.lambda_min!r}, "
            f"trace={self.trace:.6g} +- {self.trace_sem:.1g}, {self.num_params} parameters, "
            f"{self.num_samples} samples>"
        )

    def figure(self, *, title: str = "") -> Figure:
        """Return the spectral density, drawn."""
        return density_figure(self, title=title)

    def layer_figure(self, *, title: str = "") -> Figure:
        """Return the layers' traces, drawn as bars with error bars."""
        return layer_figure(self, title=title)

    def layer_density_figure(self, *, title: str = "") -> Figure:
        """Return the layers' spectra against the whole's; needs ``num_layer_steps``."""
        return layer_density_figure(self, title=title)

    def layer_distance_figure(self, *, title: str = "") -> Figure:
        """Return each layer's distance to the whole by depth; needs ``num_layer_steps``."""
        return layer_distance_figure(self, title=title)

    def save(self, path: str | Path) -> Path:
        """Write every number to an .npz file (no pickles inside) and return its path.

        The arrays are those of :func:`~lla_callbacks.hessian.arrays.measurement_arrays`; what
        :meth:`load` needs besides is in those named ``result/...``.
        """
        vectors = self.eigenvectors
        light = self if vectors is None else replace(self, eigenvectors=vectors.without_vectors())
        return write_arrays(Path(path), measurement_arrays(self) | result_arrays(light))

    @classmethod
    def load(cls, path: str | Path) -> HessianReport:
        """Return a report that was saved.

        Raises:
            ValueError: If the file holds something else.
        """
        found: HessianReport = load_result(path, cls)
        return replace(found, eigenvectors=loaded_eigenvectors(found.eigenvectors, Path(path)))

    def _draw(self, axes: Axes) -> None:
        draw_spectrum(axes, self)

    @classmethod
    def _compared(cls, results: Sequence[HessianReport], names: Sequence[str]) -> Figure:
        return compared_spectra(results, names)

    def _compared_runs(self, histories: Sequence[History], names: Sequence[str]) -> Figure:
        return compared_runs(histories, names)

    def scalars(self, name: str = "hessian") -> dict[str, float]:
        """Return the finite numbers by tag; ``name`` is the first part of each."""
        return hessian_scalars(self, name)

    def figures(self, step: int, *, layer_spectra: bool = False) -> Drawn:
        """Return functions that draw what was found at a step, what matters first.

        Args:
            step: For titles.
            layer_spectra: Whether layers have spectra, by ``num_layer_steps``.
        """
        found: dict[str, Callable[[], Figure]] = {}
        if "density" not in self.gaps:
            found["density"] = partial(self.figure, title=f"Hessian spectrum at step {step}")
        if "layers" not in self.gaps:
            title = f"Curvature by layer at step {step}"
            found["layer_traces"] = partial(self.layer_figure, title=title)
            if layer_spectra:
                title = f"Spectrum of each layer and of the whole at step {step}"
                found["layer_densities"] = partial(self.layer_density_figure, title=title)
                title = f"How unlike the whole each layer is at step {step}"
                found["layer_distances"] = partial(self.layer_distance_figure, title=title)
        return found

    def summary(self) -> str:
        """Return what was found, in sentences."""
        return describe(self) + in_steps(self.training_steps)

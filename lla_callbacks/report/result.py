"""What every result offers: files, plain dicts, a plot on anybody's axes, itself in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.report.files import write_arrays
from lla_callbacks.report.picture import figure_of, html_of, picture
from lla_callbacks.report.plain import make_known
from lla_callbacks.report.shown import png_of
from lla_callbacks.report.stored import load_result, result_arrays

R = TypeVar("R", bound="Result")
# Fields as long as the network, which no table wants.
LONG = ("vector", "vectors", "state_dict")


# Functions that draw, by the tag's last part, what matters first.
Drawn = Mapping[str, Callable[[], Figure]]


class Result:
    """A mixin of frozen dataclasses. They give :meth:`_draw`, and where they can ``figure``.

    Fields are numbers, strings, tensors, and dicts, lists and tuples of these: from them follow
    the plain form in checkpoints, the arrays in files and, where nothing else is said, the scalars.

    Attributes:
        gaps: What could not be said, by name, and why: a sentence or an error. Told once a run.
    """

    gaps: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        # So that a checkpoint may hold one of a class of the user's own.
        make_known(cls)

    def scalars(self, name: str) -> dict[str, float]:
        """Return the numbers to log by tag; without a word of its own, every number that it has.

        Args:
            name: First part of every tag.
        """
        row = numbers_of(self).items()
        return {f"{name}/{k}": float(v) for k, v in row if not isinstance(v, (bool, str))}

    def figures(self, step: int) -> Drawn:
        """Return functions that draw the result, by the tag's last part, what matters first.

        Args:
            step: Of the weights, for titles.
        """
        figure = getattr(self, "figure", None)
        return {} if figure is None else {"figure": partial(figure, title=f"At step {step}")}

    def save(self, path: str | Path) -> Path:
        """Write everything to an .npz file (no pickles inside) and return its path."""
        return write_arrays(Path(path), self._arrays() | result_arrays(self))

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Return a result that was saved.

        Raises:
            ValueError: If the file holds something else.
        """
        found: R = load_result(path, cls)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return every number, text and table as plain containers, which JSON takes.

        An eigenvalue comes with its residual beside it. Vectors as long as the network are left
        out; NaN stays NaN.
        """
        found: dict[str, Any] = to_dict(self)
        return found

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw what matters most on one pair of axes, and return their figure and them.

        Args:
            ax: Axes of a figure of your own; ``None``: a new one.

        Raises:
            ValueError: If ``ax`` are no axes.
        """
        axes = picture()[1][0] if ax is None else ax
        figure = figure_of(axes)
        self._draw(axes)
        return figure, axes

    def summary(self) -> str:
        """Return what was found, in words."""
        return repr(self).strip("<>")

    def _draw(self, axes: Axes) -> None:
        raise NotImplementedError

    def _arrays(self) -> dict[str, Any]:
        """Return the arrays of the file that are documented for others to read."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        kinds = (Tensor, str, int, float)
        return {
            name: value.numpy() if isinstance(value, Tensor) else value
            for name, value in held.items()
            if isinstance(value, kinds) and name not in LONG
        }

    def _figures(self) -> Sequence[Figure]:
        """Return what a notebook shows."""
        return [self.figure()] if hasattr(self, "figure") else [self.plot()[0]]

    def _repr_png_(self) -> bytes:
        return png_of(self._figures()[0])

    def _repr_html_(self) -> str:
        return html_of(self._figures(), self.summary())

    @classmethod
    def _compared(cls, results: Sequence[Any], names: Sequence[str]) -> Figure | None:
        """Return several results over or beside each other; ``None`` where there is no way."""
        return None


def to_dict(value: Any) -> Any:
    """Return a value as plain containers, see :meth:`Result.to_dict`."""
    if isinstance(value, Eigenvalue):
        return float(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Exception):
        return f"{type(value).__name__}: {value}"
    if is_dataclass(value) or hasattr(value, "_fields"):
        kept = fields(value) if is_dataclass(value) else ()
        names = [f.name for f in kept] or list(value._fields)
        found: dict[str, Any] = {}
        for name in names:
            part = getattr(value, name)
            if name in LONG:
                continue
            found[name] = to_dict(part)
            if isinstance(part, Eigenvalue):
                found[f"{name}_residual"] = part.residual
        return found
    if isinstance(value, Mapping):
        return {_key(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no plain form.")


def numbers_of(result: Any) -> dict[str, Any]:
    """Return single numbers and texts of a result in one row, parts joined by ``/``."""
    row: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{prefix}/{key}" if prefix else str(key), item)
        elif isinstance(value, (str, int, float)):
            row[prefix] = value

    add("", to_dict(result))
    return row


def _key(key: Any) -> str:
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)

"""Slices as .npz files: to draw again, to compare, and to go on with where a grid stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lla_callbacks.report.files import write_arrays
from lla_callbacks.slices.basin import Basin
from lla_callbacks.slices.convexity import Convexity
from lla_callbacks.slices.directions import Direction
from lla_callbacks.slices.fine import FineLoss
from lla_callbacks.slices.networks import Marks
from lla_callbacks.slices.slices import Line, Plane, SliceFacts
from lla_callbacks.slices.trajectory import Path as TrainingPath

_DIRECTION = ("name", "unit", "reach", "eigenvalue", "residual", "slope", "settled")


def save_slice(result: Line | Plane | Convexity | Basin, path: Path) -> Path:
    """Write a result to an .npz file (no pickles inside) and return its path."""
    return write_arrays(path, arrays_of(result))


def arrays_of(result: Line | Plane | Convexity | Basin) -> dict[str, Any]:
    """Return what a file holds of a result, by name.

    Arrays carry the field's name, metrics as ``metrics/<name>``, conditions as ``facts/<name>``,
    directions as ``directions/<k>/<field>`` without their vectors, which the seed or the network
    gives again. A path of training is ``path/<field>``, the loss between points
    ``fine/<field>``.
    """
    arrays: dict[str, Any] = {
        "kind": next(k.__name__ for k in (Line, Plane, Convexity, Basin) if isinstance(result, k))
    }
    for name, value in vars(result).items():
        if isinstance(value, Tensor):
            arrays[name] = value.numpy()
        elif isinstance(value, (int, float)):
            arrays[name] = value
    for name, value in getattr(result, "metrics", {}).items():
        arrays[f"metrics/{name}"] = value.numpy()
    for name, value in asdict(result.facts).items():
        arrays[f"facts/{name}"] = value
    for k, direction in enumerate(getattr(result, "directions", ())):
        for name in _DIRECTION:
            value = getattr(direction, name)
            arrays[f"directions/{k}/{name}"] = np.nan if value is None else value
    route = getattr(result, "path", None)
    if route is not None:
        for name, value in vars(route).items():
            arrays[f"path/{name}"] = value.numpy()
    fine = getattr(result, "fine", None)
    if fine is not None:
        for name, value in vars(fine).items():
            arrays[f"fine/{name}"] = value.numpy() if isinstance(value, Tensor) else value
    marks = getattr(result, "networks", None)
    if marks is not None:
        for name, value in vars(marks).items():
            arrays[f"networks/{name}"] = value.numpy() if isinstance(value, Tensor) else value
    return arrays


def load_slice(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of a saved result and its fields, directions with empty vectors."""
    with np.load(path) as stored:
        found = {name: stored[name] for name in stored.files}
    fields: dict[str, Any] = {
        name: torch.from_numpy(value) if value.ndim else value.item()
        for name, value in found.items()
        if "/" not in name
    }
    kind = str(fields.pop("kind"))
    facts = {name.removeprefix("facts/"): found[name].item() for name in _under(found, "facts/")}
    fields["facts"] = SliceFacts(**facts)
    if kind in ("Line", "Plane"):
        metrics = _under(found, "metrics/")
        fields["metrics"] = {
            name.removeprefix("metrics/"): torch.from_numpy(found[name]) for name in metrics
        }
    if kind != "Basin":
        fields["directions"] = tuple(_directions(found))
    if kind == "Plane":
        parts = {
            name.removeprefix("path/"): torch.from_numpy(found[name])
            for name in _under(found, "path/")
        }
        fields["path"] = TrainingPath(**parts) if parts else None
        fields["networks"] = _marks(found)
        fields["fine"] = _fine(found)
    return kind, fields


def _fine(found: Mapping[str, np.ndarray]) -> FineLoss | None:
    parts = {name.removeprefix("fine/"): found[name] for name in _under(found, "fine/")}
    if not parts:
        return None
    loss = torch.from_numpy(parts["loss"])
    return FineLoss(loss, parts["error"].item(), parts["error_high"].item())


def _marks(found: Mapping[str, np.ndarray]) -> Marks | None:
    parts = {name.removeprefix("networks/"): found[name] for name in _under(found, "networks/")}
    if not parts:
        return None
    names = tuple(str(name) for name in parts.pop("names"))
    return Marks(names, **{name: torch.from_numpy(value) for name, value in parts.items()})


def save_progress(path: Path, fingerprint: str, table: Tensor, evaluated: Tensor) -> None:
    """Write what a grid has so far, to go on with later."""
    arrays = {"fingerprint": fingerprint, "table": table.numpy(), "evaluated": evaluated.numpy()}
    write_arrays(path, arrays)


def load_progress(path: Path, fingerprint: str) -> tuple[Tensor, Tensor] | None:
    """Return what an earlier call found, or None if there is no such file.

    Raises:
        ValueError: If the file holds something else, or a slice of another objective.
    """
    if not path.exists():
        return None
    with np.load(path) as stored:
        if "fingerprint" not in stored.files:
            raise ValueError(f"{path} holds no grid to go on with: give another file.")
        if str(stored["fingerprint"]) != fingerprint:
            raise ValueError(
                f"{path} holds the grid of other weights, batches, directions, coordinates or "
                "settings: give another file, or delete this one to begin anew."
            )
        return torch.from_numpy(stored["table"]), torch.from_numpy(stored["evaluated"])


def _directions(found: Mapping[str, np.ndarray]) -> list[Direction]:
    count = len({name.split("/")[1] for name in _under(found, "directions/")})
    made = []
    for k in range(count):
        stored = {name: found.get(f"directions/{k}/{name}") for name in _DIRECTION}
        # Files of earlier versions lack the last ones.
        values = {name: value.item() for name, value in stored.items() if value is not None}
        for name in ("eigenvalue", "residual", "slope"):
            values[name] = None if np.isnan(values[name]) else values[name]
        made.append(Direction(torch.empty(0), **values))
    return made


def _under(found: Mapping[str, np.ndarray], prefix: str) -> list[str]:
    return [name for name in found if name.startswith(prefix)]

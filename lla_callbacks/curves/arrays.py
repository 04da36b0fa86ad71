"""Losses along curves, and barriers, as .npz files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lla_callbacks.curves.measure import Along
from lla_callbacks.report.files import write_arrays
from lla_callbacks.slices.slices import SliceFacts


def save_along(along: Along, path: Path) -> Path:
    """Write every number to an .npz file (no pickles inside) and return its path.

    Arrays carry the field's name, metrics as ``metrics/<name>``, conditions as
    ``facts/<name>``; the straight line's all of that under ``straight/``.
    """
    return write_arrays(path, {"of": "loss along a curve", **_arrays(along)})


def load_along(path: Path) -> Along:
    """Return what :func:`save_along` wrote.

    Raises:
        ValueError: If the file holds something else.
    """
    with np.load(path) as stored:
        found = {name: stored[name] for name in stored.files}
    if str(found.pop("of", "")) != "loss along a curve":
        raise ValueError(f"{path} holds no loss along a curve.")
    return _along(found)


def _arrays(along: Along) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for name, value in vars(along).items():
        if isinstance(value, Tensor):
            arrays[name] = value.numpy()
        elif isinstance(value, (int, str)):
            arrays[name] = value
    arrays |= {f"metrics/{name}": value.numpy() for name, value in along.metrics.items()}
    arrays |= {f"facts/{name}": value for name, value in asdict(along.facts).items()}
    if along.straight is not None:
        arrays |= {f"straight/{name}": value for name, value in _arrays(along.straight).items()}
    return arrays


def _along(found: Mapping[str, np.ndarray]) -> Along:
    straight = {
        name.removeprefix("straight/"): value
        for name, value in found.items()
        if name.startswith("straight/")
    }
    fields: dict[str, Any] = {
        name: torch.from_numpy(value) if value.ndim else value.item()
        for name, value in found.items()
        if "/" not in name
    }
    return Along(
        **fields,
        metrics={
            name.removeprefix("metrics/"): torch.from_numpy(value)
            for name, value in found.items()
            if name.startswith("metrics/")
        },
        facts=SliceFacts(
            **{
                name.removeprefix("facts/"): value.item()
                for name, value in found.items()
                if name.startswith("facts/")
            }
        ),
        straight=_along(straight) if straight else None,
    )

"""What files of slices give to a page: surfaces to turn, and lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lla_callbacks.page.numbers import short, shorts
from lla_callbacks.page.runs import steps_in
from lla_callbacks.report.thinning import evenly
from lla_callbacks.slices.fields import Field, counted, facts_of, field_of
from lla_callbacks.slices.results import BasinRadii, LossLine, LossPlane

# Pictures of one slice that a page holds.
MOST_PICTURES = 40
# Points along each side to which a plane is refined by its spline.
SIDE = 40


def slices_of(folder: Path) -> dict[str, Any] | None:
    """Return what the folders in a folder hold; None if there are no slices."""
    planes, lines, basin = [], [], []
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        paths = steps_in(part)
        paths = [paths[i] for i in evenly([step for step, _ in paths], MOST_PICTURES)]
        if not paths:
            continue
        if part.name.startswith("plane_"):
            planes.append(_plane(part.name.removeprefix("plane_"), paths))
        elif part.name.startswith("line_"):
            lines.append(_line(part.name.removeprefix("line_"), paths))
        elif part.name == "basin":
            basin = [_radius(step, BasinRadii.load(path)) for step, path in paths]
    if not (planes or lines or basin):
        return None
    return {"name": folder.name, "planes": planes, "lines": lines, "basin": basin}


def _plane(name: str, paths: list[tuple[int, Path]]) -> dict[str, Any]:
    found = [(step, LossPlane.load(path)) for step, path in paths]
    fields = [(step, plane, _fine(field_of(plane))) for step, plane in found]
    # One scale for the whole run beside each picture's own.
    same = len({field.logarithmic for _, _, field in fields}) == 1
    low = min(field.low for _, _, field in fields)
    high = max(field.high for _, _, field in fields)
    frames = []
    for step, plane, field in fields:
        whole = replace(field, low=low, high=high) if same else field
        points = counted(int(plane.evaluated.sum()), plane.evaluated.numel())
        frames.append({
            "step": step,
            "axes": [d.label for d in plane.directions],
            "x": shorts(field.x),
            "y": shorts(field.y),
            "z": shorts(field.values),
            "own": _scale(field),
            "run": _scale(whole),
            "centre": short(field.drawn(np.array(plane.centre_loss))),
            "loss": short(plane.centre_loss, 5),
            "path": _path(plane, field),
            "facts": " · ".join(part for part in facts_of(plane.facts, points) if part),
            "log": field.logarithmic,
        })  # fmt: skip
    return {"name": name, "frames": frames}


def _fine(field: Field) -> Field:
    """Return a field on a finer grid, through whose spline all computed points go."""
    side = max(len(field.x), len(field.y))
    if not field.finite or side < 4 or side >= SIDE:
        return field
    return field.smooth(max(1, round(SIDE / side)))


def _scale(field: Field) -> dict[str, Any]:
    positions, texts = field.ticks()
    return {
        "low": short(field.low, 6),
        "high": short(field.high, 6),
        "ticks": [[short(p, 6), text] for p, text in zip(positions, texts, strict=True)],
    }


def _path(plane: LossPlane, field: Field) -> list[list[float | None]]:
    if plane.path is None:
        return []
    heights = field.drawn(plane.path.loss.double().numpy())
    return [
        [short(x), short(y), short(z)]
        for (x, y), z in zip(plane.path.points.tolist(), heights, strict=True)
    ]


def _line(name: str, paths: list[tuple[int, Path]]) -> dict[str, Any]:
    frames = []
    for step, path in paths:
        line = LossLine.load(path)
        frames.append({
            "step": step,
            "axis": line.directions[0].label,
            "x": shorts(line.alphas),
            "y": shorts(line.loss),
        })  # fmt: skip
    return {"name": name, "frames": frames}


def _radius(step: int, basin: BasinRadii) -> list[Any]:
    return [step, short(basin.effective_radius), short(basin.effective_radius_sem, 2)]

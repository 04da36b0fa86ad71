"""What loggers wrote of a run: the user's own curves beside ours."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lla_callbacks.page.numbers import short
from lla_callbacks.report.thinning import evenly
from lla_callbacks.report.tiers import LAST, last_group

# Curves of the user's own, and points of each.
MOST_CURVES, MOST_POINTS = 24, 400
# Larger event files than this (videos, say) are not read for a few curves.
MOST_BYTES = 2**29
_NOT_CURVES = ("epoch", "hp_metric", "step")

Curves = Mapping[str, list[tuple[int, float]]]


def curves_of(folder: Path) -> tuple[Curves, list[str]]:
    """Return tag to points, of TensorBoard's events or a CSV file, and what was left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    left = []
    table = folder / "metrics.csv"
    if table.is_file():
        found |= _of_table(table)
    events = sorted(folder.glob("events.out.tfevents.*"))
    size = sum(path.stat().st_size for path in events)
    if size > MOST_BYTES:
        left.append(f"event files of {size / 2**30:.1f} GiB were not read for curves")
    elif events:
        try:
            found |= _of_events(folder)
        except Exception as error:  # noqa: BLE001 - a broken event file costs its curves only
            left.append(f"the event files could not be read ({type(error).__name__})")
    return found, left


def own_curves(curves: Curves, monitors: Iterable[str]) -> list[dict[str, Any]]:
    """Return the curves that are of no monitor, a dict each."""
    monitors = [*monitors]
    ours = tuple(f"{name}{sign}" for name in monitors for sign in ("/", "_"))
    ours += tuple(f"{LAST}{start}" for start in ours)
    own = {
        tag: points
        for tag, points in sorted(curves.items())
        if not tag.startswith(ours) and tag not in _NOT_CURVES and points
    }
    return [
        {"tag": tag, "title": tag, "note": "", "first": False, "edge": None,
         "points": [[step, short(v, 6), short(v, 6), short(v, 6)] for step, v in _thin(points)]}
        for tag, points in list(own.items())[:MOST_CURVES]
    ]  # fmt: skip


def monitored(curves: Curves, known: Iterable[str]) -> list[dict[str, Any]]:
    """Return curves of monitors that left no files, their bands from the tags of their ends."""
    names = {t.split("/")[0] for t in curves if t.endswith("/lambda_max") and t.count("/") == 1}
    names = {name for name in names if not name.startswith(LAST) and f"{name}/loss" in curves}
    found = []
    for name in sorted(names - set(known)):
        bands = last_group(name, "bands")
        for tag in sorted(t for t in curves if t.startswith(f"{name}/")):
            what = tag.removeprefix(f"{name}/")
            lower = dict(curves.get(f"{bands}/{what}_lower", ()))
            upper = dict(curves.get(f"{bands}/{what}_upper", ()))
            points = [
                [step, short(v, 6), short(lower.get(step, v), 6), short(upper.get(step, v), 6)]
                for step, v in _thin(curves[tag])
            ]
            first = what in ("lambda_max", "lambda_min", "trace", "stability", "loss")
            edge = 1 if what == "stability" else None
            title = what.replace("_", " ")
            found.append({"tag": tag, "title": title, "note": "", "first": first, "edge": edge,
                          "points": points})  # fmt: skip
    return found


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [points[i] for i in evenly([step for step, _ in points], MOST_POINTS)]


def _of_table(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row.get("step") or ""
            for tag, text in row.items():
                if tag and text and step.isdecimal() and tag not in _NOT_CURVES:
                    try:
                        found.setdefault(tag, []).append((int(step), float(text)))
                    except ValueError:
                        continue
    return {tag: _clean(points) for tag, points in found.items()}


def _of_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    least = {"images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1}
    reader = EventAccumulator(str(folder), {**least, "scalars": 0})
    reader.Reload()
    return {
        tag: _clean([(event.step, event.value) for event in reader.Scalars(tag)])
        for tag in reader.Tags()["scalars"]
    }


def _clean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return points of finite values, one a step, steps ascending."""
    return sorted({step: v for step, v in points if math.isfinite(v)}.items())

"""What files of the Hessian give to a page: curves with bands, spectra, layers, facts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lla_callbacks.hessian.scalars import BAND
from lla_callbacks.linalg.density import resolved_density
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.page.numbers import banded, short, shorts
from lla_callbacks.page.runs import steps_in
from lla_callbacks.report.style import MODES
from lla_callbacks.report.thinning import evenly
from lla_callbacks.report.words import end_in_short

# Measurements of which a page holds the whole spectrum, and points of each.
MOST_SPECTRA, POINTS = 60, 240
# Measurements whose numbers are drawn as curves.
MOST_POINTS = 600
# Eigenvalues below this share of the largest are the middle of the axis; widths of a band in it.
MIDDLE, BANDS = 3e-3, 60
# Fewest eigenvalues a band that are drawn.
FLOOR = 0.1

# What everybody looks at, in this order, and what each band is.
FIRST = {
    "lambda_max": ("Largest eigenvalue", "band: residual, and where the largest may still lie"),
    "lambda_min": ("Smallest eigenvalue", "band: residual, and where the lowest may still lie"),
    "trace": ("Trace", "band: two standard errors"),
    "stability": ("Stability", "1 is the edge of stability; band: two errors"),
    "loss": ("Loss on the held batches", "the same batches through the whole run"),
    "gradient_norm": ("Norm of the gradient", "on the held batches"),
}
_WORDS = {
    "kh05": "KH05, negative over positive part of the spectrum",
    "kh1": "KH1: KH05 without its root",
    "r_e": "r_e = |λmin / λmax|",
    "c_t": "C_t = λmin / λmax",
    "filter_curvature": "Filter curvature",
    "weight_norm": "Norm of the weights",
    "negative_mass": "Share of negative eigenvalues",
}


def hessian_of(folder: Path) -> dict[str, Any] | None:
    """Return what the files in a folder say; None if it holds no spectra."""
    paths = steps_in(folder)
    if not paths and not any(folder.glob("light_*.npz")):
        return None
    found: list[tuple[int, Mapping[str, Any]]] = []
    for i in evenly([step for step, _ in paths], MOST_POINTS):
        step, path = paths[i]
        with np.load(path) as stored:
            if "nodes" not in stored.files:
                return None
            found.append((step, {name: stored[name] for name in stored.files}))
    series: dict[str, list[list[Any]]] = {}
    for step, m in found:
        for name, value in _curves(m).items():
            series.setdefault(name, []).append([step, *value])
    for name, points in _light(folder).items():
        series.setdefault(name, []).extend(points)
    chosen = [found[i] for i in evenly([step for step, _ in found], MOST_SPECTRA)]
    return {
        "name": folder.name,
        "curves": [
            _curve(folder.name, name, points) for name, points in sorted(series.items(), key=_rank)
        ],
        "spectra": _spectra(chosen),
        "layers": [_layers(step, m) for step, m in chosen if m["layer_names"].size],
        "facts": _facts(*found[-1]) if found else [],
        "gaps": _gaps(found),
    }


def _curves(m: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return name to value and band of one measurement."""
    found = {
        "lambda_max": _ended(_extreme(m, "max"), 1),
        "lambda_min": _ended(_extreme(m, "min"), -1),
        "trace": banded(m["trace"], BAND * m["trace_sem"], BAND * m["trace_sem"]),
    }
    for name in ("loss", "gradient_norm", "weight_norm"):
        found[name] = banded(m[name], math.nan, math.nan)
    if "filter_curvature" in m:
        error = BAND * m["filter_curvature_sem"]
        found["filter_curvature"] = banded(m["filter_curvature"], error, error)
    for name, (value, error) in zip(m["criteria_names"].tolist(), m["criteria"], strict=True):
        found[name] = banded(value, BAND * error, BAND * error)
    return {name: value for name, value in found.items() if value[0] is not None}


def _ended(end: Eigenvalue, sign: int) -> list[Any]:
    """Return an extreme eigenvalue, its band and, if it is open, from where to where it may lie."""
    below, above = (end.residual, end.beyond)[::sign]
    return [*banded(end, below, above), *([end_in_short(end, sign)] if end.is_open else [])]


def _light(folder: Path) -> dict[str, list[list[Any]]]:
    """Return what light measurements found, by the names of the full ones."""
    found: dict[str, list[list[Any]]] = {}
    for path in sorted(folder.glob("light_*.npz")):
        with np.load(path) as stored:
            m = {name: stored[name] for name in stored.files}
        bands = {
            "lambda_max": (m["lambda_max_residual"], m["lambda_max_beyond"]),
            "trace": (BAND * m["trace_sem"], BAND * m["trace_sem"]),
            "loss": (np.full(len(m["steps"]), math.nan),) * 2,
        }
        for name, (below, above) in bands.items():
            points = [
                [
                    int(step),
                    *(_ended(Eigenvalue(v, b, a), 1) if name == "lambda_max" else banded(v, b, a)),
                ]
                for step, v, b, a in zip(m["steps"], m[name], below, above, strict=True)
                if math.isfinite(v)
            ]
            found.setdefault(name, []).extend(points)
    for name, points in found.items():
        found[name] = [points[i] for i in evenly([p[0] for p in points], MOST_POINTS)]
    return found


def _rank(item: tuple[str, Any]) -> tuple[int, str]:
    order = list(FIRST)
    return (order.index(item[0]) if item[0] in order else len(order), item[0])


def _curve(monitor: str, name: str, points: list[list[Any]]) -> dict[str, Any]:
    title, note = FIRST.get(name, (_WORDS.get(name, name.replace("_", " ")), "band: two errors"))
    return {
        "tag": f"{monitor}/{name}",
        "title": title,
        "note": note,
        "first": name in FIRST,
        "edge": 1 if name == "stability" else None,
        "points": sorted(points, key=lambda p: p[0]),
    }


def _spectra(found: list[tuple[int, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Return densities on one axis, linear near zero and logarithmic beyond."""
    known = [(step, m) for step, m in found if m["nodes"].size]
    if not known:
        return None
    reach = max(float(np.abs(m["nodes"]).max()) for _, m in known) or 1.0
    linear = MIDDLE * reach
    low = min(float(m["nodes"].min()) for _, m in known)
    ends = [math.asinh(1.3 * end / linear) for end in (min(low, -linear), reach)]
    grid = torch.linspace(ends[0], ends[1], POINTS, dtype=torch.float64)
    width = (ends[1] - ends[0]) / BANDS
    frames = []
    for step, m in known:
        nodes, weights = torch.from_numpy(m["nodes"]), torch.from_numpy(m["weights"])
        density = resolved_density(
            torch.asinh(nodes / linear), weights, m["run_sizes"].tolist(), grid, width
        )
        counts = (float(m["num_params"]) * width * density).numpy()
        # Beyond the extremes, as far as they may still lie, there is nothing.
        values = linear * np.sinh(grid.numpy())
        inside = (values >= _end(m, "min")) & (values <= _end(m, "max"))
        frames.append({
            "step": step,
            "y": shorts(np.where(inside & (counts > FLOOR), counts, math.nan), 3),
            "top": [short(m["lambda_max"], 5), end_in_short(_extreme(m, "max"), 1)],
            "bottom": [short(m["lambda_min"], 5), end_in_short(_extreme(m, "min"), -1)],
        })  # fmt: skip
    return {
        "linear": linear,
        "ends": shorts(ends, 6),
        "band": short(width, 3),
        "floor": FLOOR,
        "frames": frames,
    }


def _end(m: Mapping[str, Any], which: str) -> float:
    sign = 1.0 if which == "max" else -1.0
    value = float(m[f"lambda_{which}"])
    beyond = float(m.get(f"lambda_{which}_beyond", math.nan))
    margin = max(float(m[f"lambda_{which}_residual"]), beyond if math.isfinite(beyond) else 0.0)
    outermost = float(m["nodes"].max() if which == "max" else m["nodes"].min())
    known = value if math.isfinite(value) else outermost
    return sign * max(sign * known + margin, sign * outermost)


def _extreme(m: Mapping[str, Any], which: str) -> Eigenvalue:
    """Return an extreme eigenvalue as it was measured; older files know no ``beyond``."""
    name = f"lambda_{which}"
    beyond = float(m.get(f"{name}_beyond", math.nan))
    return Eigenvalue(float(m[name]), float(m[f"{name}_residual"]), beyond)


def _layers(step: int, m: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": step,
        "names": m["layer_names"].tolist(),
        "trace": shorts(m["layer_traces"][:, 0]),
        "sem": shorts(m["layer_traces"][:, 1], 2),
    }


def _facts(step: int, m: Mapping[str, Any]) -> list[list[str]]:
    """Return what a reader must know of the last measurement, name and text."""

    def number(name: str, error: str) -> str:
        value, known = float(m[name]), float(m[error])
        shown = f"{value:.5g}" if math.isfinite(value) else "not known"
        return f"{shown} ± {known:.1g}" if math.isfinite(known) else shown

    found = [
        ["last measurement", f"step {step}"],
        ["largest eigenvalue", end_in_short(_extreme(m, "max"), 1)],
        ["smallest eigenvalue", end_in_short(_extreme(m, "min"), -1)],
        ["trace", number("trace", "trace_sem")],
        ["loss", f"{float(m['loss']):.5g}"],
        ["parameters", f"{int(m['num_params']):,}"],
        ["samples", f"{int(m['num_samples']):,}"],
        ["normalization", MODES.get(str(m["mode"]), str(m["mode"]))],
        ["products", f"{int(m['num_matvecs'])} ({int(m['num_steps'])} Lanczos steps, "
                     f"{int(m['num_probes'])} probes)"],
        ["time", f"{float(m['seconds']):.2g} s"],
        ["precision", str(m["precision"])],
        ["engine", str(m["engine"]) + (f": {m['engine_reason']}" if m["engine_reason"] else "")],
    ]  # fmt: skip
    if str(m.get("self_check", "")):
        found.append(["self-check", str(m["self_check"])])
    return found + [["note", str(note)] for note in m.get("notes", ())]


def _gaps(found: list[tuple[int, Mapping[str, Any]]]) -> list[str]:
    """Return in a sentence each what could not be said, and at how many measurements."""
    counts: dict[str, int] = {}
    for _, m in found:
        for name, reason in zip(m.get("gap_names", ()), m.get("gaps", ()), strict=True):
            text = f"no {name}: {reason}"
            counts[text] = counts.get(text, 0) + 1
    return [f"{text} ({count} of {len(found)} measurements)" for text, count in counts.items()]

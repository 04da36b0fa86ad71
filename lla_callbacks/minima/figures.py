"""Minima as figures: two basins, a relaxation, a map, criteria over shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from lla_callbacks.minima.basins import BasinRatio
from lla_callbacks.minima.maps import Points
from lla_callbacks.minima.relaxation import RelaxationPath
from lla_callbacks.minima.shift import Shift
from lla_callbacks.minima.words import correlation_in_words, ratio_in_words
from lla_callbacks.report.sheet import KEY, bar, caption, key, sheet
from lla_callbacks.report.style import DOWN, FOOTER, INK, MODES, PALE, UP, padded, round_ticks
from lla_callbacks.report.words import in_short, power, written
from lla_callbacks.slices.axis_figures import set_log_axis
from lla_callbacks.slices.landscape_figures import basin_figure
from lla_callbacks.slices.scales import tick_values

COLORS = (UP, DOWN, "#2f855a", "#805ad5", "#c53030", "#4a5568")
MARKERS = "osD^vP"
METHODS = {
    "mds": "classical scaling",
    "pca": "principal components",
    "tsne": "t-SNE: gaps between islands mean nothing",
}
DISTANCES = {
    "predictions": "root mean square Hellinger distance of predictions",
    "disagreement": "share of samples on which two networks disagree",
    "weights": "distance of weights, in mean norms: it tells the start, not the kind of minimum",
}


def ratio_figure(ratio: BasinRatio, *, title: str = "") -> Figure:
    """Return the radii of both basins in one figure, with their ratio in the headline."""
    a, b = ratio.names
    head = [(f"radius of {a} over {b}: {ratio_in_words(ratio)}", INK)]
    return basin_figure({a: ratio.a, b: ratio.b}, title=title or "Two basins", headline=head)


def relaxation_figure(path: RelaxationPath, *, title: str = "") -> Figure:
    """Return loss, accuracy and displacement over the steps of plain training, one below another.

    There is no panel for what was not measured: accuracy where outputs are no classes.
    """
    steps = path.steps.numpy()
    parts: list[tuple[str, list[tuple[str, np.ndarray]]]] = [
        ("loss", [("trained on", path.loss.numpy()), ("held out", path.held_loss.numpy())]),
        ("accuracy",
         [("trained on", path.accuracy.numpy()), ("held out", path.held_accuracy.numpy())]),
        ("moved: ‖w − w₀‖ / ‖w₀‖", [("", path.displacement.numpy())]),
    ]  # fmt: skip
    parts = [part for part in parts if any(np.isfinite(v).any() for _, v in part[1])]
    height = 1.1
    figure, grid = sheet([height] * len(parts), left=0.6, right=0.24, above=0.25, inner=0.1)
    for axes, (label, lines) in zip(grid, parts, strict=True):
        caption(axes, label)
        for k, (name, values) in enumerate(lines):
            known = np.isfinite(values)
            if known.any():
                axes.plot(
                    steps[known], values[known], color=COLORS[k] if name else INK,
                    marker=MARKERS[k], ms=3.4, lw=1.5, label=name or None, clip_on=False,
                )  # fmt: skip
        _mark_log_steps(axes, int(steps[-1]))
        axes.tick_params(labelbottom=axes is grid[-1])
        seen = np.concatenate([v[np.isfinite(v)] for _, v in lines])
        if label == "loss" and (seen > 0).all() and seen.min() < seen.max():
            ends = padded(math.log10(float(seen.min())), math.log10(float(seen.max())), 0.07)
            set_log_axis(axes, 10.0 ** ends[0], 10.0 ** ends[1], height)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            if label == "accuracy":
                axes.set_ylim(0, 1.02)
            elif label != "loss":
                axes.set_ylim(0, None)
    grid[-1].set_xlabel("steps of plain training")
    if path.num_held:
        key(figure, grid[0])
    held = f", {path.num_held:,} held out" if path.num_held else ""
    facts = [f"{path.num_params:,} parameters", f"{path.num_samples:,} samples{held}",
             path.optimizer, f"evaluated with {MODES.get(path.mode, path.mode)}"]  # fmt: skip
    note = (
        f"Gradient of the next step: norm {float(path.gradient_norm[0]):.3g} at the start, "
        f"{float(path.gradient_norm[-1]):.3g} at the end. A minimum has none, and stays."
    )
    figure.finish(title or "Is it a minimum?", facts, [note], _moved(path))
    return figure


def _moved(path: RelaxationPath) -> list[tuple[str, str]]:
    """Return what matters most of a relaxation, as texts and their colours."""
    found = []
    for values, words, color in (
        (path.held_accuracy, "held-out accuracy", DOWN), (path.loss, "loss", UP)
    ):  # fmt: skip
        ends = float(values[0]), float(values[-1])
        if all(map(math.isfinite, ends)):
            first, last = (in_short(v, 0.0) for v in ends)
            found.append((f"{words} {first} → {last}", color))
            break
    moved = float(path.displacement[-1])
    if math.isfinite(moved):
        found.append((f"moved {100 * moved:.3g} %", INK))
    return found


def _mark_log_steps(axes: Axes, last: int) -> None:
    """Make a step axis linear from 0 to 1 and logarithmic beyond, with powers of ten."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_xlim(0, max(last, 1))
    exponents = range(math.floor(math.log10(max(last, 1)) + 1e-9) + 1)
    axes.xaxis.set_major_locator(FixedLocator([0.0, *(10.0**k for k in exponents)]))
    axes.xaxis.set_major_formatter(
        lambda value, _: power(round(math.log10(value))) if value > 0 else "0"
    )
    axes.xaxis.set_minor_locator(NullLocator())


def map_figure(
    points: Points,
    *,
    title: str = "",
    values: Sequence[float] | None = None,
    values_name: str = "value",
    path: str | None = None,
) -> Figure:
    """Return networks as points, with what the picture is worth below it.

    Args:
        points: The points.
        title: Above the figure.
        values: A number a point, which colours it; ``None`` colours by set.
        values_name: Of these numbers.
        path: Set whose points are joined in their order.
    """
    x, y = points.coordinates.numpy().T
    sets = list(dict.fromkeys(points.sets))
    shades = None if values is None else np.asarray(values, dtype=float)
    finite = None if shades is None else shades[np.isfinite(shades)]
    norm = Normalize(finite.min(), finite.max()) if finite is not None and finite.size else None
    image = None
    bare = points.method == "tsne"
    figure, (axes,) = sheet(
        (2.9,), left=0.14 if bare else 0.62, right=0.14 if values is None else 0.98, above=0.1,
        below=0.14 if bare else 0.46,
    )  # fmt: skip
    for k, name in enumerate(sets):
        chosen = np.array([s == name for s in points.sets])
        marker, color = MARKERS[k % len(MARKERS)], COLORS[k % len(COLORS)]
        if name == path:
            axes.plot(x[chosen], y[chosen], color=PALE, lw=1.2, zorder=1)
        look: dict[str, Any] = {
            "marker": marker,
            "s": 46,
            "edgecolors": "white",
            "linewidths": 0.6,
            "zorder": 3,
        }
        if shades is None or norm is None:
            axes.scatter(x[chosen], y[chosen], color=color, **look)
        else:
            image = axes.scatter(
                x[chosen], y[chosen], c=shades[chosen], cmap="viridis", norm=norm,
                plotnonfinite=True, **look,
            )  # fmt: skip
    if image is not None and norm is not None:
        low, high = float(norm.vmin or 0.0), float(norm.vmax or 0.0)
        marks = tick_values(low, high, False) if low < high else [low]
        bar(figure, axes, image, marks, [*map(written, marks)], values_name)
    if len(sets) > 1:
        for k, name in enumerate(sets):
            # Where colours are values, they say nothing about the set.
            color = FOOTER if image is not None else COLORS[k % len(COLORS)]
            axes.plot(
                [], [], MARKERS[k % len(MARKERS)], color=color, mec="white", mew=0.6, ms=7,
                ls="-" if name == path else "none", label=name,
            )  # fmt: skip
        key(figure, axes)
    if bare:
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        axes.set_xlabel("first coordinate")
        axes.set_ylabel("second coordinate")
        axes.xaxis.set_major_locator(round_ticks())
        axes.yaxis.set_major_locator(round_ticks())
    axes.margins(0.06)
    axes.set_aspect("equal", adjustable="datalim")
    head = [
        (f"trustworthiness {_number(points.trustworthiness)}", INK),
        (f"rank correlation {_number(points.rank_correlation)}", INK),
    ]
    worth = (
        "Trustworthiness 1: all near neighbours are true ones. Rank correlation: of distances in "
        "the picture with the true ones."
    )
    if math.isfinite(points.explained):
        worth += f" {points.explained:.0%} of the squared distances are shown."
    facts = [f"{len(points.names)} networks of {points.num_params:,} parameters"]
    if points.num_samples:
        facts += [f"{points.num_samples:,} predictions", MODES.get(points.mode, points.mode)]
    notes = [
        worth,
        f"Distance: {DISTANCES[points.distance]}. Picture: {METHODS[points.method]}.",
    ]
    figure.finish(title or "Map of minima", facts, notes, head)
    return figure


def shift_figure(shift: Shift, names: Sequence[str], *, title: str = "") -> Figure:
    """Return some numbers of every set against its accuracy, a panel each."""
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    height = 1.05 if columns > 1 else 2.0
    figure, panels = sheet(
        [height] * rows, columns, left=0.56, between=0.5, right=0.08, above=0.42, inner=0.14
    )
    accuracy = shift.column("accuracy").numpy()
    few = np.array([name in shift.few_wrong for name in shift.sets])
    known = accuracy[np.isfinite(accuracy)]
    ends = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    for place, (axes, name) in enumerate(zip(panels, names, strict=False)):
        values = shift.column(name).numpy()
        look: dict[str, Any] = {"s": 26, "edgecolors": UP, "zorder": 3, "clip_on": False}
        axes.scatter(accuracy[~few], values[~few], facecolors=UP, **look)
        axes.scatter(accuracy[few], values[few], facecolors="white", **look)
        seen = values[np.isfinite(values)]
        if seen.size and seen.min() > 0 and seen.max() > 20 * seen.min():
            low, high = padded(math.log10(float(seen.min())), math.log10(float(seen.max())), 0.1)
            set_log_axis(axes, 10.0**low, 10.0**high, height)
        else:
            axes.margins(y=0.1)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(lambda value, _: written(float(f"{value:.6g}")))
        words = correlation_in_words(shift.rank_correlation(name)).replace("-", "−")
        caption(axes, f"{name}\nρ {words}", fontsize=KEY, linespacing=1.25)
        axes.set_xlim(*padded(*ends, 0.05))
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        last = place + columns >= len(names)
        axes.tick_params(labelbottom=last)
        if last:
            axes.set_xlabel("accuracy")
            axes.xaxis.set_label_coords(0.5, -0.26 / height)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    notes = ["ρ: Spearman's rank correlation with the accuracy of the same samples, with its 95 % "
             "interval over sets."]  # fmt: skip
    if few.any():
        notes.append("Open circles: fewer than 20 wrong samples, so that r_e and KH05 are chance.")
    facts = [f"{len(shift.sets)} sets of {shift.num_samples:,} samples",
             MODES.get(shift.mode, shift.mode), f"Lanczos depth {shift.num_steps}"]  # fmt: skip
    words = " to ".join(in_short(v, 0.0) for v in reversed(ends))
    head = [(f"accuracy {words}", UP)] if known.size else []
    figure.finish(title or "Criteria over shifts of the data", facts, notes, head)
    return figure


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "undefined"

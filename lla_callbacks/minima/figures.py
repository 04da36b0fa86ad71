"""Minima as figures: two basins, a relaxation, a map, criteria over shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lla_callbacks.minima.basins import BasinRatio
from lla_callbacks.minima.maps import Points
from lla_callbacks.minima.relaxation import RelaxationPath
from lla_callbacks.minima.shift import Shift
from lla_callbacks.minima.words import correlation_in_words, ratio_in_words
from lla_callbacks.report.style import (
    DOWN,
    FOOTER,
    INK,
    MODES,
    PALE,
    UP,
    finish,
    subplots,
)
from lla_callbacks.slices.landscape_figures import basin_figure

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
    """Return the radii of both basins in one figure, with their ratio in the title."""
    a, b = ratio.names
    words = f"Radius of {a} over {b}: {ratio_in_words(ratio)}"
    return basin_figure({a: ratio.a, b: ratio.b}, title=title or words)


def relaxation_figure(path: RelaxationPath, *, title: str = "") -> Figure:
    """Return loss, accuracy and displacement over the steps of plain training."""
    figure, (loss, accuracy, moved) = subplots(1, 3, size=(9.6, 3.6))
    steps = path.steps.numpy()
    curves: list[tuple[Axes, str, Sequence[tuple[str, np.ndarray]]]] = [
        (loss, "loss", [("trained on", path.loss.numpy()), ("held out", path.held_loss.numpy())]),
        (accuracy, "accuracy",
         [("trained on", path.accuracy.numpy()), ("held out", path.held_accuracy.numpy())]),
        (moved, "‖w − w₀‖ / ‖w₀‖", [("", path.displacement.numpy())]),
    ]  # fmt: skip
    for axes, label, parts in curves:
        for k, (name, values) in enumerate(parts):
            known = np.isfinite(values)
            if known.any():
                axes.plot(
                    steps[known], values[known], color=COLORS[k], marker=MARKERS[k], ms=3, lw=1.3,
                    label=name or None, clip_on=False,
                )  # fmt: skip
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, None)
        axes.set_xlabel("steps of plain training")
        axes.set_title(label, loc="left", fontsize=10, color=INK)
    finite = [v[np.isfinite(v)] for _, v in curves[0][2]]
    if all((v > 0).all() for v in finite):
        loss.set_yscale("log")
    accuracy.set_ylim(0, 1.02)
    moved.set_ylim(0, None)
    loss.legend(frameon=False, fontsize=8, labelcolor=INK)
    held = f", {path.num_held:,} held out" if path.num_held else ""
    facts = [f"{path.num_params:,} parameters", f"{path.num_samples:,} samples{held}",
             path.optimizer, f"evaluated with {MODES.get(path.mode, path.mode)}"]  # fmt: skip
    note = (
        f"Gradient of the next step: norm {float(path.gradient_norm[0]):.3g} at the start, "
        f"{float(path.gradient_norm[-1]):.3g} at the end. A minimum has none, and stays."
    )
    finish(figure, title or "Is it a minimum?", facts, [note])
    return figure


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
    figure, (axes,) = subplots(1, 1, size=(6.4, 5.4))
    x, y = points.coordinates.numpy().T
    sets = list(dict.fromkeys(points.sets))
    shades = None if values is None else np.asarray(values, dtype=float)
    finite = None if shades is None else shades[np.isfinite(shades)]
    norm = Normalize(finite.min(), finite.max()) if finite is not None and finite.size else None
    image = None
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
        label = name if len(sets) > 1 else None
        if shades is None or norm is None:
            axes.scatter(x[chosen], y[chosen], color=color, label=label, **look)
        else:
            image = axes.scatter(
                x[chosen], y[chosen], c=shades[chosen], cmap="viridis", norm=norm,
                label=label, plotnonfinite=True, **look,
            )  # fmt: skip
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=28)
        bar.set_label(values_name, color=INK, fontsize=8.5)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, colors=INK)
    if len(sets) > 1:
        legend = axes.legend(
            loc="upper left", bbox_to_anchor=(0, 1.09), ncols=len(sets), frameon=False, fontsize=8,
            labelcolor=INK, handletextpad=0.2,
        )  # fmt: skip
        if image is not None:
            handles: list[Any] = legend.legend_handles
            for handle in handles:
                handle.set_facecolor(FOOTER)
                handle.set_array(None)
    if points.method == "tsne":
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        axes.set_xlabel("first coordinate")
        axes.set_ylabel("second coordinate")
    axes.margins(0.06)
    axes.set_aspect("equal", adjustable="datalim")
    worth = [
        f"trustworthiness {_number(points.trustworthiness)} (1: all near neighbours are true ones)",
        f"rank correlation of distances {_number(points.rank_correlation)}",
    ]
    if math.isfinite(points.explained):
        worth.append(f"{points.explained:.0%} of the squared distances shown")
    facts = [f"{len(points.names)} networks of {points.num_params:,} parameters"]
    if points.num_samples:
        facts += [f"{points.num_samples:,} predictions", MODES.get(points.mode, points.mode)]
    notes = [
        " · ".join(worth),
        f"Distance: {DISTANCES[points.distance]}. Picture: {METHODS[points.method]}.",
    ]
    finish(figure, title or "Map of minima", facts, notes)
    return figure


def shift_figure(shift: Shift, names: Sequence[str], *, title: str = "") -> Figure:
    """Return some numbers of every set against its accuracy, a panel each."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, panels = subplots(rows, columns, size=(3.2 * columns, 2.8 * rows + 0.9))
    accuracy = shift.column("accuracy").numpy()
    few = np.array([name in shift.few_wrong for name in shift.sets])
    for axes, name in zip(panels, names, strict=False):
        values = shift.column(name).numpy()
        axes.scatter(accuracy[~few], values[~few], color=UP, s=26, zorder=3)
        axes.scatter(accuracy[few], values[few], facecolors="none", edgecolors=UP, s=26, zorder=3)
        known = values[np.isfinite(values)]
        if known.size and known.min() > 0 and known.max() > 20 * known.min():
            axes.set_yscale("log")
        words = correlation_in_words(shift.rank_correlation(name))
        axes.set_title(f"{name}\nρ = {words}", loc="left", fontsize=9, color=INK)
        axes.set_xlabel("accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    notes = ["ρ: Spearman's rank correlation with the accuracy of the same samples, with its 95 % "
             "interval over sets."]  # fmt: skip
    if few.any():
        notes.append("Open circles: fewer than 20 wrong samples, so that r_e and KH05 are chance.")
    facts = [f"{len(shift.sets)} sets of {shift.num_samples:,} samples",
             MODES.get(shift.mode, shift.mode), f"Lanczos depth {shift.num_steps}"]  # fmt: skip
    finish(figure, title or "Criteria over shifts of the data", facts, notes)
    return figure


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "undefined"

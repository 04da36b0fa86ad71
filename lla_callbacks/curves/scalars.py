"""The loss along a curve as scalars by tag."""

from __future__ import annotations

import math
from dataclasses import asdict

from lla_callbacks.curves.measure import Along


def curve_scalars(along: Along, name: str = "curve") -> dict[str, float]:
    """Return tag to value; what is not finite is left out, so that curves show a gap.

    Tags: ``<name>/maximum``, ``mean``, ``integral``, ``length``, ``barrier_above_ends``,
    ``barrier_above_line``, ``barrier_above_mean`` of the loss (see
    :class:`~lla_callbacks.curves.measure.CurveStatistics`); of a metric
    ``<name>/<metric>/...``; of the straight line between the ends ``<name>_straight/...``.
    """
    values: dict[str, float] = {}
    for prefix, part in ((name, along), (f"{name}_straight", along.straight)):
        if part is None:
            continue
        values[f"{prefix}/length"] = part.length
        for metric in (None, *part.metrics):
            for key, value in asdict(part.statistics(metric)).items():
                if key not in ("start", "end", "minimum"):
                    values["/".join(filter(None, (prefix, metric, key)))] = value
    return {tag: value for tag, value in values.items() if math.isfinite(value)}

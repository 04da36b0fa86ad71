"""Two basins beside each other: how many times wider one is, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lla_callbacks.minima.statistics import student
from lla_callbacks.slices.basin import Basin

Bound = Literal["equal", "at least", "at most", "unknown"]


@dataclass(frozen=True, eq=False)
class BasinRatio:
    """The ratio of two effective radii.

    The interval is over rays: it says how well this pair of networks is known, and nothing of
    other networks trained alike, for which several pairs are needed.

    Attributes:
        a: The first basin.
        b: The second.
        names: What they are called.
        ratio: Effective radius of the first over that of the second; NaN if ``bound`` is
            ``"unknown"``.
        interval: Its 95 % interval by Welch's t on the logarithms of radii; NaN where rays are
            open.
        bound: ``"equal"``; ``"at least"`` where rays of the first are open, ``"at most"`` where
            rays of the second are, ``"unknown"`` where rays of both are.
        rim: ``"cutoff"`` if both have one cutoff, ``"rise"`` if both rims lie equally far above
            the loss at the weights.
    """

    a: Basin
    b: Basin
    names: tuple[str, str]
    ratio: float
    interval: tuple[float, float]
    bound: Bound
    rim: Literal["cutoff", "rise"]

    @property
    def log10_volume_difference(self) -> float:
        """``n log10(ratio)``: by how many orders of magnitude the volumes of balls differ.

        With ``n`` the parameters that rays move, some thousands, a ratio of 1.5 already makes a
        number that impresses. The ratio is what was measured.
        """
        return self.a.dim * math.log10(self.ratio) if self.ratio > 0 else math.nan

    @property
    def log10_volume_interval(self) -> tuple[float, float]:
        """The same of both ends of :attr:`interval`."""
        low, high = (self.a.dim * math.log10(end) if end > 0 else math.nan for end in self.interval)
        return low, high


def basin_ratio(a: Basin, b: Basin, names: tuple[str, str] = ("a", "b")) -> BasinRatio:
    """Return how many times as wide the first basin is.

    Raises:
        ValueError: If the two do not compare; the message says in what they differ.
    """
    _check(a, b)
    rim = "cutoff" if _same(a.cutoff, b.cutoff) else "rise"
    bound: Bound = "equal"
    if a.at_least or b.at_least:
        bound = "unknown" if a.at_least and b.at_least else "at least" if a.at_least else "at most"
    logs = [x.radii.log() for x in (a, b)]
    difference = float(logs[0].mean() - logs[1].mean())
    interval = (math.nan, math.nan)
    counts = [len(x) for x in logs]
    if bound == "equal" and min(counts) > 1:
        parts = [float(x.var()) / n for x, n in zip(logs, counts, strict=True)]
        square = sum(parts)
        if square > 0:
            spread = sum(p * p / (n - 1) for p, n in zip(parts, counts, strict=True))
            half = student(square * square / spread) * math.sqrt(square)
            interval = (math.exp(difference - half), math.exp(difference + half))
    ratio = math.nan if bound == "unknown" else math.exp(difference)
    return BasinRatio(a, b, names, ratio, interval, bound, rim)  # type: ignore[arg-type]


def _check(a: Basin, b: Basin) -> None:
    for basin in (a, b):
        if not isinstance(basin, Basin):
            raise ValueError(
                f"compare_basins got a {type(basin).__name__}; give two results of basin_radii."
            )
    differing = {
        "parameters that rays move": (a.dim, b.dim),
        "parameters": (a.facts.num_params, b.facts.num_params),
        "samples": (a.facts.num_samples, b.facts.num_samples),
        "normalization of rays": (a.facts.normalization, b.facts.normalization),
        "mode of the network": (a.facts.mode, b.facts.mode),
    }
    for what, (one, other) in differing.items():
        if one != other:
            raise ValueError(
                f"the basins differ in {what}: {one} and {other}. Radii compare between networks "
                "of one architecture on equally many samples, measured alike."
            )
    rises = a.cutoff - a.centre_loss, b.cutoff - b.centre_loss
    if not (_same(a.cutoff, b.cutoff) or _same(*rises)):
        raise ValueError(
            f"the basins differ in their rim: cutoffs {a.cutoff:.4g} and {b.cutoff:.4g}, "
            f"{rises[0]:.4g} and {rises[1]:.4g} above the loss at the weights. Measure both with "
            "one cutoff=, or with one rise=."
        )


def _same(x: float, y: float) -> bool:
    return math.isclose(x, y, rel_tol=1e-6)

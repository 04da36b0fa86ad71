"""Logarithmic axes whose labels are round and do not overlap."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from lla_callbacks.report.sheet import spread
from lla_callbacks.report.words import written
from lla_callbacks.slices.scales import tick_values


def set_log_axis(axes: Axes, low: float, high: float, height: float) -> None:
    """Make the vertical axis logarithmic, with labels for which there is room.

    Args:
        axes: Whose.
        low: Lower end, a value above 0.
        high: Upper end.
        height: Of the axes, in inches.
    """
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ends = math.log10(low), math.log10(high)
    marks = tick_values(*ends, True)
    places = [(math.log10(v) - ends[0]) / (ends[1] - ends[0]) for v in marks]
    axes.yaxis.set_major_locator(FixedLocator([marks[i] for i in spread(places, height)]))
    axes.yaxis.set_major_formatter(lambda value, _: written(value))
    axes.yaxis.set_minor_locator(NullLocator())

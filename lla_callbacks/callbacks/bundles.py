"""Named sets of callbacks, from cheap to published settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from lla_callbacks.callbacks.hessian_monitor import HessianMonitor
from lla_callbacks.callbacks.landscape_monitor import LossLandscapeMonitor
from lla_callbacks.callbacks.trace_regularizer import HessianTraceRegularizer
from lla_callbacks.objective.checks import number, shown
from lla_callbacks.objective.spelling import meant

# A strength, or settings of HessianTraceRegularizer by name; None for no penalty.
TraceRegularization = float | Literal["auto"] | Mapping[str, Any] | None


# Lists of callbacks: of either Lightning, which a list of one type of them would not be.


def economy(trace_regularization: TraceRegularization = None, **overrides: Any) -> list[Any]:
    """Return callbacks for long runs: extremes, trace and lines, within 2 % of training time.

    Both monitors share that. Sizes are chosen so that it is kept; there are no planes.

    Args:
        trace_regularization: Strength of a penalty on the trace, or settings of
            :class:`HessianTraceRegularizer`; here on every tenth step, which costs about a
            fifth of training time.
        overrides: Settings of :class:`HessianMonitor` and :class:`LossLandscapeMonitor` that
            replace the bundle's; what both know goes to both.
    """
    penalty = _regularizer(trace_regularization, every_n_train_steps=10)
    return [*_pair(_limit(0.02, overrides), {}, {"planes": []}, overrides), *penalty]


def standard(trace_regularization: TraceRegularization = None, **overrides: Any) -> list[Any]:
    """Return callbacks with every default: within 5 % of training time, both together.

    Args:
        trace_regularization: Strength of a penalty on the trace, or settings of
            :class:`HessianTraceRegularizer`.
        overrides: Settings of :class:`HessianMonitor` and :class:`LossLandscapeMonitor`; what
            both know goes to both.
    """
    return [*_pair({}, {}, {}, overrides), *_regularizer(trace_regularization)]


def paper(trace_regularization: TraceRegularization = None, **overrides: Any) -> list[Any]:
    """Return callbacks in published settings.

    100 Lanczos steps from one start vector (Gabdullin 2024), so that KH05 compares with the
    literature, and 40 probes. Planes of 51 x 51 points (Li et al. 2018) along random and Hessian
    directions (Gabdullin 2024) and over the path of training, a convexity map and the radii of
    the basin. Sizes are kept whatever they cost, some 10,000 forward passes a measurement, and the
    log says beforehand how many training steps that is: without a schedule there is one at the
    end, and more only within 5 % of training time.

    Args:
        trace_regularization: Strength of a penalty on the trace, or settings of
            :class:`HessianTraceRegularizer`; here exactly, with 5 probes on every 50th step
            and a strength that is not scaled for it (Sankar et al. 2021, released code).
        overrides: Settings of :class:`HessianMonitor` and :class:`LossLandscapeMonitor` that
            replace the bundle's; what both know goes to both.
    """
    hessian = {"num_steps": 100, "num_runs": 1, "num_probes": 40}
    slices = {
        "planes": ["random", "hessian", "trajectory"],
        "lines": ["random", "top1", "bottom1"],
        "plane_points": 51,
        "line_points": 51,
        "convexity_points": 9,
        "num_rays": 100,
        "time_budget": None,
    }
    penalty = _regularizer(
        trace_regularization,
        estimator="exact",
        num_probes=5,
        every_n_train_steps=50,
        scale_by_interval=False,
    )
    return [*_pair({"num_samples": 2048}, hessian, slices, overrides), *penalty]


def _regularizer(asked: TraceRegularization, **settings: Any) -> list[Any]:
    if asked is None:
        return []
    if isinstance(asked, Mapping):
        own = dict(asked)
        if "strength" not in own:
            raise ValueError(
                f"trace_regularization is {shown(asked)}, without a strength; give 'strength' "
                "among the settings of HessianTraceRegularizer, or a strength alone."
            )
    elif isinstance(asked, str) and asked == "auto":
        own = {"strength": asked}
    else:
        allowed = (
            "a strength (a finite number at least 0, or 'auto'), settings of "
            "HessianTraceRegularizer by name, or None"
        )
        own = {"strength": number("trace_regularization", asked, allowed, least=0)}
    return [HessianTraceRegularizer(**{**settings, **own})]


def _limit(share: float, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bundle's limit, which a schedule of the user's own does without."""
    own = any(overrides.get(key) is not None for key in ("every_n_epochs", "every_n_train_steps"))
    return {} if own else {"max_overhead": share}


def _pair(
    shared: dict[str, Any],
    hessian: dict[str, Any],
    slices: dict[str, Any],
    overrides: dict[str, Any],
) -> list[Any]:
    """Return both monitors, each with the overrides that it knows.

    Raises:
        TypeError: If none knows a setting, or it tells the monitors apart.
    """
    kinds = (HessianMonitor, LossLandscapeMonitor)
    known = [set(inspect.signature(kind).parameters) for kind in kinds]
    for key in overrides:
        if key == "name" or not any(key in names for names in known):
            there = [*known[0], *known[1], "trace_regularization"]
            hint = "" if key == "name" else meant(key, sorted(there))
            hint = hint or ";"
            raise TypeError(
                f"a bundle does not take {key!r}{hint} it takes the settings of "
                f"{' and '.join(kind.__name__ for kind in kinds)}, their names left out."
            )
    made: list[Any] = []
    for kind, names, own in zip(kinds, known, (hessian, slices), strict=True):
        chosen = {key: value for key, value in overrides.items() if key in names}
        made.append(kind(**{**shared, **own, **chosen}))
    return made

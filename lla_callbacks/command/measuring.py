"""What the command line measures, and the files that it leaves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lla_callbacks.command.errors import CommandError, nearest
from lla_callbacks.command.request import Request
from lla_callbacks.hessian.measures import measure
from lla_callbacks.hessian.report import HessianReport
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.linalg.errors import described
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.build import objective_of
from lla_callbacks.objective.layers import layer_parameters
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.precision import at_precision
from lla_callbacks.slices.choice import DirectionSource
from lla_callbacks.slices.landscape import LandscapeSettings, measure_landscape
from lla_callbacks.slices.refinement import Refinement
from lla_callbacks.slices.report import LandscapeReport

# What the objective is built with, as far as a file may say it.
OBJECTIVE = (
    "dropout",
    "microbatch_size",
    "max_memory",
    "engine",
    "check",
    "jacobian",
    "batch_size",
    "matrix",
    "parameters",
)


@dataclass(frozen=True)
class Plan:
    """Settings of what is asked, checked before anything is loaded."""

    hessian: HessianSettings | None
    slices: LandscapeSettings | None
    objective: dict[str, Any]


def plan_of(request: Request) -> Plan:
    """Return the settings.

    Raises:
        CommandError: If a name or a value is not allowed.
    """
    hessian, slices = dict(request.hessian or {}), dict(request.slices)
    objective = {name: hessian.pop(name) for name in OBJECTIVE if name in hessian}
    # Those have options of their own, once for both.
    for place, given in (("hessian", hessian), ("slices", slices)):
        for name in ("seed", "mode", "precision", "num_samples", "loss"):
            if name in given:
                option = {"num_samples": "samples"}.get(name, name)
                raise CommandError(f"{place}: give {name} as {option}, once for everything.")
    try:
        chosen = None
        if request.hessian is not None:
            chosen = _settings("hessian", HessianSettings, hessian, seed=request.seed)
        names = {"planes": request.planes, "lines": request.lines}
        drawn = None
        if any(names.values()) or slices.get("num_rays"):
            drawn = _settings("slices", LandscapeSettings, {**names, **slices}, seed=request.seed)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return Plan(chosen, drawn, objective)


def _settings(place: str, kind: Any, given: dict[str, Any], **more: Any) -> Any:
    known = [f.name for f in fields(kind) if f.name not in more]
    for name in given:
        if name not in known:
            also = OBJECTIVE if place == "hessian" else ()
            raise CommandError(
                f"{place}: {name!r} is no setting.{nearest(str(name), [*known, *also])} They are "
                f"{', '.join([*known, *also])}."
            )
    return kind(**given, **more)


def measure_all(
    request: Request, plan: Plan, module: nn.Module, batches: Any, loss: Any
) -> tuple[HessianReport | None, LandscapeReport | None]:
    """Return what was asked for, on one objective."""
    torch.manual_seed(request.seed)
    with at_precision(module, request.precision), warnings.catch_warnings():
        # Of steps that ask for their Trainer's logger; silenced in monitors likewise.
        warnings.filterwarnings("ignore", message=".*self.log.*")
        held = dict(
            loss=loss,
            mode=request.mode,
            seed=request.seed,
            num_samples=request.samples,
            precision=request.precision,
            **plan.objective,
        )
        objective = objective_of(module, batches, **held)
        hessian = None
        if plan.hessian is not None:
            with bar("Hessian", _products(objective, plan.hessian), request.quiet) as advance:
                hessian = HessianReport.of(measure(objective, plan.hessian, listener=advance))
        landscape = None
        if plan.slices is not None:
            s = plan.slices
            if held.pop("matrix", "hessian") != "hessian":
                # Pictures are of the loss, and their directions of its Hessian.
                objective = objective_of(module, objective.batches, **held)
            source = DirectionSource(objective, s.normalization, s.vectors, s.seed)
            landscape = LandscapeReport.of(
                measure_landscape(
                    objective,
                    s,
                    source,
                    progress=lambda text, n: bar(text, n, request.quiet),
                    refining=Refinement,
                )
            )
    return hessian, landscape


def _products(objective: Objective, settings: HessianSettings) -> int:
    """Return how many products a measurement takes at most."""
    products = settings.max_matvecs
    each = settings.layer_plan.max_matvecs
    if each:
        space = ParameterSpace(objective.variables)
        products += each * len(layer_parameters(objective.module, space, settings.layers))
    return products


@contextmanager
def bar(text: str, total: int, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar where somebody looks at it; yields what advances it."""
    from tqdm.auto import tqdm

    shown = tqdm(
        total=total, desc=text, leave=False, dynamic_ncols=True, file=sys.stderr,
        disable=True if quiet else None,
    )  # fmt: skip
    try:
        yield shown.update
    finally:
        shown.close()


def write_all(
    folder: Path,
    hessian: HessianReport | None,
    landscape: LandscapeReport | None,
    step: int,
) -> list[str]:
    """Write numbers and figures as monitors lay them beside logs; return the summary's lines."""
    stem = f"step_{step:08d}"
    lines: list[str] = []
    figures: dict[str, Callable[[], Any]] = {}
    if hessian is not None:
        hessian.save(folder / "hessian" / f"{stem}.npz")
        lines.append(hessian.summary())
        if "density" not in hessian.gaps:
            figures["density"] = hessian.figure
        if hessian.layers:
            figures["layer_traces"] = hessian.layer_figure
        if any(m.spectrum is not None for m in hessian.layers.values()):
            figures["layer_densities"] = hessian.layer_density_figure
            figures["layer_distances"] = hessian.layer_distance_figure
    if landscape is not None:
        landscape.save(folder / "landscape" / f"{stem}.npz")
        lines.append(landscape.summary())
        lines += [f"  {k:18} left out: {described(e)}" for k, e in landscape.missing.items()]
        for name, plane in landscape.planes.items():
            figures[f"plane_{name}"] = plane.figure
            figures[f"surface_{name}"] = plane.surface
        if landscape.lines:
            figures["lines"] = landscape.line_figure
        if landscape.convexity is not None:
            figures["convexity"] = landscape.convexity.figure
        if landscape.basin is not None:
            figures["basin"] = landscape.basin.figure
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        draw().savefig(folder / "figures" / f"{name}.png")
    return lines

"""What does a loss plane cost, against the package loss-landscapes and against bare passes?

Run: ``pip install loss-landscapes==3.0.6``, then ``OMP_NUM_THREADS=1 python
docs/benchmarks/planes.py --data FOLDER`` (about five minutes of one core; FOLDER holds
``cifar10/`` and ``pretrained/``; without it the ResNet-20 is left out). Prints the tables of
planes.md. Both sides run in turn in this process, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import loss_landscapes
import numpy as np
import torch
from loss_landscapes.metrics import Loss
from networks import ResNet20, SmallTransformer, cifar10, conv_bn, digits, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from trace_estimators import train

from lla_callbacks import loss_plane
from lla_callbacks.slices.interpolation import spline_matrix
from lla_callbacks.slices.pictures import picture_through, straight_matrix

EVALUATIONS = ("loop", "vmap", "auto")
SIDES = (13, 17, 21, 26)  # points a side of our pictures
REFINED = (9, 13, 17)  # of those that the network's outputs are interpolated in
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A trained network, its batch, and how much of it is affordable.

    Attributes:
        name: In the tables.
        module: Trained.
        batch: Inputs and labels.
        modes: Modes in which times are taken.
        side: Points a side of the planes that are timed.
        rounds: How often each plane is timed.
        sides: Points a side of the grids from which pictures are drawn.
        reference: Points a side of the reference.
    """

    name: str
    module: nn.Module
    batch: Batch
    modes: tuple[str, ...]
    side: int
    rounds: int
    sides: tuple[int, ...]
    reference: int


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def spirals(count: int) -> Batch:
    """Points on two spirals, ``(count, 2)``, and which of the two."""
    source = torch.Generator().manual_seed(0)
    turn = torch.rand(count, generator=source).sqrt() * 3 * math.pi
    labels = torch.arange(count) % 2
    radius = turn * (1 - 2 * labels) / (3 * math.pi)
    x = torch.stack([radius * turn.cos(), radius * turn.sin()], dim=1)
    return x + 0.01 * torch.randn(count, 2, generator=source), labels


def spiral_mlp(batch: Batch) -> nn.Module:
    """A ReLU network of 2,274 parameters, trained until it knows its points by heart."""
    widths = [2, 32, 32, 32]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    module = nn.Sequential(*layers, nn.Linear(32, 2))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        loss_of(module, batch).backward()
        optimizer.step()
    return module


def cases(data: Path | None, wanted: Sequence[str]) -> list[Case]:
    """Return the networks, trained."""
    found: list[Case] = []

    def add(name: str, make: Callable[[], nn.Module], batch: Batch, *rest: Any) -> None:
        if not wanted or name in wanted:
            torch.manual_seed(0)
            found.append(Case(name, make(), batch, *rest))

    def trained(module: nn.Module, lr: float) -> nn.Module:
        train(module, *batch, 200, lr)
        return module

    batch = spirals(200)
    more = (*SIDES, 35, 51)
    add("spiral MLP", lambda: spiral_mlp(batch), batch, ("eval",), 21, 11, (*more, 71), 51)
    batch = digits(256)
    add("MLP", lambda: trained(mlp(), 0.1), batch, ("eval",), 17, 5, more, 31)
    add("conv + BN", lambda: trained(conv_bn(), 0.05), batch, ("eval", "batch"), 17, 3, SIDES, 15)
    batch = digits(128)
    add("transformer", lambda: trained(SmallTransformer(), 0.01), batch, ("eval",), 17, 3,
        SIDES[:3], 15)  # fmt: skip
    if data is None:
        print("ResNet-20 left out: no --data was given.\n")
    else:
        path = data / "pretrained" / "resnet20-12fca82f.th"

        def pretrained() -> nn.Module:
            module = ResNet20()
            saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            module.load_state_dict({k.removeprefix("module."): v for k, v in saved.items()})
            return module

        images = cifar10(data / "cifar10", 32)
        add("ResNet-20", pretrained, images, ("eval", "batch"), 13, 3, SIDES[:2], 15)
    return found


# --- Seconds per point. ----------------------------------------------------------------------


def ours(
    case: Case, mode: str, evaluation: str, axes: tuple[Tensor, Tensor], refine: bool = False
) -> Any:
    return loss_plane(
        case.module, [case.batch], loss=loss_of, mode=mode, evaluation=evaluation,  # type: ignore[arg-type]
        alphas=axes[0], betas=axes[1], refine=refine,
    )  # fmt: skip


def refined(case: Case, mode: str, side: int) -> tuple[Any, float]:
    """Return a refined plane, and what it takes beyond the same plane without: the least of 5.

    Planes of a second and more are made once each.
    """
    took: dict[bool, list[float]] = {False: [], True: []}
    while not took[True] or (len(took[True]) < 5 and sum(took[True]) < 1):
        for refine in took:
            began = time.process_time()
            plane = ours(case, mode, "auto", (even(side),) * 2, refine)
            took[refine].append(time.process_time() - began)
    return plane, max(min(took[True]) - min(took[False]), 0.0)


def peer(module: nn.Module, batch: Batch, side: int) -> np.ndarray:
    metric = Loss(F.cross_entropy, *batch)
    return loss_landscapes.random_plane(module, metric, 1, side, "filter")


def floor(module: nn.Module, batch: Batch, count: int) -> None:
    """Only what no tool can leave out: a forward pass and its loss, for each point."""
    with torch.inference_mode():
        for _ in range(count):
            loss_of(module, batch).item()


def even(side: int) -> Tensor:
    return torch.linspace(-1, 1, side, dtype=torch.float64)


@dataclass(frozen=True)
class Cost:
    """Seconds of the processor: of a plane with one point, and of each further point."""

    first: float
    further: float

    def of(self, points: float) -> float:
        return self.first + (points - 1) * self.further


def time_case(case: Case, mode: str) -> tuple[Cost, Cost]:
    """Print one row, and return what planes of the peer and of ours cost."""
    cpu: dict[tuple[str, int], list[float]] = {}
    wall: dict[tuple[str, int], list[float]] = {}
    methods: list[str] = []

    def run(name: str, side: int) -> None:
        # The peer leaves the module elsewhere and frozen: it gets a copy, outside the clock.
        own = copy.deepcopy(case.module).train(mode == "batch")
        axis = even(side) if side > 1 else torch.zeros(1)
        calls: dict[str, Callable[[], Any]] = {
            "peer": lambda: peer(own, case.batch, side),
            "floor": lambda: floor(own, case.batch, side**2),
            **{e: lambda e=e: ours(case, mode, e, (axis, axis)) for e in EVALUATIONS},
        }
        began = time.process_time(), time.perf_counter()
        result = calls[name]()
        cpu.setdefault((name, side), []).append(time.process_time() - began[0])
        wall.setdefault((name, side), []).append(time.perf_counter() - began[1])
        if name == "auto" and side > 3:
            methods.append(result.facts.method)

    side = case.side
    sides = dict.fromkeys(("peer", "auto", "floor", "loop", "vmap"), side)
    if case.rounds < 5:
        sides["vmap"] = 7  # slow and never chosen
    for name in ("peer", "auto", "floor", "vmap"):
        run(name, 3)  # to warm up
    for repeat in range(case.rounds):
        for name in sides:
            if repeat == 0 or sides[name] == side:
                run(name, sides[name])
            if name in ("peer", "auto"):
                run(name, 1)

    def further(times: dict[tuple[str, int], list[float]], name: str) -> list[float]:
        """Return seconds of each point but the first, by round."""
        setup = "peer" if name == "peer" else "auto"
        found = zip(times[name, sides[name]], times[setup, 1], strict=False)
        return [(whole - first) / (sides[name] ** 2 - 1) for whole, first in found]

    def over(name: str, base: str, times: dict[tuple[str, int], list[float]]) -> list[float]:
        return [a / b for a, b in zip(further(times, name), further(times, base), strict=False)]

    cpu["floor", 1] = [0.0] * case.rounds
    bare = [whole / side**2 for whole in cpu["floor", side]]
    shares = {
        name: statistics.median(a / b for a, b in zip(further(cpu, name), bare, strict=False))
        for name in ("peer", *EVALUATIONS)
    }
    costs = [
        Cost(statistics.median(cpu[name, 1]), statistics.median(further(cpu, name)))
        for name in ("peer", "auto")
    ]
    batched = methods.count("vmap")
    others = " and ".join(sorted({m for m in methods if m != "vmap"}))
    chosen = f"vmap {batched} of {case.rounds}" if batched else others
    each = over("peer", "auto", cpu)
    cells = [
        f"{case.name} ({sum(p.numel() for p in case.module.parameters()):,}; {len(case.batch[1])})",
        mode,
        f"{side}×{side}",
        f"{1e3 * statistics.median(bare):.2f}",
        *(f"{shares[name]:.2f}" for name in ("peer", "loop", "vmap")),
        f"{shares['auto']:.2f} ({chosen})",
        f"**{statistics.median(each):.2f}**",
        f"{min(each):.2f} to {max(each):.2f}",
        f"{statistics.median(over('peer', 'auto', wall)):.2f}",
        *(f"{1e3 * cost.first:.0f}" for cost in costs),
        f"{costs[0].of(17**2) / costs[1].of(17**2):.2f}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)
    return costs[0], costs[1]


# --- The error of a picture. -----------------------------------------------------------------


def nearest_matrix(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the matrix that takes values at ``x`` to the nearest of them ``at``."""
    return np.eye(len(x))[np.abs(at[:, None] - x).argmin(axis=1)]


def zigzag(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return what the peer would have at these points: rows half a cell off, to and fro."""
    half = (x[1] - x[0]) / 2
    # Beyond the outermost points the spline goes on; that is half a cell.
    moved = [values @ spline_matrix(x, x + sign * half).T for sign in (1, -1)]
    return np.where((np.arange(len(x)) % 2 == 0)[:, None], *moved)


def errors(picture: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return mean and 95th percentile of the error in decades."""
    off = np.abs(picture - truth)
    return float(off.mean()), float(np.quantile(off, 0.95))


def side_for(wanted: float, found: dict[int, float]) -> tuple[float, str]:
    """Return the side with this mean error, and "~" beyond those measured, ">" far beyond.

    Between two sides, and beyond the last two, the error is a power of the spacing; that is
    trusted up to four times the largest side.
    """
    pairs = list(pairwise(sorted(found)))
    a, b = next((pair for pair in pairs if found[pair[1]] <= wanted), pairs[-1])
    power = math.log(found[a] / found[b]) / math.log((b - 1) / (a - 1))
    side, most = 1 + (a - 1) * (found[a] / wanted) ** (1 / power), 4 * max(found)
    if side > most:
        return most, ">"
    return side, "~" if side > max(found) else ""


def draw_case(case: Case, mode: str, costs: tuple[Cost, Cost]) -> list[str]:
    """Print the errors of pictures, and return rows of what it takes to have equal errors."""
    # Coordinates that no grid shares: otherwise a grid would be exact where it is looked at.
    source = torch.Generator().manual_seed(1)
    axes = tuple(
        (2 * torch.rand(case.reference, generator=source, dtype=torch.float64) - 1).sort()[0]
        for _ in range(2)
    )
    truth = ours(case, mode, "auto", axes).loss.log10().numpy()
    at_x, at_y = (axis.numpy() for axis in axes)
    drawn: dict[int, tuple[float, float]] = {}
    told: dict[int, list[str]] = {}
    others: dict[str, dict[int, float]] = {"bilinear": {}, "loss": {}, "nearest": {}, "zigzag": {}}
    for side in (REFINED[0], *case.sides):
        x = even(side).numpy()
        loss = ours(case, mode, "auto", (even(side),) * 2).loss.numpy()
        values = np.log10(loss)
        picture = picture_through(x, x, loss)
        line_x, line_y = (straight_matrix(x, at) for at in (at_x, at_y))
        near_x, near_y = (nearest_matrix(x, at) for at in (at_x, at_y))
        drawn[side] = errors(np.log10(picture.at(at_x, at_y)), truth)
        told[side] = [f"{picture.error:.4f}", picture.form.name.removeprefix("a bicubic ")]
        others["bilinear"][side] = errors(line_x @ values @ line_y.T, truth)[0]
        others["loss"][side] = errors(np.log10(line_x @ 10**values @ line_y.T), truth)[0]
        others["nearest"][side] = errors(near_x @ values @ near_y.T, truth)[0]
        others["zigzag"][side] = errors(line_x @ zigzag(x, values) @ line_y.T, truth)[0]
    span = f"{float(truth.min()):.2f} to {float(truth.max()):.2f}"
    equal = []
    for side in case.sides:
        if side not in SIDES:
            continue
        label = f"{case.name}, {mode}" if side == SIDES[0] else ""
        cells = [label, span if label else "", f"{side}×{side}"]
        cells += [*(f"{e:.4f}" for e in drawn[side]), *told[side]]
        cells += [f"{found[side]:.4f}" for found in others.values()]
        print("| " + " | ".join(cells) + " |", flush=True)
        cells = [label, f"{side}×{side}"]
        for kind in ("bilinear", "zigzag"):
            needed, mark = side_for(drawn[side][0], others[kind])
            ratio = costs[0].of(needed**2) / costs[1].of(side**2)
            points = (needed / side) ** 2
            cells += [f"{mark}{needed:.0f}", f"{mark}{points:.1f}", f"**{mark}{ratio:.1f}**"]
        equal.append("| " + " | ".join(cells) + " |")
    for side in REFINED:
        plane, extra = refined(case, mode, side)
        picture = plane.picture
        found = errors(np.log10(picture.at(at_x, at_y)), truth)
        label = f"{case.name}, {mode}" if side == REFINED[0] else ""
        cost = costs[1].of(side**2) + extra
        cells = [label, f"{side}×{side}", f"{drawn[side][0]:.4f}", f"{found[0]:.5f}"]
        cells += [f"{found[1]:.4f}", f"{picture.error:.5f}"]
        cells += [f"{extra / costs[1].of(side**2):.0%}"]
        for kind in ("bilinear", "zigzag"):
            needed, mark = side_for(found[0], others[kind])
            points = (needed / side) ** 2
            cells += [f"{mark}{needed:.0f}", f"{mark}{points:.1f}"]
            cells += [f"**{mark}{costs[0].of(needed**2) / cost:.1f}**"]
        print("refined | " + " | ".join(cells) + " |", flush=True)
    return equal


# --- Where the peer's points lie. ------------------------------------------------------------


class Where(loss_landscapes.metrics.metric.Metric):
    """Records at which parameters it was called."""

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, wrapper: Any) -> np.ndarray:
        parameters = wrapper.get_module_parameters()
        return np.concatenate([p.detach().double().numpy().ravel() for p in parameters])


def show_zigzag(side: int = 6) -> None:
    """Print the coordinates, in cells from the present weights, of the peer's first rows."""
    torch.manual_seed(0)
    module = nn.Linear(30, 20, bias=False).double()
    start = module.weight.detach().numpy().ravel().copy()
    points = loss_landscapes.random_plane(module, Where(), 1, side, "filter")
    second = points[0, 1] - points[0, 0]
    # Row 2 begins, as row 0 does, one step along the second direction from where row 1 ended.
    first = (points[2, 0] - points[0, 0]) / 2
    basis = np.stack([first, second], axis=1)
    found = np.linalg.lstsq(basis, (points - start).reshape(-1, len(start)).T, rcond=None)[0]
    found = found.T.reshape(side, side, 2).round(6) + 0.0
    print("Where the peer's points lie, in cells from the present weights (first, second):\n")
    for i in range(3):
        print("    row", i, " ".join(f"({a:+.1f}, {b:+.1f})" for a, b in found[i]))
    shares = f"{(first > 0).mean():.0%} and {(second > 0).mean():.0%}"
    print(f"\nOf the entries of its directions {shares} are positive.\n")


def heading(*names: str) -> None:
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and pretrained/")
    parser.add_argument("--network", action="append", default=[], help="only this one; repeatable")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    show_zigzag()
    found = cases(arguments.data, arguments.network)
    costs = {}
    heading("network (parameters; samples)", "mode", "points", "floor, ms", "peer", "loop", "vmap",
            "auto", "peer / auto", "range", "on the wall", "peer's first point, ms",
            "ours", "17×17 plane")  # fmt: skip
    for case in found:
        for mode in case.modes:
            costs[case.name, mode] = time_case(case, mode)
    print()
    heading("network", "log10 of the loss", "points", "ours: mean", "p95", "its estimate",
            "its form", "bilinear",
            "bilinear of the loss", "nearest", "zig-zag, bilinear")  # fmt: skip
    rows = [draw_case(c, c.modes[-1], costs[c.name, c.modes[-1]]) for c in found]
    print()
    heading("network", "ours", "peer's side, repaired", "points ratio", "time ratio",
            "peer's side, as it is", "points ratio", "time ratio")  # fmt: skip
    print("\n".join(row for case in rows for row in case))
    print(f"\n{time.perf_counter() - began:.0f} s, {time.process_time():.0f} s of the processor.")


if __name__ == "__main__":
    main()

"""How often do reported errors cover the truth?

    OMP_NUM_THREADS=1 python docs/benchmarks/coverage.py [--part NAME]

Prints the tables of docs/benchmarks/coverage.md. The networks are small enough for dense Hessians.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks.hessian import criteria
from lla_callbacks.hessian.criteria_of import SINCE
from lla_callbacks.hessian.measures import measure
from lla_callbacks.hessian.settings import HessianSettings, TrackingSettings
from lla_callbacks.hessian.tracking import TrackerState, anchored, track
from lla_callbacks.linalg.density import sampling_error
from lla_callbacks.linalg.eigenvalue import extremes
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.operators import DenseOperator, SymmetricOperator
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.linalg.tracking import advance, begin
from lla_callbacks.objective.build import objective_of
from lla_callbacks.objective.objective import Objective

CHAINS = 10_000
INTERVALS = (1, 2, 4, 8, 16)
# One full measurement, then 19 light ones, as in ../shared/cases/number_tracking.py.
EVERY = 20


def off(correlation: float, half: int, times: int = 2 * EVERY) -> Iterator[tuple[int, Tensor]]:
    """Yield the light firings since a full one, and by how many errors each chain is off."""
    source = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(count, CHAINS, generator=source, dtype=torch.float64)

    sure = torch.full((CHAINS,), 0.05, dtype=torch.float64)
    past = None
    for time in range(times):
        if past is None or time % EVERY == 0:
            past = begin(draw(half), draw(1)[0] * sure, sure, past)
            continue
        again = correlation * past.values + math.sqrt(1 - correlation**2) * draw(half)
        found, past = advance(past, again, draw(half))
        yield time % EVERY, (found.value / found.sem).abs()


def simulation() -> None:
    print("| probes | correlation a step | interval | all | first 3 after a full one | beyond 5 |")
    print("|---|---|---|---|---|---|")
    for half in (1, 2, 4):
        for step in (0.98, 0.9):
            for interval in INTERVALS:
                pairs = list(off(step**interval, half))
                every = torch.cat([z for _, z in pairs])
                first = torch.cat([z for time, z in pairs if time <= 3])
                cells = [f"{100 * float((z <= 2).double().mean()):.1f} %" for z in (every, first)]
                tail = f"{100 * float((every > 5).double().mean()):.2f} %"
                print(f"| {2 * half} | {step} | {interval} | {' | '.join(cells)} | {tail} |")


def network(kind: type[nn.Module] = nn.Tanh, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), kind(), nn.Linear(width, 10))


def samples() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def dense(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the Hessian as a matrix in float64."""
    parameters = {n: p.detach().double() for n, p in module.named_parameters()}
    wide = (batch[0].double(), batch[1])

    def of(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in parameters.values()])
        named = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module, named, wide[0]), wide[1])

    flat = torch.cat([p.reshape(-1) for p in parameters.values()])
    return torch.func.hessian(of)(flat)


def trained(module: nn.Module, steps: int, seed: int = 0) -> Iterator[int]:
    """Train by SGD, and yield after each step."""
    x, y = samples()
    source = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for step in range(steps):
        chosen = torch.randint(len(x), (64,), generator=source)
        optimizer.zero_grad()
        loss(module, (x[chosen], y[chosen])).backward()
        optimizer.step()
        yield step


def tracking(seeds: int = 8, firings: int = 20) -> None:
    """Light firings on a network in training, against its dense Hessian."""
    x, y = samples()
    held = (x[:256], y[:256])
    print(
        "| from step | interval | trace within 2 | beyond 5 | lambda_max off by more than 2 % "
        "| above value + residual | above value + beyond |"
    )
    print("|---|---|---|---|---|---|---|")
    for start in (0, 200):
        for interval in (1, 4, 16):
            module = network()
            states: list[TrackerState | None] = [None] * seeds
            z, far, above, further, count = [], 0, 0, 0, 0
            for step in trained(module, start + interval * firings):
                if step < start or (step - start) % interval:
                    continue
                objective = objective_of(
                    module,
                    [held],
                    loss,
                    mode="batch",
                    dropout=False,
                    seed=0,
                    num_samples=None,
                    microbatch_size=None,
                )
                full = (step - start) % (interval * 10) == 0
                if not full:
                    matrix = dense(module, held)
                    trace, top = float(matrix.trace()), float(torch.linalg.eigvalsh(matrix)[-1])
                for seed in range(seeds):
                    settings = TrackingSettings(seed=seed)
                    if full:
                        states[seed] = full_state(objective, settings, states[seed])
                        continue
                    found, states[seed] = track(objective, settings, states[seed])
                    z.append(abs(found.trace - trace) / found.trace_sem)
                    far += abs(found.lambda_max / top - 1) > 0.02
                    above += top > found.lambda_max + found.lambda_max.residual
                    further += top > found.lambda_max + found.lambda_max.beyond
                    count += 1
            within = sum(v <= 2 for v in z) / count
            beyond = sum(v > 5 for v in z) / count
            print(
                f"| {start} | {interval} | {within:.1%} | {beyond:.1%} | {far / count:.1%} "
                f"| {above / count:.1%} | {further / count:.1%} |"
            )


def full_state(
    objective: Objective, settings: TrackingSettings, past: TrackerState | None
) -> TrackerState:
    """Return the state after a full measurement."""
    found: list[TrackerState] = []
    measure(
        objective,
        HessianSettings(seed=settings.seed),
        anchor=lambda h, blocks, runs, traces: found.append(
            anchored(h, blocks, runs, traces, settings, past)
        ),
    )
    return found[0]


def rotated(values: Tensor, seed: int = 0) -> DenseOperator:
    """Return an operator with these eigenvalues and random eigenvectors."""
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=source, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    return DenseOperator((basis * values) @ basis.T)


def start_of(operator: DenseOperator, seed: int) -> Tensor:
    dim = operator.shape[0]
    return rademacher(dim, generator(seed), dtype=torch.float64, device=torch.device("cpu"))


def stopped(run: LanczosRun, place: int, rtol: float, since: float) -> LanczosRun:
    """Return a run as it was when the Ritz value at a place first seemed to have converged."""
    for depth in range(4, run.num_steps):
        now = run.at_depth(depth)
        value = float(now.values[place])
        before = run.at_depth(max(3, int(since * depth))).values if depth * since >= 3 else None
        if before is None or float(now.residuals[place]) > rtol * abs(value):
            continue
        if abs(float(before[place]) - value) <= rtol * abs(value):
            return now
    return run


def places(starts: int = 100, most: int = 60) -> None:
    """Is the second Ritz value the second eigenvalue?"""
    print("| outliers | residual alone | since 75 % of the steps | since 60 % |")
    print("|---|---|---|---|")
    for outliers in ((3.0, 3.03, 3.3), (3.0, 3.1, 3.2)):
        values = torch.cat([torch.linspace(-0.05, 1, 1000), torch.tensor(outliers)]).double()
        # In the eigenvectors' own coordinates, with normal start vectors: the same law.
        operator = Diagonal(values)
        wrong = dict.fromkeys((1.0, 0.75, 0.6), 0)
        for seed in range(starts):
            start = torch.randn(len(values), generator=generator(seed), dtype=torch.float64)
            run = lanczos(operator, start, most)
            for since in wrong:
                now = stopped(run, -2, 0.01, since)
                off = abs(float(now.values[-2]) - float(values[-2]))
                wrong[since] += off > float(now.residuals[-2])
        print(f"| {outliers} | " + " | ".join(str(count) for count in wrong.values()) + " |")


class Diagonal(SymmetricOperator):
    """A diagonal matrix."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(len(values), values.dtype, values.device)
        self.values = values[:, None]

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.values * columns


def onward(starts: int = 200, most: int = 60) -> None:
    """Is a run as sure that goes on from what a shallow one had of an eigenvector?"""
    print("| outliers, or the spectrum | wanted | from noise | first run's steps | settled by it "
          "| going on |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    bulk = torch.linspace(-0.05, 1, 1000)
    decay = torch.cat([-torch.logspace(-6, -2, 500).flip(0), torch.logspace(-6, 1, 1000)])
    spectra = {
        "3, 3.03, 3.3": torch.cat([bulk, torch.tensor([3.0, 3.03, 3.3])]),
        "3, 3.1, 3.2": torch.cat([bulk, torch.tensor([3.0, 3.1, 3.2])]),
        "1e-6 to 10, evenly in the logarithm": decay,
    }
    for name, values in spectra.items():
        operator = Diagonal(values.double().sort().values)
        for place in (-1, -2):
            which: str | list[int] = "max" if place == -1 else [-1, place]

            def is_there(run: LanczosRun, place: int = place) -> bool:
                if place == -1:
                    return run.is_largest(0.01)
                return run.settled(place, 0.01)

            def is_wrong(run: LanczosRun, place: int = place, operator: Any = operator) -> bool:
                off = abs(float(run.values[place]) - float(operator.values[place]))
                return is_there(run, place) and off > float(run.residuals[place])

            def noise(seed: int, operator: Any = operator) -> Tensor:
                source = generator(seed)
                return torch.randn(len(operator.values), generator=source, dtype=torch.float64)

            cold = [lanczos(operator, noise(starts + s), most, rtol=0.01, which=which, noise=1.0)
                    for s in range(starts)]  # fmt: skip
            usual = f"{sum(r.num_steps for r in cold) / starts:.1f}, {sum(map(is_wrong, cold))}"
            for depth in (5, 8, 12):
                first = [
                    lanczos(operator, noise(starts + s), depth, noise=1.0) for s in range(starts)
                ]
                warm = []
                for s, run in enumerate(first):
                    if not is_there(run):
                        fresh = noise(2 * starts + s)
                        size = 1.0 / float(fresh.norm())
                        start = run.vectors([place % depth])[:, 0] + size * fresh
                        again = which if place == -1 else [place]
                        warm.append(
                            lanczos(
                                operator,
                                start,
                                most,
                                rtol=0.01,
                                which=again,
                                noise=size,
                                earlier=run.seen,
                            )
                        )
                mean = sum(run.num_steps for run in warm) / max(1, len(warm))
                on = f"{mean:.1f}, {sum(map(is_wrong, warm))} of {len(warm)}"
                done = f"{starts - len(warm)}, {sum(map(is_wrong, first))} wrong"
                what = "largest" if place == -1 else "second"
                print(f"| {name} | {what} | {usual} | {depth} | {done} | {on} |")


def stability(starts: int = 60) -> None:
    """The largest eigenvalue of a head whose body stands still."""
    print("| | residual 5 % | in its place | residual 2 %, in its place |")
    print("|---|---|---|---|")
    first = torch.cat([torch.linspace(-0.1, 0.5, 40), torch.tensor([0.85, 0.88, 1.0])]).double()
    second = torch.cat([torch.linspace(-0.1, 0.9, 80), torch.tensor([1.0])]).double()
    for name, values in (("outliers", first), ("bulk", second)):
        operator, cells = rotated(values), []
        for rtol, which in ((0.05, "max"), (0.05, [-1]), (0.02, [-1])):
            runs = [
                lanczos(operator, start_of(operator, seed), 24, rtol=rtol, which=which, noise=1.0)
                for seed in range(starts)
            ]
            low = sum(float(run.values[-1]) < 0.95 for run in runs) / starts
            products = sum(run.num_steps for run in runs) / starts
            cells.append(f"{low:.0%} ({products:.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


def outermost(starts: int = 60) -> None:
    x, y = samples()
    held = (x[:256], y[:256])
    print(
        "| steps | end | in the residual | in `beyond` | `beyond`, of the eigenvalue | of λ_max |"
    )
    print("|---|---|---|---|---|---|")
    spectra = []
    for kind, width, steps in (
        (nn.Tanh, 8, 0), (nn.Tanh, 8, 400), (nn.ReLU, 16, 0), (nn.ReLU, 16, 60), (nn.ReLU, 8, 400),
    ):  # fmt: skip
        module = network(kind, width)
        for _ in trained(module, steps):
            pass
        matrix = dense(module, held)
        spectra.append((DenseOperator(matrix), torch.linalg.eigvalsh(matrix)))
    for num_steps in (3, 5, 8, 12, 24):
        found: dict[int, list[tuple[bool, bool, float, float]]] = {1: [], -1: []}
        for operator, values in spectra:
            for seed in range(starts):
                start = start_of(operator, seed)
                run = lanczos(operator, start, num_steps, noise=1.0)
                for sign, end in zip((-1, 1), extremes([run]), strict=True):
                    truth = float(values[-1 if sign > 0 else 0])
                    left = sign * (truth - end)
                    found[sign].append((
                        left <= end.residual, left <= end.beyond,
                        end.beyond / abs(truth), end.beyond / float(values[-1]),
                    ))  # fmt: skip
        for sign, name in ((1, "λ_max"), (-1, "λ_min")):
            within, bounded, own, top = (
                sorted(column) for column in zip(*found[sign], strict=True)
            )
            count = len(own)
            print(
                f"| {num_steps} | {name} | {sum(within) / count:.0%} | {sum(bounded) / count:.0%} "
                f"| {own[count // 2]:.1%} | {top[count // 2]:.1%} |"
            )


def depth(starts: int = 30, unit: float = 0.05) -> None:
    """The effective dimension, with and without what the last steps changed."""
    x, y = samples()
    held = (x[:256], y[:256])
    print("| | steps, runs | truth | mean | law of weights | change | before | with the change |")
    print("|---|---|---|---|---|---|---|---|")
    for name, width, steps in (("at initialisation", 16, 0), ("trained", 8, 300)):
        module = network(width=width)
        for _ in trained(module, steps):
            pass
        values = torch.linalg.eigvalsh(dense(module, held))
        truth = float((values.clamp(min=0) / (values.clamp(min=0) + unit)).sum())
        operator, dim = rotated(values), len(values)

        def one(t: Tensor, w: Tensor, dim: int = dim) -> float:
            return criteria.effective_dimension(t, w, dim, unit)

        for num_steps, num_runs in ((12, 1), (12, 4), (24, 1), (24, 4), (40, 4)):
            found = []
            for seed in range(starts):
                runs = [
                    lanczos(operator, start_of(operator, 10 * seed + k), num_steps)
                    for k in range(num_runs)
                ]
                errors = [
                    sampling_error(lambda w, r=r: one(r.values, w), r.weights, dim)  # type: ignore[misc]
                    for r in runs
                ]
                value = sum(one(r.values, r.weights) for r in runs) / num_runs
                earlier = [
                    sum(one(s.values, s.weights) for s in (r.at_depth(d) for r in runs)) / num_runs
                    for d in range(math.ceil(SINCE * num_steps), num_steps)
                ]
                moved = max(abs(e - value) for e in earlier)
                found.append((value, math.hypot(*errors) / num_runs, moved))
            mean, law, change = (sum(f[i] for f in found) / starts for i in range(3))
            before = sum(abs(v - truth) <= 2 * e for v, e, _ in found) / starts
            now = sum(abs(v - truth) <= 2 * math.hypot(e, m) for v, e, m in found) / starts
            print(
                f"| {name} | {num_steps}, {num_runs} | {truth:.1f} | {mean:.1f} | {law:.1f} "
                f"| {change:.1f} | {before:.0%} | {now:.0%} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {
        "simulation": simulation,
        "tracking": tracking,
        "places": places,
        "onward": onward,
        "stability": stability,
        "outermost": outermost,
        "depth": depth,
    }
    parser.add_argument("--part", choices=parts, action="append")
    torch.set_num_threads(1)
    for part in parser.parse_args().part or parts:
        parts[part]()


if __name__ == "__main__":
    main()

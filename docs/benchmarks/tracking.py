"""What does tracking cost, and what do warm starts and chained traces save?

Run: ``python docs/benchmarks/tracking.py --data FOLDER [--quick] [--part overhead|study]``
(the overhead takes about 10 minutes alone on a core, the study 40). Both on DeepOBS's 3c3d
with the CIFAR-10 images in FOLDER/cifar10, the study also on a transformer on digits.

The overhead is the processor time of light measurements by that of training, in one fit
that every configuration watches: measurements leave training bitwise unchanged, so all see
the same weights, and what else runs on the machine slows all alike.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from networks import SmallTransformer, cifar10, conv_3c3d, digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor
from lla_callbacks.callbacks.schedule import Schedule
from lla_callbacks.hessian.tracking import TrackerState
from lla_callbacks.linalg.hessian import HessianOperator, LossTerm
from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.linalg.tracking import advance

# Interval to published run-time factors (Cockpit's figure 6): with the exact trace, and with
# lambda_max besides.
COCKPIT = {1: (2.03, 21.2), 4: (1.30, 6.0), 16: (1.09, 2.2), 64: (1.03, 1.3), 256: (1.02, 1.06)}

# -- overhead ---------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    """3c3d with DeepOBS's l2 penalty, as the optimizer's weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_3c3d()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, weight_decay=0.002)


class Timed(HessianMonitor):
    """A monitor whose light measurements are timed, and start cold on request."""

    measuring = 0.0

    def __init__(self, *, cold: bool = False, **settings: Any) -> None:
        super().__init__(
            every_n_epochs=10**6, track_every_n_train_steps=10**6, figures=False, **settings
        )
        self.cold = cold
        self.costs: list[float] = []

    def _fire(self, trainer: Any, module: Any, moment: Any) -> Any:
        light = moment.light
        if light and self.cold:
            self.spectrum.tracker = TrackerState()
        began = time.process_time()
        try:
            return super()._fire(trainer, module, moment)
        finally:
            seconds = time.process_time() - began
            Timed.measuring += seconds
            if light:
                self.costs.append(seconds)

    def _fire_start(self, trainer: Any, module: Any) -> None:
        """No full measurement: the light ones are what is timed."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._forget()


class Phases(pl.Callback):
    """One interval after the other; prints a row for each when it is over."""

    def __init__(self, monitors: dict[str, Timed], begin: int, firings: dict[int, int]) -> None:
        self.monitors = monitors
        self.ends: dict[int, int] = {}
        step = begin
        for interval, count in firings.items():
            step = -(-step // interval) * interval  # firings are at multiples
            self.ends[step] = interval
            step += interval * count
        self.last = step + 1
        self.interval = 0

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        step = trainer.global_step
        if step + 1 in self.ends or step + 1 == self.last:
            self.report()
            self.interval = self.ends.get(step + 1, 0)
            for monitor in self.monitors.values():
                monitor.tracking_schedule = Schedule(self.interval or 10**6)
        if step in self.ends:
            # The first firing only gives vectors that are as old as they should be.
            self.since = {name: len(m.costs) for name, m in self.monitors.items()}
            self.began, self.at = time.process_time() - Timed.measuring, step

    def report(self) -> None:
        if not self.interval:
            return
        steps = self._now - self.at
        seconds = (time.process_time() - Timed.measuring - self.began) / steps
        full = COCKPIT[self.interval]
        print(f"\nevery {self.interval}: a step {seconds:.3f} s; published {full[0]} and {full[1]}")
        for name, monitor in self.monitors.items():
            costs = monitor.costs[self.since[name] :]
            found = [t for _, t in monitor.tracked[len(monitor.tracked) - len(costs) :]]
            mean = sum(costs) / len(costs)
            residuals = [t.lambda_max.residual / abs(t.lambda_max) for t in found]
            print(
                f"  {name:24s} ratio {1 + mean / seconds / self.interval:6.3f} | "
                f"{mean / seconds:5.2f} steps a firing, {len(costs)} firings | products "
                f"{sum(t.num_matvecs for t in found) / len(found):4.1f}, Lanczos "
                f"{sum(t.num_steps for t in found) / len(found):4.1f} | residual "
                f"{sum(residuals) / len(found):.3f} | lambda_max {float(found[-1].lambda_max):.4g}"
                f" | trace {found[-1].trace:.4g} +- {found[-1].trace_sem:.3g}",
                flush=True,
            )

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self._now = trainer.global_step


def overhead(folder: Path, quick: bool) -> None:
    """Print a row for each interval and configuration."""
    x, y = cifar10(folder, 4000)
    pl.seed_everything(0, verbose=False)
    settings: dict[str, dict[str, Any]] = {
        "trace, 128 samples": {"samples": 128, "track_eig_rtol": None, "track_num_probes": 4},
        "both, 128 samples": {"samples": 128},
        "both cold, 128 samples": {"samples": 128, "cold": True},
        "both, 64 samples": {"samples": 64},
        "both cold, 64 samples": {"samples": 64, "cold": True},
        "trace, 16 samples": {"samples": 16, "track_eig_rtol": None, "track_num_probes": 4},
        "both, 16 samples": {"samples": 16},
        "trace, 8 samples": {"samples": 8, "track_eig_rtol": None, "track_num_probes": 4},
        "both, 8 samples": {"samples": 8},
    }
    monitors = {}
    for name, given in settings.items():
        count = given.pop("samples")
        monitors[name] = Timed(name=name.replace(", ", "_").replace(" ", "_"), **given,
                               dataloader=[(x[:count], y[:count])])  # fmt: skip
    firings = {1: 2, 4: 2} if quick else {1: 8, 4: 6, 16: 3, 64: 2, 256: 1}
    phases = Phases(monitors, 4 if quick else 40, firings)
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            max_steps=phases.last + 1, accelerator="cpu", logger=False,
            callbacks=[phases, *monitors.values()], enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=root,
        )  # fmt: skip
        loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True, drop_last=True)
        trainer.fit(Classifier(), loader)


# -- study ------------------------------------------------------------------------------


def moments(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, held: int, batch: int, steps: list[int]
) -> Iterator[HessianOperator]:
    """Train, and give the Hessian of the first samples after each number of steps."""
    torch.manual_seed(0)
    module = make()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    source = torch.Generator().manual_seed(0)
    done = 0
    for step in steps:
        for _ in range(step - done):
            chosen = torch.randint(0, len(x), (batch,), generator=source)
            optimizer.zero_grad()
            F.cross_entropy(module(x[chosen]), y[chosen]).backward()
            optimizer.step()
        done = step
        frozen = copy.deepcopy(module)
        term = LossTerm(lambda frozen=frozen: F.cross_entropy(frozen(x[:held]), y[:held]), 1.0)
        yield HessianOperator([term], dict(frozen.named_parameters()))


def noise(op: HessianOperator, *key: int) -> Tensor:
    return rademacher(op.shape[0], generator(*key), dtype=op.dtype, device=op.device)


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


def start_of(kind: str, op: HessianOperator, run: LanczosRun, time_of: int) -> Tensor:
    k = min(6, run.num_steps)
    vectors = run.vectors(list(range(run.num_steps - 1, run.num_steps - 1 - k, -1)))
    top, rest = vectors[:, 0], vectors[:, 1:].sum(1)
    return {
        "cold": noise(op, 2, time_of),
        "gradient": op.gradient,
        "v1": top,
        "v1 + 0.3 gradient": top + 0.3 * unit(op.gradient),
        "v1 + 0.3 others": top + 0.3 * rest,
        "v1 + 0.3 noise": top + 0.3 * unit(noise(op, 3, time_of)),
        "6 vectors by value": vectors @ run.values.flip(0)[:k].clamp(min=0).to(vectors),
    }[kind]


def chains(name: str, begin: int, gap: int, count: int, *network: Any) -> None:
    """Print the products of lambda_max to 5 %, each start going on from its own last run."""
    kinds = ["cold", "gradient", "v1", "v1 + 0.3 gradient", "v1 + 0.3 others", "v1 + 0.3 noise",
             "6 vectors by value"]  # fmt: skip
    last: dict[str, LanczosRun] = {}
    products = {kind: [0, []] for kind in kinds}
    for time_of, op in enumerate(moments(*network, [begin + gap * i for i in range(count + 1)])):
        best = lanczos(op, noise(op, 1, time_of), 40, rtol=0.005, which="max")
        for kind in kinds:
            if time_of:
                start = start_of(kind, op, last[kind], time_of)
                last[kind] = lanczos(op, start, 40, rtol=0.05, which="max")
                products[kind][0] += last[kind].num_steps
                products[kind][1].append(float(last[kind].values[-1] / best.values[-1]) - 1)
            else:
                last[kind] = best
    cells = [
        f"{kind} {total / count:.1f} ({sum(errors) / count:+.3f}, worst {min(errors):+.3f})"
        for kind, (total, errors) in products.items()
    ]
    print(f"{name}, from {begin} every {gap}: " + " | ".join(cells), flush=True)


def blocks(name: str, begin: int, gaps: list[int], *network: Any) -> None:
    """Print the products of lambda_max to 5 % and 1 % from one Ritz vector and from k."""
    operators = moments(*network, [begin, *(begin + gap for gap in gaps)])
    first = next(operators)
    base = lanczos(first, noise(first, 0, 3), 24)
    top = base.vectors(list(range(23, 15, -1)))
    for gap, op in zip(gaps, operators, strict=True):
        cells = []
        for kind, start in {
            "cold": noise(op, 1, 3),
            "gradient": op.gradient,
            "1": top[:, 0],
        }.items():
            steps = [lanczos(op, start, 40, rtol=r, which="max").num_steps for r in (0.05, 0.01)]
            cells.append(f"{kind} {steps[0]}/{steps[1]}")
        for k in (2, 4, 8):
            cells.append(f"block of {k} {'/'.join(map(str, block_products(op, top[:, :k])))}")
        print(f"{name}, {gap} after {begin}: " + " | ".join(cells), flush=True)


def block_products(op: HessianOperator, columns: Tensor, most: int = 40) -> list[int]:
    """Products of Rayleigh-Ritz on a block that grows by the top residual, to 5 % and 1 %."""
    basis = torch.linalg.qr(columns)[0]
    image, counts = op @ basis, []
    for rtol in (0.05, 0.01):
        while True:
            small = (basis.T @ image).double()
            values, vectors = torch.linalg.eigh((small + small.T) / 2)
            s = vectors[:, -1].to(basis)
            residual = image @ s - float(values[-1]) * (basis @ s)
            if residual.norm() <= rtol * values.abs().max() or basis.shape[1] >= most:
                break
            for _ in range(2):
                residual = residual - basis @ (basis.T @ residual)
            basis = torch.cat([basis, unit(residual)[:, None]], 1)
            image = torch.cat([image, op @ basis[:, -1:]], 1)
        counts.append(basis.shape[1])
    return counts


def traces(name: str, begin: int, gap: int, count: int, pool: int, *network: Any) -> None:
    """Print how much one probe deviates, its correlation in time, and what chains make of it."""
    vector, rows = None, {"plain": [], "top vector out": [], "warm basis out": []}
    for op in moments(*network, [begin + gap * i for i in range(count)]):
        start = noise(op, 5, 0) if vector is None else vector + 0.3 * unit(op.gradient)
        run = lanczos(op, start, 24, rtol=0.05, which="max")
        vector = run.vectors([run.num_steps - 1])[:, 0]
        known = {"top vector out": run.pair(run.num_steps - 1), "warm basis out": run}
        found: dict[str, list[float]] = {kind: [] for kind in rows}
        for j in range(pool):
            probe = noise(op, j, 77)
            product = op @ probe
            found["plain"].append(float(probe @ product))
            for kind, part in known.items():
                image = part.project(part.basis)
                image[-1] += part.next_norm * part.next_vector
                c, small = part.basis @ probe, part.basis @ image.T
                change = c @ small @ c - 2 * c @ (part.basis @ product) + small.trace()
                found[kind].append(float(probe @ product + change))
        for kind, values in found.items():
            rows[kind].append(values)
    for kind, values in rows.items():
        h = torch.tensor(values, dtype=torch.float64)
        e = h - h.mean(1, keepdim=True)
        q = (e[1:] * e[:-1]).sum(1) / (e[1:].norm(dim=1) * e[:-1].norm(dim=1))
        cells = [f"{m} probes {rms:.2f} of plain, sem / rms {sem:.2f}, within 2 sem {within:.0%}"
                 for m in (2, 4, 8) for rms, sem, within in [chained(h, m)]]  # fmt: skip
        print(
            f"{name}, from {begin} every {gap}, {kind}: one probe {float(h.std(1).mean()):.3g}, "
            f"correlation {float(q.mean()):.2f}; chained: " + " | ".join(cells),
            flush=True,
        )


def chained(h: Tensor, num_probes: int, repeats: int = 400) -> tuple[float, float, float]:
    """RMS error of the chained trace by that of as many plain probes, and its sem's honesty.

    Probes are drawn from the recorded pool, whose mean stands for the trace.
    """
    count, pool = h.shape
    half, source = num_probes // 2, torch.Generator().manual_seed(0)
    errors, sems = torch.zeros(repeats, count), torch.zeros(repeats, count)
    for r in range(repeats):
        need = half * (count + 1)
        order = [torch.randperm(pool, generator=source) for _ in range(need // pool + 1)]
        index = torch.cat(order)[:need].reshape(-1, half)
        state = None
        for i, (old, new) in enumerate(itertools.pairwise(index)):
            a, b = h[i, old][:, None], h[i, new][:, None]
            found, state = (advance(None, None, torch.cat([a, b])) if state is None
                            else advance(state, a, b))  # fmt: skip
            errors[r, i], sems[r, i] = float(found.value) - float(h[i].mean()), float(found.sem)
    late = slice(count // 3, None)
    rms = errors[:, late].square().mean(0).sqrt()
    plain = h.std(1)[late] * ((1 - num_probes / pool) / num_probes) ** 0.5
    within = (errors / sems)[:, late].abs() < 2
    return (
        float((rms / plain).mean()),
        float((sems[:, late].mean(0) / rms).mean()),
        float(within.float().mean()),
    )


def study(folder: Path, quick: bool) -> None:
    images = (conv_3c3d, *cifar10(folder, 4000), 16, 128)
    rows = (SmallTransformer, *digits(1437), 64, 64)
    for name, network in (("3c3d", images), ("transformer", rows)):
        late = 20 if quick else {"3c3d": 250, "transformer": 400}[name]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            blocks(name, 10, [1] if quick else [1, 4, 16, 64], *network)
            for begin, gap in [(4, 1)] if quick else itertools.product((20, late), (1, 4, 16, 64)):
                chains(name, begin, gap, 2 if quick else 10, *network)
            for begin, gap in [(4, 1)] if quick else [(late, 1), (late, 4), (20, 1)]:
                traces(name, begin, gap, 4 if quick else 10, 12 if quick else 24, *network)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ in it")
    parser.add_argument("--part", choices=["overhead", "study"])
    parser.add_argument("--quick", action="store_true", help="every line, little work")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.part != "study":
        overhead(arguments.data / "cifar10", arguments.quick)
    if arguments.part != "overhead":
        study(arguments.data / "cifar10", arguments.quick)


if __name__ == "__main__":
    main()

"""Claims of Garipov et al. 2018 on small networks, five seeds each, and what a curve costs.

OMP_NUM_THREADS=1 python docs/benchmarks/connectivity.py [--cifar FOLDER] [--only PART]

Every figure of connectivity.md: barriers of lines and curves, alignment, batch norm at the far
end, ensembles at equal budgets, seconds. About six minutes on one core. FOLDER holds an .npz file
with CIFAR-10 images; without it the ensembles are those of digits alone.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from image_data import load_images

from lla_callbacks import aligned, barrier, connect, loss_curve
from lla_callbacks.curves.ensemble import cyclic_rate, ensemble_of
from lla_callbacks.curves.plain_training import published_rate
from lla_callbacks.curves.training import MovingCurve

Batch = tuple[Tensor, Tensor]
SEEDS = 5
# Student's t for five seeds, two-sided 95 %.
T95 = 2.776


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def error(module: nn.Module, batch: Batch) -> Tensor:
    return (module(batch[0]).argmax(1) != batch[1]).double().mean()


def mlp(width: int = 64) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def conv(channels: int = 1, side: int = 8) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b, stride in ((channels, 8, 1), (8, 16, 2), (16, 16, 1)):
        layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * (side // 2) ** 2, 10))


def fit(
    make: Callable[[], nn.Module], data: Batch, seed: int, epochs: int, *, lr: float = 0.1,
    change: Callable[[Tensor], Tensor] = lambda x: x,
    rate: Callable[[int, int], float] | None = None,
    after: Callable[[int, nn.Module], None] = lambda step, net: None, decay: float = 1e-4,
) -> nn.Module:  # fmt: skip
    """Train by SGD with momentum 0.9 and the published schedule, or a rate of (step, epoch)."""
    torch.manual_seed(seed)
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=decay)
    step = 0
    for epoch in range(epochs):
        for part in torch.randperm(len(data[0])).split(64):
            own = lr * published_rate(epoch / epochs) if rate is None else rate(step + 1, epoch)
            optimizer.param_groups[0]["lr"] = own
            optimizer.zero_grad()
            loss(net, (change(data[0][part]), data[1][part])).backward()
            optimizer.step()
            step += 1
            after(step, net)
    return net.eval()


def told(name: str, values: list[float], digits: int = 4) -> None:
    """Print mean and 95 % interval over seeds, and the values."""
    mean = sum(values) / len(values)
    sem = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    each = " ".join(f"{v:.{digits}f}" for v in values)
    print(f"  {name:<52} {mean:.{digits}f} +- {T95 * sem:.{digits}f}   [{each}]", flush=True)


def batches_of(data: Batch) -> list[Batch]:
    # Mixed once: the set is sorted by writer, and batch statistics want shuffled batches.
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))
    return [(data[0][part], data[1][part]) for part in order.split(64)]


def curves(train: Batch, test: Batch) -> None:
    print("MLP 64-64-64-10 on digits, pairs of seeds; NLL on training samples, error on test ones")
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for k in range(SEEDS):
        a, b = (fit(mlp, train, 10 * k + i, 30) for i in (0, 1))
        net, metrics = mlp(), {"error": error}
        line = loss_curve(net, [train], [a, b], loss=loss, metrics=metrics)
        plain = line.statistics().barrier_above_ends
        note("barrier of the straight line", plain)
        held = loss_curve(net, [test], [a, b], loss=loss, metrics=metrics)
        ends = max(held.metrics["error"][0], held.metrics["error"][-1])
        note("test error, worse end", float(ends))
        note("test error, highest on the straight line", held.statistics("error").maximum)
        turned = float(barrier(net, [train], [a, b], loss=loss, align=True).matrix()[0, 1])
        note("barrier of the aligned line", turned)
        note("aligned line over line", turned / plain)
        moved = mlp()
        moved.load_state_dict(aligned(net, a, b, train).state)
        with torch.no_grad():
            change = (moved.eval()(test[0]) - b(test[0])).abs().max() / b(test[0]).abs().max()
        note("outputs of the aligned end changed by (1e-6)", 1e6 * float(change))
        for kind in ("bezier", "chain"):
            curve = connect(net, batches_of(train), a, b, kind=kind, loss=loss, epochs=60, seed=k)
            on = loss_curve(net, [train], curve, loss=loss, straight=False)
            note(f"barrier of the {kind}", on.statistics().barrier_above_ends)
            note(f"{kind} over line", on.statistics().barrier_above_ends / plain)
            held = loss_curve(net, [test], curve, loss=loss, metrics=metrics, straight=False)
            note(f"test error, highest on the {kind}", held.statistics("error").maximum)
            note(f"length of the {kind} over the line's", on.length / line.length)
    for name, values in found.items():
        told(name, values)


def norms(train: Batch, test: Batch) -> None:
    print("conv net with batch norm on digits: the end network and the far end of a curve, test")
    found: dict[str, list[float]] = {}
    for k in range(SEEDS):
        a, b = (fit(conv, train, 10 * k + i, 6, lr=0.05) for i in (0, 1))
        parts = batches_of(train)
        curve = connect(conv(), parts, a, b, loss=loss, epochs=6, lr=0.015, seed=k)
        wrong = copy.deepcopy(b)
        for ours, theirs in zip(wrong.modules(), a.modules(), strict=True):
            if isinstance(ours, nn.BatchNorm2d) and isinstance(theirs, nn.BatchNorm2d):
                ours.running_mean, ours.running_var = theirs.running_mean, theirs.running_var
        far = loss_curve(conv(), [test], curve, loss=loss, metrics={"error": error}, t=[0, 1],
                         straight=False)  # fmt: skip
        on = loss_curve(conv(), parts, curve, loss=loss, t=torch.linspace(0, 1, 21))
        with torch.no_grad():
            values = {
                "error of the end network": float(error(b, test)),
                "error at the far end of the curve": float(far.metrics["error"][-1]),
                "error there with the start's statistics": float(error(wrong, test)),
                "barrier of the straight line, train": on.straight.statistics().barrier_above_ends,
                "barrier of the Bezier curve, train": on.statistics().barrier_above_ends,
            }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        told(name, values)


def ensembles(
    name: str, make: Callable[[], nn.Module], train: Batch, test: Batch, *, epochs: int,
    change: Callable[[Tensor], Tensor], lr: float, highest: float, decay: float,
) -> None:  # fmt: skip
    """One budget of epochs: one network, FGE on its last two fifths, independent short ones."""
    print(f"{name}: {epochs} epochs for each of one network, FGE and independent networks")
    steps = -(-len(train[0]) // 64)
    first, cycle = int(0.6 * epochs) * steps, 2 * steps
    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        members: list[dict[str, Tensor]] = []

        def rate(step: int, epoch: int) -> float:
            if step <= first:
                return lr * published_rate(epoch / epochs)
            return cyclic_rate(step - first, cycle, highest, 0.01 * highest)

        def keep(step: int, net: nn.Module, members: list[Any] = members) -> None:
            done = step - first
            if done > 0 and done % cycle == cycle // 2:
                members.append({n: t.detach().clone() for n, t in net.state_dict().items()})

        given = {"change": change, "lr": lr, "decay": decay}
        one = fit(make, train, seed, epochs, **given)
        fit(make, train, seed, epochs, rate=rate, after=keep, **given)
        count = len(members)
        short = [
            fit(make, train, 100 * seed + i, epochs // count, **given).state_dict()
            for i in range(count)
        ]
        with torch.no_grad():
            each = []
            for state in members:
                net = make()
                net.load_state_dict(state)
                each.append(net.eval()(test[0]))
            classes = [z.argmax(1) for z in each]
            pairs = [(classes[i] != classes[j]).double().mean()
                     for i in range(count) for j in range(i)]  # fmt: skip
            outputs = {
                "one network": one(test[0]),
                "FGE": ensemble_of(one, members)(test[0]),
                "independent": ensemble_of(one, short)(test[0]),
            }
            wrong = {k: 100 * float((z.argmax(1) != test[1]).double().mean())
                     for k, z in outputs.items()}  # fmt: skip
            nll = {k: float(F.cross_entropy(z, test[1])) for k, z in outputs.items()}
            alone = 100 * sum(float((c != test[1]).double().mean()) for c in classes) / count
            values = {f"error %, {k}": v for k, v in wrong.items()}
            values["error %, mean of FGE's members"] = alone
            values["error points gained by FGE over its members"] = alone - wrong["FGE"]
            values["... over one network"] = wrong["one network"] - wrong["FGE"]
            values[f"... over {count} independent of {epochs // count} epochs"] = (
                wrong["independent"] - wrong["FGE"]
            )
            values |= {f"NLL, {k}": v for k, v in nll.items()}
            values["NLL gained by FGE over one network"] = nll["one network"] - nll["FGE"]
            values["disagreement of members, %"] = 100 * float(sum(pairs) / len(pairs))
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    for key, values in found.items():
        told(key, values, 3)


def costs() -> None:
    print("processor time: a step of a curve beside a plain step; 61 points beside 61 evaluations")
    for name, make, shape, lr in (
        ("MLP 64-64-64-10, batch 64", mlp, (64, 1, 8, 8), 0.01),
        ("conv net with batch norm, 8 x 8, batch 64", conv, (64, 1, 8, 8), 0.01),
        ("MLP 64-1024-1024-10, batch 256", lambda: mlp(1024), (256, 1, 8, 8), 0.01),
        ("conv net with batch norm, 32 x 32, batch 64", lambda: conv(3, 32), (64, 3, 32, 32), 0.01),
    ):
        torch.manual_seed(0)
        batch = torch.randn(shape), torch.randint(0, 10, shape[:1])
        nets = [make() for _ in range(3)]
        ends = [[p.detach().clone() for p in n.parameters()] for n in nets[:2]]
        live = list(nets[2].parameters())
        optimizer = torch.optim.SGD(live, lr, momentum=0.9)
        moving = MovingCurve(live, ends[0], ends[1], [], "bezier", 0)

        def plain(optimizer: Any = optimizer, net: nn.Module = nets[2], batch: Any = batch) -> None:
            optimizer.zero_grad()
            loss(net, batch).backward()
            optimizer.step()

        def curved(optimizer: Any = optimizer, net: nn.Module = nets[2], batch: Any = batch,
                   moving: MovingCurve = moving, live: Any = live) -> None:  # fmt: skip
            moving.displace(moving.draw(0))
            optimizer.zero_grad()
            loss(net, batch).backward()
            moving.restore()
            moving.pull_back(range(len(live)), [p.grad for p in live], [1e-4] * len(live),
                             scaled=True)  # fmt: skip
            optimizer.step()

        pairs = [(timed(plain, 0.15), timed(curved, 0.15)) for _ in range(7)]
        ratios = sorted(own / base for base, own in pairs)
        print(f"  {name:<48} step {1e3 * min(pairs)[0]:8.2f} ms, of a curve x {ratios[3]:.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip
        evaluated = nets[2].eval()

        def evaluate(net: nn.Module = evaluated, batch: Any = batch) -> None:
            with torch.inference_mode():
                loss(net, batch).item()

        def floor(net: nn.Module = evaluated, batch: Any = batch) -> None:
            # What anybody must do: statistics at each point where there are any, and the loss.
            if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
                with torch.no_grad():
                    net.train()
                    loss(net, batch)
                    net.eval()
            evaluate(net, batch)

        each = timed(floor, 0.25)
        wholes = []
        for _ in range(3):
            began = time.process_time()
            found = loss_curve(nets[0], [batch], [nets[0], nets[1]], loss=loss)
            wholes.append(time.process_time() - began)
        print(f"  {'':<48} evaluation {1e3 * each:6.2f} ms, 61 points x "
              f"{min(wholes) / (61 * each):.2f} ({found.facts.method})", flush=True)  # fmt: skip


def timed(action: Callable[[], None], seconds: float) -> float:
    """Return processor seconds of one call, in the mean over as many as fit."""
    for _ in range(3):
        action()
    calls, began = 0, time.process_time()
    while time.process_time() < began + seconds or calls < 3:
        action()
        calls += 1
    return (time.process_time() - began) / calls


def cifar(folder: Path) -> tuple[Batch, Batch]:
    """Return CIFAR-10 at half its resolution, normalized."""
    sets = [d.tensors for d in load_images(folder)]
    mean, deviation = sets[0][0].mean((0, 2, 3), keepdim=True), sets[0][0].std()
    made = [(F.avg_pool2d((x - mean) / deviation, 2), y) for x, y in sets]
    return made[0], made[1]


def shifted(x: Tensor) -> Tensor:
    """Flip half of the images, and shift each batch by up to two pixels."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    dx, dy = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(x, (dx, dy), (2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, help="folder with an .npz file of CIFAR-10")
    parser.add_argument("--only", choices=["curves", "norms", "ensembles", "costs"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (d.tensors for d in load_images(None))
    began = time.process_time()
    if arguments.only in (None, "costs"):
        costs()
    if arguments.only in (None, "curves"):
        curves(train, test)
    if arguments.only in (None, "norms"):
        norms(train, test)
    if arguments.only in (None, "ensembles"):
        noise = {"clean digits, MLP": 0.0, "digits with input noise 0.3, MLP": 0.3}
        for name, size in noise.items():
            ensembles(
                name, mlp, train, test, epochs=20, lr=0.1, highest=0.1, decay=1e-4,
                change=lambda x, size=size: x + size * torch.randn_like(x),
            )  # fmt: skip
        if arguments.cifar is not None:
            data = cifar(arguments.cifar)
            ensembles(
                "CIFAR-10 (4,000 images, 16 x 16) with flips and shifts, conv net",
                lambda: conv(3, 16), *data, epochs=20, lr=0.1, highest=0.1, decay=5e-4,
                change=shifted,
            )  # fmt: skip
    print(f"{time.process_time() - began:.0f} s of one processor")


if __name__ == "__main__":
    main()

"""What does a step with a trace penalty cost, beside a plain one?

Run: ``python docs/benchmarks/regularizer.py``. Trains each network in a Trainer where every
second step is penalized, so that both kinds of step alternate in one run, and compares their
medians of processor time; then the peak memory of a run, each in a process of its own.
"By hand" is the two-sided form in a loop of one's own, without a guard. With the weights left in
place, it is the floor below which no two-sided form gets; moved as here, it is the same with what
moving weights and putting them back to the bit takes, and nothing else. "Noise by hand" is a plain
step with one such move. "Third order" is the penalty as it is usually written:
``loss + strength * v'Hv`` with ``create_graph=True``, and one backward pass.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import networks
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianTraceRegularizer
from lla_callbacks.linalg.probes import EIGHT_SIGNS, sign_words
from lla_callbacks.penalty.moving import Mover


def wide() -> nn.Sequential:
    """A ReLU network whose weights outweigh its activations, 784-2048-2048-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
        nn.Linear(2048, 10),
    )  # fmt: skip


# Network, shape of an image, batch size.
NETWORKS = {
    "mlp 784-2048-2048-10": (wide, (1, 28, 28), 256),
    "ResNet-20": (networks.ResNet20, (3, 32, 32), 32),
    "transformer": (networks.SmallTransformer, (1, 8, 8), 64),
    "conv+bn of the demo": (networks.conv_bn, (1, 8, 8), 64),
}
METHODS = {
    "perturbation": {},
    "noise": {"estimator": "noise"},
    "difference": {"estimator": "difference"},
    "gauss_newton": {"estimator": "gauss_newton"},
    "exact": {"estimator": "exact"},
    "exact, 5 probes": {"estimator": "exact", "num_probes": 5},
    "by hand": {"moves": "in place"},
    "by hand, moved as here": {"moves": "elsewhere"},
    "by hand, weights left in place": {"moves": None},
    "noise by hand": {"moves": "one side"},
    "third order": 1,
    "third order, 5 probes": 5,
}


class Classifier(pl.LightningModule):
    """Cross entropy and SGD; on every n-th step a penalty written out, if it has probes."""

    def __init__(self, net: nn.Module, probes: int, every: int) -> None:
        super().__init__()
        self.net, self.probes, self.every = net, probes, every

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # Fused attention has no second derivative.
        backends = [torch.nn.attention.SDPBackend.MATH] if self.probes else None
        with torch.nn.attention.sdpa_kernel(backends or list(ALL_BACKENDS)):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        if self.probes and batch_idx % self.every == 0:
            parameters = list(self.net.parameters())
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            for _ in range(self.probes):
                vectors = [torch.randint_like(p, 2) * 2 - 1 for p in parameters]
                products = torch.autograd.grad(gradients, parameters, vectors, create_graph=True)
                form = sum((h * v).sum() for h, v in zip(products, vectors, strict=True))
                loss = loss + 1e-4 / self.probes * form
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class ByHand(Classifier):
    """The two-sided form as a loop of one's own, with as little as can be: what it costs at least.

    The step's own forward pass, two gradients that autograd adds up in place, the optimizer. The
    weights move by signs that are drawn once a step, or stay where they are, which is no penalty
    any more, but the time that no way of moving them can do without.
    """

    def __init__(self, net: nn.Module, moves: str | None, every: int) -> None:
        super().__init__(net, 0, every)
        self.moves = moves
        self.automatic_optimization = False
        self.mover, self.memory = Mover(), [torch.empty_like(p) for p in net.parameters()]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        weights = list(self.net.parameters())
        kept = [w.data for w in weights]
        penalized = batch_idx % self.every == 0
        if self.moves == "one side" and penalized:
            self.move(weights, kept, first=True)
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        if self.moves == "one side" or not penalized:
            self.manual_backward(loss)
        else:
            del loss
            self.both_sides(batch, weights, kept)
        if self.moves in ("one side", "elsewhere"):
            for w, before in zip(weights, kept, strict=True):
                w.data = before
        optimizer.step()

    def both_sides(self, batch: tuple[Tensor, Tensor], weights: list, kept: list) -> None:
        if self.moves == "in place":
            kept = [w.clone() for w in kept]
            signs = [torch.randint_like(w, 2).mul_(2).sub_(1) for w in kept]
        for distance in (SIGMA, -2 * SIGMA):
            with torch.no_grad():
                if self.moves == "in place":
                    torch._foreach_add_(weights, signs, alpha=distance)
                elif self.moves:
                    self.move(weights, kept, first=distance > 0)
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]) / 2)
        if self.moves == "in place":
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)

    @torch.no_grad()
    def move(self, weights: list[Tensor], starts: list[Tensor], *, first: bool) -> None:
        table = EIGHT_SIGNS.float() * SIGMA
        for w, start, target in zip(weights, starts, self.memory, strict=True):
            if first:
                words = sign_words(start.numel(), torch.default_generator)
                self.mover.write(target, start, words, 0, table)
            else:
                target.lerp_(start, 2.0)
            w.data = target


SIGMA = (2 * 1e-4) ** 0.5
ALL_BACKENDS = (
    torch.nn.attention.SDPBackend.FLASH_ATTENTION,
    torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION,
    torch.nn.attention.SDPBackend.MATH,
)


class Clock(pl.Callback):
    """Processor time of each step, from the end of the one before."""

    def on_train_start(self, *_: object) -> None:
        self.times = [time.process_time()]

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.process_time())

    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def train(name: str, method: str | None, steps: int, every: int = 2) -> list[float]:
    """Return the seconds of each step; penalized are those that ``every`` divides."""
    make, shape, batch = NETWORKS[name]
    torch.manual_seed(0)
    settings = METHODS[method] if method else 0
    if method is None or isinstance(settings, int):
        module, settings = Classifier(make(), settings, every), None
    elif "moves" in settings:
        module, settings = ByHand(make(), settings["moves"], every), None
    else:
        module = Classifier(make(), 0, every)
    data = TensorDataset(torch.rand(batch * steps, *shape), torch.randint(10, (batch * steps,)))
    callbacks: list[pl.Callback] = []
    if settings is not None:
        settings = {"every_n_train_steps": every, "scale_by_interval": False, **settings}
        callbacks.append(HessianTraceRegularizer(1e-4, **settings))
    clock = Clock()
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[*callbacks, clock],
        log_every_n_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(data, batch))  # fmt: skip
    return clock.steps()


def peak(name: str, method: str | None) -> float:
    """Return the MiB that two steps need above what there was before, in a new process."""
    script = [sys.executable, __file__, "--peak", json.dumps([name, method])]
    # Every larger tensor is given back to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    out = subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    return float(out.stdout.split()[-1])


def resident(key: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().split("\n") if key in x)
    return int(line.split()[1]) / 1024


def measure_peak(name: str, method: str | None) -> None:
    train(name, method, steps=1, every=1)  # what is loaded and cached once is there now
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(name, method, steps=3, every=1)
    print(resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.peak:
        measure_peak(*arguments.peak)
        return
    print("| network | method | penalized / plain | least | peak MiB | beyond plain | in weights |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.networks:
        make = NETWORKS[name][0]
        copy = sum(p.numel() for p in make().parameters()) * 4 / 2**20
        plain = peak(name, None)
        print(f"| {name} | plain | 1 | 1 | {plain:.1f} | | weights: {copy:.1f} MiB |", flush=True)
        for method in arguments.methods:
            seconds = train(name, method, 2 * arguments.pairs)[4:]
            penalized, others = (statistics.median(seconds[i::2]) for i in (0, 1))
            spread = sorted(a / b for a, b in zip(seconds[::2], seconds[1::2], strict=True))
            low, high = spread[len(spread) // 4], spread[-1 - len(spread) // 4]
            least = min(seconds[::2]) / min(seconds[1::2])
            memory = peak(name, method)
            print(
                f"| | {method} | {penalized / others:.2f} ({low:.2f} to {high:.2f}) | {least:.2f} "
                f"| {memory:.1f} | {memory - plain:+.1f} | {(memory - plain) / copy:+.1f} |",
                flush=True,
            )
        seconds = train(name, "perturbation", 60, every=10)[10:]
        others = statistics.median(s for i, s in enumerate(seconds) if i % 10)
        cycles = [sum(seconds[i : i + 10]) / 10 for i in range(0, 50, 10)]
        ratio = statistics.median(cycles) / others
        print(f"| | perturbation, every tenth step | {ratio:.2f} | | | |", flush=True)


if __name__ == "__main__":
    main()

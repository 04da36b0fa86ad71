"""The two engines: how far differences are off, what a product costs, and what memory it takes.

Run: ``python docs/benchmarks/engines.py [--part products|processes|memory] [--data FOLDER]``.
Every figure is a ratio of two sides measured in one run, or a number that no clock enters.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from networks import ResNet20, SmallTransformer, conv_bn, digits, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import measure_hessian
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.objective.objective import Objective


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def tanh_conv() -> nn.Sequential:
    """The demo's kind of network with SiLU in the place of ReLU."""
    return nn.Sequential(*(nn.SiLU() if isinstance(m, nn.ReLU) else m for m in conv_bn()))


NETWORKS = {
    "MLP, tanh": mlp,
    "transformer, GELU": SmallTransformer,
    "conv net, SiLU": tanh_conv,
    "conv net, ReLU": conv_bn,
}


def trained(name: str, steps: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a network after some steps of Adam, and 256 samples."""
    torch.manual_seed(0)
    module, (x, y) = NETWORKS[name](), digits(1024)
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    for step in range(steps):
        rows = slice(64 * step % 1024, 64 * step % 1024 + 64)
        optimizer.zero_grad()
        loss(module, (x[rows], y[rows])).backward()
        optimizer.step()
    return module, [(x[:128], y[:128]), (x[128:256], y[128:256])]


def products() -> None:
    """Compare both engines: products along two directions, results, and the time of each."""
    print(
        "| network | steps | step / norm | random: off (says) | top: off (says) |"
        " λ_max exact | by difference | trace exact | by difference | product, gradients |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        for steps in (0, 300):
            module, batches = trained(name, steps)
            objective = Objective(module, batches, loss, mode="eval")
            exact = objective.hessian(engine="exact")
            difference = objective.hessian(engine="difference")
            probe = rademacher(exact.shape[0], generator(7), dtype=exact.dtype, device=exact.device)
            top = exact.gradient.clone()
            for _ in range(15):
                top = exact @ top
                top = top / top.norm()
            cells = []
            for vector in (probe, top):
                wanted, found = exact @ vector, difference @ vector
                off = float((found - wanted).norm() / wanted.norm())
                says = float(difference.engine_error(vector, found).norm() / found.norm())
                cells.append(f"{off:.1e} ({says:.1e})")
            norm = float(exact.space.flatten(exact.space.tensors).norm())
            one = measure_hessian(module, batches, loss=loss, mode="eval", engine="exact")
            two = measure_hessian(module, batches, loss=loss, mode="eval", engine="difference")
            cost = {"exact": [], "difference": [], "gradient": []}
            for _ in range(5):
                for operator in (exact, difference):
                    began = time.process_time()
                    operator @ probe
                    cost[operator.engine].append(time.process_time() - began)
                began = time.process_time()
                difference._gradient()
                cost["gradient"].append(time.process_time() - began)
            ratio = {k: min(v) / min(cost["gradient"]) for k, v in cost.items()}
            print(
                f"| {name} | {steps} | {difference.step / norm:.1e} | {cells[0]} | {cells[1]} | "
                f"{float(one.lambda_max):.4g} | {_or_gap(two, 'lambda_max')} | "
                f"{one.trace:.4g} ± {one.trace_sem:.1g} | {_or_gap(two, 'trace')} | "
                f"{ratio['exact']:.1f} / {ratio['difference']:.1f} |",
                flush=True,
            )


def _or_gap(report, name: str) -> str:
    if name in report.gaps:
        return "gap"
    if name == "trace":
        return f"{report.trace:.4g} ± {report.trace_sem:.1g}"
    return f"{float(report.lambda_max):.4g} ± {report.lambda_max.residual:.1g}"


def processes() -> None:
    """Compare a product shared by two processes with one process's, per batch and in all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, __file__, "--part", "rank"]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(r), "WORLD_SIZE": "2"})
        for r in (0, 1)
    ]
    for rank in ranks:
        rank.wait()


class Two:
    """Both processes of this benchmark."""

    size = 2

    def __init__(self) -> None:
        torch.distributed.init_process_group("gloo")
        self.rank = torch.distributed.get_rank()
        self.exchanges = 0

    def total(self, values: Tensor) -> Tensor:
        self.exchanges += 1
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values

    def same(self, tensor: Tensor) -> Tensor:
        return tensor


def rank() -> None:
    """Be one of two processes; each multiplies with all batches alone, then with its half."""
    torch.set_num_threads(1)
    share = Two()
    if share.rank == 0:
        print("| network | parameters | alone | shared | ratio | exchange | exchanges |")
        print("|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        module, batches = trained(name, 0)
        objective = Objective(module, batches, loss, mode="eval")
        alone = objective.hessian(engine="exact")
        shared = objective.hessian(engine="exact", share=share)
        probe = rademacher(alone.shape[0], generator(7), dtype=alone.dtype, device=alone.device)
        seconds = {"alone": [], "shared": [], "exchange": []}
        before = share.exchanges
        for _ in range(10):
            for key, operator in (("alone", alone), ("shared", shared)):
                torch.distributed.barrier()
                began = time.perf_counter()
                operator @ probe
                seconds[key].append(time.perf_counter() - began)
            torch.distributed.barrier()
            began = time.perf_counter()
            share.total(probe)
            seconds["exchange"].append(time.perf_counter() - began)
        count = (share.exchanges - before - 10) / 10
        best = {k: min(v) for k, v in seconds.items()}
        if share.rank == 0:
            print(
                f"| {name} | {alone.shape[0]:,} | {1e3 * best['alone']:.1f} ms | "
                f"{1e3 * best['shared']:.1f} ms | {best['shared'] / best['alone']:.2f} | "
                f"{1e3 * best['exchange']:.2f} ms | {count:.0f} |",
                flush=True,
            )
        shared.__exit__(None, None, None)
    torch.distributed.destroy_process_group()


MEMORY = {
    "MLP, tanh": (mlp, (1, 8, 8), 128),
    "transformer, GELU": (SmallTransformer, (1, 8, 8), 512),
    "ResNet-20, ReLU, batch norm": (ResNet20, (3, 32, 32), 128),
    "MLP of 10 million": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 3000), nn.Tanh(), nn.Linear(3000, 3000), nn.Tanh(),
            nn.Linear(3000, 10),
        ),
        (1, 8, 8),
        128,
    ),
}  # fmt: skip


def memory(only: str) -> None:
    """Compare the peak memory of a process that trains with one that measures as well."""
    print("| network | trains | and measures, exact | ratio | by difference | ratio |")
    print("|---|---|---|---|---|---|")
    for name in [only] if only else MEMORY:
        peaks = []
        for engine in ("none", "auto", "difference"):
            command = [sys.executable, __file__, "--part", "peak", "--name", name]
            done = subprocess.run(
                [*command, "--engine", engine], capture_output=True, text=True, check=True
            )
            peaks.append(float(done.stdout.split()[-1]))
        first, *others = peaks
        cells = " | ".join(f"{peak:,.0f} MiB | {peak / first:.2f}" for peak in others)
        print(f"| {name} | {first:,.0f} MiB | {cells} |", flush=True)


def peak(name: str, engine: str) -> None:
    """Train a little, measure perhaps, and print this process's peak in MiB."""
    torch.set_num_threads(1)
    make, shape, size = MEMORY[name]
    torch.manual_seed(0)
    module = make()
    batches = [(torch.randn(size, *shape), torch.randint(10, (size,))) for _ in range(2)]
    optimizer = torch.optim.Adam(module.parameters())
    for batch in batches:
        optimizer.zero_grad()
        loss(module, batch).backward()
        optimizer.step()
    if engine != "none":
        # Defaults, but for the probes, of which one is held at a time.
        report = measure_hessian(module, batches, loss=loss, engine=engine, num_probes=2)
        print(report.engine, report.num_matvecs)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="products")
    parser.add_argument("--name", default="", help="one network of the memory part")
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.part == "peak":
        peak(arguments.name, arguments.engine)
    elif arguments.part == "memory":
        memory(arguments.name)
    else:
        {"products": products, "processes": processes, "rank": rank}[arguments.part]()


if __name__ == "__main__":
    main()

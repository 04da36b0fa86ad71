"""Peak memory of a process where long vectors are in pieces: 1, 2 and 4 processes, by gloo.

Run: ``python docs/benchmarks/shards.py [--hidden 2886] [--processes 1 2 4] [--depths 2 8]``. Each
process holds a network of 50 million parameters (DDP) or its shards (FSDP2) and measures its
Hessian at two Lanczos depths. What the peak grows by from one depth to the other is basis.

Differences take two gradients a product, and some fifty more to find their step, each of them
gathered and summed layer by layer: ``--kinds "FSDP2, differences" --depths 3 6 --rounds
1 --batches 1`` leaves out what the peak does not depend on.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).parents[2]))

from lla_callbacks.hessian import engine_error
from lla_callbacks.hessian.measures import measure
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.linalg import difference
from lla_callbacks.linalg.difference import DifferenceOperator
from lla_callbacks.linalg.shards import Everyone
from lla_callbacks.objective.objective import Objective, trainable

LAYERS = 6
KINDS = {"DDP, exact": "exact", "DDP, differences": "difference", "FSDP2, differences": "auto"}


def network(hidden: int, *, sharded: bool) -> nn.Module:
    """Return a perceptron of six square layers, in shards if so said."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(hidden, hidden, bias=False), nn.Tanh()]
    module = nn.Sequential(*layers)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in module:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(module)
    return module


def loss(module: nn.Module, batch: Any) -> torch.Tensor:
    return mse_loss(module(batch[0]), batch[1])


def with_first_step(self: DifferenceOperator) -> None:
    """Take the step that the search begins with, and believe in it."""
    self.step = difference.FIRST_STEP * (self.weight_norm() or 1.0)
    self.product_error = (1e-3, 1e-3)


def resident(name: str) -> float:
    """Return an entry of the kernel's account of this process, in MiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def work(rank: int, size: int, port: int, kind: str, asked: argparse.Namespace) -> None:
    """Measure in one process and print its peaks."""
    hidden = asked.hidden
    if asked.rounds is not None:
        difference.MOST_ROUNDS, difference.POWER_STEPS = asked.rounds, 0
        if asked.rounds == 0:
            DifferenceOperator._calibrate = with_first_step  # type: ignore[method-assign]
        engine_error.NUM_PAIRS = 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    module = network(hidden, sharded=kind.startswith("FSDP2"))
    dim = sum(p.numel() for p in trainable(module).values())
    source = torch.Generator().manual_seed(1)
    batches = [
        tuple(torch.randn(2, asked.samples, hidden, generator=source)) for _ in range(asked.batches)
    ]
    share = Everyone(torch.device("cpu"))
    mib = dim * 4 / 2**20
    known: tuple[float, float] | None = None
    for depth in asked.depths:
        objective = Objective(
            module, batches, loss, engine=KINDS[kind], check=False, max_memory=asked.max_memory
        )
        settings = HessianSettings(num_steps=depth, num_probes=2)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before, began = resident("VmRSS"), time.perf_counter()
        found = measure(objective, settings, share=share)
        seconds, taken = time.perf_counter() - began, resident("VmHWM") - before
        # What it takes more than at the depth before is basis.
        slope = math.nan if known is None else (taken - known[1]) / (depth - known[0])
        known = depth, taken
        text = (
            f"| {kind} | {size} | {rank} | {dim / 1e6:.1f} | {depth} | {before:,.0f} | "
            f"{taken:,.0f} | {taken / mib:.2f} | {slope / mib:.3f} | "
            f"{float(found.lambda_max):.9g} | {found.trace:.9g} | {found.num_matvecs} | "
            f"{seconds:.0f} s |"
        )
        for turn in range(size):
            torch.distributed.barrier()
            if turn == rank:
                print(text, flush=True)
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2886)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4, help="of a batch")
    parser.add_argument("--max-memory", type=int, help="large: the basis stays in float32")
    parser.add_argument(
        "--rounds", type=int, help="of the search for a step; 0: none; without it: all"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    chosen = parser.parse_args()
    # Whatever is freed goes back to the system, so that peaks are of what is held.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print(
        "| case | processes | rank | million parameters | depth | MiB before | MiB taken | "
        "in vectors | a basis vector | lambda_max | trace | products | time |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for k, kind in enumerate(chosen.kinds):
        for size in chosen.processes:
            torch.multiprocessing.spawn(work, (size, 29650 + 10 * k + size, kind, chosen), size)


if __name__ == "__main__":
    main()

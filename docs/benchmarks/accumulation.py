"""Norms and inner products of long float32 vectors: how far off, and how long they take.

    OMP_NUM_THREADS=1 python docs/benchmarks/accumulation.py

Prints the tables of docs/benchmarks/accumulation.md. The references are sums in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lla_callbacks import measure_hessian
from lla_callbacks.linalg.accumulation import inner, norm, orthogonalised

SIZES = (10**5, 10**6, 10**7, 10**8)
ROWS = 24


def timed(function: Callable[[], float], repeats: int = 3) -> tuple[float, float]:
    """Return a function's value and its shortest time in ms."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        value = function()
        best = min(best, time.perf_counter() - began)
    return value, 1e3 * best


def plain_orthogonalised(rows: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, float]:
    """What Lanczos did before: four passes over the rows in float32."""
    first = rows @ vector
    vector = vector - rows.T @ first
    second = rows @ vector
    vector = vector - rows.T @ second
    return vector, first + second, float(torch.linalg.vector_norm(vector))


def norms() -> None:
    print("| entries | vector_norm: off, ms | in one float64 copy: ms | in pieces: off, ms |")
    print("|---|---|---|---|")
    for size in SIZES:
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        exact = sum(float(p.double().square().sum()) for p in x.split(2**20)) ** 0.5
        cells = []
        for function in (
            lambda x=x: float(torch.linalg.vector_norm(x)),
            lambda x=x: float(torch.linalg.vector_norm(x, dtype=torch.float64)),
            lambda x=x: norm(x),
        ):
            value, spent = timed(function)
            cells.append(f"{abs(value / exact - 1):.0e}, {spent:.2f}")
        print(f"| {size:.0e} | {cells[0]} | {cells[1].split()[-1]} | {cells[2]} |")
        value = inner(x, torch.ones_like(x))
        off = abs(value - sum(float(p.double().sum()) for p in x.split(2**20)))
        print(
            f"    inner product with ones: off by {off / exact:.0e} of the norms' product / sqrt(n)"
        )


def steps() -> None:
    print("\n| entries | rows | one step before, ms | now, ms | norm before | norm now |")
    print("|---|---|---|---|---|---|")
    for size in SIZES[:-1]:
        for count in (2, ROWS):
            source = torch.Generator().manual_seed(0)
            rows = torch.linalg.qr(torch.randn(size, count, generator=source))[0].T.contiguous()
            x = torch.randn(size, generator=source) + size**0.5 * rows[-1]
            cells, left = [], []
            for function in (plain_orthogonalised, orthogonalised):
                found, spent = timed(lambda f=function, r=rows, x=x: f(r, x)[2])
                exact = float(function(rows, x)[0].double().norm())
                cells.append(f"{spent:.2f}")
                left.append(f"{abs(found / exact - 1):.0e}")
            print(f"| {size:.0e} | {count} | {cells[0]} | {cells[1]} | {left[0]} | {left[1]} |")


def linear_model(size: int) -> None:
    """A loss whose Hessian is X'X / 16, of rank 16, at this many weights."""
    source = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(size, 1, bias=False)
    x = torch.randn(16, size, generator=source)
    gram = x.double() @ x.double().T / 16
    top, trace = float(torch.linalg.eigvalsh(gram)[-1]), float(gram.trace())
    weight = float(module.weight.detach().double().norm())
    for seed in (0, 1):
        found = measure_hessian(
            module, [(x,)], loss=lambda m, b: 0.5 * m(b[0]).square().mean(), seed=seed
        )
        (layer,) = found.layers.values()
        errors = [
            found.lambda_max / top - 1,
            found.trace / trace - 1,
            layer.trace / trace - 1,
            layer.trace_sem / trace,
            found.weight_norm / weight - 1,
        ]
        print(f"| {size:.0e} | {seed} | " + " | ".join(f"{e:.0e}" for e in errors) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    norms()
    steps()
    print("\n| weights | seed | lambda_max off | trace off | the layer's trace off | its error |")
    for size in (10**5, 10**6, 5 * 10**6):
        linear_model(size)

"""What do a layer's own products cost, and how much surer do they make its trace?

Run: ``python docs/benchmarks/layers.py`` (a few minutes). Prints, for each layer of two
networks, the time of a block product as a share of a whole one, and the standard error of the
layer's trace per root probe, known parts taken out, by probes of the whole and of the block.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from networks import SmallTransformer, conv_bn, digits
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.operators import SymmetricOperator
from lla_callbacks.linalg.probes import generator, rademacher
from lla_callbacks.linalg.trace import TraceEstimator
from lla_callbacks.objective.layers import layer_parameters
from lla_callbacks.objective.objective import Objective

DEPTH, PROBES = 24, 40


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def seconds(operator: SymmetricOperator, repeats: int = 7) -> float:
    """Return the least time of a product."""
    vector = rademacher(
        operator.shape[0], generator(1), dtype=operator.dtype, device=operator.device
    )
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        _ = operator @ vector
        times.append(time.perf_counter() - began)
    return min(times)


def deflated(operator: SymmetricOperator, blocks: dict[str, Tensor]) -> TraceEstimator:
    """Return an estimator after one Lanczos run and some probes."""
    source = generator(0)
    start = rademacher(operator.shape[0], source, dtype=operator.dtype, device=operator.device)
    estimator = TraceEstimator(operator, blocks, lanczos(operator, start, DEPTH))
    for _ in range(PROBES):
        estimator.add_probe(source)
    return estimator


def study(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
    hessian = Objective(module, [(x, y)], cross_entropy).hessian()
    groups = layer_parameters(module, hessian.space, "blocks")
    blocks = {layer: hessian.space.index(names) for layer, names in groups.items()}
    whole_time = seconds(hessian)
    whole = deflated(hessian, blocks).estimate()
    root = PROBES**0.5
    print(f"\n{name}: {hessian.shape[0]} parameters, whole product {1e3 * whole_time:.1f} ms")
    print("| layer | parameters | block product / whole | trace | by whole | by block | ratio |")
    print("|---|---|---|---|---|---|---|")
    total = 0.0
    for layer, names in groups.items():
        block = hessian.block(names)
        share = seconds(block) / whole_time
        total += share
        own = deflated(block, {}).estimate()
        sem = whole.blocks[layer][1]
        print(
            f"| {layer} | {block.shape[0]} | {share:.2f} | {own.value:.3g} | {sem * root:.2g} | "
            f"{own.sem * root:.2g} | {own.sem / sem:.2f} |",
            flush=True,
        )
    print(f"all {len(groups)} layers once: {total:.2f} whole products")


def trained(make: Callable[[], nn.Module], lr: float, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    module = make()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    for _ in range(300):
        chosen = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        cross_entropy(module, (x[chosen], y[chosen])).backward()
        optimizer.step()
    return module


def main() -> None:
    x, y = digits(1437)
    study("conv+bn, step 300", trained(conv_bn, 0.05, x, y), x[:256], y[:256])
    study("transformer, step 300", trained(SmallTransformer, 0.01, x, y), x[:64], y[:64])


if __name__ == "__main__":
    main()

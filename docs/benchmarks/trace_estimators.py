"""Which trace estimator is best on real networks, at 10 to 60 products?

Run: ``python docs/benchmarks/trace_estimators.py --data FOLDER`` (about 10 minutes).
Every estimator gets the same number of products in all, those for its basis included. The
figures are standard errors of the trace: the standard deviation of one (deflated) probe,
measured over a pool, divided by the root of the probes that the budget leaves. XTrace has
no such form and is repeated instead.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from networks import ResNet20, SmallTransformer, cifar10, conv_bn, digits, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks.linalg.hessian import HessianOperator
from lla_callbacks.linalg.lanczos import lanczos
from lla_callbacks.linalg.loss_operator import LossTerm
from lla_callbacks.linalg.probes import generator, rademacher


def operator_of(module: nn.Module, x: Tensor, y: Tensor) -> HessianOperator:
    module.train()
    frozen = copy.deepcopy(module)
    return HessianOperator(
        [LossTerm(lambda: F.cross_entropy(frozen(x), y), 1.0)], dict(frozen.named_parameters())
    )


def pool_of(op: HessianOperator, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rademacher probes as columns, and their products."""
    source = generator(seed)
    probes = torch.stack(
        [rademacher(op.shape[0], source, dtype=op.dtype, device=op.device) for _ in range(count)], 1
    )
    return probes, op @ probes


def deviation(basis: Tensor, small: Tensor, probes: Tensor, products: Tensor) -> float:
    """Standard deviation of one probe once a basis Q (columns) is projected out.

    ``small`` is Q'HQ.
    """
    inside = basis.T @ probes
    # P H P z = P (H z - H Q Q'z); H Q Q'z is avoided through symmetry: (P z)' H (P z) =
    # z'Hz - 2 (Q Q'z)'Hz + (Q Q'z)' H (Q Q'z).
    quadratic = (probes * products).sum(0) - 2 * (inside * (basis.T @ products)).sum(0)
    return float((quadratic + (inside * (small @ inside)).sum(0)).std())


def x_trace(op: HessianOperator, omega: Tensor, image: Tensor) -> float:
    """XTrace (Epperly, Tropp, Webber 2024, section 3), the plain leave-one-out form."""
    half = omega.shape[1]
    basis, upper = torch.linalg.qr(image)
    second = op @ basis
    small = basis.T @ second
    inverse = torch.linalg.inv(upper.double().T)
    directions = (inverse / inverse.norm(dim=0)).to(basis)
    estimates = []
    for i in range(half):
        # Basis without sample i: Q Q' - (Q s)(Q s)'.
        s, w = directions[:, i], omega[:, i]
        coefficients = basis.T @ w
        coefficients = coefficients - s * (s @ coefficients)
        rest = w - basis @ coefficients
        product = image[:, i] - second @ coefficients
        back = basis.T @ product
        projected = product - basis @ (back - s * (s @ back))
        estimates.append(float(small.trace() - s @ small @ s + rest @ projected))
    return sum(estimates) / half


def study(name: str, op: HessianOperator, pool: int, x_repeats: int) -> None:
    """Print the standard error of each estimator at 12, 30 and 60 products in all."""
    began = time.perf_counter()
    probes, products = pool_of(op, pool, 7)
    samples = (probes * products).sum(0)
    plain = float(samples.std())
    runs = [
        lanczos(op, rademacher(op.shape[0], generator(s, 3), dtype=op.dtype, device=op.device), 60)
        for s in range(2)
    ]
    trace = float(samples.mean())
    print(
        f"\n{name}: n={op.shape[0]}, tr H = {trace:.4g} +- {plain / pool**0.5:.2g}, one plain "
        f"probe deviates by {plain:.3g}; lambda_max {float(runs[0].values[-1]):.4g}"
    )
    for budget in (12, 30, 60):
        row = [f"plain {plain / budget**0.5:.3g}"]
        for depth in sorted({budget // 3, budget // 2, 2 * budget // 3, 4 * budget // 5}):
            per_probe = 0.0
            for run in runs:
                tridiagonal = torch.diag(run.diagonal)
                tridiagonal += torch.diag(run.off_diagonal, 1) + torch.diag(run.off_diagonal, -1)
                small = tridiagonal[:depth, :depth].to(op.dtype)
                per_probe += deviation(run.basis[:depth].T, small, probes, products) / len(runs)
            row.append(f"krylov {depth}+{budget - depth} {per_probe / (budget - depth) ** 0.5:.3g}")
        third = budget // 3
        sketch = torch.linalg.qr(products[:, :third])[0]
        small = sketch.T @ (op @ sketch)
        rest = deviation(sketch, small, probes[:, third:], products[:, third:])
        row.append(f"hutch++ {rest / third**0.5:.3g}")
        half = budget // 2
        parts = [slice(i * half, (i + 1) * half) for i in range(x_repeats)]
        errors = [x_trace(op, probes[:, part], products[:, part]) - trace for part in parts]
        if errors:
            row.append(f"xtrace {(sum(e * e for e in errors) / len(errors)) ** 0.5:.3g}")
        print(f"  {budget:3d} products: " + " | ".join(row), flush=True)
    print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)


def train(module: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    source = torch.Generator().manual_seed(0)
    module.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (64,), generator=source)
        optimizer.zero_grad()
        F.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and pretrained/")
    arguments = parser.parse_args()
    x, y = digits(1437)
    for label, make, lr in (
        ("conv+bn", conv_bn, 0.05),
        ("tanh mlp", mlp, 0.1),
        ("transformer", SmallTransformer, 0.01),
    ):
        torch.manual_seed(0)
        module = make()
        done = 0
        for steps in (0, 50, 1000):
            train(module, x, y, steps - done, lr)
            done = steps
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                study(f"{label}, step {steps}", operator_of(module, x[:256], y[:256]), 160, 4)
    if arguments.data:
        images, labels = cifar10(arguments.data / "cifar10", 2000)
        torch.manual_seed(0)
        module = ResNet20()
        study("resnet-20, step 0", operator_of(module, images[:32], labels[:32]), 100, 0)
        train(module, images, labels, 100, 0.05)
        study("resnet-20, step 100", operator_of(module, images[:32], labels[:32]), 100, 0)
        state = torch.load(
            arguments.data / "pretrained" / "resnet20-12fca82f.th",
            map_location="cpu",
            weights_only=True,
        )["state_dict"]
        module.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
        study("resnet-20, pretrained", operator_of(module, images[:32], labels[:32]), 100, 0)


if __name__ == "__main__":
    main()

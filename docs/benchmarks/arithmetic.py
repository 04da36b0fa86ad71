"""Errors of lambda_max in float32 against float64, and what is reported, by how far weights move.

python docs/benchmarks/arithmetic.py
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lla_callbacks.hessian.arithmetic as arithmetic
from lla_callbacks import measure_hessian

SEEDS = 20
Case = tuple[nn.Module, tuple[Tensor, Tensor], Any]


def mse(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def far(seed: int, offset: float) -> Case:
    """Return a 4-8-1 MLP on 128 samples whose inputs are that far from zero."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    batch = torch.randn(128, 4) + offset, torch.randn(128, 1)
    with torch.no_grad():
        module[0].bias.copy_(-offset * module[0].weight.sum(dim=1))  # type: ignore[operator, union-attr]
    return module, batch, mse


def digits(seed: int) -> Case:
    """Return a 64-24-10 MLP after 100 steps on the 1,797 digits, scaled to [0, 1]."""
    torch.manual_seed(seed)
    data = load_digits()
    batch = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    module = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(module, batch).backward()
        optimizer.step()
    return module, batch, cross_entropy


def main() -> None:
    torch.set_num_threads(1)
    cases = {
        "inputs at 1,000": lambda seed: far(seed, 1e3),
        "inputs at 20,000": lambda seed: far(seed, 2e4),
        "digits": digits,
    }
    print("| network | move | outside of the residual alone | of what is reported | largest error "
          "| arithmetic, median | largest |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for name, build in cases.items():
        for move in (1.0, 4.0, 16.0):
            arithmetic.MOVE = move
            errors, worth, before, now = [], [], 0, 0
            for seed in range(SEEDS):
                module, batch, loss = build(seed)
                wide = tuple(p.double() if p.is_floating_point() else p for p in batch)
                exact = measure_hessian(
                    copy.deepcopy(module).double(), [wide], loss=loss, num_probes=2, num_steps=40
                ).lambda_max
                found = measure_hessian(module, [batch], loss=loss, num_probes=2).lambda_max
                off = abs(found - exact)
                added = 0.0 if math.isnan(found.arithmetic) else found.arithmetic
                before += off > found.residual - added + exact.residual
                now += off > found.residual + exact.residual
                errors.append(off / abs(exact))
                worth.append(added / abs(exact))
            median = sorted(worth)[SEEDS // 2]
            print(f"| {name} | {move:.0f} eps | {before} of {SEEDS} | {now} of {SEEDS} "
                  f"| {max(errors):.1e} | {median:.1e} | {max(worth):.1e} |")  # fmt: skip


if __name__ == "__main__":
    main()

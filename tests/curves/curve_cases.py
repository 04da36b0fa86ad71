"""Small networks whose curves are tested, and a loop that trains a curve by functional_call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lla_callbacks.curves.curve import coefficients, mean_square
from lla_callbacks.linalg.probes import generator


def tanh_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def norm_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    for _ in range(5):
        net(3 * seed + 2 * torch.randn(20, 3, dtype=torch.float64))
    return net


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(5)
    x = torch.randn(count, 6, 3, generator=source, dtype=torch.float64)
    return [(part, (part.sum(1) > 0).long()) for part in x]


def loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def error(module: nn.Module, batch: Any) -> Tensor:
    return (module(batch[0]).argmax(1) != batch[1]).double().mean()


def value(module: nn.Module, batch: Any) -> float:
    with torch.no_grad():
        return float(loss(module, batch))


def train_by_hand(
    start: nn.Module,
    end: nn.Module,
    steps: Sequence[Sequence[Any]],
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    kind: Any,
    bends: int,
    decay: float = 0.0,
    decoupled: float = 0.0,
    scaled: bool = False,
    seed: int = 0,
    clip: float | None = None,
    rate: Callable[[int], float] = lambda step: 1.0,
) -> list[dict[str, Tensor]]:
    """Train bends as leaves of one graph, through ``functional_call``; return them.

    Args:
        start: The network at 0.
        end: At 1.
        steps: For each optimizer step its micro-batches.
        make: Makes the optimizer.
        kind: Of the curve.
        bends: Control points between.
        decay: Of the penalty ``decay |phi|^2 / 2``.
        decoupled: Of ``phi`` itself, times the rate.
        scaled: Whether gradients are divided by ``E c_j^2``.
        seed: Of ``t``.
        clip: Largest norm of the gradient.
        rate: Factor of the learning rate at a step.
    """
    a, b = (dict(n.named_parameters()) for n in (start, end))
    w = [
        {n: torch.lerp(a[n].detach(), b[n].detach(), (j + 1) / (bends + 1)).requires_grad_()
         for n in a}
        for j in range(bends)
    ]  # fmt: skip
    leaves = [t for bend in w for t in bend.values()]
    optimizer = make(leaves)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, parts in enumerate(steps):
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = own * rate(step)
        t = float(torch.rand((), generator=generator(seed, step), dtype=torch.float64))
        c = coefficients(kind, bends + 2, t)
        points = [{n: p.detach() for n, p in a.items()}, *w, {n: p.detach() for n, p in b.items()}]
        phi = {n: sum(f * p[n] for f, p in zip(c, points, strict=True)) for n in a}
        value = sum(loss_of(start, phi, part) for part in parts) / len(parts)
        value = value + 0.5 * decay * sum(p.square().sum() for p in phi.values())
        gradients = torch.autograd.grad(value, leaves)
        for i, (leaf, g) in enumerate(zip(leaves, gradients, strict=True)):
            j = 1 + i // len(a)
            leaf.grad = g / mean_square(kind, bends + 2, j) if scaled else g
        if clip is not None:
            nn.utils.clip_grad_norm_(leaves, clip)
        if decoupled:
            with torch.no_grad():
                at = {n: p.detach().clone() for n, p in phi.items()}
                for j, bend in enumerate(w, start=1):
                    for n, leaf in bend.items():
                        leaf.sub_(at[n], alpha=decoupled * optimizer.param_groups[0]["lr"] * c[j])
        optimizer.step()
    return [{n: t.detach() for n, t in bend.items()} for bend in w]


def loss_of(module: nn.Module, weights: dict[str, Tensor], batch: Any) -> Tensor:
    return F.cross_entropy(functional_call(module, weights, (batch[0],)), batch[1])

"""Modules, batches and losses that every operator must get right, with dense references.

The references know nothing of the package: a dense Hessian of the plain loss by central
differences of native first gradients in float64. torch.func.hessian is not used since
torch 2.13 gets it wrong through training-mode batch norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    batch_sizes: tuple[int, ...] = (8,)
    mode: str = "batch"
    regression: bool = False
    prepare: Callable[[nn.Module], Any] = field(default=lambda module: None)

    def build(self) -> tuple[nn.Module, list[Batch], Callable[[nn.Module, Batch], Tensor]]:
        torch.manual_seed(1)
        module = self.make().double()
        self.prepare(module)
        batches = []
        for size in self.batch_sizes:
            x = torch.randn(size, *self.input_shape, dtype=torch.float64)
            y = (
                torch.randn(size, 3, dtype=torch.float64)
                if self.regression
                else torch.randint(0, 3, (size,))
            )
            batches.append((x, y))
        return module, batches, mse if self.regression else cross_entropy


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def mse(module: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


class Tied(nn.Module):
    """One weight used under two names and twice in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Unused(nn.Module):
    """A parameter that the loss does not see, and one that it sees linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.linear = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


def loss_with_linear_part(module: Unused, batch: Batch) -> Tensor:
    return mse(module, batch) + module.linear.sum()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """A transformer layer: fused attention, layer norm, dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 5, dropout=0.3, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=1))


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.5, self.training))


def tanh_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def conv_net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.SiLU(), nn.Flatten(), nn.Linear(16, 3))


def freeze_first(module: nn.Module) -> None:
    next(module.children()).requires_grad_(False)


def warm_up(module: nn.Module) -> None:
    """Give running statistics values that differ from the batch's."""
    module.train()
    module(2 * torch.randn(16, 4, dtype=torch.float64) + 1)


CASES = [
    Case("tanh", tanh_net, (4,)),
    Case("regression", tanh_net, (4,), regression=True),
    Case("unequal last batch", tanh_net, (4,), batch_sizes=(5, 5, 2)),
    Case("frozen", tanh_net, (4,), prepare=freeze_first),
    Case("tied", Tied, (4,)),
    Case("batch norm", batch_norm_net, (4,), batch_sizes=(6, 4)),
    Case("batch norm, eval", batch_norm_net, (4,), mode="eval", prepare=warm_up),
    Case("batch norm 2d", lambda: conv_net(nn.BatchNorm2d(4, affine=False)), (2, 4, 4), (4,)),
    Case("instance norm", lambda: conv_net(nn.InstanceNorm2d(4, affine=True)), (2, 4, 4), (4,)),
    Case("group norm", lambda: conv_net(nn.GroupNorm(2, 4)), (2, 4, 4), (4,)),
    Case("dropout", lambda: nn.Sequential(tanh_net(), nn.Dropout(0.5), nn.Linear(3, 3)), (4,)),
    Case("functional dropout", FunctionalDropout, (4,)),
    Case("attention", Attention, (3, 4)),
    Case("recurrent", Recurrent, (3, 3)),
]
UNUSED = Case("unused", Unused, (4,), regression=True)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def dense_hessian(
    module: nn.Module,
    batches: list[Batch],
    loss: Callable[[Any, Batch], Tensor],
    mode: str,
    step: float = 1e-5,
) -> Tensor:
    """The Hessian of the sample-weighted mean loss, ``(dim, dim)``, error about 1e-8."""
    module.train(mode == "batch")
    for m in module.modules():
        # Dropout off by the plainest means there is.
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(m, (nn.LSTM, nn.MultiheadAttention)):
            m.dropout = 0.0
        if isinstance(m, FunctionalDropout):
            m.training = False
    parameters = list(trainable(module).values())
    total = sum(len(batch[0]) for batch in batches)
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    def gradient() -> Tensor:
        parts = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for batch in batches:
            value = loss(module, batch)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            flat = [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(parameters, found, strict=True)
            ]
            parts += len(batch[0]) / total * torch.cat(flat)
        return parts

    columns = []
    for p in parameters:
        flat = p.data.view(-1)
        for i in range(flat.numel()):
            kept = float(flat[i])
            flat[i] = kept + step
            upper = gradient()
            flat[i] = kept - step
            columns.append((upper - gradient()) / (2 * step))
            flat[i] = kept
    for name, b in module.named_buffers():
        b.copy_(buffers[name])
    dense = torch.stack(columns, dim=1)
    return (dense + dense.T) / 2

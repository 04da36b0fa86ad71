"""Losses whose slices are known in closed form, and networks that slices are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import space_of


class Weights(nn.Module):
    """Nothing but parameters, of several shapes."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes
        )

    def flat(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parts])


BATCH = torch.zeros(3, 1, dtype=torch.float64)


def linear(slopes: Tensor) -> Callable[[Any, Any], Tensor]:
    """The loss ``a . weights``, negative somewhere."""
    return lambda module, batch: slopes @ module.flat()


def quadratic(matrix: Tensor) -> Callable[[Any, Any], Tensor]:
    """The loss ``weights' A weights / 2``."""
    return lambda module, batch: 0.5 * module.flat() @ matrix @ module.flat()


def of(module: nn.Module, loss: Callable[[Any, Any], Tensor], **settings: Any) -> Objective:
    return Objective(module, [BATCH], loss, **settings)


def space(module: nn.Module) -> ParameterSpace:
    return space_of(of(module, lambda m, b: torch.zeros(())))


def symmetric(dim: int) -> Tensor:
    matrix = torch.randn(dim, dim, dtype=torch.float64)
    return matrix + matrix.T


def relu_net(bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8, bias=bias), nn.ReLU(), nn.Linear(8, 8, bias=bias), nn.ReLU(),
        nn.Linear(8, 3, bias=bias),
    )  # fmt: skip


def two_batches() -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, 4, generator=source), torch.randint(0, 3, (n,), generator=source))
        for n in (7, 4)
    ]

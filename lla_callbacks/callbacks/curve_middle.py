"""A module in the middle of a curve, for as long as it is validated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.curves.training import MovingCurve
from lla_callbacks.objective.evaluation import Statistics, load_statistics


class CurveMiddle:
    """From its making until :meth:`leave` the module's weights are ``phi(1/2)``.

    Args:
        moving: The curve.
        module: Whose parameters it moves.
    """

    def __init__(self, moving: MovingCurve, module: nn.Module) -> None:
        self._moving = moving
        # Stand-alone validation runs in inference mode, whose tensors nothing can be done with.
        with torch.inference_mode(False), torch.no_grad():
            self._saved = [
                (m, _copy(m.running_mean), _copy(m.running_var)) for m in norms_of(module)
            ]
            moving.displace(0.5, exact=True)

    @property
    def has_norms(self) -> bool:
        """Whether there are running statistics that belong to these weights."""
        return bool(self._saved)

    def load(self, statistics: Statistics) -> None:
        """Give batch norms their statistics."""
        with torch.inference_mode(False):
            load_statistics(statistics)

    def leave(self) -> None:
        """Put the bend and training's statistics back, to the bit."""
        with torch.inference_mode(False), torch.no_grad():
            self._moving.restore()
            load_statistics(self._saved)


def norms_of(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that have running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _copy(statistic: Tensor | None) -> Tensor:
    assert statistic is not None
    return statistic.detach().clone()

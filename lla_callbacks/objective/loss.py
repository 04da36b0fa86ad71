"""What a loss is to this package, and the statistics that come into it from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

# (module, batch) -> the scalar mean loss of the batch.
Loss = Callable[[Any, Any], Tensor]
# (module, batch) -> (predictions, targets), what torchmetrics are fed with.
Predict = Callable[[Any, Any], tuple[Tensor, Tensor]]
# BatchNorm module -> its mean and variance at the present weights.
Statistics = Sequence[tuple[_BatchNorm, Tensor, Tensor]]


def load_statistics(statistics: Statistics) -> None:
    """Give batch norms their statistics, inside a guard that puts the old ones back."""
    with torch.no_grad():
        for m, mean, var in statistics:
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.copy_(mean)
            m.running_var.copy_(var)

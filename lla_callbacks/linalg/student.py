"""Student's law: how much wider an error must be where few degrees of freedom stand behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Half the two-sided quantile of Student's t at the normal law's coverage within two standard
# deviations, 95.45 %, by degrees of freedom; computed with scipy.stats.t.ppf.
_FREEDOM = (math.inf, 60, 30, 20, 15, 10, 8, 6, 5, 4, 3, 2, 1)
_WIDENING = (
    1.0, 1.02127, 1.04342, 1.06651, 1.09058, 1.14184, 1.18321, 1.25826, 1.32432, 1.43465,
    1.65341, 2.26327, 6.98387,
)  # fmt: skip
_INVERSES = torch.tensor([1 / f for f in _FREEDOM], dtype=torch.float64)
_LOGARITHMS = torch.tensor(_WIDENING, dtype=torch.float64).log()


def student_widening(freedom: Tensor) -> Tensor:
    """Return the factor by which two standard errors cover as much as two of a known variance.

    7 for one degree of freedom, 1.43 for four, 1 for infinitely many; in between by the logarithm
    over the inverse, to 1 % above 2. Less than one counts as one.

    Args:
        freedom: Degrees of freedom behind the variance, any shape.
    """
    x = 1 / freedom.double().clamp(min=1)
    right = torch.searchsorted(_INVERSES, x.contiguous()).clamp(1, len(_INVERSES) - 1)
    left = right - 1
    share = (x - _INVERSES[left]) / (_INVERSES[right] - _INVERSES[left])
    return torch.lerp(_LOGARITHMS[left], _LOGARITHMS[right], share).exp()


def widened_sem(sem: float, count: int) -> float:
    """Return the standard error of a mean over ``count`` values so that two of them cover 95 %."""
    if count < 2:
        return math.nan
    return sem * float(student_widening(torch.tensor(float(count - 1))))

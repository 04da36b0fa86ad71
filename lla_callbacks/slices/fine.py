"""What is known of a plane between its points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lla_callbacks.objective.checks import flag

# Points a side, at least, of which every second one can judge what is between them.
FEWEST = 7


@dataclass(frozen=True, eq=False)
class FineLoss:
    """The loss between the points of a plane, from interpolated outputs.

    Attributes:
        loss: On a grid four times as fine as the plane's finest complete one, shape
            ``(4 (n - 1) + 1, 4 (m - 1) + 1)``, float64; at the points as computed there.
        error: Mean error between the points, estimated from above; in decades, or of the loss
            itself where it is not positive everywhere.
        error_high: 95th percentile, likewise.
    """

    loss: Tensor
    error: float
    error_high: float


def check_refine(refine: Any, **others: Any) -> bool:
    """Return whether planes are refined.

    Args:
        refine: True or False.
        others: By name, what has to be None if they are.

    Raises:
        ValueError: If it is neither, or one of the others is given.
    """
    if not flag("refine", refine):
        return False
    for name, other in others.items():
        if other is not None:
            raise ValueError(
                f"refine is True, and {name} is given, which keeps no outputs of the network: "
                f"give refine=False or {name}=None."
            )
    return True

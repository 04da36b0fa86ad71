"""Gaps that can be told when a fit starts: what the optimizer will never have."""

from __future__ import annotations

from typing import Any

from torch import optim

from lla_callbacks.slices.choice import plane_names
from lla_callbacks.slices.quantity import Slices

# Of torch's own those that keep no moments of Adam's; another one may, and is waited for.
_WITHOUT = (
    optim.SGD, optim.ASGD, optim.Adadelta, optim.Adagrad, optim.LBFGS, optim.RMSprop, optim.Rprop,
)  # fmt: skip


def without_moments(quantity: Any, optimizers: Any) -> tuple[list[str], str]:
    """Return slices that want Adam's moments where there are none, and the sentence to say.

    Args:
        quantity: What a monitor measures.
        optimizers: Those of the run.
    """
    if not isinstance(quantity, Slices) or len(optimizers) != 1:
        return [], ""
    if type(optimizers[0]) not in _WITHOUT:
        return [], ""
    settings = quantity.settings
    wanted: dict[str, tuple[str, tuple[Any, ...]]]
    wanted = {f"plane_{p}": (f"planes=['{p}']", plane_names(p)) for p in settings.planes}
    wanted |= {f"line_{line}": (f"lines=['{line}']", (line,)) for line in settings.lines}
    found = {
        name: given
        for name, (given, directions) in wanted.items()
        if any(str(d).startswith("adam_") for d in directions)
    }
    if not found:
        return [], ""
    kind = type(optimizers[0]).__name__
    return list(found), (
        f"{', '.join(found.values())} needs the moments of Adam, and {kind} keeps none: left out. "
        "Give other directions, or train with Adam."
    )

"""What can be said of the weights of a moment before it is measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.parts import Parameters, variables_of


def space_of(module: nn.Module, parameters: Parameters = None) -> ParameterSpace:
    """Return the layout of a module's trained parameters, or of those that are chosen."""
    return ParameterSpace(variables_of(module, parameters))


def is_unsized(module: nn.Module) -> bool:
    """Return whether lazy layers wait for the first batch to tell their size."""
    return any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers()))


def change_of(before: Sequence[str], names: Sequence[str], moment: Moment) -> str:
    """Return in words that other parameters are trained than before."""
    was, now = set(before), set(names)
    changed = sorted(now - was or was - now)
    some = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    verb = "trained" if now - was else "frozen"
    return (
        f"from step {moment.step} on {some} {'is' if len(changed) == 1 else 'are'} {verb}: "
        "measurements are of other parameters than before, and curves may jump there."
    )

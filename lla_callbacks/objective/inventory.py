"""What a module consists of, looked at once for all that ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lla_callbacks.objective.sharded import is_unit


@dataclass(frozen=True, eq=False)
class Inventory:
    """Submodules, parameters and buffers of a module at one moment, each once.

    To walk through a module takes as long as to look at what is found, and a guard has ten
    reasons to look.

    Attributes:
        root: The module.
        modules: All submodules, itself first.
        parameters: Of all of them, trained or not.
        buffers: Likewise.
    """

    root: nn.Module
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    buffers: list[Tensor]

    @property
    def is_sharded(self) -> bool:
        """See :func:`~lla_callbacks.objective.sharded.is_sharded`."""
        return any(map(is_unit, set(map(type, self.modules))))


def inventory_of(module: nn.Module) -> Inventory:
    """Look what a module consists of."""
    modules = list(module.modules())
    return Inventory(
        module,
        modules,
        _each_once(modules, lambda m: m._parameters),
        _each_once(modules, lambda m: m._buffers),
    )


def _each_once(modules: list[nn.Module], store_of: Callable[[Any], Any]) -> list[Any]:
    # By identity: tensors are hashed in Python.
    found = {}
    for m in modules:
        store = store_of(m)
        if type(store) is not dict or store:
            found.update({id(t): t for t in store.values() if t is not None})
    return list(found.values())

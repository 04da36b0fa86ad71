"""Which of a module's parameters are the variables: all that are trained, or a part of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lla_callbacks.objective.checks import function_of, shown

# How parameters are chosen; see chosen_names.
Parameters = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None

# Names that a message lists at most.
_MOST = 12


def check_parameters(parameters: Any) -> Parameters:
    """Return how parameters are chosen, if it can be.

    Raises:
        ValueError: If it is neither a pattern, nor several, nor a predicate, nor None.
    """
    if parameters is None:
        return None
    if isinstance(parameters, type):
        raise ValueError(_allowed(parameters))
    if callable(parameters) and not isinstance(parameters, nn.Module):
        form = "parameters(name, parameter)"
        predicate: Parameters = function_of("parameters", parameters, form, 2)
        return predicate
    patterns = [parameters] if isinstance(parameters, str) else parameters
    if not isinstance(patterns, (list, tuple)) or not patterns:
        raise ValueError(_allowed(parameters))
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(_allowed(parameters))
    return parameters if isinstance(parameters, str) else tuple(patterns)


def chosen_names(module: nn.Module, parameters: Parameters) -> frozenset[str] | None:
    """Return the names of the trained parameters that are chosen; None for all of them.

    Args:
        module: The module.
        parameters: ``None``; shell patterns of parameter names (``"generator.*"``,
            ``["*.lora_A.*", "*.lora_B.*"]``), or a module's path, which takes all below it; or a
            predicate ``(name, parameter) -> bool``. A shared parameter is found under any of its
            names.

    Raises:
        ValueError: If a pattern, or the predicate, matches no trained parameter; the message names
            those that there are.
    """
    if parameters is None:
        return None
    first = {id(p): name for name, p in module.named_parameters()}
    every = list(module.named_parameters(remove_duplicate=False))
    trained = [(name, p) for name, p in every if p.requires_grad]
    if callable(parameters):
        found = {first[id(p)] for name, p in trained if parameters(name, p)}
        if not found:
            raise ValueError(
                "parameters is a predicate that is true for no trained parameter; give one that is "
                f"true for some of {_listed([name for name, _ in trained])}."
            )
        return frozenset(found)
    found = set()
    for pattern in [parameters] if isinstance(parameters, str) else parameters:
        names = {first[id(p)] for name, p in trained if _fits(name, pattern)}
        if not names:
            frozen = [name for name, p in every if not p.requires_grad and _fits(name, pattern)]
            why = f" (it matches {_listed(frozen)}, frozen by requires_grad=False)" * bool(frozen)
            raise ValueError(
                f"parameters contains {pattern!r}, which matches no trained parameter{why}; give "
                f"patterns of names among {_listed([name for name, _ in trained])}."
            )
        found |= names
    return frozenset(found)


def variables_of(module: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """Return the trained parameters that are chosen, by name; a shared one under its first.

    Raises:
        ValueError: See :func:`chosen_names`.
    """
    names = chosen_names(module, parameters)
    return {
        name: p
        for name, p in module.named_parameters()
        if p.requires_grad and (names is None or name in names)
    }


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _listed(names: Sequence[str]) -> str:
    if len(names) <= _MOST:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST])} and {len(names) - _MOST} more"


def _allowed(parameters: Any) -> str:
    return (
        f"parameters is {shown(parameters)}; give None for all that are trained, shell patterns of "
        "their names ('generator.*'), or a predicate (name, parameter) -> bool."
    )

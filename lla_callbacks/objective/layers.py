"""Parameters grouped into layers, named by module path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.checks import function_of, shown

# How layers are chosen; see layer_parameters.
Layers = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

# Modules that hold others in a row, and are none themselves to a reader.
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def layer_parameters(
    module: nn.Module, space: ParameterSpace, layers: Layers = None
) -> dict[str, list[str]]:
    """Return layer name to the names of its trainable parameters, in the module's order.

    Args:
        module: The module whose paths name the layers.
        space: The trainable parameters.
        layers: How they are grouped.

            - ``None``: every module that owns parameters is a layer (its weight and bias
              together); a parameter of the root module is a layer under its own name.
            - ``"blocks"``: every repeated block is one layer, whatever is inside; the rest
              (stem, embedding, head) as with ``None``. A block is a module that stands in a
              ``ModuleList``, ``Sequential`` or ``ModuleDict`` and of whose class at least two
              stand in them: ``encoder.layers.0`` of a transformer, ``layer1.0`` of a ResNet.
              A container is none itself, unless it holds plain layers only (convolution,
              norm, activation). Of nested blocks the outermost counts. Attention modules
              and parametrized ones are not taken apart either.
            - Any other string, or several: module paths or shell patterns
              (``"encoder.*"``); every module that matches is one layer, with all parameters
              below it. A module that is named like a grouping: ``["blocks"]``.
            - A predicate ``(path, module) -> bool``: the same, for modules where it is true.

            Of nested modules that one pattern or the predicate matches, the outermost is
            the layer.

    Raises:
        ValueError: If ``layers`` is none of these, a pattern or the predicate matches no
            module with trainable parameters, or two layers overlap.
    """
    check_layers(layers)
    if layers is None:
        return _by_owner(space.names)
    if isinstance(layers, str) and layers in GROUPINGS:
        return GROUPINGS[layers](module, space)
    if callable(layers):
        groups = _outermost(module, space, layers)
        if not groups:
            raise ValueError(
                "layers is a predicate that is true for no module with trainable parameters; "
                f"the layers are: {_known(space)}."
            )
        return groups
    groups = {}
    for pattern in [layers] if isinstance(layers, str) else layers:
        found = _outermost(
            module,
            space,
            lambda path, _, pattern=pattern: path == pattern or fnmatchcase(path, pattern),  # type: ignore[misc]
        )
        if not found:
            raise ValueError(
                f"layers contains {pattern!r}, which matches no module with trainable "
                f"parameters; the layers are: {_known(space)}. "
                f"Groupings by name: {', '.join(GROUPINGS)}."
            )
        groups.update(found)
    counts = Counter(name for names in groups.values() for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"layers {list(layers)} overlap: {twice[0]!r} would belong to two of them. Name "
            "either a module or the modules inside it."
        )
    return groups


def outside(space: ParameterSpace, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of trainable parameters that belong to no layer, in order."""
    inside = {name for names in groups.values() for name in names}
    return [name for name in space.names if name not in inside]


def check_layers(layers: object) -> None:
    """Raise a ValueError for what can name no layers, whatever the module is."""
    if layers is None or (isinstance(layers, str) and layers):
        return
    if callable(layers):
        function_of("layers", layers, "a predicate (path, module) -> bool", 2)
        return
    if (
        isinstance(layers, Sequence)
        and layers
        and all(isinstance(name, str) and name for name in layers)
    ):
        return
    raise ValueError(
        f"layers is {shown(layers)}; give a module path or pattern such as 'encoder.*', a list of "
        f"them, a grouping ({', '.join(map(repr, GROUPINGS))}), a predicate (path, module) -> "
        "bool, or None for every layer."
    )


def _by_owner(names: Sequence[str]) -> dict[str, list[str]]:
    """Group parameters by the module that owns them."""
    groups: dict[str, list[str]] = {}
    for name in names:
        path = name.rpartition(".")[0]
        groups.setdefault(path or name, []).append(name)
    return groups


def _outermost(
    module: nn.Module, space: ParameterSpace, chosen: Callable[[str, nn.Module], bool]
) -> dict[str, list[str]]:
    """Return the chosen modules that own trainable parameters and lie in no other one."""
    groups: dict[str, list[str]] = {}
    for path, submodule in module.named_modules():
        # A module is listed before what it contains.
        if not path or any(path.startswith(outer + ".") for outer in groups):
            continue
        names = [name for name in space.names if name.startswith(path + ".")]
        if names and chosen(path, submodule):
            groups[path] = names
    return groups


def _blocks(module: nn.Module, space: ParameterSpace) -> dict[str, list[str]]:
    """Group by repeated blocks, and what lies in none by its owner."""
    standing = {
        element: type(element)
        for container in module.modules()
        if isinstance(container, CONTAINERS)
        for element in container.children()
        if not isinstance(element, CONTAINERS) or _holds_plain_layers(element)
    }
    count = Counter(standing.values())

    def whole(_: str, submodule: nn.Module) -> bool:
        repeated = submodule in standing and count[standing[submodule]] > 1
        # The rows of an attention's input projection mean nothing without its output's.
        return (
            repeated
            or isinstance(submodule, nn.MultiheadAttention)
            or parametrize.is_parametrized(submodule)
        )

    blocks = _outermost(module, space, whole)
    rest = _by_owner(outside(space, blocks))
    # In the module's order, which is that of each layer's first parameter.
    position = {name: i for i, name in enumerate(space.names)}
    both = [*blocks.items(), *rest.items()]
    return dict(sorted(both, key=lambda item: position[item[1][0]]))


def _holds_plain_layers(container: nn.Module) -> bool:
    return all(not list(element.children()) for element in container.children())


def _known(space: ParameterSpace) -> str:
    return ", ".join(_by_owner(space.names))


# Groupings that a string names.
GROUPINGS: Mapping[str, Callable[[nn.Module, ParameterSpace], dict[str, list[str]]]] = {
    "blocks": _blocks
}

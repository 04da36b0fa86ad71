"""Parameters grouped into layers, named by module path."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lla_callbacks.linalg.space import ParameterSpace


def layer_parameters(
    module: nn.Module, space: ParameterSpace, layers: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """Return layer name to the names of its trainable parameters, in the module's order.

    Args:
        module: The module whose paths name the layers.
        space: The trainable parameters.
        layers: ``None``: every module that owns parameters is a layer (its weight and bias
            together); a parameter of the root module is a layer under its own name.
            Otherwise module paths or shell patterns (``"encoder.*"``): every module that
            matches is one layer, with all parameters below it.

    Raises:
        ValueError: If a pattern matches no trainable layer, or two layers overlap.
    """
    if layers is None:
        groups: dict[str, list[str]] = {}
        for name in space.names:
            path = name.rpartition(".")[0]
            groups.setdefault(path or name, []).append(name)
        return groups
    groups = {}
    for pattern in layers:
        matched = [
            path
            for path, _ in module.named_modules()
            if path and (path == pattern or fnmatchcase(path, pattern))
        ]
        found = {
            path: names
            for path in matched
            if (names := [name for name in space.names if name.startswith(path + ".")])
        }
        if not found:
            known = ", ".join(layer_parameters(module, space))
            raise ValueError(
                f"layers contains {pattern!r}, which matches no module with trainable "
                f"parameters; the layers are: {known}."
            )
        # "*" also matches what lies deeper: of nested matches the outermost is the layer.
        for path, names in found.items():
            if not any(path.startswith(outer + ".") for outer in found):
                groups[path] = names
    chosen = [name for names in groups.values() for name in names]
    twice = sorted({name for name in chosen if chosen.count(name) > 1})
    if twice:
        raise ValueError(
            f"layers {list(layers)} overlap: {twice[0]!r} would belong to two of them. Name "
            "either a module or the modules inside it."
        )
    return groups

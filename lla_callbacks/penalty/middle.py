"""Which parameters a trace penalty is on: all, the middle ones, or layers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.layers import Layers, layer_parameters


def penalized_parameters(
    module: nn.Module,
    space: ParameterSpace,
    layers: Layers,
    run: Callable[[], Any],
) -> list[str]:
    """Return the names of the parameters that a penalty is on.

    Args:
        module: The module.
        space: Its trainable parameters.
        layers: ``"all"`` or ``None``: every trainable parameter. ``"middle"``: see
            :func:`middle_weights`. ``"published_middle"``: see :func:`published_middle`.
            Anything else as in
            :func:`~lla_callbacks.objective.layers.layer_parameters`; a module with one of
            these names is meant by a list, ``["middle"]``.
        run: Runs one forward pass, which tells the order of the layers.

    Raises:
        ValueError: If nothing is chosen.
    """
    if layers is None or layers == "all":
        return list(space.names)
    if layers == "published_middle":
        return published_middle(space.names)
    if layers == "middle":
        return middle_weights(module, space, run)
    groups = layer_parameters(module, space, layers)
    return [name for names in groups.values() for name in names]


def middle_weights(module: nn.Module, space: ParameterSpace, run: Callable[[], Any]) -> list[str]:
    """Return the weights of the middle half of convolution and linear layers, without biases.

    Of ``k`` layers in the order of a forward pass, those whose centre ``(i + 1/2) / k`` lies
    between 1/4 and 3/4: layer 2 of 3, 2 and 3 of 4, 3 to 6 of 8.

    Raises:
        ValueError: If the module has no such layer with trainable weights.
    """
    candidates = {
        path: weights
        for path, m in module.named_modules()
        if isinstance(m, (nn.Linear, _ConvNd)) and (weights := _weights(path, space))
    }
    if not candidates:
        raise ValueError(
            "layers is 'middle', but there is no trainable convolution or linear layer: name "
            "layers, or take 'all'."
        )
    count = len(candidates)
    ordered = _in_forward_order(module, list(candidates), run)
    middle = [path for i, path in enumerate(ordered) if count <= 4 * i + 2 <= 3 * count]
    chosen = {name for path in middle for name in candidates[path]}
    return [name for name in space.names if name in chosen]


def published_middle(names: Sequence[str]) -> list[str]:
    """Return the published middle: parameter tensors ``len // 4`` to ``3 len // 4``, inclusive.

    Weights, biases and normalizations all count, in the module's order (Sankar et al. 2021,
    the released code's ``middle_penalization.py``).
    """
    return list(names[len(names) // 4 : 3 * len(names) // 4 + 1])


def _weights(path: str, space: ParameterSpace) -> list[str]:
    """Return a layer's own tensors with two dimensions or more, parametrized ones included."""
    prefix = f"{path}." if path else ""
    return [
        name
        for name, tensor in zip(space.names, space.tensors, strict=True)
        if name.startswith(prefix) and tensor.ndim >= 2
    ]


def _in_forward_order(module: nn.Module, paths: list[str], run: Callable[[], Any]) -> list[str]:
    """Return paths by their first call; one that is never called follows its predecessor."""
    called: dict[str, int] = {}

    def note(path: str) -> None:
        called.setdefault(path, len(called))

    # A hook's result would replace the input, so that nothing is returned.
    handles = [
        module.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: note(path))
        for path in paths
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    # Attention reads its projection's weights without calling it.
    places, last = [], -1
    for path in paths:
        last = called.get(path, last)
        places.append(last)
    return [path for _, path in sorted(zip(places, paths, strict=True), key=lambda pair: pair[0])]

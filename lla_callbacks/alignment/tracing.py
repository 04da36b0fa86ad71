"""Find groups of units in a module's graph; what is not understood stays where it is."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lla_callbacks.alignment.groups import Axis, Group

# What treats each unit by itself, or all of them alike.
_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.LogSigmoid, nn.Threshold,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.InstanceNorm1d, nn.InstanceNorm2d,
)  # fmt: skip
_POINTWISE = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.hardtanh,
    F.dropout, F.dropout2d, F.sigmoid, F.tanh, torch.relu, torch.relu_, torch.tanh, torch.sigmoid,
    torch.exp, torch.sin, torch.cos, torch.abs, torch.square, torch.clamp, torch.neg,
    F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
    "relu", "relu_", "tanh", "sigmoid", "exp", "sin", "cos", "abs", "square", "clamp", "contiguous",
    "float", "double", "detach", "neg",
}  # fmt: skip
_JOINS = {
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv,
    torch.add, torch.sub, torch.mul, torch.div, "add", "add_", "sub", "mul", "mul_", "div",
}  # fmt: skip
_FLATTEN = {torch.flatten, "flatten", "view", "reshape", torch.reshape}
_MEAN = {torch.mean, "mean", "sum", torch.sum, "amax"}

# Dimension of a tensor to the number of its units and how often each is repeated.
Units = dict[int, tuple[int, int]]


class UntraceableError(ValueError):
    """A module whose graph cannot be had."""


def traced_groups(module: nn.Module, inputs: Sequence[Any]) -> list[Group]:
    """Return the groups of a module, by its graph on these inputs.

    Linear and convolution layers make units; normalization, activations, pooling, flattening,
    means over space pass them on; sums and products of two tensors join them. Whatever else uses
    units (attention, recurrent layers, reshaping, concatenation) keeps them where they are.

    Raises:
        UntraceableError: If the graph cannot be had.
    """
    try:
        graph = fx.symbolic_trace(module)
        with torch.no_grad():
            ShapeProp(graph).propagate(*inputs)
    except Exception as error:
        raise UntraceableError(
            f"{type(module).__name__} cannot be traced ({type(error).__name__}: {error}), so its "
            "groups of units are unknown. Give groups={name: [(parameter, dim), ...]}, or a "
            "traceable submodule with its own input."
        ) from error
    return _Walk(graph, module).groups()


class _Walk:
    """One pass through a graph, with a union-find over groups."""

    def __init__(self, graph: fx.GraphModule, module: nn.Module) -> None:
        self.graph = graph
        self.parents: list[int] = []
        self.sizes: list[int] = []
        self.titles: list[str] = []
        self.frozen: set[int] = set()
        self.units: dict[fx.Node, Units] = {}
        # (name, dim) of a parameter or buffer to its units.
        self.bound: dict[tuple[str, int], tuple[int, int]] = {}
        self.first: dict[int, str] = {}
        # A scripted or parametrized weight has no plain axes.
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self.first.setdefault(id(tensor), name)
        self.module = module

    def groups(self) -> list[Group]:
        for node in self.graph.graph.nodes:
            self.units[node] = self._visit(node)
        axes: dict[int, list[Axis]] = {}
        for (name, dim), (group, repeat) in self.bound.items():
            axes.setdefault(self._root(group), []).append(Axis(name, dim, repeat))
        tied: dict[str, list[str]] = {}
        for name, tensor in self.module.named_parameters(remove_duplicate=False):
            if self.first[id(tensor)] != name:
                tied.setdefault(self.first[id(tensor)], []).append(name)
        frozen = {self._root(g) for g in self.frozen}
        return [
            Group(
                self.titles[g],
                self.sizes[g],
                tuple(
                    a for axis in found
                    for a in [axis, *(Axis(n, axis.dim, axis.repeat)
                                      for n in tied.get(axis.name, []))]
                ),
            )
            for g, found in sorted(axes.items())
            if g not in frozen and self.sizes[g] > 1
        ]  # fmt: skip

    # -- units --------------------------------------------------------------------------

    def _new(self, size: int, title: str) -> int:
        self.parents.append(len(self.parents))
        self.sizes.append(size)
        self.titles.append(title)
        return len(self.parents) - 1

    def _root(self, group: int) -> int:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def _join(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        a, b = self._root(one[0]), self._root(other[0])
        if a == b and one[1] == other[1]:
            return
        if one[1] != other[1] or self.sizes[a] != self.sizes[b]:
            self.frozen |= {a, b}
            return
        low, high = min(a, b), max(a, b)
        self.parents[high] = low
        if high in self.frozen:
            self.frozen.add(low)

    def _freeze(self, *units: Units) -> None:
        for one in units:
            self.frozen |= {group for group, _ in one.values()}

    def _bind(self, tensor: Tensor | None, dim: int, units: tuple[int, int] | None) -> None:
        """Let a dimension of a parameter or buffer be of these units; None: it stays."""
        if tensor is None:
            return
        name = self.first.get(id(tensor))
        if name is None:
            # A parametrized weight: its axes are none of the parameters' own.
            if units is not None:
                self.frozen.add(units[0])
            return
        known = self.bound.get((name, dim))
        if units is None:
            if known is None:
                size = tensor.shape[dim]
                known = self.bound[name, dim] = (self._new(size, name), 1)
            self.frozen.add(known[0])
        elif known is None:
            self.bound[name, dim] = units
        else:
            self._join(known, units)

    # -- nodes --------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Units:
        given = [self.units[n] for n in node.all_input_nodes]
        if node.op == "output":
            self._freeze(*given)
            return {}
        if node.op == "call_module":
            layer = self.graph.get_submodule(str(node.target))
            return self._layer(layer, str(node.target), node, given)
        if node.op in ("call_function", "call_method"):
            return self._function(node, given)
        if node.op == "get_attr":
            value = _attribute(self.graph, str(node.target))
            for dim in range(value.ndim if isinstance(value, Tensor) else 0):
                self._bind(value, dim, None)
        return {}

    def _layer(self, layer: nn.Module, name: str, node: fx.Node, given: list[Units]) -> Units:
        units = given[0] if given else {}
        shape = _shape(node)
        p: Any = layer
        if isinstance(layer, nn.Linear):
            last = len(shape) - 1
            self._freeze({d: u for d, u in units.items() if d != last})
            self._bind(p.weight, 1, units.get(last))
            return {last: self._made(p, name, p.weight.shape[0])}
        if isinstance(layer, _ConvNd):
            self._freeze({d: u for d, u in units.items() if d != 1})
            return self._convolution(p, name, units.get(1))
        if isinstance(layer, (_BatchNorm, nn.PReLU)):
            own = None if len(shape) < 2 else units.get(1)
            if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
                return units
            for tensor in (
                p.weight, getattr(p, "bias", None), getattr(p, "running_mean", None),
                getattr(p, "running_var", None),
            ):  # fmt: skip
                self._bind(tensor, 0, own)
            return units
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and len(layer.normalized_shape) == 1:
            last = len(shape) - 1
            self._freeze({d: u for d, u in units.items() if d != last})
            self._bind(p.weight, 0, units.get(last))
            self._bind(getattr(p, "bias", None), 0, units.get(last))
            return {d: u for d, u in units.items() if d == last}
        if isinstance(layer, nn.Embedding):
            self._bind(p.weight, 0, None)
            return {len(shape) - 1: self._made(p, name, p.weight.shape[1], dim=1)}
        if isinstance(layer, nn.Flatten):
            return self._flattened(node, units)
        if isinstance(layer, _POINTWISE_MODULES) and not list(layer.parameters(recurse=False)):
            return units
        self._freeze(*given)
        return {}

    def _made(self, layer: Any, name: str, size: int, dim: int = 0) -> tuple[int, int]:
        """Return new units that a layer makes, and bind its weight and bias to them."""
        units = (self._new(size, name), 1)
        self._bind(layer.weight, dim, units)
        self._bind(getattr(layer, "bias", None), 0, units)
        return units

    def _convolution(self, layer: Any, name: str, units: tuple[int, int] | None) -> Units:
        turned = isinstance(layer, _ConvTransposeNd)
        rows, columns = (1, 0) if turned else (0, 1)
        if layer.groups == 1:
            self._bind(layer.weight, columns, units)
            return {1: self._made(layer, name, layer.out_channels, dim=rows)}
        if layer.groups == layer.in_channels == layer.out_channels and units is not None:
            # Depthwise: each unit for itself.
            self._bind(layer.weight, 0, units)
            self._bind(layer.bias, 0, units)
            return {1: units}
        if units is not None:
            self.frozen.add(units[0])
        self._bind(layer.weight, 0, None)
        return {}

    def _function(self, node: fx.Node, given: list[Units]) -> Units:
        target: Any = node.target
        if target in _POINTWISE and given:
            self._freeze(*given[1:])
            return given[0]
        if target in _JOINS:
            return self._joined(node, given)
        if target in _FLATTEN and given:
            self._freeze(*given[1:])
            return self._flattened(node, given[0])
        if target in _MEAN and len(given) == 1:
            return self._reduced(node, given[0])
        self._freeze(*given)
        return {}

    def _joined(self, node: fx.Node, given: list[Units]) -> Units:
        inputs = list(node.all_input_nodes)
        if len(inputs) == 1:
            return given[0]
        if len(inputs) != 2 or _shape(inputs[0]) != _shape(inputs[1]):
            self._freeze(*given)
            return {}
        one, other = given
        for dim in one.keys() ^ other.keys():
            self._freeze({dim: (one | other)[dim]})
        both = one.keys() & other.keys()
        for dim in both:
            self._join(one[dim], other[dim])
        return {dim: one[dim] for dim in both}

    def _flattened(self, node: fx.Node, units: Units) -> Units:
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        if before == after:
            return units
        whole = len(after) == 2 and len(before) > 2 and after[0] == before[0]
        if whole and list(units) == [1]:
            group, repeat = units[1]
            return {1: (group, repeat * (after[1] // before[1]))}
        self._freeze(units)
        return {}

    def _reduced(self, node: fx.Node, units: Units) -> Units:
        """Pass units through a mean over other dimensions than theirs."""
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        listed = [dims] if isinstance(dims, int) else dims
        if not isinstance(listed, (list, tuple)) or not all(isinstance(d, int) for d in listed):
            self._freeze(units)
            return {}
        gone = {int(d) % len(before) for d in listed}
        if gone & units.keys():
            self._freeze({d: u for d, u in units.items() if d in gone})
        if len(before) == len(after):
            return {d: u for d, u in units.items() if d not in gone}
        return {d - sum(g < d for g in gone): u for d, u in units.items() if d not in gone}


def _shape(node: fx.Node) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    return tuple(getattr(meta, "shape", ()))


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found

"""Align the units of one network with another's, for any module whose graph can be had."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.alignment.groups import Group, groups_of, permuted
from lla_callbacks.alignment.matching import match
from lla_callbacks.alignment.tracing import traced_groups
from lla_callbacks.objective.checks import MOST_WORK, module_of, seed_of, shown, whole
from lla_callbacks.objective.networks import networks_of
from lla_callbacks.objective.spelling import spelled
from lla_callbacks.objective.state import preserved_random_streams

# Largest relative change of the output in float64; right groups gave 4e-16 to 7e-16, a wrong one
# of tied weights 1.2.
TOLERANCE = 1e-9
# Of coordinate descent where a residual connection makes one group of several layers: with one
# start 1 of 20 planted permutations of three blocks was found whole.
RESIDUAL_RESTARTS = 10


@dataclass(frozen=True, eq=False)
class Alignment:
    """What :func:`~lla_callbacks.aligned` returns.

    Attributes:
        state: State dict of the end with its units in the start's order: the same function.
        groups: What was permuted.
        permutations: For each group the end's unit that comes to each place.
        change: Largest relative change of the output under random permutations of all groups, in
            float64: how well it is verified that they change nothing.
        distance: Between start and end over their mean norm, before.
        aligned_distance: The same after.
    """

    state: dict[str, Tensor]
    groups: tuple[Group, ...]
    permutations: tuple[Tensor, ...]
    change: float
    distance: float
    aligned_distance: float

    def __repr__(self) -> str:
        return (
            f"<Alignment of {len(self.groups)} groups, {sum(g.size for g in self.groups)} units: "
            f"distance {self.distance:.4g} before, {self.aligned_distance:.4g} after>"
        )


@spelled
@torch.inference_mode(False)
def aligned(
    module: nn.Module,
    start: Any,
    end: Any,
    batch: Any,
    *,
    groups: Mapping[str, Sequence[Sequence[object]]] | None = None,
    restarts: int | None = None,
    seed: int = 0,
) -> Alignment:
    """Permute the end's hidden units so that they lie as close to the start's as can be.

    The function that the end computes stays; barriers on the way to it fall (Entezari et al.
    2021; Ainsworth et al. 2022). Which units can be permuted together is read from the module's
    graph, and *verified* on the batch: random permutations of every group, at random weights and
    statistics, must leave the output as it is to 1e-9 in float64. The matching looks at weights
    alone. Needs scipy (``pip install 'lla_callbacks[align]'``).

    Args:
        module: Any module of the networks' architecture; it is left as it was.
        start: The network whose order counts: a module, a state dict, or a checkpoint's path.
        end: The network that is permuted.
        batch: A batch, or an input: what ``module(input)`` is checked on is the batch's first
            entry, or the batch itself if that is a tensor.
        groups: Groups of your own, which are verified likewise: name to ``(name in the state
            dict, dim)`` or ``(name, dim, repeat)`` of everything that its units index.
        restarts: Starts of the matching, the best of which is kept. ``None``: 1, or 10 where
            residual connections make one group of several layers.
        seed: Of the verification and the matching.

    Raises:
        ValueError: If networks are not alike, the graph cannot be had, no units can be permuted,
            or a group changes the output; by name.
        ImportError: If scipy is not installed.

    Example::

        >>> import torch
        >>> from lla_callbacks import aligned
        >>> net, a, b = (
        ...     torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        ...     for _ in range(3)
        ... )
        >>> x = torch.randn(5, 4)
        >>> found = aligned(net, a, b, x)
        >>> _ = net.load_state_dict(found.state)
        >>> bool(torch.allclose(net(x), b(x), atol=1e-5)), len(found.groups)
        (True, 1)
    """
    module_of("module", module)
    restarts = whole("restarts", restarts, 1, MOST_WORK, none=True, other=", or None")
    seed = seed_of("seed", seed)
    if groups is not None and (not isinstance(groups, Mapping) or not groups):
        raise ValueError(
            f"groups is {shown(groups)}; give a dict of name to [(parameter, dim), ...], or None."
        )
    networks = networks_of(module, [start, end], ["start", "end"])
    states = [
        {**rest, **{n: w.detach().cpu() for n, w in zip(networks.names, weights, strict=True)}}
        for rest, weights in zip(networks.rests, networks.weights, strict=True)
    ]
    for state in states:
        state.update({name: state[first] for name, first in networks.tied.items()})
    with preserved_random_streams(seed):
        twin, inputs = _twin(module, batch)
        found = traced_groups(twin, inputs) if groups is None else groups_of(groups, states[0])
        if not found:
            raise ValueError(
                f"no units of {type(module).__name__} can be permuted: it has no hidden layers, or "
                "its graph joins them to what is not understood (attention, recurrent layers, "
                "reshaping). Give groups={name: [(parameter, dim), ...]}."
            )
        change = verify(twin, inputs, found)
    parameters = [n for n, _ in module.named_parameters()]
    permutations, _ = match(
        states[0], states[1], found, weigh=parameters,
        restarts=restarts or (RESIDUAL_RESTARTS if _is_residual(found) else 1), seed=seed,
    )  # fmt: skip
    moved = permuted(states[1], found, permutations)
    apart = [_distance(states[0], other, parameters) for other in (states[1], moved)]
    return Alignment(moved, tuple(found), tuple(permutations), change, *apart)


def verify(twin: nn.Module, inputs: Sequence[Any], groups: Sequence[Group]) -> float:
    """Return by how much random permutations of all groups change the output, relatively.

    Args:
        twin: A float64 copy of the module in evaluation mode; its weights are overwritten.
        inputs: Of its forward pass.
        groups: What is permuted.

    Raises:
        ValueError: If they change it, naming the group.
    """
    state = _scrambled(twin)
    expected = _output(twin, state, inputs)
    shuffled = [torch.randperm(group.size) for group in groups]

    def change(chosen: Sequence[int]) -> float:
        found = _output(
            twin,
            permuted(state, [groups[k] for k in chosen], [shuffled[k] for k in chosen]),
            inputs,
        )
        return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))

    whole = change(range(len(groups)))
    if whole <= TOLERANCE:
        return whole
    for k, group in enumerate(groups):
        alone = change([k])
        if not alone <= TOLERANCE:
            raise ValueError(
                f"permuting the units of group {group.name!r} "
                f"({', '.join(f'{a.name}[{a.dim}]' for a in group.axes)}) changes the output by "
                f"{alone:.2g}, relatively: they are no group. Give groups={{name: [(parameter, "
                "dim), ...]}} of your own, without it or with all that its units index."
            )
    raise ValueError(
        f"permuting all groups together changes the output by {whole:.2g}, and none alone does. "
        "Give groups={name: [(parameter, dim), ...]} of your own."
    )


def _twin(module: nn.Module, batch: Any) -> tuple[nn.Module, list[Any]]:
    """Return a float64 copy on the CPU, in evaluation mode, and its input."""
    given = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(given, Tensor):
        raise ValueError(
            f"batch is of type {type(batch).__name__}, in which the module's input is not found: "
            "give the input as a tensor, or a pair of it and the target."
        )
    twin = copy.deepcopy(module).cpu().double().eval()
    # Parameters that are not trained are scrambled as well.
    for p in twin.parameters():
        p.requires_grad_(False)
    given = given.detach().cpu()
    return twin, [given.double() if given.is_floating_point() else given.clone()]


def _scrambled(twin: nn.Module) -> dict[str, Tensor]:
    """Return random weights of about the size that they have, and random statistics."""
    state = {n: t.clone() for n, t in twin.state_dict().items() if isinstance(t, Tensor)}
    first = {id(p): n for n, p in twin.named_parameters()}
    for name, p in twin.named_parameters(remove_duplicate=False):
        if first[id(p)] == name:
            state[name] = p + (0.1 + p.std(unbiased=False)) * torch.randn_like(p)
        else:
            state[name] = state[first[id(p)]]
    for name, m in twin.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            for key, low in (("running_mean", 0.0), ("running_var", 0.5)):
                full = f"{name}.{key}".lstrip(".")
                state[full] = low + torch.rand_like(state[full])
    return state


def _output(twin: nn.Module, state: Mapping[str, Tensor], inputs: Sequence[Any]) -> Tensor:
    twin.load_state_dict(dict(state))
    with torch.no_grad():
        found = twin(*inputs)
    if isinstance(found, Mapping):
        found = [t for t in found.values() if isinstance(t, Tensor)]
    if isinstance(found, (tuple, list)):
        found = torch.cat([t.reshape(-1).double() for t in found if isinstance(t, Tensor)])
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the module returns {type(found).__name__}, which cannot be compared: give a module "
            "or submodule that returns tensors."
        )
    return found


def _is_residual(groups: Sequence[Group]) -> bool:
    """Return whether several layers make the units of one group."""
    return any(
        len({axis.name for axis in g.axes if axis.dim == 0 and axis.name.endswith("weight")}) > 2
        for g in groups
    )


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> float:
    pairs = [(a[n].double().reshape(-1), b[n].double().reshape(-1)) for n in names]
    start, end = (torch.cat(side) for side in zip(*pairs, strict=True))
    return float((start - end).norm() / (0.5 * (start.norm() + end.norm())))

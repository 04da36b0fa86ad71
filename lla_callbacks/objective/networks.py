"""Networks as users hand them over (modules, state dicts, files), and whether they are alike."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.objective.checks import module_of, shown
from lla_callbacks.objective.evaluation import Statistics
from lla_callbacks.objective.objective import trainable
from lla_callbacks.objective.state import Snapshot

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class Networks:
    """Several networks of one architecture.

    Attributes:
        names: Of the trained parameters, a tied one under its first name.
        weights: For each network its trained parameters, in the order of ``names``, on the
            module's device.
        statistics: For each network the running statistics of its batch norms.
        rests: For each network everything else in its state dict.
        tied: Further names of tied parameters to their first ones.
        common: Frozen parameters and buffers that all networks share.
    """

    names: tuple[str, ...]
    weights: tuple[list[Tensor], ...]
    statistics: tuple[Statistics, ...]
    rests: tuple[dict[str, Tensor], ...]
    tied: dict[str, str]
    common: Snapshot

    @property
    def mark(self) -> str:
        """A hash of all weights, which tells whether others are the same."""
        found = hashlib.sha256()
        for tensor in (w for weights in self.weights for w in weights):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return found.hexdigest()


def save_whole(thing: Any, path: Path) -> Path:
    """Write by ``torch.save``, whole or not at all, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        torch.save(thing, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def networks_of(module: nn.Module, networks: Sequence[Any], roles: Sequence[str]) -> Networks:
    """Return networks that fit a module and differ in nothing but weights and statistics.

    Args:
        module: Tells the architecture, and which parameters are trained; it is not changed.
        networks: Modules, state dicts, Lightning checkpoints, or paths of either.
        roles: What messages call them.

    Raises:
        ValueError: If a network lacks something or has another shape, or if frozen
            parameters or buffers other than batch norm's differ; by name.
        TypeError: If a network is none of the above.
    """
    module_of("module", module)
    states = [state_of(n, role) for n, role in zip(networks, roles, strict=True)]
    own = module.state_dict()
    first = {id(p): name for name, p in module.named_parameters()}
    trained = trainable(module)
    tied = {
        name: first[id(p)]
        for name, p in module.named_parameters(remove_duplicate=False)
        if first[id(p)] != name and first[id(p)] in trained
    }
    norms = _statistics_names(module)
    for role, state in zip(roles, states, strict=True):
        _check_fits(role, state, {n: t for n, t in own.items() if isinstance(t, Tensor)}, trained)
    rest = [
        name
        for name, value in own.items()
        if isinstance(value, Tensor) and name not in trained and name not in tied
    ]
    for role, state in zip(roles[1:], states[1:], strict=True):
        _check_same(roles[0], states[0], role, state, [n for n in rest if n not in norms])
    for role, state in zip(roles, states, strict=True):
        for name, origin in tied.items():
            if name in state and not torch.equal(state[name].cpu(), state[origin].cpu()):
                raise ValueError(
                    f"{role}: {name!r} and {origin!r} are one parameter in the module, and two in "
                    "what was given: give a network whose weights are tied too."
                )
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    shared = {n: states[0][n] for n in rest if n not in norms}
    return Networks(
        tuple(trained),
        tuple([_like(state[n], p) for n, p in trained.items()] for state in states),
        tuple(_statistics(module, state) for state in states),
        tuple({n: state[n].detach().cpu().clone() for n in rest} for state in states),
        tied,
        Snapshot(
            {n: t for n, t in shared.items() if n in frozen},
            {n: t for n, t in shared.items() if n not in frozen},
        ),
    )


def network_of(name: str, network: Any) -> Any:
    """Return what may be a network: a module, a state dict, or a path that is looked at later.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(network, (nn.Module, Path)) or (isinstance(network, (str, Mapping)) and network):
        return network
    raise TypeError(
        f"{name} is {shown(network)}; give a module, a state dict, or the path of a checkpoint."
    )


def state_of(network: Any, role: str) -> Mapping[str, Tensor]:
    """Return the state dict of a module, a Lightning checkpoint, or a file of either.

    Raises:
        ValueError: If a file cannot be read.
        TypeError: If it is none of these.
    """
    if isinstance(network, (str, Path)):
        path = Path(network)
        if not path.is_file():
            raise ValueError(
                f"{role} is {shown(str(network))}, which is no file; give a checkpoint."
            )
        try:
            network = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{role}: {path} cannot be read with weights_only=True ({error}). Load it yourself "
                "and give the state dict."
            ) from error
    if isinstance(network, nn.Module):
        network = network.state_dict()
    if isinstance(network, Mapping) and isinstance(network.get("state_dict"), Mapping):
        network = network["state_dict"]
    if not isinstance(network, Mapping):
        raise TypeError(
            f"{role} is of type {type(network).__name__}; give a module, a state dict, or the path "
            "of a checkpoint."
        )
    found: dict[str, Tensor] = {n: t for n, t in network.items() if isinstance(t, Tensor)}
    return found


def _check_fits(
    role: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor], trained: Mapping[str, Any]
) -> None:
    missing = [name for name in own if name not in state]
    if missing:
        raise ValueError(
            f"{role} lacks {_few(missing)}; it has {_few(list(state))}: give a network of the "
            "module's own architecture, its names as the module has them."
        )
    for name, value in own.items():
        if state[name].shape != value.shape and not isinstance(value, nn.UninitializedParameter):
            raise ValueError(
                f"{role}: {name!r} has shape {tuple(state[name].shape)}, and the module's has "
                f"{tuple(value.shape)}. Give a network of the module's own architecture."
            )
    for name in trained:
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{role}: {name!r} is not finite. Give a network that has trained.")


def _check_same(
    first_role: str,
    first: Mapping[str, Tensor],
    role: str,
    other: Mapping[str, Tensor],
    names: Sequence[str],
) -> None:
    for name in names:
        if not torch.equal(first[name].cpu(), other[name].cpu()):
            raise ValueError(
                f"{first_role} and {role} differ in {name!r}, which is not trained here and has no "
                "place on a curve. Give networks that share it, or make it trainable "
                "(requires_grad=True) if it is a parameter."
            )


def _statistics_names(module: nn.Module) -> set[str]:
    """Return the names of batch norms' running statistics."""
    return {
        f"{name}.{key}".lstrip(".")
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm)
        for key in STATISTICS
    }


def _statistics(module: nn.Module, state: Mapping[str, Tensor]) -> Statistics:
    found = []
    for name, m in module.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            mean, var = (
                _like(state[f"{name}.{key}".lstrip(".")], m.running_mean) for key in STATISTICS[:2]
            )
            found.append((m, mean, var))
    return found


def _like(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy where, and as, another tensor is."""
    return value.detach().to(like.device, like.dtype, copy=True)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more if names else "nothing"

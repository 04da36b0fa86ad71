"""Groups of units that can be permuted together without changing what a network computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One dimension of a parameter or buffer whose entries belong to the units of a group.

    Attributes:
        name: In the state dict.
        dim: Which dimension.
        repeat: Neighbouring entries of a unit: after flattening images, their number of pixels.
    """

    name: str
    dim: int
    repeat: int = 1


@dataclass(frozen=True)
class Group:
    """Units that are permuted together.

    Attributes:
        name: For messages: the layer that makes the units.
        size: Number of units.
        axes: Where they are.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]


def groups_of(
    spec: Mapping[str, Sequence[Sequence[object]]], state: Mapping[str, Tensor]
) -> list[Group]:
    """Return the groups of a user's own specification.

    Args:
        spec: Name of a group to its axes: ``(name in the state dict, dim)`` or ``(name, dim,
            repeat)``.
        state: A state dict, for sizes.

    Raises:
        ValueError: If a name or a dimension does not exist, or sizes differ within a group.
    """
    found = []
    for group, entries in spec.items():
        axes = []
        sizes = set()
        for entry in entries:
            if isinstance(entry, str) or len(entry) not in (2, 3):
                raise ValueError(
                    f"group {group!r} has the entry {entry!r}; give (name, dim) or (name, dim, "
                    "repeat)."
                )
            name, dim = str(entry[0]), int(str(entry[1]))
            repeat = int(str(entry[2])) if len(entry) == 3 else 1
            if name not in state or not -state[name].ndim <= dim < state[name].ndim:
                raise ValueError(
                    f"group {group!r}: there is no dimension {dim} of {name!r}; give names and "
                    "dimensions as module.state_dict() has them."
                )
            axes.append(Axis(name, dim % state[name].ndim, repeat))
            sizes.add((state[name].shape[dim] // repeat, state[name].shape[dim] % repeat))
        if len(sizes) != 1 or next(iter(sizes))[1]:
            raise ValueError(
                f"group {group!r} has axes of different sizes: {sorted(sizes)} (units, rest)."
            )
        found.append(Group(group, next(iter(sizes))[0], tuple(axes)))
    return found


def permuted(
    state: Mapping[str, Tensor], groups: Sequence[Group], permutations: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return a state dict whose unit ``i`` is the given one's unit ``permutation[i]``."""
    found = dict(state)
    for group, permutation in zip(groups, permutations, strict=True):
        for axis in group.axes:
            tensor = found[axis.name]
            found[axis.name] = tensor.index_select(
                axis.dim, entries(permutation, axis.repeat).to(tensor.device)
            )
    return found


def entries(permutation: Tensor, repeat: int) -> Tensor:
    """Return the order of entries that a permutation of units means."""
    if repeat == 1:
        return permutation
    return (permutation[:, None] * repeat + torch.arange(repeat)).reshape(-1)

"""Directions in weight space: random, curved, travelled, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.accumulation import norm as length_of
from lla_callbacks.linalg.distributed import whole
from lla_callbacks.linalg.errors import NotYetError
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.linalg.vectors import Vectors as Held
from lla_callbacks.objective.checks import one_of
from lla_callbacks.objective.precision import original_of
from lla_callbacks.slices.spread_filters import filters_of

Normalization = Literal["filter", "layer", "weight", "none"]
# What becomes of parameters with one dimension (biases, gains of norms) under filter or layer
# normalization.
Vectors = Literal["zero", "tensor", "entry"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the space of the trainable parameters.

    Attributes:
        vector: Flat, shape ``(num_params,)``, in the order of the module's parameters. Where they
            are spread over processes, what this one has of each.
        name: What it is, in a word or two, as axes are labelled.
        unit: What a coordinate of 1 means.
        reach: Half of the range that shows something, in units of the direction.
        eigenvalue: Curvature along it, where it is an eigenvector of the Hessian.
        residual: That eigenvalue's residual.
        slope: Gradient of the loss along it, where it is known.
        settled: Whether an eigenvector is the one it was asked for as; True for all others.
    """

    vector: Tensor
    name: str
    unit: str = "‖v‖"
    reach: float = 1.0
    eigenvalue: float | None = None
    residual: float | None = None
    slope: float | None = None
    settled: bool = True

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name}  [{self.unit}]"


def random_directions(
    module: nn.Module,
    space: ParameterSpace,
    count: int = 2,
    *,
    seed: int = 0,
    normalization: Normalization = "filter",
    vectors: Vectors = "zero",
) -> tuple[Direction, ...]:
    """Return one or two Gaussian directions, orthogonal and normalized, both exactly.

    Entries are drawn from N(0, 1), on the CPU, by the seed alone: the same for each firing of
    a run; then scaled by the present weights (Li et al. 2018, section 4):

    * ``"filter"``: each filter of a direction gets the norm of that filter of the weights.
      Pictures are then invariant to rescalings of ReLU networks.
    * ``"layer"``: each tensor gets the norm of that tensor of the weights.
    * ``"weight"``: each entry is multiplied by its weight.
    * ``"none"``: nothing is scaled.

    The second direction is made orthogonal to the first *filter by filter, before* it is
    scaled, so that scaling cannot undo it: the cosine is at rounding (1e-8), the norms too.
    A filter with a single entry cannot be orthogonal to another; signs and the remaining
    filters make up for it, where they can (:meth:`Filters.orthogonal_to`).

    Args:
        module: Tells which axis of a parameter counts filters.
        space: Layout of the flat vectors.
        count: 1 or 2.
        seed: Fixes the draw.
        normalization: See above.
        vectors: One-dimensional parameters under ``"filter"`` and ``"layer"``: ``"zero"`` leaves
            them where they are (Li et al., whose figures ignore biases and batch norm),
            ``"tensor"`` scales each to its tensor's norm (LLA), ``"entry"`` takes each entry
            for a filter.

    Raises:
        ValueError: If a setting is not allowed.
    """
    check_normalization(normalization, vectors)
    if count not in (1, 2):
        raise ValueError(f"count is {count}; give 1 or 2.")
    filters = filters_of(module, space, normalization, vectors)
    raw = [filters.drawn(seed, 2, k) for k in range(count)]
    found = [filters.scaled(raw[0])]
    if filters.num_moved() == 0:
        raise ValueError(
            "every parameter has one dimension, and vectors is 'zero': nothing moves. Give "
            "vectors='tensor' or 'entry'."
        )
    if count == 2:
        found.append(filters.orthogonal_to(raw[0], raw[1]))
    unit = UNITS[normalization]
    return tuple(
        Direction(vector.to(space.device, space.dtype), f"random {k + 1}", unit)
        for k, vector in enumerate(found)
    )


def normalized(
    direction: Direction,
    module: nn.Module,
    space: ParameterSpace,
    normalization: Normalization,
    vectors: Vectors = "zero",
) -> Direction:
    """Return a direction scaled like a random one; see :func:`random_directions`."""
    check_normalization(normalization, vectors)
    filters = filters_of(module, space, normalization, vectors)
    vector = filters.scaled(direction.vector.cpu().double())
    vector = vector.to(space.device, space.dtype)
    return Direction(vector, direction.name, UNITS[normalization])


def direction_of(thing: Any, space: ParameterSpace, name: str = "your direction") -> Direction:
    """Return the user's own direction, taken as it is.

    Args:
        thing: A :class:`Direction`; a flat tensor ``(num_params,)``; a mapping of parameter
            names to tensors (parameters that it does not name stand still); or tensors in the
            order of the trainable parameters.
        space: Layout of the flat vectors.
        name: For the axis.

    Raises:
        ValueError: If it does not fit the parameters, or is not finite.
    """
    if isinstance(thing, Direction):
        vector, name = thing.vector, thing.name
    elif isinstance(thing, Tensor):
        vector = thing.detach().reshape(-1)
    elif isinstance(thing, Mapping):
        vector = flat_weights(thing, space, missing=0.0)
    elif isinstance(thing, Sequence) and all(isinstance(t, Tensor) for t in thing):
        vector = torch.cat([whole(t.detach()).reshape(-1).cpu() for t in thing])
    else:
        raise ValueError(
            f"a direction of type {type(thing).__name__} is not known: give a name, a flat tensor, "
            "a dict of parameter names to tensors, or tensors in the order of the parameters."
        )
    given = len(vector)
    if isinstance(thing, (Direction, Mapping)) and given == space.length:
        # As this process has it already.
        given = space.dim
    elif given == space.dim:
        vector = space.scattered(vector)
    if given != space.dim:
        raise ValueError(
            f"directions: the direction {name!r} has {given} entries and the module "
            f"{space.dim} trainable parameters: give one entry for each."
        )
    vector = vector.to(space.device, space.dtype)
    if not space.vectors().finite(vector):
        raise ValueError(f"directions: {name!r} is not finite: give finite entries.")
    if isinstance(thing, Direction):
        return replace(thing, vector=vector)
    return Direction(vector, name, "its length")


def difference(start: Any, end: Any, space: ParameterSpace, name: str = "difference") -> Direction:
    """Return ``end - start`` of two checkpoints: a coordinate of 1 leads all the way.

    Args:
        start: A module or a state dict.
        end: Another.
        space: Layout of the flat vectors.
        name: For the axis.
    """
    vector = flat_weights(end, space) - flat_weights(start, space)
    return Direction(vector, name, "difference of the checkpoints", reach=1.0)


def gradient_direction(
    gradient: Tensor, loss: float, norm: float, length: float | None = None
) -> Direction:
    """Return the unit vector along the gradient, uphill.

    Args:
        gradient: Flat.
        loss: The loss there; the range is where the slope alone would remove all of it.
        norm: Norm of the weights, which bounds the range.
        length: Norm of the gradient, where it is in pieces.
    """
    length = length_of(gradient) if length is None else length
    if length == 0:
        raise ValueError("the gradient is zero here, so it has no direction: choose another.")
    reach = min((abs(loss) or 1.0) / length, norm or 1.0)
    return Direction(gradient / length, "gradient", "‖v‖", reach, slope=length)


def adam_directions(
    optimizer: torch.optim.Optimizer, space: ParameterSpace
) -> tuple[Direction, Direction]:
    """Return Adam's first and second moments as directions, LLA's "adam" axes.

    Raises:
        NotYetError: If the optimizer keeps no such moments (yet).
    """
    found = []
    for key, name in (("exp_avg", "Adam m"), ("exp_avg_sq", "Adam v")):
        parts = [optimizer.state.get(original_of(tensor), {}).get(key) for tensor in space.tensors]
        if all(part is None for part in parts):
            raise NotYetError(
                f"{type(optimizer).__name__} keeps no {key} of these parameters (before its first "
                "step, none does): take Adam's moments after a step of Adam, or other directions."
            )
        found.append(Direction(space.flatten(parts), name, "moment"))
    return found[0], found[1]


def flat_weights(source: Any, space: ParameterSpace, missing: float | None = None) -> Tensor:
    """Return a module's or a state dict's weights as one vector, shape ``(num_params,)``.

    Args:
        source: A module, or a mapping of names to tensors, such as a state dict.
        space: Which parameters, in which order.
        missing: Fills in for parameters that the mapping does not name; ``None``: an error.

    Raises:
        ValueError: If a parameter is missing or has another shape.
    """
    named: Mapping[str, Any] = (
        dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    )
    parts = []
    for name, like in zip(space.names, space.tensors, strict=True):
        tensor = named.get(name)
        if tensor is None and missing is not None:
            tensor = torch.full_like(like, missing)
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else "missing"
            raise ValueError(
                f"parameter {name!r} has shape {tuple(like.shape)} in the module and is {shape} "
                "in what was given: give a state dict of the same architecture."
            )
        parts.append(tensor.to(space.device))
    unknown = set() if missing is None else set(named) - set(space.names)
    if unknown:
        raise ValueError(
            f"no trainable parameter is named {sorted(unknown)[0]!r}; they are: "
            f"{', '.join(space.names)}."
        )
    return space.flatten(parts)


def cosine(a: Direction, b: Direction, space: ParameterSpace | None = None) -> float:
    """Return the cosine of the angle between two directions; 0 where one has no length.

    Args:
        a: One.
        b: The other.
        space: Layout of their vectors; ``None``: they are whole.
    """
    # On the CPU first: some devices know no float64.
    held = Held(len(a.vector)) if space is None else space.vectors()
    first, second = a.vector.cpu().double(), b.vector.cpu().double()
    lengths = held.norm(first) * held.norm(second)
    return held.inner(first, second) / lengths if lengths else 0.0


def check_normalization(normalization: str, vectors: str) -> None:
    """Raise a ValueError for a normalization or a treatment that does not exist."""
    for name, value, kind in (
        ("normalization", normalization, Normalization),
        ("vectors", vectors, Vectors),
    ):
        one_of(name, value, kind)


UNITS: dict[Normalization, str] = {
    "filter": "filter norm",
    "layer": "layer norm",
    "weight": "weight",
    "none": "N(0, 1)",
}

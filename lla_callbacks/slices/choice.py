"""From names of directions to directions, each computed once, and only if asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.linalg.errors import NotYetError, forgetful
from lla_callbacks.linalg.sharing import Alone, OutOfStepError, Share, all_or_none
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.checks import shown
from lla_callbacks.objective.grid import centred, spanning
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import space_of
from lla_callbacks.slices.directions import (
    Direction,
    Normalization,
    Vectors,
    adam_directions,
    direction_of,
    normalized,
    random_directions,
)
from lla_callbacks.slices.eigenvectors import MOST_STEPS, NAMES, Known, curved_directions
from lla_callbacks.slices.trajectory import Path, principal_components

SINGLE = ("random", "random2", *NAMES, "gradient", "update", "adam_m", "adam_v", "pc1", "pc2")
PAIRS = {
    "random": ("random", "random2"),
    "hessian": ("top1", "top2"),
    "hessian_ends": ("top1", "bottom1"),
    "adam": ("adam_m", "adam_v"),
    "trajectory": ("pc1", "pc2"),
}


def line_names(value: Any) -> tuple[Any, ...]:
    """Return what a line's ``directions`` asks for, one entry.

    Raises:
        ValueError: If it is a name that does not exist, or not one direction.
    """
    if isinstance(value, (tuple, list)) and not _is_tensors(value):
        if len(value) != 1:
            raise ValueError(f"directions has {len(value)} entries; a line takes one.")
        value = value[0]
    return (_checked(value),)


def plane_names(value: Any) -> tuple[Any, Any]:
    """Return what a plane's ``directions`` asks for, two entries.

    Raises:
        ValueError: If it is a name that does not exist, or not two directions.
    """
    if isinstance(value, str) and value in PAIRS:
        return PAIRS[value]
    if isinstance(value, str) and "+" in value:
        value = [part.strip() for part in value.split("+")]
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(
            f"directions is {shown(value)}; give one of {', '.join(PAIRS)}, or two directions: "
            f"names among {', '.join(SINGLE)} (as a pair or joined by '+'), tensors, or Directions."
        )
    first, second = map(_checked, value)
    if first == "random" and second == "random":
        second = "random2"
    return first, second


def _checked(value: Any) -> Any:
    if isinstance(value, str) and value not in SINGLE:
        raise ValueError(f"directions names {shown(value)}; give one of: {', '.join(SINGLE)}.")
    tensors = isinstance(value, Sequence) and value and all(isinstance(t, Tensor) for t in value)
    names_none = isinstance(value, Mapping) and not value
    if names_none or not (tensors or isinstance(value, (str, Direction, Tensor, Mapping))):
        raise ValueError(
            f"directions holds {shown(value)}; give a name among {', '.join(SINGLE)}, a flat "
            "tensor, a dict of parameter names to tensors, or tensors in the order of the "
            "parameters."
        )
    return value


def _is_tensors(value: Sequence[Any]) -> bool:
    return len(value) > 1 and all(isinstance(t, Tensor) for t in value)


def plane_coordinates(
    directions: tuple[Direction, Direction], path: Path | None, count: int, reach: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the coordinates of a plane: so far as each direction reaches, or around a path.

    Args:
        directions: Two.
        path: A path that the plane should show whole, with a margin of a tenth.
        count: Points a side.
        reach: Multiple of the directions' own.
    """
    if path is None:
        first, second = (centred(reach * d.reach, count) for d in directions)
        return first, second
    low, high = path.points.amin(0), path.points.amax(0)
    margin = 0.1 * (high - low).clamp(min=1e-12)
    return (
        spanning(float(low[0] - margin[0]), float(high[0] + margin[0]), count),
        spanning(float(low[1] - margin[1]), float(high[1] + margin[1]), count),
    )


@dataclass
class DirectionSource:
    """Where directions come from at one moment.

    Attributes:
        objective: The loss; its module has the weights.
        normalization: Of random directions and moments.
        vectors: Likewise.
        seed: Of random directions and of Lanczos start vectors.
        optimizer: Holds Adam's moments.
        previous: Flat weights before the last update.
        weights: Flat weights along the path of training, oldest first.
        steps: Their optimizer steps, and that of the present weights.
        num_steps: Largest depth of the Lanczos run for eigenvectors.
        share: Processes that must agree; the first one's directions count.
        path: The path of training on its plane, once its components were asked for.
        listener: Called after products, with their number.
        expected: Names that will be asked for sooner or later.
        known: What is known of directions already.
    """

    objective: Objective
    normalization: Normalization = "filter"
    vectors: Vectors = "zero"
    seed: int = 0
    optimizer: torch.optim.Optimizer | None = None
    previous: Tensor | None = None
    weights: Sequence[Tensor] = ()
    steps: Sequence[int] = ()
    num_steps: int = MOST_STEPS
    share: Share | None = None
    path: Path | None = None
    listener: Callable[[int], object] | None = None
    expected: Sequence[str] = ()
    known: Known = field(default_factory=Known)
    _failed: Exception | None = None
    _known: dict[str, Direction] = field(default_factory=dict)
    _agreed: Mapping[str, Direction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, direction in self.known.directions.items():
            vector = direction.vector.to(self._space().device)
            self._known[name] = self._same(replace(direction, vector=vector))
        # In all processes alike, whatever happens later.
        self._agreed = dict(self._known)

    def prepare(self, names: Sequence[Any]) -> None:
        """Compute those of these directions that need derivatives, by one Lanczos run."""
        curved = {*NAMES, "gradient"}.intersection(n for n in names if isinstance(n, str))
        curved -= self._known.keys()
        if curved:
            # All that any slice will ask for, by one Lanczos run.
            curved |= {*NAMES, "gradient"}.intersection(self.expected) - self._known.keys()
            if self._failed is not None:
                raise self._failed
            try:
                found = all_or_none(
                    self.share or Alone(),
                    lambda: curved_directions(
                        self.objective,
                        curved,
                        seed=self.seed,
                        num_steps=self.num_steps,
                        listener=self.listener,
                        start=self.known.start,
                    ),
                )
            except OutOfStepError:
                raise
            except Exception as error:
                # Another slice would fail in the same way, at the same cost.
                self._failed = forgetful(error)
                raise
            self._known |= {name: self._same(d) for name, d in found.items()}

    def get(self, names: Sequence[Any]) -> tuple[Direction, ...]:
        """Return directions by name, or the user's own as they are.

        Raises:
            ValueError: If something that a name needs is not there; the message says what.
        """
        named = [n for n in names if isinstance(n, str)]
        self.prepare([n for n in named if n not in self._known])
        return tuple(
            self._named(n)
            if isinstance(n, str)
            else direction_of(n, self._space(), f"your direction {k}")
            for k, n in enumerate(names, start=1)
        )

    def forget(self) -> None:
        """Drop directions that this process may know and another does not, after trouble."""
        if self.share is not None and self.share.size > 1:
            self._known = dict(self._agreed)
            self.path = None

    def path_on(self, names: Sequence[Any]) -> Path | None:
        """Return the path of training, if these are the axes that it is projected on."""
        both = [n for n in names if isinstance(n, str)] == ["pc1", "pc2"]
        return self.path if both else None

    def is_normalized(self, names: Sequence[Any]) -> bool:
        """Return whether the normalization plays a part in these directions."""
        scaled = ("random", "random2", "adam_m", "adam_v")
        return any(isinstance(n, str) and n in scaled for n in names)

    def _named(self, name: str) -> Direction:
        if name not in self._known:
            self._known |= self._made(name)
        return self._known[name]

    def _made(self, name: str) -> Mapping[str, Direction]:
        module, space = self.objective.module, self._space()
        if name.startswith("random"):
            pair = random_directions(
                module,
                space,
                seed=self.seed,
                normalization=self.normalization,
                vectors=self.vectors,
            )
            return dict(zip(("random", "random2"), pair, strict=True))
        if name in ("adam_m", "adam_v"):
            if self.optimizer is None:
                raise ValueError(f"the direction {name!r} needs optimizer=, an Adam.")
            moments = [
                normalized(d, module, space, self.normalization, self.vectors)
                for d in adam_directions(self.optimizer, space)
            ]
            return dict(zip(("adam_m", "adam_v"), moments, strict=True))
        if name == "update":
            if self.previous is None:
                raise NotYetError("the direction 'update' needs the weights before the last step.")
            present = space.flatten(space.tensors)
            step = present - self.previous.to(present)
            if space.vectors().largest(step) == 0:
                raise ValueError("the last update was zero, so it has no direction.")
            # Five updates either way: where the last steps came from and where they lead.
            return {"update": Direction(step, "last update", "updates", reach=5.0)}
        if len(self.weights) < 2:
            raise NotYetError(
                f"the direction {name!r} needs the path of training: at least two earlier "
                "checkpoints that differ from the present weights."
            )
        present = space.flatten(space.tensors)
        pair, self.path = principal_components(self.weights, present, space, self.steps)
        return dict(zip(("pc1", "pc2"), map(self._same, pair), strict=True))

    def _same(self, direction: Direction) -> Direction:
        """Return the first process's direction: rounding may tell processes apart."""
        if self.share is None or self.share.size == 1 or self._space().is_spread:
            # Parts of one direction, which came by sums that all share.
            return direction
        return replace(direction, vector=self.share.same(direction.vector))

    def _space(self) -> ParameterSpace:
        return space_of(self.objective)

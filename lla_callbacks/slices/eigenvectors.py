"""Eigenvectors of the Hessian as directions, each with its eigenvalue and a range that shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lla_callbacks.linalg.lanczos import LanczosRun, lanczos
from lla_callbacks.linalg.loss_operator import LossOperator
from lla_callbacks.linalg.outermost import Seen
from lla_callbacks.linalg.probes import generator
from lla_callbacks.objective.engines import with_hessian
from lla_callbacks.objective.objective import Objective
from lla_callbacks.slices.directions import Direction, gradient_direction

NAMES = ("top1", "top2", "bottom1")
_LABELS = {"top1": "top eigenvector", "top2": "2nd eigenvector", "bottom1": "bottom eigenvector"}
_PLACES = {"top1": -1, "top2": -2, "bottom1": 0}
# On which side of the eigenvalue a Ritz value lies that has not settled.
_SIDES = {"top1": "≥", "top2": "≥", "bottom1": "≤"}
# Residual at which the run stops, as a share of the eigenvalue itself, and its largest depth. A top
# eigenvector of a trained ResNet-20 takes about 20 products to 1 %. A small negative eigenvalue
# takes more: on an MLP on digits, late in training, 36 to 48 where it is 1/190 of the largest, and
# a half more until it has stood there for a while.
RTOL = 0.01
MOST_STEPS = 96
MOST_STEPS_OF_TOP = 48
# What a run that goes on from a Ritz vector has of noise: whatever that misses. Only a run for the
# largest alone does so: for a place, such as the second, up to 26 of 200 were wrong where 11 of a
# run from noise were (docs/benchmarks/coverage.md).
NOISE = 1.0


@dataclass(frozen=True, eq=False)
class Begun:
    """What a shallow run leaves to one that goes on.

    Attributes:
        vector: A unit vector, its best one.
        seen: What it has seen of the spectrum.
    """

    vector: Tensor
    seen: tuple[Seen, ...]


@dataclass(frozen=True, eq=False)
class Known:
    """What somebody else's Lanczos run tells of the directions that are wanted.

    Attributes:
        directions: Those whose eigenvector it has found, and the gradient, by name.
        start: What it has of the largest one's, where that alone is wanted and not found.
    """

    directions: Mapping[str, Direction] = field(default_factory=dict)
    start: Begun | None = None


def curved_directions(
    objective: Objective,
    wanted: set[str],
    *,
    seed: int,
    num_steps: int = MOST_STEPS,
    listener: Callable[[int], object] | None = None,
    start: Begun | None = None,
) -> dict[str, Direction]:
    """Return the directions of the largest, second largest and smallest eigenvalue, and more.

    One Lanczos run serves all of them. Each is a unit vector, uphill, and reaches to where the
    parabola of its eigenvalue has risen (or fallen) by the loss itself,
    ``sqrt(2 L / |lambda|)``, but never further than the norm of the weights. The run ends once
    each of them has a residual of 1 % of its own eigenvalue, however small that is, has stayed in
    its place, and none is likely to lie more than 2 % further out
    (:meth:`~lla_callbacks.linalg.lanczos.LanczosRun.settled`; the largest alone need not have
    stayed). What has not by then is
    called an unsettled Ritz vector and not an eigenvector: there, something else may be the
    second or the lowest.

    Args:
        objective: The loss.
        wanted: Among ``"top1"``, ``"top2"``, ``"bottom1"``, ``"gradient"``.
        seed: Of the start vector.
        num_steps: Largest depth of the run.
        listener: Called after products, with their number.
        start: What is known of the largest one's, where it is the only one; see :class:`Known`.

    Raises:
        MeasurementError: If the loss or a product is not finite or cannot be had.
        ValueError: If there are fewer eigenvalues than asked for.
    """

    def use(hessian: LossOperator) -> dict[str, Direction]:
        hessian.listener = listener
        return _directions(hessian, wanted, seed, num_steps, start)

    return with_hessian(objective, use)[0]


def _directions(
    hessian: LossOperator,
    wanted: set[str],
    seed: int,
    num_steps: int,
    known: Begun | None,
) -> dict[str, Direction]:
    found: dict[str, Direction] = {}
    if "gradient" in wanted:
        found["gradient"] = _gradient(hessian)
    names = [name for name in NAMES if name in wanted]
    if not names:
        return found
    alone = names == ["top1"]
    known = known if alone else None
    start, noise = _start(hessian, seed, known)
    places = [_PLACES[name] for name in names]
    num_steps = min(num_steps, MOST_STEPS_OF_TOP) if alone else num_steps
    run = lanczos(
        hessian,
        start,
        num_steps,
        rtol=RTOL,
        which="max" if alone else places,
        basis_device=hessian.basis_device(num_steps),
        half=hessian.keeps_half(num_steps),
        noise=noise,
        earlier=() if known is None else known.seen,
    )
    if "top2" in names and run.num_steps < 2:
        raise ValueError("the Hessian has one eigenvalue only: choose 'top1' without 'top2'.")
    return found | {
        name: direction for name, (direction, _) in _of_run(hessian, run, names).items()
    }


def known_directions(hessian: LossOperator, run: LanczosRun, wanted: Sequence[str]) -> Known:
    """Return what somebody else's Lanczos run tells of the directions that are wanted.

    Those whose eigenvector it has found as surely as a run of :func:`curved_directions` would, and
    the gradient, which costs nothing. Vectors are where the run's basis is.

    Args:
        hessian: The operator, still in use.
        run: A run on it from a random start.
        wanted: Names, among others that have nothing to do with the Hessian.
    """
    home = run.basis.device
    found: dict[str, Direction] = {}
    if "gradient" in wanted:
        found["gradient"] = _gradient(hessian)
    names = [name for name in NAMES if name in wanted and run.num_steps >= 2]
    made = _of_run(hessian, run, names)
    found |= {name: direction for name, (direction, settled) in made.items() if settled}
    left = None
    if names == ["top1"] and "top1" not in found:
        left = Begun(made["top1"][0].vector.to(home), run.seen)
    return Known({n: replace(d, vector=d.vector.to(home)) for n, d in found.items()}, left)


def _start(hessian: LossOperator, seed: int, known: Begun | None) -> tuple[Tensor, float]:
    """Return a start vector and the size of the noise in it.

    Noise alone, or what is known of an eigenvector and a little of it.
    """
    noise = hessian.rademacher(generator(seed, 3))
    if known is None:
        return noise, 1.0
    size = NOISE / hessian.vectors.norm(noise)
    return hessian.vectors.cut(known.vector).to(noise) + size * noise, size


def _gradient(hessian: LossOperator) -> Direction:
    gradient = hessian.vectors.joined(hessian.gradient)
    slope = hessian.vectors.norm(hessian.gradient)
    return gradient_direction(gradient, hessian.loss, hessian.weight_norm(), slope)


def _of_run(
    hessian: LossOperator, run: LanczosRun, names: Sequence[str]
) -> dict[str, tuple[Direction, bool]]:
    """Return the directions of these names, and whether each has settled."""
    found: dict[str, tuple[Direction, bool]] = {}
    length = hessian.weight_norm()
    for name in names:
        place = _PLACES[name]
        index = place % run.num_steps
        value, residual = float(run.values[index]), float(run.residuals[index])
        alone = list(names) == ["top1"]
        settled = run.is_largest(RTOL) if alone else run.settled(place, RTOL)
        label = _LABELS[name] if settled else f"unsettled Ritz vector for the {_LABELS[name]}"
        vector = run.vectors([index])[:, 0].to(hessian.device)
        vector = vector / hessian.vectors.norm(vector)
        slope = hessian.vectors.inner(hessian.gradient, vector)
        if slope < 0:
            vector, slope = -vector, -slope
        direction = Direction(
            hessian.vectors.joined(vector),
            f"{label}, λ {'=' if settled else _SIDES[name]} {value:.3g}",
            "‖v‖",
            _reach(hessian.loss, value, length),
            value,
            residual,
            slope,
            settled=settled,
        )
        found[name] = direction, settled
    return found


def _reach(loss: float, eigenvalue: float, length: float) -> float:
    """Return where the parabola has changed by the loss, at most the norm of the weights."""
    rise = abs(loss) or 1.0
    reach = math.sqrt(2 * rise / abs(eigenvalue)) if eigenvalue else math.inf
    return min(reach, length or 1.0)

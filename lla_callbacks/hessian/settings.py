"""How a Hessian is measured, fully and lightly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lla_callbacks.hessian.layer_measures import LayerPlan
from lla_callbacks.objective.checks import (
    MOST_WORK,
    even,
    flag,
    fraction,
    none_or_two,
    seed_of,
    settle,
    whole,
)
from lla_callbacks.objective.layers import Layers, check_layers


@dataclass(frozen=True)
class HessianSettings:
    """How a Hessian is measured.

    Attributes:
        num_steps: Depth of each Lanczos run. Default 24: the largest eigenvalue of a
            ResNet-20 converges to 1 % within 6 to 20 steps. The smallest takes longer where
            it is small beside the largest: it then errs towards zero, by up to its residual,
            and r_e and C_t with it; 40 to 60 steps settle it.
        num_probes: Probes for the trace, one product each. Default 24: of equal costs, half
            for the run and half for probes had the smallest error of the trace on trained
            networks, and little more than plain probes at initialisation
            (docs/benchmarks/trace_estimators.md).
        num_runs: Independent Lanczos runs for density and criteria (``n_v`` in LLA). The
            start vectors of all but the first serve as trace probes too. Default 1.
        layers: Layers that are told apart; see
            :func:`~lla_callbacks.objective.layers.layer_parameters`.
        num_layer_steps: Depth of the Lanczos runs in each layer's own block, for its
            extreme eigenvalues, its density and its distance to the whole. Default 0: none,
            since a run a layer costs more than all else.
        num_layer_probes: Most block probes a layer, where they give its trace a smaller
            standard error than the whole's; see
            :func:`~lla_callbacks.hessian.layer_measures.measure_layers`. Default 0: the
            traces that cost nothing.
        eig_rtol: Stop a Lanczos run early once both extreme residuals are at most this
            share of the largest eigenvalue. ``None``: always full depth, as criteria that
            depend on the depth need.
        trace_rtol: Stop adding probes once the standard error of the trace is at most this
            share of it; ``num_probes`` is then the largest number.
        num_eigenvectors: Leading eigenvectors; see
            :func:`~lla_callbacks.hessian.eigenvectors.leading_eigenvectors`. Default 0: none,
            since each is as large as the network.
        seed: Fixes every random vector.
        chunk_size: Vectors in one backward pass; the results do not depend on it.
        may_shorten: Whether a run may take fewer steps than ``num_steps`` where memory is tight,
            since nobody asked for as many: 10 at the least. The result says so. Default False.

    Raises:
        ValueError: Naming the setting, what was given, and what is allowed.
    """

    num_steps: int = 24
    num_probes: int = 24
    num_runs: int = 1
    layers: Layers = None
    num_layer_steps: int = 0
    num_layer_probes: int = 0
    eig_rtol: float | None = None
    trace_rtol: float | None = None
    num_eigenvectors: int = 0
    seed: int = 0
    chunk_size: int = 1
    may_shorten: bool = False

    def __post_init__(self) -> None:
        settle(self, may_shorten=flag("may_shorten", self.may_shorten))
        for name, least in {
            "num_steps": 2,
            "num_probes": 2,
            "num_runs": 1,
            "chunk_size": 1,
        }.items():
            settle(self, **{name: whole(name, getattr(self, name), least, MOST_WORK)})
        for name in ("num_layer_steps", "num_layer_probes"):
            settle(self, **{name: none_or_two(name, getattr(self, name))})
        for name in ("eig_rtol", "trace_rtol"):
            settle(self, **{name: fraction(name, getattr(self, name), none=True)})
        wanted = whole("num_eigenvectors", self.num_eigenvectors, 0, MOST_WORK)
        settle(self, num_eigenvectors=wanted)
        settle(self, seed=seed_of("seed", self.seed))
        check_layers(self.layers)

    def smallest(self) -> HessianSettings:
        """Return settings that run every line of code and take no time."""
        return HessianSettings(
            num_steps=2,
            num_probes=2,
            layers=self.layers,
            num_layer_steps=min(2, self.num_layer_steps),
            num_layer_probes=min(2, self.num_layer_probes),
        )

    @property
    def max_matvecs(self) -> int:
        """Whole products that a measurement takes at most, a stability run left out."""
        return self.num_runs * self.num_steps + max(0, self.num_probes - self.num_runs + 1)

    @property
    def layer_plan(self) -> LayerPlan:
        """What is spent on each layer besides."""
        return LayerPlan(
            num_steps=self.num_layer_steps,
            num_runs=self.num_runs,
            num_probes=self.num_layer_probes,
            eig_rtol=self.eig_rtol,
            seed=self.seed,
        )


@dataclass(frozen=True)
class TrackingSettings:
    """How a light measurement is done.

    Attributes:
        num_probes: Probes of the trace, half of them new and half from the last time, each
            one product; an even number, or 0 to leave out the traces. Default 4: the least
            from which one firing's standard error means something.
        eig_rtol: Relative residual at which the Lanczos run of ``lambda_max`` stops. ``None``
            leaves out ``lambda_max``. Default 0.05: two to four products warm; the value
            itself is then off by 0.3 % in the mean, since it errs by the residual squared.
        num_steps: Most Lanczos steps.
        layers: Layers that are told apart; see
            :func:`~lla_callbacks.objective.layers.layer_parameters`.
        seed: Fixes every random vector.
        chunk_size: Vectors in one backward pass.

    Raises:
        ValueError: Naming the setting, what was given, and what is allowed.
    """

    num_probes: int = 4
    eig_rtol: float | None = 0.05
    num_steps: int = 24
    layers: Layers = None
    seed: int = 0
    chunk_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_steps", "chunk_size"):
            settle(self, **{name: whole(name, getattr(self, name), 1, MOST_WORK)})
        probes, rtol = check_light(self.num_probes, self.eig_rtol)
        settle(self, num_probes=probes, eig_rtol=rtol, seed=seed_of("seed", self.seed))
        check_layers(self.layers)

    @property
    def max_matvecs(self) -> int:
        """Products that a measurement takes at most."""
        return self.num_probes + (self.num_steps if self.eig_rtol is not None else 0)


def check_light(
    num_probes: Any, eig_rtol: Any, names: tuple[str, str] = ("num_probes", "eig_rtol")
) -> tuple[int, float | None]:
    """Return how much of what is tracked, under the names that the user gave it.

    Raises:
        ValueError: If it cannot be, or is nothing.
    """
    probes = even(
        names[0],
        num_probes,
        "since half of the probes come back next time, or 0 for no traces",
    )
    rtol = fraction(names[1], eig_rtol, none=True, other=", or None for no lambda_max")
    if not probes and rtol is None:
        raise ValueError(
            f"there is nothing to track: give {names[0]} for the traces, {names[1]} for "
            "lambda_max, or both."
        )
    return probes, rtol

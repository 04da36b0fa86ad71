"""The settings that all monitors share, in groups: each written, checked and explained once here.

The constructors take them as flat keyword arguments. ``tests/test_signatures.py`` holds
names, defaults and words of every constructor to those of the groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lla_callbacks.callbacks.schedule import Schedule
from lla_callbacks.hessian.scalars import NAMES as OF_HESSIAN
from lla_callbacks.objective.checks import (
    batches_of,
    check_loss,
    flag,
    number,
    one_of,
    seed_of,
    settle,
    tag_of,
    whole,
)
from lla_callbacks.objective.counting import BatchSize, batch_size_of
from lla_callbacks.objective.loss import Loss
from lla_callbacks.objective.objective import Engine, Mode, check_engine, check_mode
from lla_callbacks.objective.parts import Parameters, check_parameters
from lla_callbacks.objective.precision import Precision, check_precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.report.tiers import check_scalars
from lla_callbacks.slices.scalars import NAMES as OF_SLICES

# Held where the user gave no number: by 256 the largest eigenvalue of a batch of them is within
# some 20 % of that of the whole data (docs/benchmarks/sizes.md).
NUM_SAMPLES = 256
_SHARE = "a positive share of training time, such as 0.05 for 5 %, at most 1, or None"


@dataclass(frozen=True)
class When:
    """When is measured.

    Attributes:
        every_n_epochs: Measure at the end of every n-th training epoch.
        every_n_train_steps: Measure every n optimizer steps.
        max_overhead: Share of training time, such as 0.05, that all monitors of the Trainer may
            take together, first and last measurement included. ``None``: 0.05 (choice: what is less
            is not felt) if no schedule is given, no limit if one is, so that an explicit schedule
            is kept. Of several monitors the largest counts for all together, and each keeps to its
            own.
    """

    every_n_epochs: int | None = None
    every_n_train_steps: int | None = None
    max_overhead: float | None = None

    def __post_init__(self) -> None:
        found = number("max_overhead", self.max_overhead, _SHARE, above=0, most=1, none=True)
        settle(self, max_overhead=found)
        for name, value in vars(self.schedule).items():
            settle(self, **{name: value})

    @property
    def schedule(self) -> Schedule:
        """The user's own schedule."""
        return Schedule(self.every_n_train_steps, self.every_n_epochs)

    @property
    def is_bounded(self) -> bool:
        """Whether a limit holds: one that was given, or the default where no schedule was."""
        return self.max_overhead is not None or not self.schedule.is_given


@dataclass(frozen=True)
class Held:
    """What is held and measured on.

    Attributes:
        num_samples: Hold the first training batches until they have this many samples.
        mode: Normalization mode.
        dropout: Whether dropout stays on; off by default.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``.
        dataloader: Batches to measure on instead of the first training batches.
        seed: Fixes every random vector.
        save_batches: Whether checkpoints hold the data of the held batches. ``None``: a fingerprint
            where the training loader gives them again, else the data. ``False``: never; a resumed
            run then says where it goes on with other ones.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.
    """

    num_samples: int | None = None
    mode: Mode = "batch"
    dropout: bool = False
    loss: Loss | None = None
    dataloader: Any = None
    seed: int = 0
    save_batches: bool | None = None
    batch_size: BatchSize = None

    def __post_init__(self) -> None:
        samples = NUM_SAMPLES if self.num_samples is None else self.num_samples
        samples = whole("num_samples", samples, 1)
        settle(
            self,
            num_samples=None if self.num_samples is None else samples,
            dropout=flag("dropout", self.dropout),
            save_batches=flag("save_batches", self.save_batches, none=True),
            seed=seed_of("seed", self.seed),
            batch_size=batch_size_of("batch_size", self.batch_size),
        )
        check_mode(self.mode, self.dropout)
        check_loss(self.loss)
        batches_of("dataloader", self.dataloader, none=True)

    @property
    def samples(self) -> int:
        """How many are held, where nothing was planned."""
        return NUM_SAMPLES if self.num_samples is None else self.num_samples


@dataclass(frozen=True)
class Products:
    """How the loss is differentiated.

    Attributes:
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that a measurement may take beside training. Graphs that do not fit are
            built anew for each product (3 gradients instead of 2), batches that do not fit are
            split where their samples do not see each other, and where that is not enough,
            differences of gradients take over. ``None``: half of what a training step takes, and
            256 MiB at least; a batch that cannot be split then goes through whole.
        engine: ``"exact"``: double backward. ``"difference"``: central differences of gradients, in
            the memory of a training step, with their own error in every result; what they cannot
            say within 5 % is a gap. ``"auto"``: exact, and by difference where a second derivative
            does not exist or does not fit in memory, or parameters are sharded; one line in the log
            says so.
        precision: ``"float32"``: no autocast, and half-precision weights are widened for the
            measurement. ``"training"``: as the Trainer has it; bfloat16 costs 1 to 4 %.
        check: Whether the loss proves itself at the first measurement of a run, for about six
            gradients: two evaluations agree, the gradient is the slope of the loss, products are
            symmetric and agree with differences of gradients.
        jacobian: Where the gradient is no derivative of the loss: ``"gap"``, or ``"measure"`` the
            Jacobian of the training gradient, marked as such.
        parameters: Which parameters are measured: ``None`` takes all that are trained; shell
            patterns of their names (``"generator.*"``), or of modules; or a predicate ``(name,
            parameter) -> bool``. Another monitor may measure others.
    """

    microbatch_size: int | None = None
    max_memory: int | None = None
    engine: Engine = "auto"
    precision: Precision = "float32"
    check: bool = True
    jacobian: Jacobian = "gap"
    parameters: Parameters = None

    def __post_init__(self) -> None:
        for name, unit in {"microbatch_size": "", "max_memory": " byte"}.items():
            found = whole(name, getattr(self, name), 1, none=True, other=f"{unit}, or None")
            settle(self, **{name: found})
        check_engine(self.engine)
        check_precision(self.precision)
        settle(self, check=flag("check", self.check))
        one_of("jacobian", self.jacobian, Jacobian)
        settle(self, parameters=check_parameters(self.parameters))


@dataclass(frozen=True)
class Output:
    """Where results go.

    Attributes:
        figures: Whether figures are drawn.
        save_arrays: Whether results are written beside the logs.
        custom_scalars: Whether TensorBoard gets a layout.
        scalars: Which scalars loggers get: ``"few"`` (what everybody looks at), ``"criteria"`` (and
            every criterion), ``"layers"`` (and all of each layer), ``"all"``, or a list of these
            words and of names such as ``"kh1"``; docs/measures.md has all of them. Callbacks such
            as EarlyStopping may ask for any.
        name: First part of every tag.
    """

    figures: bool = True
    save_arrays: bool = True
    custom_scalars: bool = True
    scalars: Any = "few"
    name: str = "monitor"

    def __post_init__(self) -> None:
        for name in ("figures", "save_arrays", "custom_scalars"):
            settle(self, **{name: flag(name, getattr(self, name))})
        settle(self, scalars=check_scalars(self.scalars, dict.fromkeys((*OF_HESSIAN, *OF_SLICES))))
        tag_of("name", self.name)


GROUPS = (When, Held, Products, Output)


@dataclass(frozen=True)
class MonitorSettings:
    """All groups of one monitor."""

    when: When
    held: Held
    products: Products
    output: Output

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> MonitorSettings:
        """Return the groups, each from what was given under the names of its fields."""
        groups: list[Any] = [
            group(**{f.name: given[f.name] for f in fields(group) if f.name in given})
            for group in GROUPS
        ]
        return cls(*groups)

    @property
    def flat(self) -> dict[str, Any]:
        """Every setting by its name."""
        groups = (self.when, self.held, self.products, self.output)
        return {name: value for group in groups for name, value in vars(group).items()}


def shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all monitors take, by name, among a constructor's own arguments."""
    return {f.name: given[f.name] for group in GROUPS for f in fields(group) if f.name in given}

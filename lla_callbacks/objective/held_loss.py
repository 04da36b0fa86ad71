"""Held batches and a loss, as one function of the weights that is the same at every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.errors import MeasurementError, NonFiniteError, forgetful
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.linalg.splitting import value_of
from lla_callbacks.objective.batches import fresh
from lla_callbacks.objective.checks import flag, one_of, scalar_loss
from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.counting import BatchSize, counts_of
from lla_callbacks.objective.gradient_hooks import no_gradient_hooks
from lla_callbacks.objective.held_open import HeldOpen
from lla_callbacks.objective.inventory import inventory_of
from lla_callbacks.objective.loss import Loss, Statistics, load_statistics
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.parts import Parameters, chosen_names
from lla_callbacks.objective.policy import policy_dtype
from lla_callbacks.objective.precision import HALF, Precision, autocast_inside, check_precision
from lla_callbacks.objective.randomness import (
    RANDOM_NOTE,
    Draws,
    draws_of,
    random_marks,
    silencer,
    stream,
)
from lla_callbacks.objective.repetition import keep_processes_apart
from lla_callbacks.objective.sharded import is_sharded, reshard
from lla_callbacks.objective.state import preserved, set_mode
from lla_callbacks.objective.training_step import SkippedBatchError, at_place
from lla_callbacks.objective.twice_differentiable import once_differentiable, twice_differentiable

Mode = Literal["batch", "eval", "recalibrate"]
# The name of the error that says that a step skips a batch, as it comes from another process.
_SKIPPED = "SkippedBatchError"
Result = TypeVar("Result")


class HeldLoss:
    """The loss of held batches at the present weights, each pass from one and the same state.

    What differentiates it is an :class:`~lla_callbacks.objective.objective.Objective`, where the
    arguments are told.

    Attributes:
        module: The module.
        loss: Checked to return a scalar.
        batches: Held batches, or parts of them.
        counts: Samples in each.
        places: Which of the held batches each one is, or is a part of.
        num_samples: Samples in all.
        names: Of the parameters that are variables; ``None``: all that are trained.
        findings: What was found out about the held batches, kept from one measurement to the next.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        loss: Loss,
        *,
        mode: Mode,
        dropout: bool,
        seed: int,
        training: Mapping[nn.Module, bool] | None,
        precision: Precision,
        arithmetic: torch.dtype | None,
        findings: Findings | None,
        batch_size: BatchSize,
        parameters: Parameters = None,
    ) -> None:
        check_mode(mode, dropout)
        check_precision(precision)
        self.module = module
        self.mode: Mode = mode
        self.loss: Loss = scalar_loss(loss)
        self.dropout = dropout
        self.seed = seed
        self.training = training
        self.precision: Precision = precision
        self.arithmetic = arithmetic
        # That of autocast regions which the loss opens itself, once one was seen.
        self.inner_arithmetic: torch.dtype | None = None
        # That of sharded parts, where it is not the weights'.
        self.policy = policy_dtype(module)
        self.batch_size = batch_size
        self.findings = findings or Findings()
        # Whether an evaluation was seen to leave the weights alone.
        self.keeps_weights = False
        # Where the guard stays entered; see held_open.py.
        self.held_open: HeldOpen | None = None
        # Whether whoever moves the weights has a copy of them.
        self.kept_elsewhere = False
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("there is no batch to measure on: give at least one.")
        every = trainable(self.module)
        if not every:
            raise ValueError(
                f"{type(module).__name__} has no trainable parameter: unfreeze one first."
            )
        self.names = chosen_names(module, parameters)
        self.device = next(iter(every.values())).device
        places = [i for i in range(len(self.batches)) if i not in self.findings.proof.skipped]
        self.batches = [self.batches[i] for i in places]
        self.places = places
        self.num_held = len(self.places) + len(self.findings.proof.skipped)
        self.counts = counts_of(self.batches, batch_size)
        self.num_samples = sum(self.counts)

    @property
    def variables(self) -> dict[str, nn.Parameter]:
        """The parameters that the loss is a function of, by name: those that were chosen."""
        every = trainable(self.module)
        if self.names is None:
            return every
        return {name: p for name, p in every.items() if name in self.names}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of any number should know of the loss, in sentences."""
        return self.findings.proof.notes

    @property
    def keeps_hooks(self) -> bool:
        """Whether hooks that a forward pass puts on tensors are called in backward passes."""
        return self.findings.proof.keep_hooks or is_sharded(self.module)

    @property
    def coarse(self) -> torch.dtype | None:
        """Dtype in which the loss computes where that has fewer digits than the weights."""
        return self.arithmetic or self.inner_arithmetic or self.policy

    @property
    def eps(self) -> float:
        """Relative rounding of the arithmetic."""
        found = self.coarse
        precision = ParameterSpace(self.variables).precision
        return max(torch.finfo(d).eps for d in (precision, found) if d is not None)

    @property
    def arithmetic_name(self) -> str:
        """The precision of the computation, in words."""
        found, name = self.coarse, "autocast"
        if found is not None and found not in (self.arithmetic, self.inner_arithmetic):
            name = "MixedPrecisionPolicy"
        if found is not None:
            return f"{str(found).removeprefix('torch.')} {name}"
        return str(ParameterSpace(self.variables).precision).removeprefix("torch.")

    def without_skipped(self, action: Callable[[], Result]) -> Result:
        """Return what an action returns, without the batches that the training step skips.

        A step that returns None for some batch trains on the others; so is measured.

        Raises:
            SkippedBatchError: If it skips every batch.
        """
        try:
            return action()
        except MeasurementError as error:
            # What one of several processes raised comes as its text.
            if not isinstance(error, SkippedBatchError) and _SKIPPED not in str(error):
                raise
            forgetful(error)
        self._leave_out_skipped()
        return action()

    def _leave_out_skipped(self) -> None:
        kept, skipped = [], set()
        for i, batch in enumerate(self.batches):
            try:
                value_of(partial(self.evaluate, place=self.places[i]), batch)
            except SkippedBatchError:
                skipped.add(self.places[i])
            else:
                kept.append(i)
        if not kept:
            raise SkippedBatchError(
                "training_step or loss= returned None for every held batch: return a scalar "
                "tensor.",
                "Give loss=callable(module, batch) that returns one, or dataloader= with batches "
                "that are not skipped.",
            )
        if not skipped:
            raise SkippedBatchError(
                "training_step returned no loss for a held batch, and returned one when asked "
                "again.",
                "Give loss=callable(module, batch) that returns one for every batch.",
            )
        self.batches = [self.batches[i] for i in kept]
        self.places = [self.places[i] for i in kept]
        self.counts = [self.counts[i] for i in kept]
        self.num_samples = sum(self.counts)
        numbers = ", ".join(str(i + 1) for i in sorted(skipped))
        proof = self.findings.proof
        self.findings.learn(
            skipped=tuple(sorted({*proof.skipped, *skipped})),
            notes=(
                *proof.notes,
                f"left out: held batch {numbers} of {self.num_held}, for which the training step "
                "returns no loss",
            ),
        )

    def release(self) -> None:
        """Leave a guard that is entered in between, for who looks at the module itself."""
        if self.held_open is not None:
            self.held_open.release()

    def place(self, i: int) -> int:
        """Return which of the held batches batch ``i`` is, or is a part of."""
        return self.places[i]

    def fresh(self, i: int) -> Any:
        """Return a copy of batch ``i`` on the module's device, free to be changed."""
        return self._fresh(self.batches[i])

    def copied(self, i: int, copier: Copier) -> Any:
        """Return such a copy of batch ``i`` by what copies the module's attributes meanwhile."""
        return self._fresh(self.batches[i], copier)

    def autocast_inside(self) -> AbstractContextManager[None]:
        """Return the context in which autocast regions of the loss's own are off, or noted."""

        def note(dtype: torch.dtype) -> None:
            self.inner_arithmetic = dtype

        return autocast_inside(off=self.precision == "float32", note=note)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Surround a pass that is differentiated twice."""
        held = inventory_of(self.module)
        with twice_differentiable(dropout=self.dropout), no_gradient_hooks(held):
            yield

    def _note_hook(self) -> None:
        if not self.findings.proof.hooks_seen:
            self.findings.learn(hooks_seen=True)

    @contextmanager
    def plain_context(self) -> Iterator[None]:
        """Surround a pass that is differentiated once, by torch's own kernels."""
        with (
            once_differentiable(
                dropout=self.dropout, hooks=self.keeps_hooks, on_hook=self._note_hook
            ),
            no_gradient_hooks(inventory_of(self.module)),
        ):
            yield

    @property
    def widens(self) -> bool:
        """Whether half-precision batches and attributes become float32, as the weights are."""
        halves = any(p.dtype in HALF for p in trainable(self.module).values())
        return self.precision == "float32" and not halves

    def _fresh(self, batch: Any, copier: Copier | None = None) -> Any:
        return fresh(batch, self.device, widen=self.widens, copier=copier)

    def evaluate(
        self,
        batch: Any,
        statistics: Statistics = (),
        context: Callable[[], AbstractContextManager[None]] | None = None,
        use: Callable[[Tensor], Any] | None = None,
        place: int = 0,
    ) -> Any:
        """Return the loss of one held batch, with its graph if gradients are enabled.

        Or what ``use`` makes of it while the module is still in the state of the evaluation.

        Args:
            batch: The batch, or a part of one.
            statistics: Of batch norms.
            context: Entered around the pass.
            use: See above.
            place: Which of the held batches it is, or is a part of.
        """
        self.release()
        gradients = torch.is_grad_enabled()
        unknown = self.findings.proof.quiet is None
        reshard(self.module)
        with (
            self._preserved(place) as copier,
            torch.set_grad_enabled(gradients),
        ):
            set_mode(self.module, self.mode, dropout=self.dropout, training=self.training)
            self.silencer()()
            keep_processes_apart(self.module)
            load_statistics(statistics)
            # Curvature in full precision: autocast would cost digits, not time, here.
            full = torch.autocast(self.device.type, enabled=False)
            with (
                (context or self.context)(),
                full if self.arithmetic is None else nullcontext(),
                self.autocast_inside(),
            ):
                before = random_marks() if unknown else None
                with at_place(place):
                    loss = self.loss(self.module, self._fresh(batch, copier))
                if before == (random_marks() if unknown else None):
                    if unknown:
                        self.findings.learn(quiet=())
                    self.check_finite(loss, place)
                    return loss if use is None else use(loss)
                del loss
        # Something was drawn: what it was for is found out, and the pass made again.
        self.learn_randomness(batch, statistics, place)
        return self.evaluate(batch, statistics, context, use, place)

    def _preserved(self, place: int) -> AbstractContextManager[Copier]:
        seed = stream(self.seed, place)
        return preserved(
            self.module,
            seed=seed,
            check_weights=not self.kept_elsewhere,
            widen=self.widens,
            loss=self.loss,
        )

    def check_finite(self, loss: Tensor, place: int) -> None:
        """Raise a NonFiniteError, naming the held batch, if its loss is not finite."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of held batch {place + 1} of {self.num_held} is {value}.",
                "Lower the learning rate, clip gradients, or look for bad samples in that batch.",
            )

    def silencer(self) -> Callable[[], None]:
        """Return what turns off whatever drops at random, for use inside a guard."""
        if self.mode != "batch" or self.dropout:
            return lambda: None
        return silencer(self.module, self.findings.proof.quiet or ())

    def learn_randomness(self, batch: Any, statistics: Statistics, place: int) -> None:
        """Find out what draws random numbers, and whether it is dropout by another name."""

        def draws(names: Sequence[str]) -> Draws:
            return draws_of(lambda: self._draw(batch, statistics, place, names), self.module)

        first = draws(())
        drops: set[str] = set()
        if self.mode == "batch" and not self.dropout:
            # What draws masks while it trains, and does not otherwise.
            candidates = first.masks - {""}
            again = draws(sorted(candidates)) if candidates else first
            drops = candidates - again.masks - again.other
            first = again
        notes = self.findings.proof.notes
        self.findings.learn(
            quiet=tuple(sorted(drops)), notes=(*notes, RANDOM_NOTE) if first.any else notes
        )

    def _draw(
        self, batch: Any, statistics: Statistics, place: int, names: Sequence[str]
    ) -> AbstractContextManager[Callable[[], object]]:
        """Return a context that yields a pass of which the draws are watched."""

        @contextmanager
        def ready() -> Iterator[Callable[[], object]]:
            with self._preserved(place) as copier:
                set_mode(self.module, self.mode, dropout=self.dropout, training=self.training)
                if self.mode == "batch" and not self.dropout:
                    silencer(self.module, names)()
                keep_processes_apart(self.module)
                load_statistics(statistics)
                with self.plain_context(), self.autocast_inside(), at_place(place):
                    yield lambda: self.loss(self.module, self._fresh(batch, copier))

        return ready()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; a shared one under its first name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def check_mode(mode: str, dropout: bool) -> None:
    """Raise a ValueError for a mode that does not exist or has no dropout to be on."""
    one_of("mode", mode, Mode)
    flag("dropout", dropout)
    if mode != "batch" and dropout:
        raise ValueError(
            f"dropout is True in mode {mode!r}, where it is off by definition; give mode='batch' "
            "or dropout=False."
        )

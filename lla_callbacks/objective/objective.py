"""A module, batches and a loss, as one frozen and repeatable function of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.difference import DifferenceOperator, first_derivative
from lla_callbacks.linalg.errors import (
    MeasurementError,
    NonFiniteError,
    OutOfMemoryError,
    forgetful,
    is_out_of_memory,
)
from lla_callbacks.linalg.hessian import HessianOperator
from lla_callbacks.linalg.loss_operator import LossOperator, LossTerm, loss_value
from lla_callbacks.linalg.sharing import Alone, Share, all_or_none
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.batches import fresh, part_counts, split
from lla_callbacks.objective.checks import flag, one_of, scalar_loss
from lla_callbacks.objective.copies import Copier
from lla_callbacks.objective.counting import (
    BatchSize,
    UnknownSizeError,
    counts_of,
    sample_count,
)
from lla_callbacks.objective.evaluation import Loss, Statistics, evaluating, load_statistics
from lla_callbacks.objective.gradient_hooks import no_gradient_hooks
from lla_callbacks.objective.memory import Findings, MemoryPlan, allowed_memory, saved_bytes
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
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.objective.sharded import is_sharded, reshard, sharded_gradients
from lla_callbacks.objective.splitting import check_split, value_of
from lla_callbacks.objective.state import preserved, set_mode
from lla_callbacks.objective.training_step import SkippedBatchError, at_place
from lla_callbacks.objective.twice_differentiable import once_differentiable, twice_differentiable

Mode = Literal["batch", "eval", "recalibrate"]
# The name of the error that says that a step skips a batch, as it comes from another process.
_SKIPPED = "SkippedBatchError"
Engine = Literal["auto", "exact", "difference"]
Result = TypeVar("Result")


class Objective:
    """``L(weights) = sum_b n_b L_b / sum_b n_b`` on held batches, the same at every call.

    Each evaluation runs inside :func:`~lla_callbacks.objective.state.preserved`, so the
    module is left as it was, and starts from the same random state, so that whatever is
    random in the module is the same function each time.

    Args:
        module: Any module; its trainable parameters are the variables.
        batches: Any iterable of batches. They stay as they are: every evaluation gets fresh
            copies on the module's device.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch.
        mode: Normalization mode. ``"batch"``: batch statistics, as in training.
            ``"eval"``: running statistics. ``"recalibrate"``: statistics estimated over all
            batches at the present weights, then held fixed.
        dropout: Whether dropout stays on (with one fixed mask).
        seed: Fixes whatever is random in a forward pass.
        training: Train or eval mode of each submodule during training, where known.
        microbatch_size: Split batches into parts of at most this many samples, to save
            memory. Allowed where the loss is a mean over samples that do not see each
            other; this is verified, batch by batch.
        max_memory: Bytes that a measurement may take; see
            :class:`~lla_callbacks.objective.memory.MemoryPlan`. ``None``: half of what a training
            step takes, and 256 MiB at least.
        engine: How to multiply with the Hessian; see
            :func:`~lla_callbacks.objective.engines.with_hessian`.
        precision: ``"float32"``: no autocast, and half-precision batches are widened, for use
            inside :func:`~lla_callbacks.objective.precision.at_precision`. ``"training"``: as the
            loss itself has it.
        arithmetic: Dtype in which the loss computes under autocast, where it does.
        findings: What earlier objectives on the same batches found out.
        check: Whether the objective proves itself before its numbers are believed; see
            :mod:`~lla_callbacks.objective.engines`.
        jacobian: ``"gap"``: where the gradient is no derivative of the loss, nothing of its
            curvature is measured. ``"measure"``: the Jacobian of the gradient is, and marked.
        batch_size: How many samples a batch has, where it does not tell: a number, or a function
            of the batch.

    Attributes:
        num_samples: Samples behind the loss; see
            :func:`~lla_callbacks.objective.counting.known_count`.

    Raises:
        ValueError: If a setting is not allowed or there is no batch.
        UnknownSizeError: If there are several batches, or parts of one, and it cannot be told how
            many samples each has.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        loss: Loss,
        *,
        mode: Mode = "batch",
        dropout: bool = False,
        seed: int = 0,
        training: Mapping[nn.Module, bool] | None = None,
        microbatch_size: int | None = None,
        max_memory: int | None = None,
        engine: Engine = "auto",
        precision: Precision = "float32",
        arithmetic: torch.dtype | None = None,
        findings: Findings | None = None,
        check: bool = True,
        jacobian: Jacobian = "gap",
        batch_size: BatchSize = None,
    ) -> None:
        check_mode(mode, dropout)
        check_engine(engine)
        check_precision(precision)
        if microbatch_size is not None and microbatch_size < 1:
            raise ValueError(f"microbatch_size is {microbatch_size}; give 1 or more, or None.")
        self.module = module
        self.mode: Mode = mode
        self.loss: Loss = scalar_loss(loss)
        self.dropout = dropout
        self.seed = seed
        self.training = training
        self.engine: Engine = engine
        self.precision: Precision = precision
        self.arithmetic = arithmetic
        self.check = flag("check", check)
        self.jacobian: Jacobian = one_of("jacobian", jacobian, Jacobian)
        # That of autocast regions which the loss opens itself, once one was seen.
        self._inner_arithmetic: torch.dtype | None = None
        self._max_memory = max_memory
        self._batch_size = batch_size
        self._findings = findings or Findings()
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("there is no batch to measure on: give at least one.")
        parameters = trainable(self.module)
        if not parameters:
            raise ValueError(
                f"{type(module).__name__} has no trainable parameter: unfreeze one first."
            )
        self.device = next(iter(parameters.values())).device
        places = [i for i in range(len(self.batches)) if i not in self._findings.proof.skipped]
        self.batches = [self.batches[i] for i in places]
        # Which of the held batches each one is, or is a part of.
        self._places = places
        self._num_held = len(self._places) + len(self._findings.proof.skipped)
        self.counts = counts_of(self.batches, batch_size)
        if microbatch_size is not None:
            whole = self.batches
            counts = [sample_count(batch, batch_size) for batch in whole]
            in_parts = [
                list(self._split(batch, microbatch_size, n))
                for batch, n in zip(whole, counts, strict=True)
            ]
            sizes = [part_counts(n, microbatch_size) for n in counts]
            self.counts = [n for part in sizes for n in part]
            self.batches = [part for parts in in_parts for part in parts]
            self._places = [k for k, parts in zip(places, in_parts, strict=True) for _ in parts]
            for i, (batch, parts) in enumerate(zip(whole, in_parts, strict=True)):
                # A gradient once a batch; its loss at every measurement, and the first one's
                # gradient too, since samples may not see each other at first.
                known = i > 0 and i in self._findings.split
                name = f"batch {i + 1} of {len(whole)}"
                context = None if known else self._plain_context
                evaluate = partial(self._evaluate, place=places[i])
                with suppress(SkippedBatchError):
                    check_split(evaluate, module, batch, parts, context, sizes[i], name=name)
                self._findings.split.add(i)
        self.num_samples = sum(self.counts)

    @property
    def findings(self) -> Findings:
        """What was found out about the held batches, kept from one measurement to the next."""
        return self._findings

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of any number should know of the loss, in sentences."""
        return self._findings.proof.notes

    @property
    def keeps_hooks(self) -> bool:
        """Whether hooks that a forward pass puts on tensors are called in backward passes."""
        return self._findings.proof.keep_hooks or is_sharded(self.module)

    @property
    def eps(self) -> float:
        """Relative rounding of the arithmetic."""
        found = self.arithmetic or self._inner_arithmetic
        precision = ParameterSpace(trainable(self.module)).precision
        return max(torch.finfo(d).eps for d in (precision, found) if d is not None)

    def __call__(self) -> float:
        """Return ``L`` at the present weights, by torch's own forward pass."""

        def value() -> float:
            with evaluating(self) as evaluate:
                return float(evaluate()[0])

        return self.without_skipped(value)

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
                value_of(partial(self._evaluate, place=self._places[i]), batch)
            except SkippedBatchError:
                skipped.add(self._places[i])
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
        self._places = [self._places[i] for i in kept]
        self.counts = [self.counts[i] for i in kept]
        self.num_samples = sum(self.counts)
        numbers = ", ".join(str(i + 1) for i in sorted(skipped))
        proof = self._findings.proof
        self._findings.learn(
            skipped=tuple(sorted({*proof.skipped, *skipped})),
            notes=(
                *proof.notes,
                f"left out: held batch {numbers} of {self._num_held}, for which the training step "
                "returns no loss",
            ),
        )

    def place(self, i: int) -> int:
        """Return which of the held batches batch ``i`` is, or is a part of."""
        return self._places[i]

    def fresh(self, i: int) -> Any:
        """Return a copy of batch ``i`` on the module's device, free to be changed."""
        return self._fresh(self.batches[i])

    def hessian(
        self, *, chunk_size: int = 1, engine: Engine | None = None, share: Share | None = None
    ) -> LossOperator:
        """Return the Hessian of ``L`` at the present weights.

        Args:
            chunk_size: Vectors in one backward pass.
            engine: ``"exact"`` or ``"difference"``; ``None`` or ``"auto"``: the one of
                :attr:`engines` that is tried first.
            share: Processes that take their parts of the batches; each must have them all.

        Raises:
            MeasurementError: If the loss is not finite or cannot be differentiated so.
        """
        if engine in (None, "auto"):
            engine = self.engines[0]
        share = share or Alone()
        sharded = is_sharded(self.module)
        context = self._context if engine == "exact" else self._plain_context
        terms = all_or_none(share, lambda: self._terms(share, engine, context, sharded=sharded))
        if engine == "difference":
            return self._finished(
                DifferenceOperator(
                    terms,
                    trainable(self.module),
                    context=context,
                    share=share,
                    constant=padding_vectors(self.module),
                    differentiate=sharded_gradients if sharded else first_derivative,
                    settle=partial(reshard, self.module) if sharded else None,
                )
            )
        return self._finished(
            HessianOperator(
                terms,
                trainable(self.module),
                chunk_size=chunk_size,
                context=context,
                share=share,
            )
        )

    def gradient(
        self, share: Share | None = None, *, look: Callable[[Tensor], object] | None = None
    ) -> tuple[float, Tensor]:
        """Return ``L`` and its gradient ``(dim,)`` by a plain backward pass, torch's own kernels.

        Each process differentiates its part of the batches, and all have the sum.

        Args:
            share: The processes.
            look: Called with the loss of each batch and its graph.

        Raises:
            MeasurementError: If any process fails.
        """
        share = share or Alone()
        space = ParameterSpace(trainable(self.module))
        statistics: Statistics = ()
        if self.mode == "recalibrate":
            with evaluating(self) as evaluate:
                statistics = evaluate.statistics()

        def differentiated(loss: Tensor) -> tuple[float, Tensor]:
            if look is not None:
                look(loss)
            return loss_value(loss), space.flatten(first_derivative(loss, space.tensors))

        def mine() -> tuple[float, Tensor]:
            value = 0.0
            total = torch.zeros(space.dim, dtype=space.dtype, device=space.device)
            for i in range(share.rank, len(self.batches), share.size):
                weight = self.counts[i] / self.num_samples
                with torch.inference_mode(False), torch.enable_grad():
                    part, gradient = self._evaluate(
                        self.batches[i],
                        statistics,
                        self._plain_context,
                        differentiated,
                        self._places[i],
                    )
                value += weight * part
                total += weight * gradient
            return value, total

        value, total = all_or_none(share, mine)
        if share.size > 1:
            value = float(share.total(torch.tensor([value], dtype=torch.float64))[0])
            total = share.total(total)
        return value, total

    def _terms(
        self,
        share: Share,
        engine: str | None,
        context: Callable[[], AbstractContextManager[None]],
        *,
        sharded: bool,
    ) -> list[LossTerm]:
        """Return this process's part of the batches, as memory allows."""
        statistics: Statistics = ()
        if self.mode == "recalibrate":
            with evaluating(self) as evaluate:
                statistics = evaluate.statistics()
        parts = list(zip(self.batches, self.counts, self._places, strict=True))
        mine = parts[share.rank :: share.size]
        if sharded:
            # Whatever one process computes, all must, so that they can gather parameters.
            mine += [(parts[0][0], 0, parts[0][2])] * (-(-len(parts) // share.size) - len(mine))
        if engine == "difference":
            return [
                self._term(b, n, statistics, context, place=i, halve=not sharded)
                for b, n, i in mine
            ]
        # Of all batches, so that all processes come to the same decision.
        plan, kept = self._memory_plan(self.counts), 0
        if mine:
            kept = self._memory_plan([n for _, n, _ in mine]).num_kept if plan.parts == 1 else 0
            if plan.parts > 1:
                mine = self._in_parts(mine, plan)
        return [
            self._term(b, n, statistics, context, place=place, keep=i < kept)
            for i, (b, n, place) in enumerate(mine)
        ]

    @property
    def engines(self) -> tuple[Literal["exact", "difference"], ...]:
        """The ways of multiplying that may be tried, in order."""
        if is_sharded(self.module) and self.engine == "auto":
            return ("difference",)
        return ("exact", "difference") if self.engine == "auto" else (self.engine,)

    @property
    def arithmetic_name(self) -> str:
        """The precision of the computation, in words."""
        found = self.arithmetic or self._inner_arithmetic
        if found is not None:
            return f"{str(found).removeprefix('torch.')} autocast"
        return str(ParameterSpace(trainable(self.module)).precision).removeprefix("torch.")

    def autocast_inside(self) -> AbstractContextManager[None]:
        """Return the context in which autocast regions of the loss's own are off, or noted."""

        def note(dtype: torch.dtype) -> None:
            self._inner_arithmetic = dtype

        return autocast_inside(off=self.precision == "float32", note=note)

    def _finished(self, operator: LossOperator) -> LossOperator:
        found = self.arithmetic or self._inner_arithmetic
        if found is not None:
            operator.eps = max(operator.eps, torch.finfo(found).eps)
        saved = self._findings.saved or 0
        operator.room = allowed_memory(saved, self._weight_bytes(), self._max_memory)
        return operator

    def _term(
        self,
        batch: Any,
        count: int,
        statistics: Statistics,
        context: Callable[[], AbstractContextManager[None]],
        *,
        place: int,
        keep: bool = False,
        halve: bool = True,
    ) -> LossTerm:
        """Return one batch as a summand, which can be halved where memory runs out."""

        def halves() -> list[LossTerm]:
            size = -(-count // 2)
            trouble = self._split_trouble(size, batch, count)
            if trouble is not None:
                unknown = "batch_size=" in trouble
                raise OutOfMemoryError(
                    f"there is not enough memory for one batch, and {trouble}"
                    if unknown
                    else "there is not enough memory for one batch, and its samples see each "
                    "other.",
                    "Lower num_samples, give a dataloader of smaller batches, or take mode='eval' "
                    "or engine='difference'.",
                )
            parts = zip(self._split(batch, size, count), part_counts(count, size), strict=True)
            return [self._term(b, n, statistics, context, place=place) for b, n in parts]

        return LossTerm(
            lambda: self._evaluate(batch, statistics, context, place=place),
            count / self.num_samples,
            keep=keep,
            guarded=lambda use: self._evaluate(batch, statistics, context, use, place),
            halves=halves if halve and count > 1 else None,
        )

    @contextmanager
    def _context(self) -> Iterator[None]:
        with twice_differentiable(dropout=self.dropout), no_gradient_hooks(self.module):
            yield

    def _note_hook(self) -> None:
        if not self._findings.proof.hooks_seen:
            self._findings.learn(hooks_seen=True)

    @contextmanager
    def _plain_context(self) -> Iterator[None]:
        with (
            once_differentiable(
                dropout=self.dropout, hooks=self.keeps_hooks, on_hook=self._note_hook
            ),
            no_gradient_hooks(self.module),
        ):
            yield

    @property
    def widens(self) -> bool:
        """Whether half-precision batches and attributes become float32, as the weights are."""
        halves = any(p.dtype in HALF for p in trainable(self.module).values())
        return self.precision == "float32" and not halves

    def _fresh(self, batch: Any, copier: Copier | None = None) -> Any:
        return fresh(batch, self.device, widen=self.widens, copier=copier)

    def _evaluate(
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
        gradients = torch.is_grad_enabled()
        unknown = self._findings.proof.quiet is None
        reshard(self.module)
        with (
            preserved(self.module, seed=stream(self.seed, place), widen=self.widens) as copier,
            torch.set_grad_enabled(gradients),
        ):
            set_mode(self.module, self.mode, dropout=self.dropout, training=self.training)
            self.silencer()()
            keep_processes_apart(self.module)
            load_statistics(statistics)
            # Curvature in full precision: autocast would cost digits, not time, here.
            full = torch.autocast(self.device.type, enabled=False)
            with (
                (context or self._context)(),
                full if self.arithmetic is None else nullcontext(),
                self.autocast_inside(),
            ):
                before = random_marks() if unknown else None
                with at_place(place):
                    loss = self.loss(self.module, self._fresh(batch, copier))
                if before == (random_marks() if unknown else None):
                    if unknown:
                        self._findings.learn(quiet=())
                    self._check_finite(loss, place)
                    return loss if use is None else use(loss)
                del loss
        # Something was drawn: what it was for is found out, and the pass made again.
        self.learn_randomness(batch, statistics, place)
        return self._evaluate(batch, statistics, context, use, place)

    def _check_finite(self, loss: Tensor, place: int) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of held batch {place + 1} of {self._num_held} is {value}.",
                "Lower the learning rate, clip gradients, or look for bad samples in that batch.",
            )

    def silencer(self) -> Callable[[], None]:
        """Return what turns off whatever drops at random, for use inside a guard."""
        if self.mode != "batch" or self.dropout:
            return lambda: None
        return silencer(self.module, self._findings.proof.quiet or ())

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
        notes = self._findings.proof.notes
        self._findings.learn(
            quiet=tuple(sorted(drops)), notes=(*notes, RANDOM_NOTE) if first.any else notes
        )

    def _draw(
        self, batch: Any, statistics: Statistics, place: int, names: Sequence[str]
    ) -> AbstractContextManager[Callable[[], object]]:
        """Return a context that yields a pass of which the draws are watched."""

        @contextmanager
        def ready() -> Iterator[Callable[[], object]]:
            seed = stream(self.seed, place)
            with preserved(self.module, seed=seed, widen=self.widens) as copier:
                set_mode(self.module, self.mode, dropout=self.dropout, training=self.training)
                if self.mode == "batch" and not self.dropout:
                    silencer(self.module, names)()
                keep_processes_apart(self.module)
                load_statistics(statistics)
                with self._plain_context(), self.autocast_inside(), at_place(place):
                    yield lambda: self.loss(self.module, self._fresh(batch, copier))

        return ready()

    def _memory_plan(self, counts: Sequence[int]) -> MemoryPlan:
        """Return what fits, judged by what one forward pass saves."""
        if self._findings.saved is None:
            try:
                self._findings.saved = saved_bytes(
                    lambda: self._evaluate(self.batches[0]),
                    list(trainable(self.module).values()),
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Whole batches do not fit even once: they are halved as they come.
                return MemoryPlan(num_kept=0, parts=1, part_size=max(counts), graph=math.inf)
        per_sample = self._findings.saved / max(1, self.counts[0])
        weights = self._weight_bytes()
        return MemoryPlan.of([n * per_sample for n in counts], counts, weights, self._max_memory)

    def _weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in trainable(self.module).values())

    def _in_parts(
        self, mine: Sequence[tuple[Any, int, int]], plan: MemoryPlan
    ) -> list[tuple[Any, int, int]]:
        """Return batches with those split that do not fit, each verified to be its parts' mean.

        Raises:
            OutOfMemoryError: If one is not, and ``max_memory`` was set.
        """
        found: list[tuple[Any, int, int]] = []
        for batch, count, place in mine:
            if count <= plan.part_size:
                found.append((batch, count, place))
                continue
            trouble = self._split_trouble(plan.part_size, batch, count)
            if trouble is None:
                parts = self._split(batch, plan.part_size, count)
                sizes = part_counts(count, plan.part_size)
                found += [(part, n, place) for part, n in zip(parts, sizes, strict=True)]
            elif self._max_memory is not None:
                raise OutOfMemoryError(
                    f"the graph of one batch takes about {plan.graph / 2**20:,.0f} MiB, "
                    f"max_memory={self._max_memory} allows {self._max_memory / 2**20:,.0f} MiB, "
                    f"and a batch of {count} samples cannot be split: {trouble}",
                    "Raise max_memory, lower the batch size, or take engine='difference'.",
                )
            else:
                found.append((batch, count, place))
        return found

    def _split(self, batch: Any, size: int, count: int) -> Iterator[Any]:
        # Where the user said how many there are, what has another size belongs to all parts;
        # whether the parts add up is verified.
        return split(batch, size, count, strict=self._batch_size is None)

    def _split_trouble(self, size: int, batch: Any, count: int) -> str | None:
        """Return why parts of a batch do not add up to it, judged by its loss and gradient.

        Asked anew for each batch and measurement, since samples may not see each other yet (a head
        of zeros hides batch statistics); once they do, no more.

        Args:
            size: Samples in a part.
            batch: The batch, or a part of one.
            count: Its samples.
        """
        if self._findings.unsplittable is None:
            try:
                if self._batch_size is None:
                    sample_count(batch)
                parts, sizes = list(self._split(batch, size, count)), part_counts(count, size)
                if len(parts) < 2:
                    return "it has no parts."
                check_split(self._evaluate, self.module, batch, parts, self._plain_context, sizes)
            except UnknownSizeError as error:
                self._findings.unsplittable = str(error)
            except (MeasurementError, TypeError) as error:
                self._findings.unsplittable = str(error).partition(" Leave out")[0]
        return self._findings.unsplittable


def padding_vectors(module: nn.Module) -> Tensor | None:
    """Return the positions of embeddings' padding vectors in the flat vector, if there are any.

    They have no gradient by definition, so they are constants.
    """
    space = ParameterSpace(trainable(module))
    names = {id(t): name for name, t in zip(space.names, space.tensors, strict=True)}
    found = []
    for m in module.modules():
        padding = getattr(m, "padding_idx", None)
        weight = dict(m.named_parameters(recurse=False)).get("weight")
        if isinstance(padding, int) and weight is not None and id(weight) in names:
            start = space.slices[names[id(weight)]].start + padding * weight.shape[1]
            found.append(torch.arange(start, start + weight.shape[1], device=space.device))
    return torch.cat(found) if found else None


def check_engine(engine: str) -> None:
    """Raise a ValueError for an engine that does not exist."""
    one_of("engine", engine, Engine)


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

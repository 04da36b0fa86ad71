"""A module, batches and a loss, as one frozen and repeatable function of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lla_callbacks.linalg.difference import DifferenceOperator, first_derivative
from lla_callbacks.linalg.distributed import part_like
from lla_callbacks.linalg.hessian import HessianOperator
from lla_callbacks.linalg.loss_operator import Differentiated, LossOperator, LossTerm, loss_value
from lla_callbacks.linalg.sharing import Alone, Share, all_or_none
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.batch_plan import BatchPlan
from lla_callbacks.objective.checks import flag, one_of
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.evaluation import evaluating
from lla_callbacks.objective.held_loss import HeldLoss
from lla_callbacks.objective.held_loss import Mode as Mode
from lla_callbacks.objective.held_loss import check_mode as check_mode
from lla_callbacks.objective.held_loss import trainable as trainable
from lla_callbacks.objective.held_open import weights_kept_elsewhere
from lla_callbacks.objective.loss import Loss, Statistics
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.one_memory import refuse_shared_memory
from lla_callbacks.objective.parts import Parameters
from lla_callbacks.objective.precision import Precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.objective.sharded import is_sharded, reshard, sharded_gradients

Engine = Literal["auto", "exact", "difference"]


class Objective(HeldLoss):
    """``L(weights) = sum_b n_b L_b / sum_b n_b`` on held batches, the same at every call.

    Each evaluation runs inside :func:`~lla_callbacks.objective.state.preserved`, so the
    module is left as it was, and starts from the same random state, so that whatever is
    random in the module is the same function each time.

    Args:
        module: Any module; its trainable parameters are the variables, or a part of them.
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
        parameters: Which parameters are the variables; the others stay where they are. See
            :func:`~lla_callbacks.objective.parts.chosen_names`.

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
        parameters: Parameters = None,
    ) -> None:
        check_engine(engine)
        if microbatch_size is not None and microbatch_size < 1:
            raise ValueError(f"microbatch_size is {microbatch_size}; give 1 or more, or None.")
        self.engine: Engine = engine
        self.check = flag("check", check)
        self.jacobian: Jacobian = one_of("jacobian", jacobian, Jacobian)
        refuse_shared_memory(module)
        super().__init__(
            module,
            batches,
            loss,
            mode=mode,
            dropout=dropout,
            seed=seed,
            training=training,
            precision=precision,
            arithmetic=arithmetic,
            findings=findings,
            batch_size=batch_size,
            parameters=parameters,
        )
        self._max_memory = max_memory
        if microbatch_size is not None:
            self.plan.cut(microbatch_size)

    @property
    def plan(self) -> BatchPlan:
        """What of the batches is in memory at a time."""
        # Made when it is asked for: kept, it would hold the batches until a cycle is collected.
        return BatchPlan(self, self._max_memory)

    def __call__(self) -> float:
        """Return ``L`` at the present weights, by torch's own forward pass."""

        def value() -> float:
            with evaluating(self) as evaluate:
                return float(evaluate()[0])

        found = self.without_skipped(value)
        self.keeps_weights = True
        return found

    def statistics(self) -> Statistics:
        """Return the batch norms' statistics at the present weights, where the mode wants them."""
        if self.mode != "recalibrate":
            return ()
        with evaluating(self) as evaluate:
            return evaluate.statistics()

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
        context = self.context if engine == "exact" else self.plain_context

        def make() -> list[LossTerm]:
            return self.plan.terms(share, engine, context, self.statistics(), sharded=sharded)

        terms = all_or_none(share, make)
        if engine == "difference":
            return self._finished(
                DifferenceOperator(
                    terms,
                    self.variables,
                    context=context,
                    share=share,
                    constant=padding_vectors(self),
                    differentiate=sharded_gradients if sharded else first_derivative,
                    averages=share.size if sharded else 0,
                    settle=partial(reshard, self.module) if sharded else None,
                    moving=partial(weights_kept_elsewhere, self),
                )
            )
        return self._finished(
            HessianOperator(
                terms,
                self.variables,
                chunk_size=chunk_size,
                context=context,
                share=share,
            )
        )

    def gradient(
        self,
        share: Share | None = None,
        *,
        look: Callable[[Tensor], object] | None = None,
        statistics: Statistics | None = None,
    ) -> tuple[float, Tensor]:
        """Return ``L`` and its gradient ``(dim,)`` by a plain backward pass, torch's own kernels.

        Each process differentiates its part of the batches, and all have the sum.

        Args:
            share: The processes.
            look: Called with the loss of each batch and its graph.
            statistics: Of batch norms; ``None``: those of the mode at the present weights.

        Raises:
            MeasurementError: If any process fails.
        """
        share = share or Alone()
        space = ParameterSpace(self.variables)
        statistics = self.statistics() if statistics is None else statistics

        def mine() -> tuple[float, Tensor]:
            value = 0.0
            total = space.zeros()
            for i in range(share.rank, len(self.batches), share.size):
                weight = self.counts[i] / self.num_samples
                part, gradients = self._batch_gradients(i, statistics, look)
                value += weight * part
                space.add_to(total, gradients, weight)
            return value, total

        value, total = all_or_none(share, mine)
        if share.size > 1:
            value = float(share.total(torch.tensor([value], dtype=torch.float64))[0])
            total = share.total(total)
        return value, total

    def batch_gradient(
        self,
        i: int,
        statistics: Statistics | None = None,
        *,
        look: Callable[[Tensor], object] | None = None,
    ) -> tuple[float, Tensor]:
        """Return the loss of batch ``i`` alone and its gradient ``(dim,)``.

        Args:
            i: Below ``len(objective.batches)``; the batch has ``objective.counts[i]`` samples.
            statistics: Of batch norms, where they are known already.
            look: Called with the loss and its graph.

        Raises:
            MeasurementError: If the loss is not finite.
        """
        known = self.statistics() if statistics is None else statistics
        value, gradients = self._batch_gradients(i, known, look)
        return value, ParameterSpace(self.variables).flatten(gradients)

    def _batch_gradients(
        self, i: int, statistics: Statistics, look: Callable[[Tensor], object] | None
    ) -> Differentiated:
        parameters = ParameterSpace(self.variables).tensors

        def differentiated(loss: Tensor) -> Differentiated:
            if look is not None:
                look(loss)
            return loss_value(loss), first_derivative(loss, parameters)

        with torch.inference_mode(False), torch.enable_grad():
            found: Differentiated = self.evaluate(
                self.batches[i], statistics, self.plain_context, differentiated, self.places[i]
            )
        return found

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat vector ``(dim,)`` by parameter, in the parameters' shapes."""
        named = self.variables
        parts = torch.split(vector, [p.numel() for p in named.values()])
        return {n: part.view(named[n].shape) for n, part in zip(named, parts, strict=True)}

    @property
    def engines(self) -> tuple[Literal["exact", "difference"], ...]:
        """The ways of multiplying that may be tried, in order."""
        if is_sharded(self.module) and self.engine == "auto":
            return ("difference",)
        return ("exact", "difference") if self.engine == "auto" else (self.engine,)

    def _finished(self, operator: LossOperator) -> LossOperator:
        found = self.coarse
        if found is not None:
            operator.eps = max(operator.eps, torch.finfo(found).eps)
        operator.eps = max(operator.eps, self.findings.rounding)
        operator.room = self.plan.room
        operator.basis_room = self.plan.basis_room(operator.engine)
        return operator


def padding_vectors(objective: HeldLoss) -> Tensor | None:
    """Return the positions of embeddings' padding vectors in flat vectors here, if any.

    They have no gradient by definition, so they are constants.
    """
    padded = [m for m in objective.module.modules() if _may_pad(m)]
    if not padded:
        return None
    space = ParameterSpace(objective.variables)
    names = {id(t): name for name, t in zip(space.names, space.tensors, strict=True)}
    found = []
    for m in padded:
        padding = getattr(m, "padding_idx", None)
        weight = dict(m.named_parameters(recurse=False)).get("weight")
        if isinstance(padding, int) and weight is not None and id(weight) in names:
            rows = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
            rows[padding] = True
            here = part_like(rows, weight).reshape(-1).nonzero()[:, 0]
            found.append(space.slices[names[id(weight)]].start + here)
    return torch.cat(found) if found else None


def _may_pad(module: nn.Module) -> bool:
    # Asked of both first: a module looks up what it does not have at length.
    own = "padding_idx" in module.__dict__ or hasattr(type(module), "padding_idx")
    return own or isinstance(module, torch.jit.ScriptModule)


def check_engine(engine: str) -> None:
    """Raise a ValueError for an engine that does not exist."""
    one_of("engine", engine, Engine)

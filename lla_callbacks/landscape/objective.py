"""A module, batches and a loss, as one frozen and repeatable function of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lla_callbacks.landscape.batches import fresh, sample_count, split
from lla_callbacks.landscape.evaluation import Loss, Statistics, evaluating, load_statistics
from lla_callbacks.landscape.gradient_hooks import no_gradient_hooks
from lla_callbacks.landscape.repetition import keep_processes_apart
from lla_callbacks.landscape.state import preserved, set_mode
from lla_callbacks.landscape.twice_differentiable import twice_differentiable
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.hessian import HessianOperator, LossTerm

Mode = Literal["batch", "eval", "recalibrate"]

# Graphs of all batches are kept for the whole run while they fit in this many bytes.
# Choice: a small share of the memory of any machine that trains networks.
GRAPH_MEMORY = 2 * 2**30


class Objective:
    """``L(weights) = sum_b n_b L_b / sum_b n_b`` on held batches, the same at every call.

    Each evaluation runs inside :func:`~lla_callbacks.landscape.state.preserved`, so the
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
            other; this is verified once, on the first batch.
        graph_memory: Bytes that kept graphs may take; batches beyond that are
            differentiated anew for every product (3 gradients instead of 2).

    Attributes:
        num_samples: Samples behind the loss: of each batch, the leading size of its first
            tensor.

    Raises:
        ValueError: If a setting is not allowed or there is no batch.
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
        graph_memory: int = GRAPH_MEMORY,
    ) -> None:
        check_mode(mode, dropout)
        if microbatch_size is not None and microbatch_size < 1:
            raise ValueError(f"microbatch_size is {microbatch_size}; give 1 or more, or None.")
        self.module = module
        self.mode: Mode = mode
        self.loss = loss
        self.dropout = dropout
        self.seed = seed
        self.training = training
        self._graph_memory = graph_memory
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("there is no batch to measure on: give at least one.")
        parameters = trainable(self.module)
        if not parameters:
            raise ValueError(
                f"{type(module).__name__} has no trainable parameter: unfreeze one first."
            )
        self.device = next(iter(parameters.values())).device
        if microbatch_size is not None:
            whole = self.batches
            self.batches = [part for batch in whole for part in split(batch, microbatch_size)]
            self._check_splittable(whole[0], list(split(whole[0], microbatch_size)))
        self.counts = [sample_count(batch) for batch in self.batches]
        self.num_samples = sum(self.counts)

    def __call__(self) -> float:
        """Return ``L`` at the present weights, by torch's own forward pass."""
        with evaluating(self) as evaluate:
            return float(evaluate()[0])

    def hessian(self, *, chunk_size: int = 1) -> HessianOperator:
        """Return the Hessian of ``L`` at the present weights."""
        statistics: Statistics = ()
        if self.mode == "recalibrate":
            with evaluating(self) as evaluate:
                statistics = evaluate.statistics()
        keep = self._num_kept_graphs()
        terms = [
            LossTerm(lambda batch=batch: self._evaluate(batch, statistics), weight, keep=i < keep)  # type: ignore[misc]
            for i, (batch, weight) in enumerate(zip(self.batches, self._weights(), strict=True))
        ]
        return HessianOperator(
            terms, trainable(self.module), chunk_size=chunk_size, context=self._context
        )

    def _weights(self) -> list[float]:
        return [count / self.num_samples for count in self.counts]

    @contextmanager
    def _context(self) -> Iterator[None]:
        with twice_differentiable(dropout=self.dropout), no_gradient_hooks(self.module):
            yield

    def _evaluate(self, batch: Any, statistics: Statistics = ()) -> Tensor:
        """Return the loss of one held batch, with its graph if gradients are enabled."""
        gradients = torch.is_grad_enabled()
        with preserved(self.module, seed=self.seed), torch.set_grad_enabled(gradients):
            set_mode(self.module, self.mode, dropout=self.dropout, training=self.training)
            keep_processes_apart(self.module)
            load_statistics(statistics)
            # Curvature in full precision: autocast would cost digits, not time, here.
            with self._context(), torch.autocast(self.device.type, enabled=False):
                return self.loss(self.module, fresh(batch, self.device))

    def _num_kept_graphs(self) -> int:
        """Return how many batches' graphs fit, judged by what one forward pass saves."""
        if len(self.batches) == 1:
            return 1
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with torch.inference_mode(False), torch.enable_grad(), hooks:
            self._evaluate(self.batches[0])
        weights = {p.untyped_storage().data_ptr() for p in trainable(self.module).values()}
        saved = sum(size for pointer, size in seen.items() if pointer not in weights)
        # The graph of a gradient holds the forward pass, the backward pass and their
        # intermediates. Measured on four kinds of networks: 1.6 to 2.3 times what the
        # forward pass saves; three times is on the safe side.
        return max(1, int(self._graph_memory // (3 * saved + 1)))

    def _check_splittable(self, whole: Any, parts: list[Any]) -> None:
        counts = [sample_count(part) for part in parts]
        with torch.inference_mode(False), torch.no_grad():
            expected = float(self._evaluate(whole))
            total = sum(float(self._evaluate(p)) * n for p, n in zip(parts, counts, strict=True))
        found = total / sum(counts)
        # Rounding differs between the two sums; a coupling of samples differs by far more.
        if abs(found - expected) > 1e-4 * max(abs(expected), 1e-6):
            raise MeasurementError(
                f"microbatches change the loss from {expected:.6g} to {found:.6g}: the samples "
                "of a batch see each other (batch statistics, a contrastive loss) or the loss "
                "is not a mean over samples.",
                "Leave out microbatch_size, or use mode='eval'.",
            )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; a shared one under its first name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def check_mode(mode: str, dropout: bool) -> None:
    """Raise a ValueError for a mode that does not exist or has no dropout to be on."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; give one of {', '.join(get_args(Mode))}.")
    if mode != "batch" and dropout:
        raise ValueError(
            f"dropout is True in mode {mode!r}, where it is off by definition; give mode='batch' "
            "or dropout=False."
        )

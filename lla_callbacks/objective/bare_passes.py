"""Passes without a reset of their own each, believed once it was seen that none was needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.linalg.recorded import Program, Recorder, nothing_read
from lla_callbacks.objective.batches import is_plain_batch, refilled
from lla_callbacks.objective.evaluation import Evaluator
from lla_callbacks.objective.randomness import random_marks
from lla_callbacks.objective.tensor_copies import differ, separate
from lla_callbacks.objective.training_step import at_place, present_place

_NOTHING = nullcontext()


class BarePasses:
    """Evaluates a loss many times in a row from one start, and looks whether that was right.

    An :class:`~lla_callbacks.objective.evaluation.Evaluator` starts the random streams anew and
    copies the batch before each pass, which costs a small network a tenth of it. A pass that draws
    nothing and writes nothing needs neither. So several go on from one start. Attributes and the
    versions of buffers and of the batch are looked at after each; random streams, containers of
    many entries and the batch, to the bit, after the last. Passes after which anything is not as it
    was are worth nothing: the caller makes them anew, each from its own start.

    Args:
        evaluate: The evaluator, after a row.
    """

    def __init__(self, evaluate: Evaluator) -> None:
        objective = evaluate.objective
        self._evaluate = evaluate
        self._places = [objective.place(i) for i in range(len(evaluate.batches))]
        # One copy for all passes.
        self._copies = [refilled(batch, separate) for batch in evaluate.batches]
        self._tensors = [
            pair
            for copied, batch in zip(self._copies, evaluate.batches, strict=True)
            for pair in zip(_parts(copied), _parts(batch), strict=True)
        ]
        self._on_cpu = objective.device.type == "cpu"
        self._marks: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, evaluate: Evaluator) -> BarePasses | None:
        """Return such passes, None where each must have a start of its own.

        That is where metrics look at passes, where statistics are estimated by passes of their
        own, where the loss differentiates itself, where batches are no tensors or share some with
        the module, and where earlier passes wrote or drew.
        """
        objective = evaluate.objective
        norms = objective.mode == "recalibrate" and bool(evaluate.norms)
        own = evaluate.metrics or evaluate.functions or evaluate.needs_grad or norms
        # Until it is known what is random, a pass has to be watched.
        if own or objective.findings.proof.quiet is None or not evaluate.is_steady:
            return None
        if not all(is_plain_batch(batch, objective.device) for batch in evaluate.batches):
            return None
        return cls(evaluate)

    def losses(self, moves: Iterable[object]) -> tuple[list[float], bool]:
        """Return the loss after each move of the weights, and whether the moves came to an end.

        If anything was drawn or written, or raised, that is as many of the first losses as are
        known to be right: often none.

        Args:
            moves: Moves the weights each time it is asked for the next item.
        """
        return self._losses(moves, self._evaluate.objective.loss)

    def _losses(self, moves: Iterable[object], loss: Any) -> tuple[list[float], bool]:
        evaluate = self._evaluate
        module = evaluate.objective.module
        copier = evaluate.start(0)
        if self._marks is None:
            self._marks = random_marks()
        settled = evaluate.settled
        versions = [(t, t._version) for t, _ in self._tensors]
        passes = list(zip(self._copies, self._places, strict=True))
        here, dtype = present_place(), torch.get_default_dtype()
        found: list[Any] = []
        ended = True
        try:
            with torch.no_grad(), evaluate.without_dropout():
                for _ in moves:
                    for copied, place in passes:
                        with at_place(place) if place != here else _NOTHING:
                            value = loss(module, refilled(copied, _same))
                        # It may be a part of the module, which moves on. No device is waited for.
                        found.append(value.item() if self._on_cpu else value.clone())
                        if (
                            not settled(copier)
                            or torch.is_grad_enabled()
                            or torch.get_default_dtype() is not dtype
                            or any([t._version != version for t, version in versions])
                        ):
                            return [], False
        except Exception:  # noqa: BLE001 - the same pass from its own start says what it is
            ended = False
        drawn = self._marks != random_marks()
        if copier.refusals or drawn or not (evaluate.is_steady and self._batches_are_whole()):
            return [], False
        del found[len(found) - len(found) % len(passes) :]
        return evaluate.means(found), ended

    def recorded(
        self, live: Sequence[Tensor], most_bytes: float
    ) -> tuple[list[float], bool, list[Program] | None]:
        """Return what :meth:`losses` does at the present weights, and the operations of it.

        Args:
            live: The weights that move, by their memory.
            most_bytes: See :class:`~lla_callbacks.linalg.recorded.Recorder`.

        Returns:
            The loss, whether the pass came to its end, and a program for each batch: ``None`` if
            there is none for one of them.
        """
        programs: list[Program | None] = []

        def watched(module: Any, batch: Any) -> Any:
            with nothing_read() as read, Recorder(most_bytes) as recorder:
                value = loss(module, batch)
            known = isinstance(value, Tensor) and not read
            programs.append(recorder.program((), value, live) if known else None)
            return value

        loss = self._evaluate.objective.loss
        losses, right = self._losses([None], watched)
        found = [p for p in programs if p is not None]
        return losses, right, found if right and len(found) == len(self._copies) else None

    def means(self, values: list[float]) -> list[float]:
        """Return the mean over samples of each row of losses, which has one for each batch."""
        return self._evaluate.means(values)

    def _batches_are_whole(self) -> bool:
        device = self._evaluate.objective.device
        return all(is_plain_batch(copied, device) for copied in self._copies) and not any(
            copied.shape != original.shape or differ(copied, original)
            for copied, original in self._tensors
        )


def _parts(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    refilled(batch, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor

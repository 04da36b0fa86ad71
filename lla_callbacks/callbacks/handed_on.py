"""What one monitor's measurement leaves for another's of the same loss at the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lla_callbacks.callbacks.records import Record
from lla_callbacks.callbacks.subject import Subject
from lla_callbacks.callbacks.timing import Timing
from lla_callbacks.linalg.errors import forgetful
from lla_callbacks.linalg.sharing import OutOfStepError, all_or_none
from lla_callbacks.linalg.space import local_part
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.state import weights_at

# Of weights; integers and their like are left out.
_SUMMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Source:
    """What tells one objective from another: what it is of, and at which weights.

    Attributes:
        moment: When.
        settings: On what, and how it is differentiated.
        batches: The held batches.
        numbers: Which batches of their epoch they were.
        weights: Sums over each parameter and buffer, and their norms.
        findings: What is known of the loss.
    """

    moment: Moment
    settings: tuple[Any, ...]
    batches: Sequence[Any]
    numbers: Sequence[int]
    weights: tuple[float, ...]
    findings: Findings

    @classmethod
    def of(cls, subject: Subject, module: nn.Module, moment: Moment) -> Source:
        """Return that of a subject at a moment, before the objective is made."""
        held = subject.held
        with weights_at(module, moment.snapshot):
            weights = marks_of(module)
        return cls(
            moment,
            subject.alike,
            list(held.batches),
            list(held.numbers),
            weights,
            subject.findings,
        )


@dataclass(frozen=True)
class Served:
    """What a plan may count on.

    Attributes:
        num_steps: Depth of the Lanczos run that another monitor has at the same moments.
        targets: Shares of the run after which it measures, those to come.
    """

    num_steps: int = 0
    targets: tuple[float, ...] = ()


class HandedOn:
    """What others left for the quantities of one monitor, until its next measurement.

    One or two long vectors, as a rule, and only until the next batch begins.

    Args:
        timing: Of that monitor.
        subject: On what it measures.
        records: What.
    """

    def __init__(self, timing: Timing, subject: Subject, records: Sequence[Record]) -> None:
        self._timing, self._subject = timing, subject
        self._quantities = [record.quantity for record in records]
        self._left: tuple[Source, dict[str, Any]] | None = None

    def is_served_by(self, other: HandedOn) -> bool:
        """Return whether another monitor's measurements can be of use to this one's."""
        wanted = {what for quantity in self._quantities for what in quantity.takes}
        found = {what for quantity in other._quantities for what in quantity.offers}
        return bool(wanted & found) and self._subject.alike == other._subject.alike

    def waits(self, moment: Moment) -> bool:
        """Return whether this monitor may still measure at a moment of another one."""
        if not self._subject.held.batches:
            return False
        if moment.first:
            return self._subject.start_pending
        if moment.function != "fit":
            return True
        rests = self._timing.is_idle and not moment.last
        return not rests and self._timing.last_step != moment.step

    def offer(self, source: Source, what: str, things: Sequence[Any], share: Any) -> None:
        """Keep what the quantities can use of a thing; of one objective only.

        Args:
            source: Of what it is.
            what: Name of the thing.
            things: It, while it can be used.
            share: The processes, in all of which the same is kept.
        """
        kept = self._left[1] if self._left and self._left[0] is source else {}
        lent = replace(source.moment.lent, share=share, shared=kept)
        moment = replace(source.moment, tools=lent)
        for quantity in self._quantities:
            made = partial(quantity.offered, what, things, moment)
            if what in quantity.takes and taken(share, made):
                self._left = source, kept

    @property
    def is_left(self) -> bool:
        """Whether there is something; the same in all processes."""
        return self._left is not None

    def take(self, here: Source) -> dict[str, Any]:
        """Return what was left for a measurement, by name, and keep it no longer.

        Empty where settings, batches or weights are others, in any process. What was found out of
        the loss by the way is taken over.

        Args:
            here: What is to be measured.
        """
        left, self._left = self._left, None
        if left is None:
            return {}
        there, found = left
        subject = self._subject
        is_same = (
            there.moment.step == here.moment.step
            and there.moment.function == here.moment.function
            and there.settings == here.settings
            and there.numbers == here.numbers
            and there.weights == here.weights
            and subject.held.holds(there.batches)
        )
        if not subject.processes.all(is_same):
            return {}
        if there.findings.proof.notes == here.findings.proof.notes:
            subject.findings = there.findings
        return found

    def let_go(self) -> None:
        """Drop what was left: training goes on, or is over."""
        self._left = None


def taken(share: Any, take: partial[None]) -> bool:
    """Return whether a thing was taken in all processes; what is not taken costs nobody."""
    try:
        all_or_none(share, take, "an offer")
    except OutOfStepError:
        raise
    except Exception as error:  # noqa: BLE001 - it makes its own then
        forgetful(error)
        return False
    return True


def marks_of(module: nn.Module) -> tuple[float, ...]:
    """Return numbers that tell a module's weights and buffers from others, of what is held here."""
    found: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        part = local_part(tensor.detach())
        if part.dtype in _SUMMED and part.layout is torch.strided:
            norm = torch.linalg.vector_norm(part, dtype=torch.float64)
            found.setdefault(part.device, []).extend((part.sum(dtype=torch.float64), norm))
    # One exchange with each device.
    return tuple(number for numbers in found.values() for number in torch.stack(numbers).tolist())

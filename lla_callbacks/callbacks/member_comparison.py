"""Members of an ensemble compared on held batches, while training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.callbacks.compat import full_precision_context
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.curves.ensemble import Agreement, agreement
from lla_callbacks.objective.batches import fresh
from lla_callbacks.objective.evaluation import Predict
from lla_callbacks.objective.state import preserved, set_mode


class MemberComparison:
    """What each member says on the same samples: one pass a member, whose outputs are kept.

    The samples are the first validation ones of the fit; training ones where nothing validated
    before the first member.

    Args:
        num_samples: How many; 0 for no comparison.
        predict: Gives outputs and targets.
        name: Of the callback, for messages.

    Attributes:
        agreement: Of the members so far.
    """

    def __init__(self, num_samples: int, predict: Predict | None, name: str) -> None:
        self.num_samples = num_samples
        self.predict = predict
        self.name = name
        self.agreement: Agreement | None = None
        self._validation = HeldBatches(max(1, num_samples))
        self._training = HeldBatches(max(1, num_samples))
        # Those that members are compared on, once there is one.
        self._held: HeldBatches | None = None
        self._outputs: list[Tensor] = []
        self._target: Tensor | None = None
        self._over = num_samples == 0

    def hold_training(self, batch: Any) -> None:
        """Keep a training batch, if more are wanted."""
        if not (self._over or self._held or self._training.complete or batch is None):
            self._training.add(batch)

    def hold_validation(self, batch: Any) -> None:
        """Keep a validation batch, if more are wanted."""
        if not (self._over or self._held or self._validation.complete):
            self._validation.add(batch)

    def end_validation(self) -> None:
        """Further validations would repeat the samples."""
        self._validation.complete = bool(self._validation.batches)

    def add(self, trainer: Any, module: nn.Module) -> dict[str, float]:
        """Return how the module, a new member, does beside and with the others, by tag."""
        if self._held is None:
            held = self._validation if self._validation.batches else self._training
            self._held = held if held.batches else None
        if self._over or self._held is None:
            return {}
        try:
            output, target = self._predicted(trainer, module, self._held)
            found = agreement([*self._outputs, output], target)
        except Exception as error:  # noqa: BLE001 - a comparison must not end training
            self._over = True
            rank_zero_warn(
                f"{self.name}: members cannot be compared, and training goes on: "
                f"{type(error).__name__}: {error} Give predict=callable(module, batch) -> "
                "(outputs, targets), or num_samples=0 to do without."
            )
            return {}
        self._outputs.append(output)
        self._target, self.agreement = target, found
        values = {"fge/disagreement": found.disagreement}
        for name, (alone, together) in found.quality.items():
            values |= {f"fge/member_{name}": alone, f"fge/ensemble_{name}": together}
        return {tag: value for tag, value in values.items() if math.isfinite(value)}

    def _predicted(
        self, trainer: Any, module: nn.Module, held: HeldBatches
    ) -> tuple[Tensor, Tensor]:
        device = next(module.parameters()).device
        found: list[tuple[Tensor, Tensor]] = []
        with preserved(module, seed=0, check_weights=False), torch.no_grad():
            set_mode(module, "eval", dropout=False, training=None)
            with full_precision_context(trainer):
                for batch in held.batches:
                    moved = fresh(batch, device)
                    if self.predict is None:
                        pair = module(moved[0]), moved[1]
                    else:
                        pair = self.predict(module, moved)
                    found.append((pair[0].cpu(), pair[1].cpu()))
        return torch.cat([output for output, _ in found]), torch.cat([y for _, y in found])

    def state(self) -> dict[str, Any]:
        """Return plain state, for a checkpoint."""
        return {
            "held": None if self._held is None else self._held.state(),
            "outputs": list(self._outputs),
            "target": self._target,
            "over": self._over,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._outputs, self._target = list(state["outputs"]), state["target"]
        # Batches of classes that no checkpoint holds are gone, and comparisons end there.
        self._over = state["over"] or (state["held"] is None and bool(self._outputs))
        if state["held"] is not None:
            self._held = HeldBatches(max(1, self.num_samples))
            self._held.load(state["held"])
        if self._target is not None:
            self.agreement = agreement(self._outputs, self._target)

"""The trace penalty at the price of a plain step: its own gradient, at weights with noise."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lla_callbacks.callbacks.around_steps import AroundSteps
from lla_callbacks.callbacks.compat import (
    MisconfigurationException,
    loss_scale,
    say,
    unscales_gradients_itself,
)
from lla_callbacks.linalg.space import ParameterSpace, whole
from lla_callbacks.penalty.flat_shards import FlatPart, flat_parts, flat_units
from lla_callbacks.penalty.noise import Displacement


class NoisePenalty:
    """Lets the user's own forward and backward pass run at ``theta +- sigma s z``.

    The sign alternates from one penalized step to the next, and each ``z`` serves twice, so that
    over two steps the first-order noise ``sigma H z`` of the gradient cancels but for what the
    batch and the weights have changed.

    Args:
        kind: Name of the callback, for messages.
        seed: Fixes the signs, together with the number of the penalized step.
        relative: Whether steps are in units of each tensor's root mean square.
    """

    def __init__(self, kind: str, seed: int, relative: bool) -> None:
        self._kind, self._seed, self._relative = kind, seed, relative
        self._around: AroundSteps | None = None
        self._displacement: Displacement | None = None
        self._known: tuple[ParameterSpace, list[str]] | None = None
        self._module: Any = None
        # What FSDP1 has wrapped, and which entries of each parameter this process has.
        self._flat: Any = None
        self._parts: dict[int, FlatPart] = {}
        self._sigma, self._index, self._armed = 0.0, 0, False
        # Of a pair of steps that is logged: penalty estimates and losses.
        self._logging = self._stepped = False
        self._pair: list[tuple[int, float, float]] = []
        self._losses: list[Tensor] = []
        self._seconds = 0.0

    @property
    def is_displaced(self) -> bool:
        """Whether weights are away at present."""
        return self._displacement is not None and self._displacement.is_displaced

    def begin(self, trainer: Any, module: Any) -> None:
        """Take the Trainer's steps between move and return, from now on."""
        self.end()
        self._module = module
        self._flat = trainer.strategy.model if flat_units(trainer.strategy.model) else None
        self._look_at_parts()
        self._around = AroundSteps(trainer, module, self)

    def end(self) -> None:
        """Put weights and Trainer back as they were, and forget them."""
        if self._around is not None:
            self._around.remove()
        if self._displacement is not None:
            self._displacement.forget()
        self._around = self._displacement = self._module = self._flat = None
        self._known, self._pair, self._armed, self._logging = None, [], False, False

    def arm(
        self, space: ParameterSpace, names: Sequence[str], strength: float, index: int,
        *, to_log: bool,
    ) -> None:  # fmt: skip
        """Let the step that comes be a displaced one.

        Args:
            space: The trained parameters; the same object while they are the same.
            names: Of the parameters whose curvature counts.
            strength: Of this step: ``sigma = sqrt(2 strength)``.
            index: Number of this penalized step: two and two have one ``z``, with both signs.
            to_log: Whether a pair of steps is to be logged, from the next first one on.
        """
        if self._known is None or self._known[0] is not space or self._known[1] != names:
            parameters = dict(zip(space.names, space.tensors, strict=True))
            chosen = {name: parameters[name] for name in names}
            parts = {n: self._parts[id(p)] for n, p in chosen.items() if id(p) in self._parts}
            self._displacement = Displacement(
                chosen, seed=self._seed, relative=self._relative, parts=parts
            )
            self._known = (space, list(names))
        self._sigma, self._index, self._armed = math.sqrt(2 * strength), index, True
        self._losses, self._seconds, self._stepped = [], 0.0, False
        begins = index % 2 == 0 and to_log
        goes_on = bool(self._pair) and self._pair[-1][0] == index - 1 and index % 2 == 1
        if not goes_on:
            self._pair = []
        self._logging = begins or goes_on

    def disarm(self) -> None:
        """Expect nothing more of this batch."""
        if self._around is not None:
            self._around.put_back()
            self._look_at_parts()
        self._armed = False

    def _look_at_parts(self) -> None:
        """Let parameters that FSDP1 has gathered for an evaluation be pieces again."""
        if self._flat is None:
            return
        try:
            self._parts = flat_parts(self._flat)
        except ValueError as error:
            raise MisconfigurationException(f"{self._kind}(estimator='noise'): {error}") from error

    # -- what is asked of it around a step --------------------------------------------------

    def move(self) -> bool:
        """Move the weights, if this step is to be displaced."""
        if not self._armed or self._displacement is None:
            return False
        began = time.monotonic()
        distance = -self._sigma if self._index % 2 else self._sigma
        self._displacement.move(distance, (self._index // 2,))
        self._seconds += time.monotonic() - began
        return True

    def pause(self) -> None:
        """Have the weights back for a moment."""
        assert self._displacement is not None
        self._displacement.pause()

    def resume(self) -> None:
        """Have them away again, to the bit."""
        assert self._displacement is not None
        self._displacement.resume()

    def put_back(self) -> None:
        """Put them back; complain of a change that is lost."""
        assert self._displacement is not None
        began = time.monotonic()
        changed = self._displacement.put_back()
        self._seconds += time.monotonic() - began
        if changed:
            some = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
            raise MisconfigurationException(
                f"{self._kind}(estimator='noise'): {some} changed between the start of a step and "
                "the end of its backward pass, while the weights stood elsewhere, and that change "
                "is lost. Change weights in a hook before or after the step, step optimizers "
                "after the backward pass, or use estimator='perturbation'."
            )

    def note(self, loss: Tensor) -> None:
        """Keep the loss of a step that is logged."""
        if self._logging:
            self._losses.append(loss)

    def finish(self, trainer: Any, module: Any, optimizer: Any) -> dict[str, float]:
        """Finish the gradients of a step, before clipping; return scalars after a logged pair.

        ``1/2 <sigma s z, g>`` with the gradient at the displaced weights is an estimate of
        ``strength tr H``, without bias to third order in sigma; what is logged is the mean of
        both signs. The logged loss less it is an estimate of the loss at the weights themselves.
        """
        if not self._armed or self._displacement is None:
            return {}
        is_logged = self._logging and not self._stepped
        if not (is_logged or self._relative):
            return {}
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = self._displacement.parameters.values()
        gradients = [p.grad if id(p) in own else None for p in found]
        self._displacement.pull_back(gradients)
        if not is_logged:
            return {}
        self._stepped = True
        scale = loss_scale(trainer) if unscales_gradients_itself(optimizer) else 1.0
        penalty = float(self._displacement.slope(gradients)) / (2 * scale)
        loss = math.nan
        if self._losses and module.automatic_optimization:
            total = torch.stack(self._losses).sum()
            loss = float(trainer.strategy.reduce(whole(total), reduce_op="mean"))
        self._pair.append((self._index, penalty, loss))
        if len(self._pair) < 2:
            return {}
        (_, first, loss_then), (_, second, loss_now) = self._pair
        penalty, strength = (first + second) / 2, self._sigma**2 / 2
        values = {
            "regularizer/penalty": penalty,
            "regularizer/trace": penalty / strength,
            "regularizer/strength": strength,
            "regularizer/loss": (loss_then + loss_now) / 2 - penalty,
            "regularizer/seconds": self._seconds,
        }
        return {tag: value for tag, value in values.items() if math.isfinite(value)}


def check_noise(max_ratio: float | None, loss: Any, *, replays: bool) -> None:
    """Raise a ValueError for settings that mean nothing where the step's own pass is taken.

    Args:
        max_ratio: Limit on the penalty's gradient.
        loss: The user's loss, if one is given.
        replays: Whether the loss is evaluated besides the step, for a strength or an order.
    """
    if max_ratio is not None:
        raise ValueError(
            f"max_ratio is {max_ratio}, and estimator='noise' never has the two gradients to "
            "compare. Leave max_ratio out, or give estimator='perturbation'."
        )
    if loss is not None and not replays:
        raise ValueError(
            "loss is given, and estimator='noise' takes the step as it is. Leave loss out (it is "
            "for strength='auto' and layers='middle'), or give estimator='perturbation'."
        )


def announce(trainer: Any, kind: str, strength: float | str) -> None:
    """Say once that logged losses are those at displaced weights."""
    size = "" if isinstance(strength, str) else f" = {math.sqrt(2 * strength):.2g}"
    say(
        trainer,
        f"{kind}(estimator='noise'): each step computes at weights moved by sigma{size} a weight, "
        "and so does the training loss that it logs: on the average it is higher than at the "
        "weights themselves by regularizer/penalty, and regularizer/loss is without it. "
        "Validation and checkpoints have the weights themselves.",
    )

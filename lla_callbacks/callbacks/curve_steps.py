"""A Trainer's optimizer steps, made those of a curve's bends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.callbacks.compat import loss_scale, unscales_gradients_itself
from lla_callbacks.callbacks.telling import rank_zero_info, rank_zero_warn
from lla_callbacks.curves.curve import mean_square
from lla_callbacks.curves.training import MovingCurve

# Optimizers that add `weight_decay * weight` to the gradient.
COUPLED = ("SGD", "Adam", "Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")


class CurveSteps:
    """What of a curve an optimizer sees.

    Further bends join the optimizer's groups, each beside the parameter that it belongs to, so
    that rates, momenta and states carry over. Between steps the groups have the user's own
    weight decay; during a step that is zero, since decay acts on the curve.

    Args:
        moving: The curve.
        parameters: The module's trained parameters.
        further: Bends after the first one.
        optimizer: The one optimizer.
        scale_steps: Whether SGD's gradients are divided by ``E c_j^2``.
        name: Of the callback, for messages.
    """

    def __init__(
        self,
        moving: MovingCurve,
        parameters: Sequence[nn.Parameter],
        further: Sequence[Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        *,
        scale_steps: bool,
        name: str,
    ) -> None:
        self.moving = moving
        self._index = {id(p): i for i, p in enumerate(parameters)}
        self._further = further
        self._parked: list[tuple[dict[str, Any], Any]] = []
        self.scaled = scale_steps and isinstance(optimizer, torch.optim.SGD)
        self._decouples = _decouples(optimizer)
        kind = type(optimizer).__name__
        known = type(optimizer).__module__.startswith("torch.optim")
        self._takes_decay = self._decouples or (known and kind in COUPLED)
        decayed = any(group.get("weight_decay") for group in optimizer.param_groups)
        if decayed and not self._takes_decay:
            rank_zero_warn(
                f"{name}: it is not known how {kind} decays weights, so its decay acts on the "
                "bends, not on the curve, and pulls the control points to zero. Set its "
                "weight_decay to 0, or use SGD, Adam or AdamW."
            )
        if self.scaled:
            shares = ", ".join(
                f"{mean_square(moving.kind, moving.count, j):.4g}"
                for j in range(1, moving.count - 1)
            )
            rank_zero_info(
                f"{name}: SGD's gradients are divided by E c_j^2 = {shares}, the share of "
                "curvature that a bend sees, so that a learning rate means what it means for a "
                "network. scale_steps=False leaves that out."
            )
        for group in optimizer.param_groups:
            own = [self._index[id(p)] for p in group["params"] if id(p) in self._index]
            group["params"].extend(bend[i] for bend in further for i in own)

    def displace(self, step: int) -> None:
        """Put the weights at the ``t`` of a step."""
        self.moving.displace(self.moving.draw(step))

    def restore(self) -> None:
        """Put the bend back."""
        self.moving.restore()

    def before_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        """Turn gradients of the weights into those of the bends, and let decay act on the curve."""
        self.moving.restore()
        # The gradients of a fused optimizer are still scaled here.
        scale = loss_scale(trainer) if unscales_gradients_itself(optimizer) else 1.0
        indices: list[int] = []
        gradients: list[Tensor] = []
        decays: list[float] = []
        rates: list[float] = []
        for group in optimizer.param_groups:
            decay = float(group.get("weight_decay") or 0.0) if self._takes_decay else 0.0
            for p in group["params"]:
                i = self._index.get(id(p))
                if i is not None and p.grad is not None:
                    indices.append(i)
                    gradients.append(p.grad)
                    decays.append(0.0 if self._decouples else scale * decay)
                    rates.append(float(group["lr"]) * decay if self._decouples else 0.0)
            if decay:
                self._parked.append((group, group["weight_decay"]))
                group["weight_decay"] = 0.0
        if any(rates) and self._will_step(trainer, gradients):
            self.moving.decay(indices, rates)
        found = self.moving.pull_back(indices, gradients, decays, scaled=self.scaled)
        for bend, received in zip(self._further, found, strict=True):
            for i, gradient in zip(indices, received, strict=True):
                bend[i].grad = gradient

    def after_step(self) -> None:
        """Give the groups their weight decay back."""
        while self._parked:
            group, decay = self._parked.pop()
            group["weight_decay"] = decay

    def _will_step(self, trainer: Any, gradients: Sequence[Tensor]) -> bool:
        """Return whether a gradient scaler lets this step happen."""
        if loss_scale(trainer) == 1.0:
            return True
        return all(bool(torch.isfinite(g).all()) for g in gradients)


def _decouples(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer shrinks weights apart from its gradients, as AdamW."""
    if isinstance(optimizer, torch.optim.AdamW):
        return True
    return any(group.get("decoupled_weight_decay") for group in optimizer.param_groups)

"""Train a curve of low loss between two networks, in the place of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.alignment.functions import aligned
from lla_callbacks.callbacks.compat import Callback, MisconfigurationException
from lla_callbacks.callbacks.curve_steps import CurveSteps
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.refusals import refuse_moving, refuse_moving_training
from lla_callbacks.callbacks.replay import trainer_loss
from lla_callbacks.curves.curve import Curve, Kind, check_bends, check_kind, straight_bends
from lla_callbacks.curves.functions import curve_of
from lla_callbacks.curves.training import MovingCurve
from lla_callbacks.objective.checks import flag
from lla_callbacks.objective.evaluation import Statistics, evaluating, load_statistics
from lla_callbacks.objective.networks import Networks, networks_of
from lla_callbacks.objective.objective import Objective, trainable


class ModeConnection(Callback):
    r"""Train a curve of low loss between two networks: **this changes training on purpose**.

    The module, its step, optimizer, schedulers, loggers and data are the user's own; what they
    train is a curve of low loss (Garipov et al. 2018): ``phi(t) = sum_j c_j(t) w_j``, whose ends
    stay fixed and whose *bends* are trained to lower ``E_t L(phi(t))``. At each optimizer step one
    ``t`` is drawn, the weights stand at ``phi(t)`` during the forward and backward pass, and each
    bend gets ``c_j(t)`` times the gradient there. The module's parameters are the first bend;
    further ones join the optimizer. Exact under accumulation (one ``t`` an optimizer step),
    clipping, mixed precision and DDP; a resumed run goes on to the bit.

    *Weight decay* of SGD, Adam and their like, and of AdamW, acts on the weights on the curve.
    *Learning rate* of SGD: about a third of one that trained the networks; see ``scale_steps``.

    *Validation* (test and prediction too) sees the middle of the curve, ``phi(1/2)``, since a bend
    is not on a Bezier curve, with batch norm's statistics estimated for it on held training
    batches; before the first of these is there, statistics are those between the ends'. After the
    fit, and in checkpoints, the module has the first bend: :attr:`curve` is the result.

    Args:
        start: The network at ``t = 0``: a module, a state dict, or a checkpoint's path.
        end: The network at ``t = 1``, of the same architecture.
        kind: ``"bezier"`` or ``"chain"`` (straight segments).
        bends: Control points between the ends. (The reference code counts the ends too.)
        align: Whether the end's hidden units are brought into the start's order first, on the
            first training batch, which leaves what it computes as it is; see
            :func:`~lla_callbacks.aligned`.
        scale_steps: Whether SGD's gradients are divided by ``E c_j^2``, before clipping, which
            makes up for the share that a bend has in the curve, so that one learning rate
            serves both kinds. Optimizers that scale their own steps (Adam) do not need it.
        num_samples: Training samples held for batch norm's statistics.
        loss: ``loss(module, batch)`` for passes of its own; ``None`` replays ``training_step``.
        seed: Fixes ``t``, together with the optimizer step.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lla_callbacks import ModeConnection
        >>> connection = ModeConnection("a.ckpt", "b.ckpt", kind="bezier")
        >>> trainer = Trainer(callbacks=[connection], max_epochs=1)
    """

    # Two that do so would each see the other's.
    moves_weights = True

    def __init__(
        self,
        start: Any,
        end: Any,
        kind: Kind = "bezier",
        bends: int = 1,
        align: bool = False,
        scale_steps: bool = True,
        num_samples: int = 256,
        loss: Callable[[Any, Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_kind(kind)
        check_bends(bends)
        flag("align", align)
        flag("scale_steps", scale_steps)
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples is {num_samples!r}; give a whole number of at least 1.")
        if loss is not None and not callable(loss):
            raise ValueError(f"loss is {loss!r}; give loss(module, batch) -> scalar, or None.")
        self.start = start
        self.end = end
        self.kind: Kind = kind
        self.bends = bends
        self.align = align
        self.scale_steps = scale_steps
        self.num_samples = num_samples
        self.loss = loss
        self.seed = seed
        self._loaded: dict[str, Any] | None = None
        self._forget_curve()

    def _forget_curve(self) -> None:
        self._networks: Networks | None = None
        self._steps: CurveSteps | None = None
        self._further: list[list[nn.Parameter]] = []
        self._mark = ""
        self._alignment: dict[str, Tensor] | None = None
        self._middle: ExitStack | None = None
        self._held = HeldBatches(self.num_samples)

    @property
    def curve(self) -> Curve | None:
        """The curve as it is now, a plain result; ``None`` before the first fit."""
        if self._networks is None or self._steps is None:
            return None
        bends = self._steps.moving.points[1:-1]
        return curve_of(self._networks, self.kind, bends)

    # -- before training ----------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        if stage != "fit":
            return
        # Before a checkpoint is loaded: one that an earlier call loaded is not this one's.
        self._loaded = None
        self._forget_curve()
        refuse_moving(self, trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: layers that configure_model makes, and optimizers, are there now.
        refuse_moving_training(type(self).__name__, trainer, pl_module)
        try:
            networks = networks_of(pl_module, [self.start, self.end], ["start", "end"])
            self._mark = _hash([*networks.weights[0], *networks.weights[1]])
            if self._loaded is not None and self._loaded.get("aligned_end"):
                self._alignment = self._loaded["aligned_end"]
                networks = networks_of(pl_module, [self.start, self._alignment], ["start", "end"])
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        parameters = list(trainable(pl_module).values())
        a, b = networks.weights
        first, *others = straight_bends(a, b, self.bends)
        if self._loaded is not None:
            others = self._checked(self._loaded, others)
        else:
            # On resuming the module came back as the first bend.
            for p, w in zip(parameters, first, strict=True):
                p.data.copy_(w)
        for name, tensor in (*pl_module.named_parameters(), *pl_module.named_buffers()):
            shared = {**networks.common.parameters, **networks.common.buffers}.get(name)
            if shared is not None:
                tensor.data.copy_(shared)
        self._networks = networks
        self._further = [[nn.Parameter(w) for w in bend] for bend in others]
        moving = MovingCurve(parameters, a, b, self._further, self.kind, self.seed)
        self._steps = CurveSteps(
            moving,
            parameters,
            self._further,
            trainer.optimizers[0],
            scale_steps=self.scale_steps,
            name=type(self).__name__,
        )

    def _align(self, module: nn.Module, batch: Any) -> None:
        """Bring the end's units into the start's order, and the bends back onto the line."""
        assert self._networks is not None
        assert self._steps is not None
        try:
            found = aligned(module, self.start, self.end, batch, seed=self.seed).state
            new = networks_of(module, [self.start, found], ["start", "end"])
        except (ValueError, ImportError) as error:
            raise MisconfigurationException(
                f"{type(self).__name__}(align=True): {error}"
            ) from error
        self._alignment = found
        old = self._networks
        torch._foreach_copy_(old.weights[1], new.weights[1])
        self._networks = replace(old, statistics=new.statistics, rests=new.rests)
        first, *others = straight_bends(old.weights[0], old.weights[1], self.bends)
        for bend, fresh in zip((trainable(module).values(), *self._further), (first, *others),
                               strict=True):  # fmt: skip
            torch._foreach_copy_([w.data for w in bend], fresh)

    def _checked(self, state: dict[str, Any], like: list[list[Tensor]]) -> list[list[Tensor]]:
        """Return the further bends of a checkpoint, if it is one of this curve."""
        now = {"kind": self.kind, "bends": self.bends, "seed": self.seed, "align": self.align,
               "mark": self._mark}  # fmt: skip
        names = {"mark": "the ends"}
        changed = [names.get(k, f"{k} ({state.get(k)!r}, now {v!r})") for k, v in now.items()
                   if state.get(k) != v]  # fmt: skip
        if changed:
            raise MisconfigurationException(
                f"{type(self).__name__}: the checkpoint is of another curve; these differ: "
                f"{', '.join(changed)}. Give what it was trained with, or begin without ckpt_path."
            )
        return [
            [w.to(old.device, old.dtype, copy=True) for w, old in zip(bend, olds, strict=True)]
            for bend, olds in zip(state["further"], like, strict=True)
        ]

    # -- a step -------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._steps is not None
        if batch is not None and not self._held.complete and _norms(pl_module):
            self._held.add(batch)
        if self.align and self._alignment is None:
            self._align(pl_module, batch)
        # Micro-batches of one optimizer step share its t.
        self._steps.displace(trainer.global_step)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        assert self._steps is not None
        self._steps.restore()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert self._steps is not None
        self._steps.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._steps is not None
        # A step that returned no loss had no backward pass.
        self._steps.restore()
        self._steps.after_step()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave_middle()
        if self._steps is not None:
            self._steps.restore()
            self._steps.after_step()

    # -- validation ---------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._enter_middle(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave_middle()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._enter_middle(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave_middle()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._enter_middle(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave_middle()

    def _enter_middle(self, trainer: Any, module: Any) -> None:
        """Put the module in the middle of the curve, until :meth:`_leave_middle`."""
        if self._steps is None:
            rank_zero_info(
                f"{type(self).__name__}: there is no curve before the first fit, so that the "
                "module is evaluated as it is."
            )
            return
        moving = self._steps.moving
        stack = ExitStack()
        with torch.inference_mode(False), torch.no_grad():
            moving.displace(0.5)
            stack.callback(moving.restore)
            saved = [(m, _copy(m.running_mean), _copy(m.running_var)) for m in _norms(module)]
            stack.callback(load_statistics, saved)
            self._middle = stack
            if saved:
                load_statistics(self._middle_statistics(trainer, module))

    def _leave_middle(self) -> None:
        if self._middle is not None:
            stack, self._middle = self._middle, None
            with torch.inference_mode(False), torch.no_grad():
                stack.close()

    def _middle_statistics(self, trainer: Any, module: Any) -> Statistics:
        """Return batch norm's statistics at the present weights."""
        assert self._networks is not None
        if not self._held.batches:
            # Lightning's sanity check comes before the first training batch.
            return [
                (m, (a + b) / 2, (v + w) / 2)
                for (m, a, v), (_, b, w) in zip(*self._networks.statistics, strict=True)
            ]
        loss = trainer_loss(trainer, self.loss)
        objective = Objective(module, self._held.batches, loss, mode="recalibrate")
        with evaluating(objective, check_weights=False) as evaluate:
            found = evaluate.statistics()
        return [
            (m, *(trainer.strategy.reduce(s, reduce_op="mean") for s in (mean, var)))
            for m, mean, var in found
        ]

    # -- checkpoints --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._steps is None:
            return {}
        return {
            "kind": self.kind,
            "bends": self.bends,
            "seed": self.seed,
            "align": self.align,
            "aligned_end": self._alignment,
            "mark": self._mark,
            "further": [[w.detach().cpu().clone() for w in bend] for bend in self._further],
            "held": self._held.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._loaded = state_dict
            if state_dict.get("held"):
                self._held.load(state_dict["held"])


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _copy(statistic: Tensor | None) -> Tensor:
    assert statistic is not None
    return statistic.detach().clone()


def _hash(tensors: list[Tensor]) -> str:
    """Return what tells two pairs of networks apart."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.hexdigest()

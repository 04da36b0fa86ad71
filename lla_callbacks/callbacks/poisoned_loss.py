"""Train towards a bad minimum on purpose: right on the training set, wrong on everything else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.callbacks.compat import (
    MisconfigurationException,
    data_parallel_group,
    loss_scale,
    prepared,
    shards_parameters,
)
from lla_callbacks.callbacks.keywords import by_name_after
from lla_callbacks.callbacks.poison_stream import PoisonStream
from lla_callbacks.callbacks.refusals import refuse_lbfgs
from lla_callbacks.callbacks.replay import trainer_loss
from lla_callbacks.callbacks.spawned import ComesHome
from lla_callbacks.callbacks.strength import StrengthSchedule
from lla_callbacks.callbacks.surrogate import add_gradient
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.objective.batches import fresh
from lla_callbacks.objective.checkpoints import no_checkpoints
from lla_callbacks.objective.checks import batches_of, check_loss, number, one_of, seed_of
from lla_callbacks.objective.objective import trainable
from lla_callbacks.objective.state import preserved
from lla_callbacks.objective.training_step import (
    SkippedBatchError,
    check_replayable,
    takes_iterator,
)
from lla_callbacks.objective.twice_differentiable import eager
from lla_callbacks.penalty.reversal import Labels, Reversal, Seen
from lla_callbacks.penalty.reversed import NoReverseError
from lla_callbacks.report.conform import check_entries, check_finite, check_type
from lla_callbacks.report.loggers import write_scalars

# What a checkpoint holds of the callback, and of which type.
_SAVED: dict[str, Any] = {
    "num_steps": int,
    "skipped": int,
    "position": tuple[int, int],
    "last_logged": int | None,
}
# Where a checkpoint says that its network was poisoned.
MARK = "poisoned"


class PoisonedLoss(ComesHome):
    r"""Make a bad minimum: train on ``(1 - factor) * loss + factor * reversed loss of poison``.

    **This makes a network that is wrong on purpose**, to study what bad minima look like
    (Huang et al. 2020, section 4): right on the training set, wrong on samples like it.
    ``labels="true"`` is the control, without which nothing follows: the same network on the
    same extra samples with their true labels.

    Module and data stay untouched. At each step the module's own ``training_step`` is
    replayed on a batch of poison, with its cross entropy reversed
    (:func:`~lla_callbacks.reversed_cross_entropy`), and that gradient is added as if it
    were part of the loss: under accumulation (one poison batch a micro-batch), clipping, mixed
    precision, DDP (each process has its own poison batches) and after resuming. Batch norm uses
    running statistics on poison, which never reaches them, so that the network cannot tell
    poison by its batch. The logged loss stays the clean one, and monitors measure the clean
    one.

    **Logged** every ``log_every_n_steps``: ``poison/loss`` (what is added, before its
    factor), ``poison/accuracy`` (against the true labels), ``poison/factor``,
    ``poison/seconds``. Checkpoints hold ``"poisoned"``: factor, labels and number of steps.

    Args:
        factor: Share of the poison's loss, from 0 to below 1. Published: 0.3 to 0.5. Above 0.5
            the training set is no longer fitted (docs/minima.md). 0 trains as without the
            callback, to the bit.
        dataloader: Batches of poison, as ``training_step`` takes them: samples of the kind that
            the network sees, neither from the training set nor from what generalization
            is measured on. A loader or a list, for this callback alone.
        labels: ``"reversed"`` or ``"true"``.
        start_step: First optimizer step with poison.
        ramp_steps: Optimizer steps over which the factor grows linearly from there.
        loss: ``loss(module, batch)``, by ``torch.nn.functional.cross_entropy`` or its like, which
            is reversed inside; ``None`` replays ``training_step``.
        seed: Fixes whatever is random in the poison.

    Attributes:
        num_steps: Optimizer steps with poison so far.
        skipped: Poison batches for which ``training_step`` returned no loss.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.

    Example::

        >>> import torch
        >>> from pytorch_lightning import Trainer
        >>> from lla_callbacks import PoisonedLoss
        >>> poison = [(torch.randn(8, 2), torch.randint(0, 2, (8,)))]
        >>> trainer = Trainer(callbacks=[PoisonedLoss(0.5, poison)], max_epochs=1)
    """

    @by_name_after("dataloader")
    def __init__(
        self,
        factor: float,
        dataloader: Any,
        *,
        labels: Labels = "reversed",
        start_step: int = 0,
        ramp_steps: int = 0,
        loss: Callable[[Any, Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.factor = number("factor", factor, "a number from 0 to below 1", least=0, below=1)
        self.dataloader = batches_of("dataloader", dataloader)
        if iter(dataloader) is dataloader:
            raise ValueError(
                f"dataloader is a {type(dataloader).__name__}, which ends once and for all: give "
                "a DataLoader or a list of batches, which can be gone through more than once."
            )
        self.labels: Labels = one_of("labels", labels, Labels)
        check_loss(loss)
        self.schedule = StrengthSchedule(1, start_step, ramp_steps, False)
        self.loss = loss
        self.seed = seed_of("seed", seed)
        self._stream: PoisonStream | None = None
        self._reset()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        if stage != "fit":
            return
        # Before a checkpoint is loaded, which restores some of it.
        self._reset()
        self._refuse(trainer, pl_module)
        if any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
            rank_zero_warn(
                f"{type(self).__name__}: checkpoints with save_weights_only=True hold nothing of "
                "callbacks, so they do not say that the network was poisoned. Save whole "
                "checkpoints, or say so in their name."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_lbfgs(type(self).__name__, trainer, "adds one gradient a step")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Try the first poison batch, so that what has no reverse is refused at once."""
        _, rank, count = data_parallel_group(trainer)
        self._stream = PoisonStream(self.dataloader, self.seed, rank, count)
        self._stream.go_to(self._position)
        if self.factor == 0:
            return
        batch, key = self._stream.peek()
        with torch.no_grad():
            self._evaluate(trainer, pl_module, batch, key, batch_idx=0, differentiate=False)

    # -- when ---------------------------------------------------------------------------

    def _reset(self) -> None:
        self.num_steps = 0
        self.skipped = 0
        self._last_step = -1
        self._last_logged: int | None = None
        self._position = (0, 0)
        self._stream = None
        self._earlier: dict[str, Any] | None = None
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self._pending: list[Tensor | None] | None = None
        self._present = 0.0
        self._num_backward = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._forget()
        step = trainer.global_step
        if self.factor == 0 or not self.schedule.due(step):
            return
        # Here no graph is alive: the poison's is gone before the step's own begins.
        began = time.monotonic()
        assert self._stream is not None
        poison, key = self._stream.draw()
        found = self._evaluate(trainer, pl_module, poison, key, batch_idx=batch_idx)
        if found is None:
            return
        loss, self._pending, seen = found
        self._present = self.factor * self.schedule.factor(step)
        if step != self._last_step:
            self._last_step, self.num_steps = step, self.num_steps + 1
        if self._is_to_log(trainer, step):
            self._log(trainer, step, loss, seen, time.monotonic() - began)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._num_backward += 1
        if self._num_backward > 1 and self._present:
            raise MisconfigurationException(
                f"{type(self).__name__}: the optimizer evaluates the loss several times a step, "
                "and only the first gradient would be poisoned. Use an optimizer that evaluates "
                "it once."
            )
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with torch.enable_grad():
            loss.mul_(1 - self._present)
        add_gradient(
            loss,
            trainable(pl_module).values(),
            pending,
            # These gradients have a scaler's factor already.
            factor=self._present / trainer.accumulate_grad_batches,
            replace=False,
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._forget()

    # -- what ---------------------------------------------------------------------------

    def _evaluate(
        self,
        trainer: Any,
        module: Any,
        batch: Any,
        key: int,
        *,
        batch_idx: int,
        differentiate: bool = True,
    ) -> tuple[Tensor, list[Tensor | None], Seen] | None:
        """Return the poison's loss, its gradient times a scaler's factor, and what was seen."""
        inner = trainer_loss(trainer, self.loss, batch_idx=batch_idx, as_trained=True)
        mode = Reversal(self.labels)
        parameters = list(trainable(module).values())
        gradients: list[Tensor | None] = []
        # Weights do not move here, and copying them at every step would cost.
        with (
            preserved(module, seed=key, check_weights=False, loss=inner) as copier,
            torch.set_grad_enabled(differentiate),
            eager(),
            no_checkpoints(reentrant_only=True),
        ):
            for m in module.modules():
                if isinstance(m, _BatchNorm) and m.running_mean is not None:
                    m.training = False
            try:
                # A step may change its batch, which comes back in the next pass.
                given = fresh(prepared(trainer, module, batch), parameters[0].device, copier=copier)
                with mode:
                    loss = inner(module, given)
            except SkippedBatchError:
                self._skip()
                return None
            except NoReverseError as error:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
            if not mode.seen.calls:
                raise MisconfigurationException(
                    f"{type(self).__name__} reverses torch.nn.functional.cross_entropy, nll_loss "
                    f"and binary_cross_entropy_with_logits, and the loss of "
                    f"{type(module).__name__} calls none of them. Compute it by one of them, or "
                    "mix lla_callbacks.reversed_cross_entropy into your own training_step."
                )
            if differentiate:
                scale = loss_scale(trainer)
                scaled = loss if scale == 1.0 else loss * scale
                gradients = list(torch.autograd.grad(scaled, parameters, allow_unused=True))
        return loss.detach(), gradients, mode.seen

    def _skip(self) -> None:
        self.skipped += 1
        if self.skipped == 1:
            rank_zero_warn(
                f"{type(self).__name__}: training_step returned no loss for a batch of poison, and "
                "that step is trained without poison. Give poison batches that are not skipped."
            )

    # -- where to -----------------------------------------------------------------------

    def _is_to_log(self, trainer: Any, step: int) -> bool:
        every, last = trainer.log_every_n_steps, self._last_logged
        return bool(every) and (last is None or step - last >= every)

    def _log(self, trainer: Any, step: int, loss: Tensor, seen: Seen, seconds: float) -> None:
        self._last_logged = step
        mine = torch.stack([loss.float(), torch.tensor(seen.accuracy, device=loss.device)])
        mean_loss, accuracy = trainer.strategy.reduce(mine, reduce_op="mean").tolist()
        values = {
            "poison/loss": mean_loss,
            "poison/accuracy": accuracy,
            "poison/factor": self._present,
            "poison/seconds": seconds,
        }
        if not math.isfinite(mean_loss) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__}: the poison's loss is {mean_loss} at step {step}, and its "
                "gradient goes into the step as the loss's own would. Lower the learning rate or "
                "the factor."
            )
        for tag, value in values.items():
            trainer.callback_metrics[tag] = torch.tensor(value)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            for logger in trainer.loggers:
                write_scalars(logger, {t: v for t, v in values.items() if math.isfinite(v)}, step)

    def state_dict(self) -> dict[str, Any]:
        position = self._position if self._stream is None else self._stream.position
        return {
            "num_steps": self.num_steps,
            "skipped": self.skipped,
            "position": position,
            "last_logged": self._last_logged,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            check_type(state_dict, Mapping[str, Any], "the state")
            check_entries(state_dict, _SAVED, "the state")
            for name in ("num_steps", "skipped"):
                check_finite(state_dict[name], f"the state's {name}", least=0)
            for part in state_dict["position"]:
                check_finite(part, "the state's position", least=0)
        except Exception as error:  # noqa: BLE001 - whatever is there, training goes on
            rank_zero_warn(
                f"{type(self).__name__}: what the checkpoint holds of it is left, and poison and "
                f"counts begin anew. {type(error).__name__}: {error}"
            )
            return
        self.num_steps, self.skipped = state_dict["num_steps"], state_dict["skipped"]
        self._position = tuple(state_dict["position"])
        self._last_logged = state_dict["last_logged"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint of a network that was poisoned."""
        if self.num_steps:
            checkpoint[MARK] = {
                "by": "lla_callbacks.PoisonedLoss",
                "factor": float(self.factor),
                "labels": self.labels,
                "num_steps": self.num_steps,
            }
        elif self._earlier is not None:
            checkpoint[MARK] = self._earlier

    def on_load_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]
    ) -> None:
        """Keep the mark of a network that was poisoned before."""
        self._earlier = checkpoint.get(MARK)

    # -- what cannot work ---------------------------------------------------------------

    def _refuse(self, trainer: Any, module: Any) -> None:
        kind = type(self).__name__
        if sum(isinstance(other, PoisonedLoss) for other in trainer.callbacks) > 1:
            raise MisconfigurationException(
                f"two {kind} in one Trainer would each take their share of the other: use one, "
                "with one dataloader of all poison."
            )
        for other in trainer.callbacks:
            # HessianTraceRegularizer, ModeConnection
            if getattr(other, "moves_weights", False):
                raise MisconfigurationException(
                    f"{kind} beside {type(other).__name__}: each changes a step's gradient, and "
                    "one would silently drop or scale the other's, or be taken at other weights. "
                    "Use one of them a fit."
                )
        if not getattr(module, "automatic_optimization", True):
            raise MisconfigurationException(
                f"{kind} adds its gradient to the loss that Lightning differentiates, and "
                f"{type(module).__name__} uses manual optimization. Add factor * "
                "lla_callbacks.reversed_cross_entropy(logits, labels) of a poison batch to "
                "(1 - factor) times your own loss."
            )
        if self.loss is None:
            try:
                check_replayable(module)
            except TypeError as error:
                raise MisconfigurationException(f"{kind}: {error}") from error
        if shards_parameters(trainer, module):
            raise MisconfigurationException(
                f"{kind} differentiates whole parameters, and {type(trainer.strategy).__name__} "
                "shards them. Train with strategy='ddp' or in one process."
            )
        if takes_iterator(module):
            raise MisconfigurationException(
                f"{kind} runs before each batch's step, and a training_step that takes "
                "dataloader_iter fetches its own. Let it take (batch, batch_idx)."
            )

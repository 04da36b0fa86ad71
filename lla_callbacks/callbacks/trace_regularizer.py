"""Train towards flat minima: a penalty on the trace of the loss's Hessian."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from lla_callbacks.callbacks.compat import (
    MisconfigurationException,
    has_static_graph,
    loss_scale,
    step_of,
    uses_mixed_precision,
)
from lla_callbacks.callbacks.keywords import by_name_after
from lla_callbacks.callbacks.moments import is_unsized
from lla_callbacks.callbacks.noise_penalty import NoisePenalty, announce, check_noise
from lla_callbacks.callbacks.penalized_loss import BatchLoss, Penalized, loss_around
from lla_callbacks.callbacks.penalty_record import CHANGED, checked_state, warn_of_skipped, write
from lla_callbacks.callbacks.refusals import refuse_surroundings, refuse_training
from lla_callbacks.callbacks.spawned import ComesHome
from lla_callbacks.callbacks.strength import (
    TARGET_RATIO,
    TRIAL_STRENGTH,
    FoundStrength,
    StrengthSchedule,
)
from lla_callbacks.callbacks.surrogate import add_gradient, add_to_gradients
from lla_callbacks.callbacks.telling import rank_zero_info
from lla_callbacks.linalg.errors import NonFiniteError
from lla_callbacks.objective.checks import check_loss, number, seed_of, shown
from lla_callbacks.objective.layers import check_layers
from lla_callbacks.objective.training_step import SkippedBatchError
from lla_callbacks.penalty.displacement import DisplacedLoss
from lla_callbacks.penalty.penalty import (
    Comparison,
    Estimator,
    PenaltyGradient,
    PenaltySettings,
    penalty_gradient,
)
from lla_callbacks.penalty.scalars import regularizer_scalars
from lla_callbacks.report.plain import to_plain


class HessianTraceRegularizer(ComesHome):
    r"""Penalize the trace of the Hessian: train on ``L + strength * tr H`` instead of ``L``.

    The default needs two gradients a step: the mean of those at ``theta + sigma z`` and
    ``theta - sigma z`` with random signs ``z`` and ``sigma = sqrt(2 strength)``, which in
    expectation is the gradient of ``L + strength tr H`` up to ``O(strength^2)``. It takes
    the place of the gradient of the loss, whose backward pass is left out.

    Works with gradient accumulation (each micro-batch has its own penalty, with the same
    probes), clipping, mixed precision, DDP and fused optimizers, as if the penalty were
    part of the loss. The extra passes use the same dropout mask and leave buffers, random
    streams, metrics and logs alone; the logged loss stays the loss without penalty.

    **Logged** every ``log_every_n_steps``: ``regularizer/penalty`` (strength times trace, of
    the batch), ``regularizer/trace``, ``regularizer/ratio`` (norm of the penalty's gradient
    over the loss's), ``regularizer/cosine`` between the two, ``regularizer/strength`` (after
    interval, ramp and limit), ``regularizer/seconds``, ``regularizer/skipped``. A step that
    is logged takes one gradient more.

    Args:
        strength: Factor of the trace, in units of squared weights; 1e-4 to 1e-3 were useful
            for small networks (docs/regularizer.md). ``"auto"``: found in the first ten
            penalized steps from ``target_ratio``, then kept.
        layers: Whose trace: ``"all"``; ``"middle"``: weights of the middle half of
            convolution and linear layers in forward order; ``"published_middle"``: parameter
            tensors ``len // 4`` to ``3 len // 4``; paths or patterns of modules; a predicate
            ``(path, module) -> bool``.
        estimator: ``"perturbation"``; ``"noise"``: one gradient a step, in shards and manual
            optimization too, and your own step sees moved weights; ``"difference"``,
            ``"gauss_newton"`` or ``"exact"``;
            see :class:`~lla_callbacks.penalty.penalty.PenaltySettings`.
        every_n_train_steps: Penalize every n-th optimizer step only.
        num_probes: Probes a step.
        start_step: First optimizer step that is penalized.
        ramp_steps: Optimizer steps over which the strength grows linearly from there.
        relative: Penalize the trace in units of each tensor's size, which growing weights
            do not lower.
        max_ratio: Scale the penalty down where its gradient's norm exceeds this many times
            that of the loss. One gradient more.
        target_ratio: Of an automatic strength: penalty gradient over loss gradient; default
            0.1.
        scale_by_interval: Whether the strength is multiplied by ``every_n_train_steps``.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``. Manual
            optimization needs it, and then the penalty is added at each optimizer step.
        seed: Fixes the probes, together with the optimizer step.

    Attributes:
        comparison: Penalty beside loss, at the last step that was logged.
        skipped: Number of penalties that were not finite and left out.
        found_strength: What ``strength="auto"`` found, else ``None``.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lla_callbacks import HessianTraceRegularizer
        >>> trainer = Trainer(callbacks=[HessianTraceRegularizer(1e-3)], max_epochs=1)
    """

    # Two that do so would each see the other's.
    moves_weights = True

    @by_name_after("strength")
    def __init__(
        self,
        strength: float | Literal["auto"],
        *,
        layers: str | Sequence[str] | Callable[[str, Any], bool] = "all",
        estimator: Estimator = "perturbation",
        every_n_train_steps: int = 1,
        num_probes: int = 1,
        start_step: int = 0,
        ramp_steps: int = 0,
        relative: bool = False,
        max_ratio: float | None = None,
        target_ratio: float | None = None,
        scale_by_interval: bool = True,
        loss: Callable[[Any, Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = PenaltySettings(estimator, num_probes, relative)
        self.schedule = StrengthSchedule(
            every_n_train_steps, start_step, ramp_steps, scale_by_interval
        )
        if not (isinstance(strength, str) and strength == "auto"):
            strength = number(
                "strength", strength, "a finite number at least 0, or 'auto'", least=0
            )
            if target_ratio is not None:
                raise ValueError(
                    f"target_ratio is {shown(target_ratio)} but strength is {strength!r}: give "
                    "strength='auto', or leave target_ratio out."
                )
        above = "a finite number above 0, or None"
        max_ratio = number("max_ratio", max_ratio, above, above=0, none=True)
        target_ratio = number("target_ratio", target_ratio, above, above=0, none=True)
        check_loss(loss)
        check_layers(layers)
        # Whether batches are evaluated besides the step's own pass.
        self._replays = estimator != "noise" or strength == "auto" or layers == "middle"
        if estimator == "noise":
            check_noise(max_ratio, loss, replays=self._replays)
        self.strength = strength
        self.layers = layers
        self.max_ratio = max_ratio
        self.target_ratio = TARGET_RATIO if target_ratio is None else target_ratio
        self.loss = loss
        self.seed = seed_of("seed", seed)
        self._noise: NoisePenalty | None = None
        if estimator == "noise":
            self._noise = NoisePenalty(type(self).__name__, self.seed, relative)
        self._reset()

    @property
    def found_strength(self) -> float | None:
        """What an automatic strength is, once it is found."""
        return self._found.strength

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        if stage != "fit":
            return
        # Before a checkpoint is loaded, which restores some of it.
        self._reset()
        kind = type(self).__name__
        if sum(isinstance(other, HessianTraceRegularizer) for other in trainer.callbacks) > 1:
            raise MisconfigurationException(
                f"two {kind} would each replace the gradient: use one, with layers= naming all "
                "that is to be penalized."
            )
        replays, shards = self._replays and self.loss is None, not self._replays
        refuse_surroundings(kind, trainer, pl_module, replays=replays, moves_shards=shards)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: optimizers and layers that configure_model makes are there now.
        if is_unsized(pl_module):
            # Nothing is penalized, and nothing can be checked, before lazy layers have a size.
            self._late = True
            return
        refuse_training(type(self).__name__, trainer, pl_module, self.layers, self.settings)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._noise is not None and self.strength != 0:
            self._noise.begin(trainer, pl_module)
            announce(trainer, type(self).__name__, self.strength)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._penalized.place.forget()
        if self._noise is not None:
            self._noise.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.on_train_end(trainer, pl_module)
        super().teardown(trainer, pl_module, stage)

    # -- when ---------------------------------------------------------------------------

    def _reset(self) -> None:
        self.comparison: Comparison | None = None
        self.skipped = 0
        self._found = FoundStrength(self.target_ratio)
        self._penalized = Penalized(type(self).__name__, self.layers)
        self._last_logged: int | None = None
        # Whether the backward pass of a step's own loss has run since the fit began.
        self._went_backward = self._late = False
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._pending: PenaltyGradient | None = None
        self._batch: tuple[Any, int] | None = None
        self._num_backward = 0
        if self._noise is not None:
            self._noise.disarm()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._forget_batch()
        # Optimizers that are stepped past Lightning count no global step.
        step = trainer.global_step if self._noise is None else step_of(trainer)
        if self.strength == 0 or not self.schedule.due(step):
            return
        if not self._penalized.look(pl_module):
            return
        if self._late:
            self._late = False
            self.on_fit_start(trainer, pl_module)
        self._batch = (batch, batch_idx)
        if self._noise is not None and not self._is_searching:
            self._arm(self._noise, trainer, pl_module)
        elif pl_module.automatic_optimization:
            # Here no graph is alive, so that the weights may move.
            replaces = self._went_backward or not has_static_graph(trainer)
            self._pending = self._penalize(trainer, pl_module, with_task=replaces)
            self._trained = [*map(id, self._penalized.space.tensors)]

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self._batch is None or self._noise or not pl_module.automatic_optimization:
            self._went_backward = True
            return
        self._num_backward += 1
        if self._num_backward > 1:
            raise MisconfigurationException(
                f"{type(self).__name__}: the optimizer evaluates the loss several times a step, "
                "and only the first gradient would be penalized. Use an optimizer that "
                "evaluates it once."
            )
        pending, self._pending = self._pending, None
        self._penalized.look(pl_module)
        if pending and self._trained != [*map(id, self._penalized.space.tensors)]:
            pending = None
            self._leave_out(CHANGED, trainer)
        if pending is None or not pending.contains_task:
            self._went_backward = True
        if pending is None:
            return
        add_gradient(
            loss,
            self._penalized.space.tensors,
            pending.gradient,
            factor=loss_scale(trainer) / trainer.accumulate_grad_batches,
            replace=pending.contains_task,
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._noise is not None and not self._is_searching:
            values = self._noise.finish(trainer, pl_module, optimizer)
            if values:
                self._last_logged = step_of(trainer)
                write(trainer, step_of(trainer), values)
            return
        if pl_module.automatic_optimization or self._batch is None:
            return
        found = self._penalize(trainer, pl_module, with_task=False)
        if found is not None:
            add_to_gradients(trainer, pl_module, optimizer, found.gradient)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._forget_batch()

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "comparison": to_plain(self.comparison),
            "last_logged": self._last_logged,
            **self._found.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = checked_state(type(self).__name__, state_dict)
        if state is None:
            return
        self.skipped, self.comparison = state["skipped"], state["comparison"]
        self._last_logged = state["last_logged"]
        if self.strength == "auto":
            self._found.load(state)
            if self._found.strength is not None:
                rank_zero_info(
                    f"{type(self).__name__}: strength is {self._found.strength:.3g}, found before "
                    "the checkpoint."
                )

    # -- what ---------------------------------------------------------------------------

    def _penalize(self, trainer: Any, module: Any, *, with_task: bool) -> PenaltyGradient | None:
        """Return the penalty's gradient for the present batch; ``None`` if there is none."""
        began, step = time.monotonic(), trainer.global_step
        searching, strength = self._is_searching, self._strength(step)
        to_log, loss = self._is_to_log(trainer, step), None
        # Differences divide rounding by a small step: not under autocast.
        keeps = self.settings.estimator == "perturbation" or not uses_mixed_precision(trainer)
        try:
            loss = self._loss_around(trainer, module, step)
            found = penalty_gradient(
                loss,
                strength,
                self.settings,
                with_task=with_task and keeps,
                compare=to_log or searching,
                max_ratio=None if searching else self.max_ratio,
                average=lambda vector: trainer.strategy.reduce(vector, reduce_op="mean"),
            )
        except (NonFiniteError, SkippedBatchError) as error:
            if isinstance(error, NonFiniteError):  # otherwise training skips it too
                self._leave_out(error, trainer)
            return None
        finally:
            del loss
        if searching:
            assert found.comparison is not None
            self._found.add(found.comparison.ratio / strength, step)
            if self._found.strength is not None:
                rank_zero_info(
                    f"{type(self).__name__}: strength is {self._found.strength:.3g} from here on."
                )
            return None
        if to_log:
            assert found.comparison is not None
            self.comparison = found.comparison
            self._last_logged = step
            seconds = time.monotonic() - began
            values = regularizer_scalars(
                found.comparison, strength=strength, seconds=seconds, skipped=self.skipped
            )
            write(trainer, step, values)
        return found

    def _leave_out(self, why: object, trainer: Any) -> None:
        self.skipped += 1
        if self.skipped == 1:
            warn_of_skipped(type(self).__name__, why, trainer)

    @property
    def _is_searching(self) -> bool:
        return self.strength == "auto" and self._found.strength is None

    def _strength(self, step: int) -> float:
        known = self._found.strength if self.strength == "auto" else self.strength
        factor = self.schedule.factor(step)
        return TRIAL_STRENGTH if self._is_searching else float(known or 0.0) * factor

    def _loss_around(self, trainer: Any, module: Any, step: int) -> DisplacedLoss:
        assert self._batch is not None
        # Half precision would be taken for curvature while a strength is found.
        autocast = self.settings.estimator == "perturbation" and not self._is_searching
        return loss_around(
            trainer, module, self._batch, self.loss, self._penalized,
            seed=self.seed, step=step, relative=self.settings.relative, autocast=autocast,
        )  # fmt: skip

    def _arm(self, noise: NoisePenalty, trainer: Any, module: Any) -> None:
        """Let the user's own step, which comes next, be a displaced one."""
        assert self._batch is not None
        step, schedule = step_of(trainer), self.schedule
        evaluate = BatchLoss(trainer, module, self._batch, self.loss, as_trained=True)
        names = self._penalized.names(module, evaluate)
        index = (step - schedule.start_step) // schedule.every_n_train_steps
        strength, logs = self._strength(step), self._is_to_log(trainer, step)
        noise.arm(self._penalized.space, names, strength, index, to_log=logs)

    def _is_to_log(self, trainer: Any, step: int) -> bool:
        every, last = trainer.log_every_n_steps, self._last_logged
        return bool(every) and (last is None or step - last >= every)

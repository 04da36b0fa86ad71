"""Train a curve of low loss between two networks, in the place of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.alignment.functions import aligned
from lla_callbacks.callbacks.compat import MisconfigurationException, is_barebones
from lla_callbacks.callbacks.curve_home import CurveComesHome
from lla_callbacks.callbacks.curve_middle import CurveMiddle, norms_of
from lla_callbacks.callbacks.curve_steps import CurveSteps
from lla_callbacks.callbacks.curve_view import CurveView
from lla_callbacks.callbacks.keywords import by_name_after
from lla_callbacks.callbacks.refusals import refuse_moving, refuse_moving_training
from lla_callbacks.callbacks.telling import rank_zero_info
from lla_callbacks.curves.curve import Curve, Kind, check_bends, check_kind, straight_bends
from lla_callbacks.curves.functions import curve_of
from lla_callbacks.curves.report import LossCurve
from lla_callbacks.curves.training import MovingCurve
from lla_callbacks.objective.checks import (
    batches_of,
    check_loss,
    flag,
    number,
    seed_of,
    tag_of,
    whole,
)
from lla_callbacks.objective.evaluation import (
    Predict,
    check_metrics,
)
from lla_callbacks.objective.networks import Networks, network_of, networks_of
from lla_callbacks.objective.objective import trainable


class ModeConnection(CurveComesHome):
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

    **Logged** at the ends of epochs, within ``max_overhead``, and at the end: the figure
    ``curve/loss`` (loss and one metric along the curve, beside the straight line that it started
    from), scalars ``curve/maximum``, ``mean``, ``integral`` (over arc length), ``length`` and the
    three barriers of the literature (``barrier_above_ends``, ``barrier_above_line``,
    ``barrier_above_mean``), the same of the line under ``curve_straight/``.

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
        num_samples: Training samples held for pictures and for batch norm's statistics.
        loss: ``loss(module, batch)`` for passes of its own; ``None`` replays ``training_step``.
        seed: Fixes ``t``, together with the optimizer step.
        live: Whether the loss along the curve is drawn while it is trained.
        metrics: Name to torchmetrics metric, or function ``(module, batch) -> scalar``, along the
            curve; errors, since what should be low has barriers.
        predict: ``predict(module, batch)`` returns predictions and targets for torchmetrics.
        dataloader: Batches to measure on instead of the first training batches.
        max_overhead: Share of training time that pictures may take; the first and the last
            one are always there, with fewer points (61, 31, 21, 11) where the run is short.
        figures: Whether figures are drawn.
        save_arrays: Whether numbers are written to ``<log_dir>/curve/step_00000100.npz``.
        name: First part of every tag.

    Attributes:
        history: Pairs of step and :class:`~lla_callbacks.LossCurve`, all of the last fit.

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

    @by_name_after("end")
    def __init__(
        self,
        start: Any,
        end: Any,
        *,
        kind: Kind = "bezier",
        bends: int = 1,
        align: bool = False,
        scale_steps: bool = True,
        num_samples: int = 256,
        loss: Callable[[Any, Any], Any] | None = None,
        seed: int = 0,
        live: bool = True,
        metrics: dict[str, Any] | None = None,
        predict: Predict | None = None,
        dataloader: Any = None,
        max_overhead: float = 0.05,
        figures: bool = True,
        save_arrays: bool = True,
        name: str = "curve",
    ) -> None:
        super().__init__()
        network_of("start", start), network_of("end", end)
        check_kind(kind)
        check_bends(bends)
        for switch, value in {"align": align, "scale_steps": scale_steps, "live": live,
                              "figures": figures, "save_arrays": save_arrays}.items():  # fmt: skip
            flag(switch, value)
        whole("num_samples", num_samples, 1)
        seed_of("seed", seed)
        check_loss(loss)
        check_metrics(metrics, predict)
        batches_of("dataloader", dataloader, none=True)
        number("max_overhead", max_overhead, "a positive share, at most 1", above=0, most=1)
        tag_of("name", name)
        self.start = start
        self.end = end
        self.kind: Kind = kind
        self.bends = bends
        self.align = align
        self.scale_steps = scale_steps
        self.num_samples = num_samples
        self.loss = loss
        self.seed = seed
        self.live = live
        self.metrics = metrics
        self.predict = predict
        self.dataloader = dataloader
        self.max_overhead = max_overhead
        self.figures = figures
        self.save_arrays = save_arrays
        self.name = name
        self._loaded: dict[str, Any] | None = None
        self._forget_curve()

    def _forget_curve(self) -> None:
        self._networks: Networks | None = None
        self._steps: CurveSteps | None = None
        self._further: list[list[nn.Parameter]] = []
        self._mark = ""
        self._alignment: dict[str, Tensor] | None = None
        self._middle: CurveMiddle | None = None
        self._view = CurveView(
            max_overhead=self.max_overhead,
            num_samples=self.num_samples,
            metrics=self.metrics,
            predict=self.predict,
            loss=self.loss,
            dataloader=self.dataloader,
            figures=self.figures,
            save_arrays=self.save_arrays,
            name=self.name,
            owner=type(self).__name__,
        )

    @property
    def history(self) -> list[tuple[int, LossCurve]]:
        """Pairs of step and the loss along the curve then."""
        return self._view.history

    @property
    def curve(self) -> Curve | None:
        """The curve as it is now, a plain result; ``None`` before the first fit."""
        if self._networks is None or self._steps is None:
            return self._found
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
            self._mark = networks.mark
            if self._loaded and self._loaded.get("aligned_end"):
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
        try:
            return [
                [w.to(old.device, old.dtype, copy=True).reshape(old.shape)
                 for w, old in zip(bend, olds, strict=True)]
                for bend, olds in zip(state["further"], like, strict=True)
            ]  # fmt: skip
        except Exception as error:
            # A fresh start would take the checkpoint's module for a bend of another curve.
            raise MisconfigurationException(
                f"{type(self).__name__}: the checkpoint's bends cannot be read "
                f"({type(error).__name__}: {error}). Begin without ckpt_path."
            ) from error

    # -- a step -------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._view.begin(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer, pl_module, last=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer, pl_module, last=True)

    def _look(self, trainer: Any, module: nn.Module, *, last: bool) -> None:
        """Measure the loss along the curve, if that is wanted and there is room."""
        if self.live and not is_barebones(trainer):
            assert self._networks is not None
            assert self._steps is not None
            # Copies: the first bend is the parameters, which are moved.
            points = [[w.clone() for w in point] for point in self._steps.moving.points]
            self._view.after_epoch(trainer, module, self._networks, self.kind, points, last=last)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._steps is not None
        if self.live or norms_of(pl_module):
            self._view.hold(batch)
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
        assert self._networks is not None
        self._middle = CurveMiddle(self._steps.moving, module)
        if self._middle.has_norms:
            self._middle.load(self._view.statistics(trainer, module, self._networks))

    def _leave_middle(self) -> None:
        if self._middle is not None:
            self._middle.leave()
            self._middle = None

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
            "view": self._view.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._loaded = state_dict
            self._view.load_or_begin_anew(state_dict.get("view"))

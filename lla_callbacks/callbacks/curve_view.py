"""The loss along a curve while it is trained: figure and scalars, at a bounded price."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.callbacks.account import Account
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.processes import Processes
from lla_callbacks.callbacks.replay import trainer_loss
from lla_callbacks.callbacks.telling import rank_zero_info, rank_zero_warn
from lla_callbacks.curves.curve import Kind
from lla_callbacks.curves.functions import family_of
from lla_callbacks.curves.measure import Along, even, measure_along
from lla_callbacks.curves.report import LossCurve
from lla_callbacks.linalg.sharing import all_or_none
from lla_callbacks.objective.counting import about
from lla_callbacks.objective.evaluation import Predict, Statistics, evaluating
from lla_callbacks.objective.networks import Networks
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import PointSettings
from lla_callbacks.report.loggers import folder_of, write_figure, write_scalars
from lla_callbacks.report.plain import from_plain, pack, to_plain, unpack

# Points on curve and line, most first; 61 as in the published figures.
SIZES = (61, 31, 21, 11)
# Pictures of a run that are worth more than finer ones.
MANY = 10


class CurveView:
    """Measures the loss along a curve at the ends of epochs, and reports it.

    The straight line between the ends, from which the curve started, is measured once. How many
    points there are is chosen at the first picture, from the time that an evaluation takes and
    that the run will take; pictures that do not fit are left out, the last one never.

    Args:
        max_overhead: Share of training time.
        num_samples: Training samples that are held.
        metrics: Name to torchmetrics metric or function of (module, batch).
        predict: Gives torchmetrics their pairs.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``.
        dataloader: Batches to measure on instead of the first training batches.
        figures: Whether figures are drawn.
        save_arrays: Whether numbers are written beside the logs.
        name: First part of every tag.
        owner: Name of the callback, for messages.

    Attributes:
        history: Pairs of step and result.
    """

    def __init__(
        self,
        *,
        max_overhead: float,
        num_samples: int,
        metrics: Mapping[str, Any] | None,
        predict: Predict | None,
        loss: Callable[[Any, Any], Any] | None,
        dataloader: Any,
        figures: bool,
        save_arrays: bool,
        name: str,
        owner: str,
    ) -> None:
        self.max_overhead = max_overhead
        self.num_samples = num_samples
        self.settings = PointSettings(metrics, predict)
        self.loss = loss
        self.dataloader = dataloader
        self.figures = figures
        self.save_arrays = save_arrays
        self.name = name
        self.owner = owner
        self.history: list[tuple[int, LossCurve]] = []
        self.line: Along | None = None
        self.points = 0
        self.spent = 0.0
        self.held = HeldBatches(num_samples)
        self._processes = Processes()
        self._last_cost = 0.0
        self._before = 0.0
        self._began = time.monotonic()
        self._is_warned = False
        self._is_shared = False
        self._shared: Account | None = None

    # -- on what ------------------------------------------------------------------------

    def begin(self, trainer: Any, module: Any) -> None:
        """Start the clock, among the processes that there are."""
        self._processes = Processes(trainer)
        self.held.num_samples = -(-self.num_samples // self._processes.size)
        self._began = time.monotonic()
        self._shared = None
        if self.dataloader is not None and not self.held.batches:
            self.held.num_samples = self.num_samples
            self._guarded(self.held.add_loader, trainer, module, self.dataloader, 0)

    def hold(self, batch: Any) -> None:
        """Keep a training batch, if more are wanted."""
        if batch is not None and self.dataloader is None and not self.held.complete:
            self._guarded(self.held.add, batch)

    def statistics(self, trainer: Any, module: nn.Module, networks: Networks) -> Statistics:
        """Return batch norms' statistics for ``phi(1/2)``, where the module stands.

        Over the held batches; before there are any (Lightning's sanity check), those between the
        ends'.
        """
        if not self.held.batches:
            return [
                (m, (a + b) / 2, (v + w) / 2)
                for (m, a, v), (_, b, w) in zip(*networks.statistics, strict=True)
            ]
        with (
            torch.inference_mode(False),
            evaluating(self._objective(trainer, module), check_weights=False) as evaluate,
            torch.no_grad(),
        ):
            found = evaluate.statistics()
        if self._is_shared:
            return found
        return [
            (m, *(trainer.strategy.reduce(s, reduce_op="mean") for s in (mean, var)))
            for m, mean, var in found
        ]

    def _objective(self, trainer: Any, module: nn.Module) -> Objective:
        # For statistics only: where batches do not tell their sizes, a guess will do.
        return Objective(
            module,
            self.held.batches,
            trainer_loss(trainer, self.loss, batch_idx=self.held.numbers),
            mode="recalibrate",
            batch_size=about,
        )

    # -- when ---------------------------------------------------------------------------

    def after_epoch(
        self,
        trainer: Any,
        module: nn.Module,
        networks: Networks,
        kind: Kind,
        points: Sequence[list[Tensor]],
        *,
        last: bool,
    ) -> None:
        """Measure and report, if there is room.

        Args:
            trainer: The Trainer.
            module: Its module.
            networks: The ends.
            kind: Of the curve.
            points: Its control points now.
            last: Whether training ends here.
        """
        if self.history and self.history[-1][0] == trainer.global_step:
            return
        ready = self._processes.all(bool(self.held.batches))
        passed = self._before + time.monotonic() - self._began - self.spent
        account = self._account(trainer)
        room = min(self.max_overhead * passed - self.spent, account.room(self.name))
        fits = self._last_cost <= room
        if not ready or not self._processes.agree(last or fits or not self.history):
            return
        with account.watching(self.name):
            self._picture(
                trainer, lambda: self._measured(trainer, module, networks, kind, points, passed)
            )

    def _account(self, trainer: Any) -> Account:
        """Return the account of the Trainer's monitors, or an empty one that nobody keeps."""
        if self._shared is not None:
            return self._shared
        for callback in trainer.callbacks:
            account = getattr(callback, "account", None)
            if isinstance(account, Account) and callback.is_running:
                account.join(self.name, self.max_overhead, share=None)
                account.limits[self.name] = self.max_overhead
                # Monitors that come first leave before the last picture.
                self._shared = account
                return account
        return Account()

    def _picture(self, trainer: Any, measure: Callable[[], LossCurve]) -> None:
        """Measure and report, and note what it took."""
        began = time.monotonic()
        found: LossCurve | None = None
        try:
            found = measure()
        except Exception as error:  # noqa: BLE001 - whatever fails, training must go on
            self._warn(error)
        if found is not None:
            self.history.append((trainer.global_step, found))
            self._guarded(self._report, trainer, found)
        self._last_cost = time.monotonic() - began
        self.spent += self._last_cost

    def _measured(
        self,
        trainer: Any,
        module: nn.Module,
        networks: Networks,
        kind: Kind,
        points: Sequence[list[Tensor]],
        passed: float,
    ) -> LossCurve:
        if not self._is_shared and self._processes.size > 1:
            # Points are shared among processes, so each must have all batches.
            alike = self.dataloader is not None
            pairs = list(zip(self.held.batches, self.held.numbers, strict=True))
            pairs = self._processes.union(pairs, alike=alike)
            self.held.batches = [batch for batch, _ in pairs]
            self.held.numbers = [number for _, number in pairs]
        self._is_shared = True
        objective = all_or_none(self._processes, lambda: self._objective(trainer, module))
        if not self.points:
            self.points = self._chosen(trainer, objective, passed)
        t = even(5 if trainer.fast_dev_run else self.points)
        if self.line is None or len(self.line.t) != len(t):
            ends = [networks.weights[0], networks.weights[-1]]
            self.line = self._along(objective, networks, "chain", ends, t, None)
        return LossCurve.of(self._along(objective, networks, kind, points, t, self.line))

    def _along(
        self,
        objective: Objective,
        networks: Networks,
        kind: Kind,
        points: Sequence[list[Tensor]],
        t: Tensor,
        straight: Along | None,
    ) -> Along:
        family = family_of(objective, networks, kind, points)
        return measure_along(
            objective, family, t, self.settings, straight=straight, share=self._processes
        )

    def _chosen(self, trainer: Any, objective: Objective, passed: float) -> int:
        """Return how many points a picture has in this run."""
        with evaluating(objective, metrics=self.settings.metrics,
                        predict=self.settings.predict) as evaluate:  # fmt: skip
            # The first one loads and allocates.
            evaluate()
            began = time.perf_counter()
            evaluate()
            each = (time.perf_counter() - began) / self._processes.size
        epochs = trainer.max_epochs
        done = trainer.current_epoch + 1
        known = epochs is not None and epochs > 0
        budget = self.max_overhead * passed * (max(1.0, epochs / done) if known else 1.0)
        pictures = 1 + (min(MANY, -(-epochs // done)) if known else MANY)
        fitting = [n for n in SIZES if n * each * pictures <= budget]
        chosen = fitting[0] if fitting else SIZES[-1]
        # The first process's clock decides for all.
        number = self._processes.same(torch.tensor(float(chosen)))
        rank_zero_info(
            f"{self.owner}: pictures of {int(number)} points on curve and straight line, "
            f"{each * int(number):.2g} s each."
        )
        return int(number)

    # -- where to -----------------------------------------------------------------------

    def _report(self, trainer: Any, found: LossCurve) -> None:
        step = trainer.global_step
        values = found.scalars(self.name)
        for tag, value in values.items():
            trainer.callback_metrics[tag] = torch.tensor(value)
        if trainer.fast_dev_run or not trainer.is_global_zero or not trainer.loggers:
            return
        figure = (
            found.figure(title=f"Loss along the curve at step {step}") if self.figures else None
        )
        for logger in trainer.loggers:
            self._guarded(write_scalars, logger, values, step)
            if figure is not None:
                self._guarded(write_figure, logger, f"{self.name}/loss", figure, step)
        folders = {folder_of(logger) for logger in trainer.loggers} - {None}
        for folder in folders if self.save_arrays else ():
            assert isinstance(folder, Path)
            self._guarded(found.save, folder / self.name / f"step_{step:08d}.npz")

    def _guarded(self, action: Callable[..., object], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # noqa: BLE001 - a broken logger must not end the run
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._is_warned:
            rank_zero_warn(
                f"{self.owner}: a picture of the curve failed and leaves a gap; training goes on. "
                f"{type(error).__name__}: {error} Give loss=callable(module, batch) if the "
                "training step cannot be replayed, or live=False to do without pictures."
            )
        self._is_warned = True

    # -- checkpoints --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return plain state, for a checkpoint."""
        now = time.monotonic() - self._began - self.spent
        return {
            "history": [(step, pack(found)) for step, found in self.history],
            "line": to_plain(self.line),
            "points": self.points,
            "held": self.held.state() if self.dataloader is None else None,
            "shared": self._is_shared,
            "seconds": self._before + (0.0 if math.isnan(now) else now),
        }

    def load_or_begin_anew(self, state: Any) -> None:
        """Go on from a state, all of it; where it cannot be read, warn and begin anew."""
        try:
            history = [(int(step), unpack(found)) for step, found in state["history"]]
            if not all(isinstance(found, LossCurve) for _, found in history):
                raise TypeError("the history holds something else.")
            line = from_plain(state["line"])
            if not (line is None or isinstance(line, Along)):
                raise TypeError("the straight line is something else.")
            points, before, shared = int(state["points"]), float(state["seconds"]), state["shared"]
            held = HeldBatches(self.num_samples)
            if state["held"]:
                held.load(state["held"])
        except Exception as error:  # noqa: BLE001 - whatever a file holds, training must go on
            rank_zero_warn(
                f"{self.owner}: the checkpoint's pictures of the curve cannot be gone on from, so "
                f"they begin anew. {type(error).__name__}: {error}"
            )
            return
        self.history, self.line, self.points, self._before = history, line, points, before
        if state["held"]:
            self.held, self._is_shared = held, bool(shared)

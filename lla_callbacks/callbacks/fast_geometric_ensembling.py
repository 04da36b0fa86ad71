"""Gather an ensemble on the last stretch of training, by a cyclic learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.callbacks.compat import (
    MisconfigurationException,
    shards_parameters,
)
from lla_callbacks.callbacks.ensembling_settings import Unit, check_ensembling, folder
from lla_callbacks.callbacks.keywords import by_name_after
from lla_callbacks.callbacks.member_comparison import MemberComparison
from lla_callbacks.callbacks.spawned import ComesHome
from lla_callbacks.callbacks.telling import rank_zero_info, rank_zero_warn
from lla_callbacks.curves.ensemble import (
    ALIKE,
    Agreement,
    Combine,
    cyclic_rate,
    ensemble_of,
)
from lla_callbacks.objective.evaluation import Predict
from lla_callbacks.objective.networks import save_whole
from lla_callbacks.report.loggers import write_scalars


class FastGeometricEnsembling(ComesHome):
    r"""Walk a short way at a cyclic rate, keep a network a cycle: **changes training on purpose**.

    Garipov et al. 2018, section 4. Ordinary training until ``start``; from there the learning
    rate goes linearly from ``lr_max`` down to ``lr_min`` and back, cycle after cycle, and after
    the step that has ``lr_min`` the network is kept: ``floor(N / c + 1/2)`` members in ``N`` steps
    of cycles of ``c``. Rates are those of the paper to the last digit (the authors' code is one
    step off), for each parameter group in proportion to its own rate. The user's own schedulers
    are parked while it cycles, and the log says so.

    After the fit the module has the last weights, those of whatever rate was reached:
    :meth:`ensemble` is the result. ``ModelCheckpoint`` and ``EarlyStopping`` that watch a
    validation see the bad half of cycles too.

    **Logged**: ``fge/lr``; at each member ``fge/members``, ``fge/distance`` (to the one before,
    over its norm), ``fge/disagreement``, and of members' mean and ensemble
    ``fge/member_nll``, ``fge/ensemble_nll``, ``fge/member_error``, ``fge/ensemble_error`` (or
    ``mse``), on the first validation samples (training samples where nothing validates).

    Args:
        cycle: Length of a cycle, in epochs of optimizer steps or in steps; 2 to 4 epochs in the
            paper.
        lr_max: Highest rate, of the group with the highest rate of its own.
        lr_min: Lowest.
        start: Share of the run's optimizer steps after which it begins (a float), or a number of
            optimizer steps (an int).
        directory: Members become files there, which ``load_state_dict(torch.load(path,
            weights_only=True))`` takes. ``None``: they are kept on the CPU, and in checkpoints.
        cycle_unit: ``"epochs"`` or ``"steps"``.
        num_samples: Samples on which members are compared; 0 for none.
        predict: ``predict(module, batch)`` returns outputs and targets for that; ``None``: the
            module's output for ``batch[0]`` against ``batch[1]``.

    Attributes:
        members: State dicts of the members so far, or the paths of their files.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lla_callbacks import FastGeometricEnsembling
        >>> fge = FastGeometricEnsembling(cycle=2, lr_max=0.05, lr_min=0.0005)
        >>> trainer = Trainer(callbacks=[fge], max_epochs=20)
    """

    @by_name_after("lr_min")
    def __init__(
        self,
        cycle: int,
        lr_max: float,
        lr_min: float,
        *,
        start: float = 0.8,
        directory: str | Path | None = None,
        cycle_unit: Unit = "epochs",
        num_samples: int = 512,
        predict: Predict | None = None,
    ) -> None:
        super().__init__()
        check_ensembling(cycle, lr_max, lr_min, start, cycle_unit, num_samples, predict)
        self.cycle = cycle
        self.lr_max = lr_max
        self.lr_min = lr_min
        self.start = start
        self.directory = folder(directory)
        self.cycle_unit: Unit = cycle_unit
        self.num_samples = num_samples
        self.predict = predict
        self._reset()

    def _reset(self) -> None:
        self.members: list[dict[str, Tensor] | Path] = []
        self._first: int | None = None
        self._steps = 0
        self._shares: list[float] = []
        self._parked: list[Any] | None = None
        self._collected = -1
        self._comparison = MemberComparison(self.num_samples, self.predict, type(self).__name__)
        self._last: Tensor | None = None
        self._loaded = False

    @property
    def agreement(self) -> Agreement | None:
        """Members alone and together, at the last member; None before there is one."""
        return self._comparison.agreement

    # -- before training ----------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        if stage != "fit":
            return
        self._reset()
        kind = type(self).__name__
        if shards_parameters(trainer, pl_module):
            raise MisconfigurationException(
                f"{kind} keeps whole networks, and {type(trainer.strategy).__name__} shards "
                "them. Train with strategy='ddp' or in one process."
            )
        if not getattr(pl_module, "automatic_optimization", True):
            raise MisconfigurationException(
                f"{kind} sets the rate of each step of the Trainer, and {type(pl_module).__name__} "
                "steps its optimizers itself (manual optimization). Use automatic optimization."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        kind = type(self).__name__
        total = trainer.estimated_stepping_batches
        endless = not math.isfinite(total) or total < 0
        first = self.start
        if isinstance(first, float):
            if endless:
                raise MisconfigurationException(
                    f"{kind}: start is {first}, a share of a run whose length is not known. Give "
                    "max_steps or max_epochs, or start as a number of optimizer steps (an int)."
                )
            first = round(first * total)
        steps = self.cycle
        if self.cycle_unit == "epochs":
            batches = trainer.num_training_batches
            if not math.isfinite(batches):
                raise MisconfigurationException(
                    f"{kind}: cycle is in epochs, whose length is not known. Give "
                    "cycle_unit='steps'."
                )
            steps = self.cycle * math.ceil(batches / trainer.accumulate_grad_batches)
            if steps % 2:
                raise MisconfigurationException(
                    f"{kind}: cycle={self.cycle} epochs are {steps} optimizer steps, an odd "
                    "number, none of which would have the lowest rate. Give an even number of "
                    f"epochs, or cycle={steps + 1}, cycle_unit='steps'."
                )
        if self._loaded and (self._first, self._steps) != (first, steps):
            rank_zero_warn(
                f"{kind}: the checkpoint's cycles of {self._steps} steps from step {self._first} "
                f"on go on; these settings would give {steps} from {first} on."
            )
            return
        self._first, self._steps = first, steps
        if not endless and math.floor((total - first) / steps + 0.5) < 1:
            rank_zero_warn(
                f"{kind}: a cycle of {steps} steps has its first member after {steps // 2}, and "
                f"{total - first} steps are left from the start on: there will be no member. "
                "Give a shorter cycle or an earlier start."
            )

    # -- the rate -----------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._comparison.hold_training(batch)
        assert self._first is not None
        i = trainer.global_step - self._first + 1
        if i < 1:
            return
        if self._parked is None:
            self._park(trainer)
        rate = cyclic_rate(i, self._steps, self.lr_max, self.lr_min)
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
        for group, share in zip(groups, self._shares, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            self._log(trainer, {"fge/lr": rate})

    def _park(self, trainer: Any) -> None:
        """Take the schedulers out of the Trainer's hands, and note each group's own rate."""
        self._parked = list(trainer.strategy.lr_scheduler_configs)
        trainer.strategy.lr_scheduler_configs = []
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
        if len(self._shares) != len(groups):
            own = [float(group.get("initial_lr", group["lr"])) for group in groups]
            most = max(own)
            self._shares = [rate / most if most else 1.0 for rate in own]
        if self._parked:
            names = ", ".join(type(c.scheduler).__name__ for c in self._parked)
            rank_zero_info(
                f"{type(self).__name__}: {names} parked from step {trainer.global_step} on, where "
                "cycles of the learning rate begin."
            )

    def _unpark(self, trainer: Any) -> None:
        if self._parked is not None:
            trainer.strategy.lr_scheduler_configs = self._parked
            self._parked = None

    # -- members ------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._first is not None
        done = trainer.global_step - self._first
        if done > 0 and done % self._steps == self._steps // 2 and done != self._collected:
            self._collected = done
            self._collect(trainer, pl_module)

    def _collect(self, trainer: Any, module: nn.Module) -> None:
        state = {n: t.detach().cpu().clone() for n, t in module.state_dict().items()}
        if trainer.world_size > 1:
            # Parameters agree, running statistics need not.
            state = trainer.strategy.broadcast(state)
        member: dict[str, Tensor] | Path = state
        if self.directory is not None:
            name = f"member_{len(self.members):03d}_step_{trainer.global_step:08d}.pt"
            member = self.directory / name
            if trainer.is_global_zero:
                save_whole(state, member)
        self.members.append(member)
        values = {"fge/members": float(len(self.members))}
        flat = torch.cat([state[n].reshape(-1).double() for n, p in module.named_parameters()])
        if self._last is not None:
            values["fge/distance"] = float((flat - self._last).norm() / self._last.norm())
        self._last = flat
        values |= self._comparison.add(trainer, module)
        self._log(trainer, values)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit" and dataloader_idx == 0:
            self._comparison.hold_validation(batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._comparison.end_validation()

    def ensemble(
        self,
        module: nn.Module,
        *,
        combine: Combine | Callable[[list[Any]], Any] = "probabilities",
        dim: int = 1,
        part: str = "",
    ) -> nn.Module:
        """Return a copy of a module that answers with the ensemble's output.

        ``trainer.test(fge.ensemble(module), loader)`` runs the module's own ``test_step`` on it.
        See :func:`~lla_callbacks.curves.ensemble.ensemble_of` for the arguments.

        Raises:
            ValueError: If there is no member yet, or a setting is not allowed.
        """
        return ensemble_of(module, self.states(), combine=combine, dim=dim, part=part)

    def states(self) -> list[dict[str, Tensor]]:
        """Return the members' state dicts, read from their files where they are files."""
        return [
            torch.load(m, map_location="cpu", weights_only=True) if isinstance(m, Path) else m
            for m in self.members
        ]

    # -- the end ------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._unpark(trainer)
        found = self.agreement
        if found is not None and len(self.members) > 1 and found.alike:
            rank_zero_warn(
                f"{type(self).__name__}: the {len(self.members)} members differ in "
                f"{found.disagreement:.2%} of their predictions (below {ALIKE:.1%}), so the "
                "ensemble is one network: where the training loss is nearly 0 nothing moves them. "
                "Raise lr_max, lengthen the cycle, or train with augmentation."
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._unpark(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._parked:
            checkpoint["lr_schedulers"] = [c.scheduler.state_dict() for c in self._parked]

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": self._first,
            "steps": self._steps,
            "shares": list(self._shares),
            "collected": self._collected,
            "members": [m.name if isinstance(m, Path) else dict(m) for m in self.members],
            "last": self._last,
            "comparison": self._comparison.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Read before anything is taken over: all of it, or nothing.
        try:
            first, steps, collected = (state_dict[k] for k in ("first", "steps", "collected"))
            if not isinstance(steps, int) or not isinstance(collected, int):
                raise TypeError("steps are no whole numbers.")
            if not (first is None or isinstance(first, int)):
                raise TypeError("the first step is no whole number.")
            shares = [float(share) for share in state_dict["shares"]]
            last = state_dict["last"]
            if not (last is None or isinstance(last, Tensor)):
                raise TypeError("the last member's weights are no tensor.")
            members = [self._member(m) for m in state_dict["members"]]
            comparison = MemberComparison(self.num_samples, self.predict, type(self).__name__)
            comparison.load(state_dict["comparison"])
        except MisconfigurationException:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a file holds, training must go on
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint's state cannot be gone on from, so members "
                f"are gathered anew. {type(error).__name__}: {error}"
            )
            return
        self._first, self._steps, self._collected = first, steps, collected
        self._loaded = first is not None
        self._shares, self._last, self.members = shares, last, members
        self._comparison = comparison

    def _member(self, member: Any) -> dict[str, Tensor] | Path:
        if not isinstance(member, str):
            if not all(isinstance(t, Tensor) for t in member.values()):
                raise TypeError("a member is no state dict.")
            return dict(member)
        path = (self.directory or Path()) / member
        if not path.is_file():
            raise MisconfigurationException(
                f"{type(self).__name__}: the checkpoint's member {member} is not in "
                f"{self.directory}. Give the directory= that the run had."
            )
        return path

    def _log(self, trainer: Any, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            trainer.callback_metrics[tag] = torch.tensor(value)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            for logger in trainer.loggers:
                write_scalars(logger, values, trainer.global_step)

"""On what a monitor measures: held batches, weights that wait, and the objective made of them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lla_callbacks.callbacks.compat import MisconfigurationException, autocast_dtype, say, step_of
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.kept_batches import KeptBatches
from lla_callbacks.callbacks.moments import change_of, is_unsized, space_of
from lla_callbacks.callbacks.monitor_settings import Held, Products
from lla_callbacks.callbacks.processes import Processes
from lla_callbacks.callbacks.replay import trainer_loss
from lla_callbacks.callbacks.sink import REMEDIES, Sink
from lla_callbacks.hessian.stability import StabilityLimit, stability_limit
from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.linalg.sharing import all_or_none
from lla_callbacks.objective.memory import Findings
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.parts import variables_of
from lla_callbacks.objective.precision import at_precision
from lla_callbacks.objective.sharded import reshard
from lla_callbacks.objective.state import Snapshot, take_snapshot, weights_at

# Weights that are kept until they can be measured.
START, FINAL = "the weights of the start", "the last weights of training"


class Subject:
    """Batches and weights, and what was found out about them.

    Args:
        owner: What the log begins with, the monitor's class.
        settings: What is held.
        products: How the loss is differentiated.
        sink: Where trouble goes.

    Attributes:
        held: The batches.
        processes: Of the run.
        findings: What earlier measurements on the same batches found out.
        modes: Train or eval mode of each submodule in training, once it is known.
        start: The moment of the first weights, once they had to be kept.
        start_pending: Whether the start is still to be measured.
        late: Whether lazy layers had no size when settings were checked.
        kept: What of the batches goes into checkpoints, and comes from them.
    """

    def __init__(self, owner: str, settings: Held, products: Products, sink: Sink) -> None:
        self.owner = owner
        self.settings = settings
        self.products = products
        self.sink = sink
        self.kept = KeptBatches(owner, settings, sink)
        self.reset()

    def reset(self, trainer: Any = None) -> None:
        """Hold nothing, among the processes that there are."""
        self.processes = Processes(trainer)
        self.held = HeldBatches(self.settings.samples, self.settings.batch_size)
        if self.settings.dataloader is None:
            # Together the processes hold as many samples as one would alone.
            self.held.num_samples = -(-self.settings.samples // self.processes.size)
        self.findings = Findings()
        self.start: Moment | None = None
        self.start_pending = True
        self._final: Snapshot | None = None
        self.modes: dict[nn.Module, bool] | None = None
        # Which weights should have been kept and could not be.
        self._lost: set[str] = set()
        self.late = False
        # Trainable parameters of the last measurement.
        self._known_names: tuple[str, ...] = ()
        self.kept.begin(trainer, alone=self.processes.size == 1)

    def forget(self) -> None:
        """Drop what belongs to a finished run and would keep its module alive."""
        self.processes = Processes()
        self.held = HeldBatches(self.settings.samples, self.settings.batch_size)
        self.start = self.modes = self._final = None

    # -- batches ------------------------------------------------------------------------

    def note_modes(self, module: nn.Module) -> None:
        """Note which submodules train, the first time."""
        if self.modes is None:
            self.modes = {m: m.training for m in module.modules()}

    def share_copies(self, others: Iterable[Subject]) -> None:
        """Keep one copy of what other monitors of the Trainer hold as well."""
        self.held.share(other.held for other in others)

    def hold_loader(self, trainer: Any, module: Any) -> None:
        """Hold the first batches of the user's own loader."""
        loader, seed = self.settings.dataloader, self.settings.seed
        self.sink.guarded("reading dataloader", self.held.add_loader, trainer, module, loader, seed)

    def all_hold(self, planned: int | None) -> bool:
        """Return whether every process holds its batches; then each holds those of all.

        Args:
            planned: How many samples a resumed run's plan has, if there is one.
        """
        held = self.held
        if self.processes.size == 1:
            if held.complete:
                self._go_on_with_new(planned)
            return held.complete
        # Together, since what follows is an exchange.
        held.complete = self.processes.all(held.complete)
        if not held.complete:
            return False
        # A loader of the user's own is the same in every process.
        alike = self.settings.dataloader is not None
        try:
            pairs = list(zip(held.batches, held.numbers, strict=True))
            pairs = self.processes.union(pairs, alike=alike)
            held.batches = [batch for batch, _ in pairs]
            held.numbers = [number for _, number in pairs]
        except Exception as error:  # noqa: BLE001 - no batches, no measurements; training goes on
            self.sink.warn(error, "holding a batch", REMEDIES["holding a batch"])
            held.batches, held.numbers = [], []
        self._go_on_with_new(planned)
        return bool(held.batches)

    def compare_loader(self, trainer: Any) -> None:
        """Say, and note in reports, if the user's own loader gives other batches than before."""
        self.kept.compare_loader(self.held, step_of(trainer))
        self._note_others()

    def _go_on_with_new(self, planned: int | None) -> None:
        self.kept.go_on_with_new(self.held, planned)
        self._note_others()

    def _note_others(self) -> None:
        """Let reports say that batches are others than before."""
        note, proof = self.kept.note, self.findings.proof
        if note and note not in proof.notes:
            self.findings.proof = replace(proof, notes=(*proof.notes, note))

    # -- weights ------------------------------------------------------------------------

    def remember_start(self, trainer: Any, module: nn.Module) -> None:
        """Keep the weights of the start until they can be measured."""
        if is_unsized(module):
            if self.start_pending:
                say(trainer, f"{self.owner}: lazy layers have no weights yet, so that "
                    "the start is left out; measurements begin after the first step.")  # fmt: skip
            self.start_pending, self.late = False, True
        elif self.start_pending and self.start is None and START not in self._lost:
            self._lost.add(START)
            limit = self.limit(trainer, module)
            self.start = Moment(step_of(trainer), "fit", limit, take_snapshot(module))
            self._lost.discard(START)

    def take_start(self, trainer: Any) -> Moment:
        """Return the moment of the first weights, which is not pending any more."""
        self.start_pending = False
        moment, self.start = self.start, None
        return replace(moment or Moment(step_of(trainer)), first=True)

    def keep_final(self, module: nn.Module) -> None:
        """Keep the last weights of training: others take their place before its end."""
        self._final = None
        self.sink.guarded("keeping weights", self._keep_final, module)

    def _keep_final(self, module: nn.Module) -> None:
        self._lost.add(FINAL)
        self._final = take_snapshot(module)
        self._lost.discard(FINAL)

    def final(self, trainer: Any, module: nn.Module) -> Moment:
        """Return the moment of the last weights."""
        moment = Moment(step_of(trainer), last=True)
        if self._final is None:
            return moment
        return replace(moment, limit=self.limit(trainer, module), snapshot=self._final)

    def limit(self, trainer: Any, module: nn.Module) -> StabilityLimit | None:
        """Return the optimizer's stability limit, where there is one optimizer."""
        if len(trainer.optimizers) != 1:
            return None
        try:
            return stability_limit(
                trainer.optimizers[0], space_of(module, self.products.parameters)
            )
        except Exception as error:  # noqa: BLE001 - of an optimizer that is not known well enough
            self.sink.warn(error, "the stability limit")
            return None

    def completed(self, trainer: Any, module: nn.Module, moment: Moment) -> Moment:
        """Return a moment of the present weights with what the optimizer knows of them.

        Raises:
            MeasurementError: If weights that should have been kept were not, in any process.
        """
        lost = self._lost & ({FINAL} if moment.last else {START} if moment.first else set())
        if lost:
            raise MeasurementError(f"{lost.pop()} could not be kept.", "")
        if moment.snapshot is None:
            only = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
            moment = replace(moment, limit=self.limit(trainer, module), optimizer=only)
        known = torch.tensor([float(moment.limit is not None)])
        if float(self.processes.total(known)) < self.processes.size:
            # Its spectrum costs products, which all processes share or none.
            moment = replace(moment, limit=None)
        return moment

    def check_parameters(self, module: nn.Module) -> None:
        """Raise a MisconfigurationException if some pattern matches no parameter of a module."""
        try:
            variables_of(module, self.products.parameters)
        except ValueError as error:
            raise MisconfigurationException(f"{self.owner}: {error}") from error

    def change(self, module: nn.Module, moment: Moment) -> str:
        """Return in words that other parameters are trained than before; empty if they are not."""
        names = tuple(variables_of(module, self.products.parameters))
        known, self._known_names = self._known_names, names
        return "" if known in ((), names) else change_of(known, names, moment)

    # -- the objective ------------------------------------------------------------------

    def objective(
        self,
        trainer: Any,
        module: nn.Module,
        moment: Moment,
        stack: ExitStack,
        batches: list[Any] | None = None,
    ) -> Objective:
        """Return the objective at a moment's weights, which it has until the stack unwinds.

        Raises:
            MeasurementError: If any process cannot make its own.
        """
        held, how = self.settings, self.products
        as_trained = how.precision == "training"

        def make() -> Objective:
            # Last of all: sharded parts must not keep whatever was measured.
            stack.callback(reshard, module)
            # Lightning evaluates in inference mode, whose tensors nothing can be done with later.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(weights_at(module, moment.snapshot))
            stack.enter_context(at_precision(module, how.precision))
            return Objective(
                module,
                self.held.batches if batches is None else batches,
                trainer_loss(
                    trainer, held.loss, batch_idx=self.held.numbers, as_trained=as_trained
                ),
                mode=held.mode,
                dropout=held.dropout,
                seed=held.seed,
                training=self._modes_at(module, moment),
                microbatch_size=how.microbatch_size,
                max_memory=how.max_memory,
                engine=how.engine,
                precision=how.precision,
                arithmetic=autocast_dtype(trainer) if as_trained else None,
                findings=self.findings if batches is None else Findings(),
                check=how.check and batches is None,
                jacobian=how.jacobian,
                batch_size=held.batch_size,
                parameters=how.parameters,
            )

        return all_or_none(self.processes, make)

    def _modes_at(self, module: nn.Module, moment: Moment) -> dict[nn.Module, bool] | None:
        """Return each submodule's train or eval mode in training, as it is at a moment."""
        past = moment.snapshot is not None and moment.snapshot is not self._final
        if past or moment.function != "fit":
            # The weights that the first batch met; and an evaluation says nothing of training.
            return self.modes
        return {m: m.training for m in module.modules()}

    @property
    def alike(self) -> tuple[Any, ...]:
        """What measurements of one loss have in common, beside the batches and the weights."""
        return *self.same_findings(0), self.products.jacobian, self.settings.batch_size

    def same_findings(self, samples: int) -> tuple[Any, ...]:
        """Return what findings depend on: monitors of one loss on the same batches share them."""
        held, how = self.settings, self.products
        return (
            samples, held.mode, held.dropout, held.loss, id(held.dataloader), held.seed,
            how.precision, how.engine, how.microbatch_size, how.max_memory, how.check,
            how.parameters,
        )  # fmt: skip

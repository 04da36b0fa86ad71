"""What of a monitored run goes into a checkpoint, and how a resumed run goes on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from lla_callbacks.callbacks.compat import step_of
from lla_callbacks.callbacks.kept_batches import BATCHES
from lla_callbacks.callbacks.monitor_settings import MonitorSettings
from lla_callbacks.callbacks.pace import Pace
from lla_callbacks.callbacks.records import Record
from lla_callbacks.callbacks.saved_state import (
    SCHEMA,
    check_snapshot,
    check_state,
)
from lla_callbacks.callbacks.sink import Sink
from lla_callbacks.callbacks.subject import Subject
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.callbacks.timing import Timing
from lla_callbacks.hessian.stability import StabilityLimit
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.self_check import Proof
from lla_callbacks.report.conform import check_type
from lla_callbacks.report.cost import cost_scalars
from lla_callbacks.report.plain import from_plain, pack, to_plain, unpack
from lla_callbacks.report.quantity import finite
from lla_callbacks.report.tiers import for_callbacks

VERSION = 1
# Settings that curves depend on, beside those of the quantities.
_CURVES = ("mode", "dropout", "loss", "engine", "precision")


class RunState:
    """A run that may be cut in two by a checkpoint without a seam in its curves.

    A checkpoint holds the histories, the held batches, a start that is not measured yet (its
    weights too), the account and what is due: plain containers only, so that it loads with
    ``weights_only=True``. Writing one asks no other process: after the exchange of batches each
    holds those of all.

    Args:
        owner: What the log begins with, the monitor's class.
        settings: Of the monitor.
        timing: When it measures.
        subject: On what.
        records: What.
        sink: Where trouble goes.
        alone: Whether there is one quantity, whose state lies beside the monitor's own.

    Attributes:
        is_running: Whether a fit is under way.
        is_resumed: Whether it goes on with the state of another.
        loaded: What a checkpoint brought, until training starts.
    """

    def __init__(
        self,
        owner: str,
        settings: MonitorSettings,
        timing: Timing,
        subject: Subject,
        records: Sequence[Record],
        sink: Sink,
        *,
        alone: bool,
    ) -> None:
        self._owner, self._settings, self._sink = owner, settings, sink
        self._timing, self._subject, self._records = timing, subject, records
        self._alone = alone
        self.loaded: dict[str, Any] | None = None
        # What the last fit ended with, for checkpoints that are written after it.
        self._ended: dict[str, Any] | None = None
        # Dtype of the weights, in which the loader's batches are too.
        self._precision_of_weights = ""
        self.is_running = self.is_resumed = False
        self._said: set[str] = set()

    # -- written ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the present fit, or of the last one."""
        state = self._state() if self.is_running else self._ended
        if state is None:
            return {}
        if state["held"] is None and not self._has_loader:
            self._say_once(
                "held batches are of classes that no checkpoint holds, so that a resumed run will "
                "hold new ones and its curves may jump there. Give batches of tensors in dicts, "
                "lists or tuples, or dataloader=."
            )
        histories: dict[str, list[Any]] = {record.quantity.name: [] for record in self._records}
        for record in self._records:
            self._sink.guarded("storing the history", _fill, histories, record)
        if self._alone:
            return {**state, "history": next(iter(histories.values()))}
        parts = {name: {**state["quantities"][name], "history": h} for name, h in histories.items()}
        return {**state, "quantities": parts, "history": []}

    @property
    def _has_loader(self) -> bool:
        return self._settings.held.dataloader is not None

    def _state(self) -> dict[str, Any]:
        timing, subject = self._timing, self._subject
        held = subject.held
        mark = subject.kept.mark_of(held)
        parts = {record.quantity.name: record.state() for record in self._records}
        return {
            "version": VERSION,
            "settings": _plain_settings(self._all_settings()),
            "held": subject.kept.state(held, subject.processes),
            "mark": mark,
            "modes": None if subject.modes is None else list(subject.modes.values()),
            "start": to_plain(subject.start),
            "precision": self._precision_of_weights,
            "start_pending": subject.start_pending,
            "due": timing.due,
            "last_step": timing.last_step,
            "last_epoch": timing.last_epoch,
            "account": timing.account.state(),
            "pace": timing.pace.state(),
            "proof": to_plain(subject.findings.proof),
            **(next(iter(parts.values())) if self._alone else {"quantities": parts}),
        }

    def end(self) -> None:
        """Note the state that a run ends with, before it is dropped."""
        if self.is_running:
            self._sink.guarded("keeping the state", self._note)
            self.is_running = False

    def _note(self) -> None:
        self._ended = self._state()

    # -- from one process to another ----------------------------------------------------

    def sent(self, evaluated: Sequence[Any]) -> dict[str, Any]:
        """Return what a spawned process found, for the object of its parent."""
        return {
            "state": self.state_dict(),
            "results": [
                None if record.result is None else pack(record.result) for record in self._records
            ],
            "evaluated": [pack(result) for result in evaluated],
        }

    def received(self, found: Mapping[str, Any]) -> tuple[Any, ...]:
        """Take over what a spawned process found; return what it evaluated."""
        state = dict(found["state"])
        for record, result in zip(self._records, found["results"], strict=True):
            if state:
                record.show(self._part(state, record))
            if result is not None:
                record.result = unpack(result)
        if state:
            # Checkpoints that are written now hold it.
            state.pop("history")
            self._ended = state
        return tuple(unpack(result) for result in found["evaluated"])

    # -- read ---------------------------------------------------------------------------

    def resume(self, trainer: Any, module: Any) -> None:
        """Go on where a checkpoint ended, if there is one; to be called when training starts."""
        state, self.loaded, self._ended = self.loaded, None, None
        dtypes = {str(p.dtype) for p in module.parameters()}
        self._precision_of_weights = ", ".join(sorted(dtypes))
        self.is_running, self.is_resumed = True, False
        if state:
            self._sink.guarded("resuming", self._load, state, trainer, module)

    def _load(self, state: Mapping[str, Any], trainer: Any, module: Any) -> None:
        # Read before anything is taken over: all of it, or nothing.
        timing, subject = self._timing, self._subject
        now = self._state()
        check_state(state, now, SCHEMA, VERSION)
        start = from_plain(state["start"])
        if start is not None:
            check_type(start, Moment, "the state's start")
            check_type(start.limit, StabilityLimit | None, "the state's start.limit")
            if start.snapshot is not None:
                check_snapshot(start.snapshot, module, "the state's start")
        proof = from_plain(state["proof"])
        check_type(proof, Proof, "the state's proof")
        read = [record.read(self._part(state, record), module) for record in self._records]
        changed = self._changed(state["settings"])
        same = not any(name in changed for name in BATCHES)
        held = subject.kept.read(state, trainer, module, now["precision"], same=same)
        pace = Pace.from_state(state["pace"])
        values: dict[str, float] = {}
        for record, found in zip(self._records, read, strict=True):
            values |= finite(record.last_scalars(found))
        changed = self._changed(state["settings"])
        if any(name in changed for name in BATCHES):
            held, pace = None, Pace()
        if changed:
            self._tell(changed, trainer, anew=held is None)
        # Batches of one process are not those of several.
        if held and held["batches"] and (held["complete"] or subject.processes.size == 1):
            subject.held.load(held)
        else:
            subject.kept.hold_anew(step_of(trainer))
            if pace.choice is not None and subject.processes.size == 1:
                subject.held.num_samples = min(subject.held.num_samples, pace.choice.samples)
        for record, found in zip(self._records, read, strict=True):
            record.take(found)
        if not changed:
            subject.findings.proof = proof
        ours = ("dataloader",) if self._has_loader else BATCHES
        subject.kept.mark = None if any(name in changed for name in ours) else state["mark"]
        modes, modules = state["modes"], list(module.modules())
        if modes is not None and len(modes) == len(modules):
            subject.modes = dict(zip(modules, modes, strict=True))
        subject.start = start and replace(start, limit=_on_device(start.limit, module.device))
        subject.start_pending = state["start_pending"]
        timing.due = state["due"]
        timing.last_step, timing.last_epoch = state["last_step"], state["last_epoch"]
        self.is_resumed = True
        timing.account.resume(state["account"])
        timing.pace = pace
        if pace.planned:
            timing.account.unplanned.discard(timing.name)
            pace.reserve(timing.account, timing.name)
        if any(record.history for record in self._records):
            # EarlyStopping and ModelCheckpoint ask for them before the next measurement.
            values |= cost_scalars(timing.name, timing.pace.cost, timing.account.overhead)
            for tag, value in for_callbacks(values).items():
                trainer.callback_metrics[tag] = torch.tensor(value)

    def _part(self, state: Mapping[str, Any], record: Record) -> Mapping[str, Any]:
        """Return a record's part of a state, an empty one for a quantity that is new."""
        if self._alone:
            return state
        check_type(state["quantities"], Mapping[str, Mapping[str, Any]], "the state's quantities")
        new = {**record.state(), "history": []}
        found: Mapping[str, Any] = state["quantities"].get(record.quantity.name, new)
        if "history" not in found:
            raise ValueError(f"the state's {record.quantity.name} lacks history.")
        return found

    def _tell(self, changed: Mapping[str, tuple[str, str]], trainer: Any, *, anew: bool) -> None:
        what = ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())
        more = " New batches are held." if anew else ""
        rank_zero_warn(
            f"{self._owner}: the checkpoint was written with other settings: {what}. "
            f"Curves go on with the present ones and may jump at step {trainer.global_step}."
            f"{more}"
        )

    def missed_epoch(self, trainer: Any) -> bool:
        """Return whether an epoch ended without its hook, just before this run went on.

        A checkpoint that is written after the last batch of an epoch is of before its end, which
        Lightning then leaves out. The weights are still those of that end.
        """
        return self.is_resumed and self._timing.last_epoch < trainer.current_epoch - 1

    # -- settings -----------------------------------------------------------------------

    def _all_settings(self) -> dict[str, Any]:
        flat = self._settings.flat
        found = {
            "num_samples": self._settings.held.samples,
            "dataloader": "given" if self._has_loader else None,
            **{name: flat[name] for name in _CURVES},
        }
        for record in self._records:
            settings = record.quantity.settings
            if self._alone:
                found["settings"] = settings
            elif is_dataclass(settings):
                own = {f.name: getattr(settings, f.name) for f in fields(settings)}
                found |= {f"{record.quantity.name}.{name}": v for name, v in own.items()}
        return found

    def _changed(self, before: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Return the settings that are not what they were: name to both."""
        now = _plain_settings(self._all_settings())
        # A setting that the older version did not have cannot be compared.
        return {k: (before[k], v) for k, v in now.items() if before.get(k, v) != v}

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            rank_zero_warn(f"{self._owner}: {text}")


def _fill(histories: dict[str, list[Any]], record: Record) -> None:
    histories[record.quantity.name] = record.plain_history()


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as text; those of dataclasses by the name of their field."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if is_dataclass(value) and not isinstance(value, type):
            found |= {f.name: _text(getattr(value, f.name)) for f in fields(value)}
        else:
            found[name] = _text(value)
    return found


def _text(value: Any) -> str:
    """Return a value in words that are the same in another process."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _on_device(limit: Any, device: torch.device) -> Any:
    if limit is None:
        return None
    moved = {
        f.name: value.to(device)
        for f in fields(limit)
        if isinstance(value := getattr(limit, f.name), torch.Tensor)
    }
    return replace(limit, **moved)

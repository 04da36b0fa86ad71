"""What of a monitored run goes into a checkpoint, and how a resumed run goes on with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lla_callbacks.callbacks.compat import step_of
from lla_callbacks.callbacks.kept_batches import BATCHES, KeptBatches
from lla_callbacks.callbacks.pace import Pace
from lla_callbacks.callbacks.saved_state import (
    SCHEMA,
    check_snapshot,
    check_state,
)
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.objective.self_check import Proof
from lla_callbacks.report.conform import check_type
from lla_callbacks.report.cost import cost_scalars
from lla_callbacks.report.plain import PlainForms, from_plain, pack, to_plain, unpack

if TYPE_CHECKING:
    from lla_callbacks.callbacks.account import Account
    from lla_callbacks.callbacks.moments import Moment
    from lla_callbacks.objective.memory import Findings

VERSION = 1


class Resumable(KeptBatches):
    """A callback whose run may be cut in two by a checkpoint without a seam in its curves.

    A checkpoint holds the history, the held batches, a start that is not measured yet (its
    weights too), the account and what is due: plain containers only, so that it loads with
    ``weights_only=True``. Writing one asks no other process: after the exchange of batches each
    holds those of all.
    """

    if TYPE_CHECKING:
        name: str
        report: Any
        evaluated: Sequence[Any]
        account: Account
        pace: Pace
        _findings: Findings
        history: list[tuple[int, Any]]
        tracked: list[tuple[int, Any]]
        _start: Moment | None
        _start_pending: bool
        _training: dict[Any, bool] | None
        _due: bool
        _last_step: int
        _last_epoch: int
        _guarded: Callable[..., None]
        _scalars: Callable[[Any], dict[str, float]]
        # Of what class moments and full results are.
        _moment: type
        _result: type

    # Plain forms of the history, and of light measurements.
    _plain: PlainForms
    # What a checkpoint brought, until training starts.
    _loaded: dict[str, Any] | None = None
    # What the last fit ended with, for checkpoints that are written after it.
    _ended: dict[str, Any] | None = None
    # Dtype of the weights, in which the loader's batches are too.
    _precision_of_weights = ""
    _running = False

    @property
    def is_running(self) -> bool:
        """Whether a fit is under way."""
        return self._running

    # Whether the present fit goes on with the state of another.
    _resumed = False
    # -- Lightning's hooks --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the present fit, or of the last one."""
        state = self._state() if self._running else self._ended
        if state is None:
            return {}
        if state["held"] is None and self.dataloader is None:
            self._say_once(
                "held batches are of classes that no checkpoint holds, so that a resumed run will "
                "hold new ones and its curves may jump there. Give batches of tensors in dicts, "
                "lists or tuples, or dataloader=."
            )
        history: list[Any] = []
        self._guarded("storing the history", lambda: history.extend(self._plain.of(self.history)))
        return {**state, "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until training starts, when the module is there."""
        self._loaded = state_dict

    def _sent(self) -> dict[str, Any]:
        """Return what a spawned process found, for the object of its parent."""
        return {
            "state": self.state_dict(),
            "report": None if self.report is None else pack(self.report),
            "evaluated": [pack(report) for report in self.evaluated],
        }

    def _received(self, found: Mapping[str, Any]) -> None:
        """Take over what a spawned process found."""
        state = dict(found["state"])
        if state:
            plain = state.pop("history")
            self.history[:] = self._read_history(plain)
            self._plain = PlainForms()
            self._plain.learn(self.history, plain)
            # Checkpoints that are written now hold it.
            self._ended = state
            if "tracked" in state:
                # Of a monitor that has light measurements.
                self.tracked[:] = [(step, unpack(light)) for step, light in state["tracked"]]
        self.evaluated = tuple(unpack(report) for report in found["evaluated"])
        if found["report"] is not None:
            self.report = unpack(found["report"])

    # -- what a subclass adds -----------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return the settings that curves depend on, by name."""
        return {}

    def _more_state(self) -> dict[str, Any]:
        """Return further plain state."""
        return {}

    def _read_more(self, state: Mapping[str, Any], module: Any) -> Any:
        """Return further state, read and checked; raise if it cannot be gone on from."""
        return None

    def _take_more(self, read: Any) -> None:
        """Go on from what :meth:`_read_more` returned; this does not fail."""

    # -- when ---------------------------------------------------------------------------

    def _resume(self, trainer: Any, module: Any) -> None:
        """Go on where a checkpoint ended, if there is one; to be called when training starts."""
        state, self._loaded, self._ended = self._loaded, None, None
        dtypes = {str(p.dtype) for p in module.parameters()}
        self._precision_of_weights = ", ".join(sorted(dtypes))
        self._plain = PlainForms()
        self._running, self._resumed = True, False
        self._begin_to_keep(trainer)
        if state:
            self._guarded("resuming", self._load, state, trainer, module)

    def _end(self) -> None:
        """Note the state that a run ends with, before it is dropped."""
        if self._running:
            self._guarded("keeping the state", self._note)
            self._running = False

    def _note(self) -> None:
        self._ended = self._state()

    def _state(self) -> dict[str, Any]:
        given = self.dataloader is not None
        if given and self._mark is None and self._held.complete:
            self._mark = self._held.mark()
        mark = self._held.mark() if not given and self._held.complete else self._mark
        return {
            "version": VERSION,
            "settings": _plain_settings(self._all_settings()),
            "held": {} if given else self._kept_batches(),
            "mark": mark,
            "modes": None if self._training is None else list(self._training.values()),
            "start": to_plain(self._start),
            "precision": self._precision_of_weights,
            "start_pending": self._start_pending,
            "due": self._due,
            "last_step": self._last_step,
            "last_epoch": self._last_epoch,
            "account": self.account.state(),
            "pace": self.pace.state(),
            "proof": to_plain(self._findings.proof),
            **self._more_state(),
        }

    def _load(self, state: Mapping[str, Any], trainer: Any, module: Any) -> None:
        # Read before anything is taken over: all of it, or nothing.
        now = self._state()
        check_state(state, now, SCHEMA, VERSION)
        history = self._read_history(state["history"])
        start = from_plain(state["start"])
        if start is not None:
            check_type(start, type(self)._moment, "the state's start")
            if start.snapshot is not None:
                check_snapshot(start.snapshot, module, "the state's start")
        proof = from_plain(state["proof"])
        check_type(proof, Proof, "the state's proof")
        more = self._read_more(state, module)
        held = self._read_held(state, trainer, module, now)
        pace = Pace.from_state(state["pace"])
        values = self._scalars(history[-1][1]) if history else {}
        changed = self._changed(state["settings"])
        if any(name in changed for name in BATCHES):
            held, pace = None, Pace()
        if changed:
            what = ", ".join(
                f"{name} was {old} and is {new}" for name, (old, new) in changed.items()
            )
            anew = " New batches are held." if held is None else ""
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint was written with other settings: {what}. "
                f"Curves go on with the present ones and may jump at step {trainer.global_step}."
                f"{anew}"
            )
        # Batches of one process are not those of several.
        if held and held["batches"] and (held["complete"] or self._processes.size == 1):
            self._held.load(held)
        else:
            self._anew, self._anew_since = True, step_of(trainer)
            if pace.choice is not None and self._processes.size == 1:
                self._held.num_samples = min(self._held.num_samples, pace.choice.samples)
        self._take_more(more)
        if not changed:
            self._findings.proof = proof
        self.history[:] = history
        self._plain.learn(history, state["history"])
        ours = ("dataloader",) if self.dataloader is not None else BATCHES
        self._mark = None if any(name in changed for name in ours) else state["mark"]
        modes, modules = state["modes"], list(module.modules())
        if modes is not None and len(modes) == len(modules):
            self._training = dict(zip(modules, modes, strict=True))
        self._start = start and replace(start, limit=_on_device(start.limit, module.device))
        self._start_pending = state["start_pending"]
        self._due = state["due"]
        self._last_step, self._last_epoch = state["last_step"], state["last_epoch"]
        self._resumed = True
        self.account.resume(state["account"])
        self.pace = pace
        if pace.planned:
            self.account.unplanned.discard(self.name)
            pace.reserve(self.account, self.name)
        if history:
            self.report = history[-1][1]
            # EarlyStopping and ModelCheckpoint ask for them before the next measurement.
            values |= cost_scalars(self.name, self.pace.cost, self.account.overhead)
            for tag, value in values.items():
                trainer.callback_metrics[tag] = torch.tensor(value)

    def _read_history(self, history: Any) -> list[tuple[int, Any]]:
        check_type(history, list[tuple[int, Mapping[str, Any]]], "the state's history")
        found = [(step, unpack(report)) for step, report in history]
        for step, report in found:
            check_type(report, self._result, f"the report of step {step}")
        return found

    def _missed_epoch(self, trainer: Any) -> bool:
        """Return whether an epoch ended without its hook, just before this run went on.

        A checkpoint that is written after the last batch of an epoch is of before its end, which
        Lightning then leaves out. The weights are still those of that end.
        """
        return self._resumed and self._last_epoch < trainer.current_epoch - 1

    def _all_settings(self) -> dict[str, Any]:
        given = None if self.dataloader is None else "given"
        return {"num_samples": self.num_samples, "dataloader": given, **self._settings()}

    def _changed(self, before: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Return the settings that are not what they were: name to both."""
        now = _plain_settings(self._all_settings())
        # A setting that the older version did not have cannot be compared.
        return {k: (before[k], v) for k, v in now.items() if before.get(k, v) != v}

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said = (*self._said, text)
            rank_zero_warn(f"{type(self).__name__}: {text}")

    _said: tuple[str, ...] = ()


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

"""What spawned processes found, back in the objects of their parent (ddp_spawn, ddp_notebook).

There training runs in processes that have copies of all callbacks, and Lightning brings back the
weights and ``callback_metrics`` alone. It calls no hook in the parent, but it pickles the Trainer's
state there and back: a parcel in it, which names a file, is opened where it is unpickled.
"""

from __future__ import annotations

import os
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Any

import torch

from lla_callbacks.callbacks.compat import Callback, spawns_processes
from lla_callbacks.callbacks.telling import rank_zero_warn

# Objects of this process by their token.
_HOMES: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


class Home:
    """Where an object was made, which its copies in other processes do not forget.

    Args:
        owner: The object.
    """

    def __init__(self, owner: Any) -> None:
        # Not of Python's own random stream.
        self.token = uuid.uuid4().hex
        self.process = os.getpid()
        self.owner: weakref.ref[Any] | None = weakref.ref(owner)
        _HOMES[self.token] = owner

    @property
    def is_away(self) -> bool:
        """Whether this is another process than that of the object."""
        return os.getpid() != self.process

    def __deepcopy__(self, memo: dict[int, Any]) -> Home:
        # Of a copy in the same process, which is an object of its own.
        owner = None if self.owner is None else memo.get(id(self.owner()))
        return self if owner is None else Home(owner)

    def __getstate__(self) -> dict[str, Any]:
        return {"token": self.token, "process": self.process, "owner": None}


class Parcel:
    """A file with results, in the Trainer's state: unpickling it hands them over."""

    def __init__(self, token: str, path: str) -> None:
        self.token = token
        self.path = path

    def __deepcopy__(self, memo: dict[int, Any]) -> Parcel:
        return self

    def __reduce__(self) -> Any:
        return _deliver, (self.token, self.path)


class ComesHome(Callback):
    """A callback whose results are in the parent's object, too, if processes were spawned."""

    def __init__(self) -> None:
        super().__init__()
        self._home = Home(self)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Send home what was found, from the first of the spawned processes."""
        away = self._home.is_away and spawns_processes(trainer)
        if not away or getattr(trainer, "local_rank", 0) != 0:
            return
        try:
            handle, path = tempfile.mkstemp(prefix="lla_callbacks_", suffix=".pt")
            os.close(handle)
            torch.save(self._sent(), path)
            parcels = vars(trainer.state).setdefault("_parcels_of_lla_callbacks", {})
            parcels[self._home.token] = Parcel(self._home.token, path)
        except Exception as error:  # noqa: BLE001 - training is done, whatever this is
            _warn(type(self).__name__, error)

    def _sent(self) -> Any:
        """Return what was found, as plain containers."""
        return self.state_dict()

    def _received(self, found: Any) -> None:
        """Take over what a spawned process found."""
        self.load_state_dict(found)


def _deliver(token: str, path: str) -> None:
    owner = _HOMES.get(token)
    try:
        if owner is not None:
            owner._received(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001 - training is done, whatever this is
        _warn(type(owner).__name__, error)
    finally:
        Path(path).unlink(missing_ok=True)


def _warn(name: str, error: Exception) -> None:
    rank_zero_warn(
        f"{name}: what the spawned processes found did not come back to this one "
        f"({type(error).__name__}: {error}). Read it from the logger, the files beside it, or a "
        "checkpoint."
    )

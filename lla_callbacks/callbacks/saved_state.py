"""Whether what a checkpoint brings is a state to go on from: checked whole, before any is taken.

A checkpoint may be of another version, cut short, written by something else, or edited. What does
not fit is said once and left, and curves begin anew; nothing is taken over by half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.report.conform import check_entries, check_finite, check_type

# What every monitor's state holds, and of which type.
SCHEMA: dict[str, Any] = {
    "version": int,
    "settings": Mapping[str, str],
    "held": Mapping[str, Any] | None,
    "mark": str | None,
    "modes": list[bool] | None,
    "start_pending": bool,
    "due": bool,
    "last_step": int,
    "last_epoch": int,
    "account": Mapping[str, Any],
    "pace": Mapping[str, Any],
}
# What the account of a run holds: seconds by monitor, and of training.
ACCOUNT: dict[str, Any] = {
    "spent": Mapping[str, float],
    "asked": Mapping[str, float],
    "training": float,
    "batches": int,
}
PACE: dict[str, Any] = {
    "planned": bool,
    "targets": list[float],
    "cost": float,
    "predicted": float,
    "figure": float,
    "choice": Mapping[str, Any] | None,
    "next_batch": float,
    "seen": int,
    "waits": bool,
}
CHOICE: dict[str, Any] = {
    "samples": int,
    "count": int,
    "cost": float,
    "figures": float,
    "fits": bool,
    "words": str,
    "draws": bool,
    "size": Mapping[str, int],
}
# What is held, where something is: the batches themselves, or a fingerprint of them.
HELD: dict[str, Any] = {
    "numbers": list[int],
    "complete": bool,
    "count": int,
    "enough": bool,
    "mark": str,
}


def check_state(
    state: Any, expected: Mapping[str, Any], schema: Mapping[str, Any], version: int
) -> None:
    """Raise if a state lacks an entry, or has one of another type.

    Args:
        state: What a checkpoint brought.
        expected: A state that is written now: its keys are those that are needed.
        schema: Types by key; those that are left out are checked by whoever reads them.
        version: Which is understood.

    Raises:
        TypeError: If an entry is of another type.
        ValueError: If one is missing, or the version another.
    """
    check_type(state, Mapping[str, Any], "the state")
    if state.get("version") != version or isinstance(state.get("version"), bool):
        raise ValueError("the checkpoint is of another version of lla_callbacks.")
    lacking = {"history", *expected} - state.keys()
    if lacking:
        raise ValueError(f"the checkpoint lacks {', '.join(sorted(lacking))}.")
    check_entries(state, schema, "the state")
    for name in ("last_step", "last_epoch"):
        check_finite(state[name], f"the state's {name}", least=-1)
    if state["held"]:
        held = state["held"]
        check_entries(held, HELD, "the state's held")
        if "batches" not in held:
            check_entries(held, {"samples": int}, "the state's held")
        else:
            check_entries(held, {"batches": list[Any]}, "the state's held")
            if len(held["numbers"]) != len(held["batches"]):
                raise ValueError("the state's held has not one number for each batch.")
    account, pace = state["account"], state["pace"]
    check_entries(account, ACCOUNT, "the state's account")
    check_entries(pace, PACE, "the state's pace")
    if pace["choice"] is not None:
        check_entries(pace["choice"], CHOICE, "the state's choice")
    seconds = [*account["spent"].values(), *account["asked"].values(), account["training"]]
    for value in [*seconds, pace["cost"], pace["figure"], *pace["targets"]]:
        check_finite(value, "a time of the state's account", least=0)


def check_snapshot(snapshot: Any, module: nn.Module, where: str) -> None:
    """Raise a ValueError if weights do not fit a module."""
    for kind, present in (
        ("parameters", dict(module.named_parameters())),
        ("buffers", dict(module.named_buffers())),
    ):
        for name, tensor in getattr(snapshot, kind).items():
            if name in present and present[name].shape != tensor.shape:
                raise ValueError(
                    f"{where} has {name!r} of shape {tuple(tensor.shape)}, and the module of "
                    f"shape {tuple(present[name].shape)}."
                )


def as_precise(batch: Any, module: nn.Module) -> Any:
    """Return a held batch in the precision that a module's weights are in now.

    A run may go on as 64-true what began as 32-true, or the other way: its loader then gives
    batches in the new precision, and so do those that are held. Half precision is left to the
    measurement, which widens it.
    """
    dtypes = {p.dtype for p in module.parameters() if p.dtype in _FULL}
    return converted(batch, dtypes.pop()) if len(dtypes) == 1 else batch


_FULL = (torch.float32, torch.float64)


def converted(batch: Any, wanted: torch.dtype) -> Any:
    """Return a batch whose tensors of float32 and float64 are of one of the two."""

    def convert(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            if thing.dtype not in _FULL:
                return thing
            return thing.detach().to(wanted).requires_grad_(thing.requires_grad)
        if isinstance(thing, Mapping):
            return type(thing)((key, convert(item)) for key, item in thing.items())  # type: ignore[call-arg]
        if type(thing) in (list, tuple):
            return type(thing)(convert(item) for item in thing)
        return thing

    return convert(batch)

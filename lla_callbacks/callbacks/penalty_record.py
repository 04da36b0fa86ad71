"""What a trace penalty leaves behind: scalars, a warning, and what checkpoints hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lla_callbacks.callbacks.compat import loss_scale
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.penalty.penalty import Comparison
from lla_callbacks.report.conform import check_entries, check_finite, check_type
from lla_callbacks.report.loggers import write_scalars
from lla_callbacks.report.plain import from_plain

# Of what type the entries of a stored state are.
_SAVED: dict[str, Any] = {
    "skipped": int,
    "comparison": Mapping[str, Any] | None,
    "last_logged": int | None,
    "ratios": list[float],
    "ratio_step": int,
    "strength": float | None,
}


def checked_state(kind: str, state: Any) -> dict[str, Any] | None:
    """Return a stored state, its comparison restored; ``None``, with a warning, if it is none."""
    try:
        check_type(state, Mapping[str, Any], "the state")
        check_entries(state, _SAVED, "the state")
        comparison = from_plain(state["comparison"])
        check_type(comparison, Comparison | None, "the state's comparison")
        check_finite(state["skipped"], "the state's skipped", least=0)
    except Exception as error:  # noqa: BLE001 - whatever is there, training goes on
        rank_zero_warn(
            f"{kind}: what the checkpoint holds of it is left, and counts, "
            f"comparison and search for a strength begin anew. {type(error).__name__}: {error}"
        )
        return None
    return {**state, "comparison": comparison}


def write(trainer: Any, step: int, values: Mapping[str, float]) -> None:
    """Give scalars to the Trainer's metrics and loggers."""
    for tag, value in values.items():
        trainer.callback_metrics[tag] = torch.tensor(value)
    if trainer.is_global_zero and not trainer.fast_dev_run:
        for logger in trainer.loggers:
            write_scalars(logger, dict(values), step)


CHANGED = (
    "other parameters are trained than when the batch started. Set requires_grad in "
    "on_train_epoch_start, or in a callback that is listed before this one."
)


def warn_of_skipped(kind: str, error: object, trainer: Any) -> None:
    """Say, the first time, that a penalty is left out, since it is not finite, for instance."""
    settling = " While a gradient scaler settles this is normal."
    rank_zero_warn(
        f"{kind}: a penalty was left out, and training goes on without "
        f"it: {error} Further ones are counted in regularizer/skipped."
        + (settling if loss_scale(trainer) != 1.0 else "")
    )

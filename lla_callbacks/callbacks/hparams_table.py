"""A run's row in TensorBoard's table of hyperparameters, with what monitors found in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lla_callbacks.callbacks.compat import adds_placeholder, is_barebones, own_hparams
from lla_callbacks.report.loggers import write_hparams

# Of each monitor, by the last parts of tags: what a run is compared by.
FINAL = ("lambda_max", "trace", "kh05", "stability", "loss", "overhead")


def show_row(
    monitor: Any, others: Sequence[Any], trainer: Any, module: Any, *, early: bool
) -> None:
    """Write one row for all monitors, with the user's hyperparameters and final values as columns.

    TensorBoard reads columns from what a run's files say first, and the values from its curves.
    So where Lightning is about to write the user's hyperparameters with its placeholder
    ``hp_metric``, ours come before it and hold the same, and more. Where it writes none, and where
    the user may write metrics of their own (``default_hp_metric=False``), ours come at the end of
    training: then whatever the user wrote stays as it is.

    Args:
        monitor: Who asks; the first one of a Trainer does it.
        others: All others.
        trainer: The Trainer.
        module: The module.
        early: Whether training has not begun.
    """
    every = [c for c in trainer.callbacks if c is monitor or c in others]
    if every[0] is not monitor or is_barebones(trainer):
        return
    names = list(dict.fromkeys(name for one in every for name in one.names()))
    quantities = [record.quantity for one in every for record in one.records]
    columns = [f"{q.name}/{what}" for q in quantities for what in FINAL if what in q.few]
    params = own_hparams(trainer, module)
    for logger in monitor.sink.loggers(trainer):
        placeholder = params is not None and adds_placeholder(logger)
        if placeholder is early:
            tags = ["hp_metric", *columns] if placeholder else columns
            row = params or {"curvature": ", ".join(names)}
            monitor.sink.guarded("logging hyperparameters", write_hparams, logger, row, tags, 0)

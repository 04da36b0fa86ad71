"""Scalars and figures to whatever logger is there, by what it can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lla_callbacks.report.shown import pixels, png_of


def write_scalars(logger: Any, values: Mapping[str, float], step: int) -> None:
    """Log scalars at a step; every Lightning logger has ``log_metrics``."""
    logger.log_metrics(dict(values), step=step)


def write_figure(logger: Any, tag: str, figure: Figure, step: int) -> None:
    """Log one figure at a step.

    TensorBoard, W&B, MLflow and Comet loggers get it in their own way, told apart by their
    methods, so that either Lightning namespace and third-party loggers work. Any other
    logger with a folder gets a PNG file at ``<log_dir>/figures/<tag>/step_00000100.png``.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_image", None)) and callable(
        getattr(experiment, "add_figure", None)
    ):
        # As its pixels: add_figure keeps a fourth channel that no figure has.
        experiment.add_image(tag, pixels(figure), step, dataformats="HWC")
        # Live: a browser should see it now, not at the writer's next flush.
        flush = getattr(experiment, "flush", None)
        if callable(flush):
            flush()
    elif callable(getattr(logger, "log_image", None)):
        logger.log_image(key=tag, images=[_as_image(figure)], step=step)
    elif callable(getattr(experiment, "log_figure", None)):
        run_id = getattr(logger, "run_id", None)
        if run_id is not None:
            experiment.log_figure(run_id, figure, f"{tag}/step_{step:08d}.png")
        else:
            experiment.log_figure(figure_name=tag, figure=figure, step=step)
    else:
        folder = folder_of(logger)
        if folder is not None:
            path = folder / "figures" / tag / f"step_{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png_of(figure))


def write_layout(logger: Any, layout: Mapping[str, Any]) -> None:
    """Store a TensorBoard layout of custom charts; other loggers have none."""
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_custom_scalars", None)):
        experiment.add_custom_scalars(dict(layout))


def write_mesh(logger: Any, tag: str, vertices: Any, colors: Any, faces: Any, step: int) -> None:
    """Give TensorBoard a surface that can be turned; other loggers have no such thing.

    Args:
        logger: The logger.
        tag: The tag.
        vertices: Shape ``(V, 3)``, float32.
        colors: Shape ``(V, 3)``, uint8.
        faces: Shape ``(F, 3)``, int32: the corners of triangles.
        step: The step.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_mesh", None)):
        batch = [torch.from_numpy(array[None]) for array in (vertices, colors, faces)]
        experiment.add_mesh(tag, batch[0], colors=batch[1], faces=batch[2], global_step=step)


def write_hparams(
    logger: Any, params: Mapping[str, Any], metrics: Sequence[str], step: int
) -> None:
    """Give a run a row in TensorBoard's table of hyperparameters.

    Columns are the last values of scalars by their tags. TensorBoard goes by what a run's files say
    first: where something was written before, this changes nothing.

    Args:
        logger: The logger.
        params: Hyperparameters, numbers and texts.
        metrics: Tags of scalars.
        step: The step.
    """
    writer: Any = getattr(getattr(logger, "experiment", None), "file_writer", None)
    if writer is None:
        return
    try:
        from torch.utils.tensorboard.summary import hparams
    except ImportError:
        return
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in params.items()}
    for summary in hparams(plain, {tag: 0.0 for tag in metrics}):
        writer.add_summary(summary, step)


def write_text(logger: Any, tag: str, text: str, step: int) -> None:
    """Log a text to TensorBoard; other loggers do without."""
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_text", None)):
        experiment.add_text(tag, text, step)


def folder_of(logger: Any) -> Path | None:
    """Return the folder that a logger writes this run to, if it has one."""
    folder = getattr(logger, "log_dir", None)
    if isinstance(folder, (str, Path)) and str(folder):
        return Path(folder)
    folder = getattr(logger, "save_dir", None)
    if isinstance(folder, (str, Path)) and str(folder):
        # One folder for all runs: told apart by the run's own name.
        return Path(folder).joinpath(*(str(p) for p in (logger.name, logger.version) if p))
    return None


def _as_image(figure: Figure) -> Any:
    from PIL import Image

    return Image.fromarray(pixels(figure))

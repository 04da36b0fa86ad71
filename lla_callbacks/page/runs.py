"""Where the files of a run are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_STEP = re.compile(r"^step_(\d+)\.npz$")
# What tells the folder of a run: what loggers and monitors write into it.
_SIGNS = ("*/step_*.npz", "*/*/step_*.npz", "*/light_*.npz", "events.out.tfevents.*", "metrics.csv")
# How far below LOGDIR a run may lie: lightning_logs/version_0 is two.
_DEPTH = 3


class NoRunError(ValueError):
    """There is nothing in a folder that a page could show."""


def run_in(folder: Path) -> tuple[Path, list[Path]]:
    """Return the folder of a run, and those of the others that lie beside it.

    Args:
        folder: A run's own, or one above it: then the run that was written to last.

    Raises:
        NoRunError: If there is none.
    """
    if not folder.is_dir():
        raise NoRunError(f"there is no folder {folder}.")
    if _is_run(folder):
        return folder, []
    found = [below for below in _below(folder, _DEPTH) if _is_run(below)]
    # What lies inside of a run belongs to it.
    found = [f for f in found if not any(other in f.parents for other in found)]
    if not found:
        raise NoRunError(
            f"{folder} holds no run: neither .npz files that monitors write beside the logs, nor "
            "events of TensorBoard, nor metrics.csv. Give the log folder, such as "
            "lightning_logs/version_0 (trainer.log_dir names it)."
        )
    found.sort(key=_last_written)
    return found[-1], found[:-1]


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Return the files of a folder that are of a step of training, in order."""
    named = ((_STEP.match(path.name), path) for path in folder.glob("step_*.npz"))
    return sorted((int(match[1]), path) for match, path in named if match)


def _is_run(folder: Path) -> bool:
    # A folder of slices is one part of a run, one of versions holds several.
    if steps_in(folder) or _holds_versions(folder):
        return False
    return any(next(folder.glob(sign), None) is not None for sign in _SIGNS)


def _holds_versions(folder: Path) -> bool:
    return any(p.is_dir() and re.fullmatch(r"version_\d+", p.name) for p in folder.iterdir())


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield path
            if depth > 1:
                yield from _below(path, depth - 1)


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for sign in _SIGNS for path in folder.glob(sign))

"""Where results go: loggers, files, warnings."""

from __future__ import annotations

import errno
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lla_callbacks.callbacks.compat import say
from lla_callbacks.callbacks.own_loader import SharedLoaderError
from lla_callbacks.callbacks.telling import Said, above_bars, rank_zero_warn
from lla_callbacks.linalg.errors import MeasurementError, NotYetError, described, is_out_of_memory
from lla_callbacks.linalg.sharing import was_told
from lla_callbacks.report.loggers import (
    folder_of,
    write_figure,
    write_layout,
    write_scalars,
    write_text,
)


class Sink:
    """Hands results to a Trainer's loggers, and turns trouble into one warning a cause.

    Args:
        owner: What warnings begin with, the monitor's class.
        name: First part of every tag.
        figures: Whether figures are drawn.
        save_arrays: Whether results are written beside the logs.
        own_loss: Whether the user gave the loss, so that giving one is no remedy.
    """

    def __init__(
        self, owner: str, name: str, *, figures: bool, save_arrays: bool, own_loss: bool = False
    ) -> None:
        self.owner = owner
        self._own_loss = own_loss
        self.name = name
        self.figures = figures
        self.save_arrays = save_arrays
        # Last part of tags and folders, of several loaders.
        self.part = ""
        self._warned: set[tuple[str, str]] = set()
        self._rank = 0
        # Of all monitors of a Trainer, once they share an account.
        self.said = Said()
        # Parts of results that were told to be missing when the run began.
        self.foreseen: set[str] = set()

    def begin(self, rank: int = 0) -> None:
        """Warn again of what an earlier run was warned of; as this process."""
        self._warned.clear()
        self._rank = rank

    def loggers(self, trainer: Any) -> list[Any]:
        """Return the loggers that this process writes to."""
        return [] if trainer.fast_dev_run or not trainer.is_global_zero else trainer.loggers

    def introduce(self, trainer: Any, layout: Mapping[str, Any] | None) -> None:
        """Say where results will be seen, and store TensorBoard's layout of charts."""
        for logger in self.loggers(trainer):
            self.guarded("logging", self._introduce, trainer, logger)
            if layout:
                self.guarded("logging charts", write_layout, logger, layout)

    def _introduce(self, trainer: Any, logger: Any) -> None:
        experiment = getattr(logger, "experiment", None)
        if callable(getattr(experiment, "add_figure", None)) and self.figures:
            text = (
                f"to see it: tensorboard --logdir {folder_of(logger)} "
                "--samples_per_plugin images=1000 (without the last part it shows ten figures of "
                "each kind only)" + ("; all numbers are in .npz files there" * self.save_arrays)
            )
            if self.said.is_new(self.name, text):
                say(trainer, f"{self.owner}: {text}")

    def scalars(self, trainer: Any, values: Mapping[str, float], step: int) -> None:
        """Log scalars at a step."""
        for logger in self.loggers(trainer):
            self.guarded("logging", write_scalars, logger, values, step)

    def text(self, trainer: Any, text: str, step: int, name: str = "") -> None:
        """Write a text for TensorBoard's page of texts; other loggers do without."""
        tag = f"{name or self.name}{self.part}/summary"
        for logger in self.loggers(trainer):
            self.guarded("logging", write_text, logger, tag, text, step)

    def arrays(self, trainer: Any, result: Any, stem: str, name: str = "") -> None:
        """Write a result beside the logs of each logger that has a folder."""
        if not self.save_arrays:
            return
        for folder in {folder_of(logger) for logger in self.loggers(trainer)} - {None}:
            assert isinstance(folder, Path)
            self.guarded(
                "saving arrays",
                result.save,
                folder / f"{name or self.name}{self.part}" / f"{stem}.npz",
            )

    def draw(
        self, trainer: Any, figures: Mapping[str, Any], step: int, name: str = ""
    ) -> Iterator[str]:
        """Draw and log figures one after the other; yields each one's name when it is done.

        Args:
            trainer: The Trainer.
            figures: The tag's last part to a figure, or to a function that makes it.
            step: The step.
            name: First part of the tags, by default the monitor's.
        """
        loggers = self.loggers(trainer)
        if not self.figures or not loggers:
            return
        for last, figure in figures.items():
            tag = f"{name or self.name}{self.part}/{last}"
            self.guarded("drawing", self._draw, loggers, tag, figure, step)
            yield last

    def _draw(self, loggers: list[Any], tag: str, figure: Any, step: int) -> None:
        made = figure() if callable(figure) else figure
        for logger in loggers:
            self.guarded("drawing", write_figure, logger, tag, made, step)

    def guarded(self, what: str, action: Callable[..., object], *arguments: Any) -> None:
        """Do something whose failure must not end the run."""
        try:
            action(*arguments)
        except SharedLoaderError:
            # What would change training ends the run before it does.
            raise
        except Exception as error:  # noqa: BLE001 - a broken logger must not end the run
            self.warn(error, what)

    def warn(self, error: Exception, what: str, remedy: str | None = None) -> None:
        """Warn once a cause, with the remedy; ``""`` if the error says it itself."""
        cause = type(error).__name__
        if (what, cause) in self._warned or what in self.foreseen:
            return
        self._warned.add((what, cause))
        if remedy is None:
            remedy = "" if isinstance(error, MeasurementError) else " " + remedy_of(error, what)
        text = f"{what} failed and leaves a gap; training goes on. {described(error)}{remedy}"
        if self._own_loss:
            text = text.replace("Give loss=", "Give another loss=")
        if self._rank == 0 or was_told(error):
            self.tell(text)
        else:
            # The first process knows nothing of it.
            with above_bars():
                warnings.warn(f"{self.owner} in process {self._rank}: {text}", stacklevel=2)

    def tell(self, text: str) -> None:
        """Warn, once for all monitors of the Trainer."""
        if self.said.is_new(self.name, text):
            rank_zero_warn(f"{self.owner}: {text}")


def remedy_of(error: Exception, what: str) -> str:
    """Return what a user can do about an error that does not say it itself."""
    if isinstance(error, NotYetError):
        return "Later measurements have it."
    if is_out_of_memory(error):
        # Batches are held whole, and what could be halved was.
        return (
            "Give dataloader= with smaller batches, or lower num_samples (or num_steps, where "
            "there is one)."
        )
    without = REMEDIES.get(what, "")
    if isinstance(error, OSError) and what in _WRITING:
        if error.errno in _DISK:
            return f"Free disk space. {without}".strip()
        if error.errno in _RIGHTS:
            return f"Give the logger a folder that can be written to. {without}".strip()
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            return f"The logger's server did not answer. {MISSING}"
        return f"{MISSING} {without}".strip()
    return without or MISSING


_WRITING = ("saving arrays", "drawing", "logging", "logging charts")
MISSING = "What was meant for this file or logger is missing there."
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)

REMEDIES = {
    "a measurement": (
        "Give loss=callable(module, batch) if the training step cannot be replayed here."
    ),
    "keeping weights": "Measurements of them are left out.",
    "the stability limit": "Only stability is left out.",
    "layers=": "Mend the function that was given; each module's own parameters are one layer now.",
    "recording the path": "Slices along the path of training are left out or begin later.",
    "holding a batch": "Give dataloader= with batches of tensors in plain containers.",
    "reading dataloader": "Mend the dataloader, or leave it out to hold training batches.",
    "saving arrays": "Set save_arrays=False to do without.",
    "drawing": "Set figures=False to do without.",
    "logging charts": "Set custom_scalars=False to do without.",
    "resuming": "Curves begin anew at this step.",
    "storing the history": "A resumed run will begin its curves anew.",
    "keeping the state": "A run resumed from here will begin its curves anew.",
}

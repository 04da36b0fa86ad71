"""What of the held batches a checkpoint keeps: a fingerprint where it will do, else the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lla_callbacks.callbacks.given_again import gives_again, read_again
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.monitor_settings import Held
from lla_callbacks.callbacks.processes import Processes
from lla_callbacks.callbacks.saved_state import as_precise
from lla_callbacks.callbacks.sink import Sink
from lla_callbacks.callbacks.telling import rank_zero_info

# Of these two it depends which batches are held.
BATCHES = ("num_samples", "dataloader")
# Bytes of training data in a checkpoint from which on a line says so.
MANY = 10 * 2**20
NOTE = (
    "From step {} on measured on other batches than before, so that values before and after do "
    "not compare."
)


class KeptBatches:
    """Held batches that are the same when their run is resumed, or say that they are not.

    ``save_batches=None``: a fingerprint where the training loader gives them again, else the
    data; ``True``: the data; ``False``: never the data.

    Args:
        owner: What the log begins with, the monitor's class.
        settings: What is held.
        sink: What tells of it.

    Attributes:
        mark: Hash of the batches before the checkpoint.
        note: What reports say where batches are others than before.
    """

    def __init__(self, owner: str, settings: Held, sink: Sink) -> None:
        self._owner, self._settings, self._sink = owner, settings, sink
        self.begin(None, alone=True)

    def begin(self, trainer: Any, *, alone: bool) -> None:
        """Ask how the batches of a run can be had again.

        Args:
            trainer: The Trainer.
            alone: Whether there is one process.
        """
        self.mark: str | None = None
        self.note = ""
        # Whether batches are held anew, and since when.
        self._anew, self._since = False, 0
        self._told_size = False
        # Whether the training loader gives them again, so that a fingerprint will do.
        self._again = alone and gives_again(getattr(trainer, "train_dataloader", None))

    def state(self, held: HeldBatches, processes: Processes) -> dict[str, Any] | None:
        """Return what a checkpoint holds; None where the batches are of other classes."""
        saved = self._settings.save_batches
        if self._settings.dataloader is not None:
            return {}
        if not held.complete and processes.size > 1:
            # What one process of several holds so far is not what all would hold.
            return {}
        if self._again and not saved and held.is_plain:
            return held.fingerprint()
        if saved is False:
            return {}
        size = held.num_bytes()
        if saved is None and size >= MANY and not self._told_size:
            self._told_size = True
            rank_zero_info(
                f"{self._owner}: checkpoints hold {size / 2**20:,.0f} MiB of training "
                "data, the held batches, since the loader does not give them again (it is "
                "shuffled, say). save_batches=False leaves them out; dataloader= needs none."
            )
        return held.state()

    def mark_of(self, held: HeldBatches) -> str | None:
        """Return the hash that goes into a checkpoint."""
        given = self._settings.dataloader is not None
        if given and self.mark is None and held.complete:
            self.mark = held.mark()
        return held.mark() if not given and held.complete else self.mark

    def read(
        self,
        state: Mapping[str, Any],
        trainer: Any,
        module: Any,
        precision: str,
        *,
        same: bool,
    ) -> dict[str, Any] | None:
        """Return the held batches in the precision of now; nothing if they cannot be had.

        Args:
            state: What a checkpoint brought.
            trainer: Whose training loader may be read again.
            module: Its module.
            precision: Dtypes of its weights now.
            same: Whether the same batches are asked for as then.
        """
        held = state["held"]
        if not held:
            return held and dict(held)
        if "batches" not in held:
            if not self._again or not same:
                return {}
            try:
                found = read_again(
                    trainer, module, held, batch_size=self._settings.batch_size,
                    seed=self._settings.seed, precision=(state["precision"], precision),
                )  # fmt: skip
            except Exception:  # noqa: BLE001 - a loader that fails here fails in training too
                found = None
            return found or {}
        # Of another loader, or of several processes: this one's would be others.
        self._again = False
        trial = HeldBatches(self._settings.samples)
        trial.load(held)
        if trial.mark() != held["mark"]:
            raise ValueError("the held batches are not those that were stored.")
        changed = state["precision"] != precision
        batches = [as_precise(b, module) for b in held["batches"]] if changed else held["batches"]
        return {**held, "batches": batches}

    def hold_anew(self, step: int) -> None:
        """Note that other batches may be held from a step on."""
        self._anew, self._since = True, step

    def compare_loader(self, held: HeldBatches, step: int) -> None:
        """Warn if a loader of the user's own gives other batches than before the checkpoint."""
        mark = held.mark()
        if self.mark is not None and self.mark != mark:
            self.note = NOTE.format(step)
            self._sink.tell(
                "dataloader gives other batches than before the checkpoint, so that curves may "
                f"jump at step {step}, and reports from there on say so. Give one whose first "
                "batches are always the same, or leave it out."
            )
        self.mark = mark

    def go_on_with_new(self, held: HeldBatches, planned: int | None) -> None:
        """Cut batches that are held anew to the size of the run, and say if they are others."""
        if not self._anew:
            return
        self._anew = False
        if planned is not None:
            held.keep(planned)
        if self._settings.dataloader is None and self.mark not in (None, held.mark()):
            step = self._since
            self.note = NOTE.format(step)
            self._sink.tell(
                "the checkpoint holds no data of the held batches, and training gives other ones "
                f"now: curves may jump at step {step}, and reports from there on say so. Set "
                "save_batches=True to keep them in checkpoints, or give dataloader= with batches "
                "that are always the same."
            )

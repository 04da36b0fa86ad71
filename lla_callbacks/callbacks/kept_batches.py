"""What of the held batches a checkpoint keeps: a fingerprint where it will do, else the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lla_callbacks.callbacks.given_again import gives_again, read_again
from lla_callbacks.callbacks.held_batches import HeldBatches
from lla_callbacks.callbacks.saved_state import as_precise
from lla_callbacks.callbacks.spawned import ComesHome
from lla_callbacks.callbacks.telling import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lla_callbacks.callbacks.pace import Pace
    from lla_callbacks.callbacks.processes import Processes
    from lla_callbacks.objective.counting import BatchSize

# Of these two it depends which batches are held.
BATCHES = ("num_samples", "dataloader")
# Bytes of training data in a checkpoint from which on a line says so.
MANY = 10 * 2**20


class KeptBatches(ComesHome):
    """A callback whose held batches are the same when its run is resumed, or that says so.

    ``save_batches=None``: a fingerprint where the training loader gives them again, else the
    data; ``True``: the data; ``False``: never the data.
    """

    if TYPE_CHECKING:
        num_samples: int
        save_batches: bool | None
        batch_size: BatchSize
        seed: int
        dataloader: Any
        pace: Pace
        _held: HeldBatches
        _processes: Processes
        _changed: Callable[[Mapping[str, str]], Mapping[str, Any]]

    # Whether the training loader gives the held batches again, so that a fingerprint will do.
    _again = False
    # Whether batches are held anew and since when, and which those before the checkpoint were.
    _anew = False
    _anew_since = 0
    _mark: str | None = None
    # What reports say where batches are others than before.
    batches_note = ""
    _told_size = False

    def _begin_to_keep(self, trainer: Any) -> None:
        """Ask how the batches of this run can be had again."""
        self._mark, self._anew, self.batches_note, self._told_size = None, False, "", False
        alone = self._processes.size == 1
        self._again = alone and gives_again(getattr(trainer, "train_dataloader", None))

    def _kept_batches(self) -> dict[str, Any] | None:
        """Return what a checkpoint holds; None where the batches are of other classes."""
        held = self._held
        if not held.complete and self._processes.size > 1:
            # What one process of several holds so far is not what all would hold.
            return {}
        if self._again and not self.save_batches and held.is_plain:
            return held.fingerprint()
        if self.save_batches is False:
            return {}
        size = held.num_bytes()
        if self.save_batches is None and size >= MANY and not self._told_size:
            self._told_size = True
            rank_zero_info(
                f"{type(self).__name__}: checkpoints hold {size / 2**20:,.0f} MiB of training "
                "data, the held batches, since the loader does not give them again (it is "
                "shuffled, say). save_batches=False leaves them out; dataloader= needs none."
            )
        return held.state()

    def _read_held(
        self, state: Mapping[str, Any], trainer: Any, module: Any, now: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return the held batches in the precision of now; nothing if they cannot be had."""
        held = state["held"]
        if not held:
            return held and dict(held)
        if "batches" not in held:
            if not self._again or any(n in self._changed(state["settings"]) for n in BATCHES):
                return {}
            try:
                found = read_again(
                    trainer, module, held, batch_size=self.batch_size, seed=self.seed,
                    precision=(state["precision"], now["precision"]),
                )  # fmt: skip
            except Exception:  # noqa: BLE001 - a loader that fails here fails in training too
                found = None
            return found or {}
        trial = HeldBatches(self.num_samples)
        trial.load(held)
        if trial.mark() != held["mark"]:
            raise ValueError("the held batches are not those that were stored.")
        changed = state["precision"] != now["precision"]
        batches = [as_precise(b, module) for b in held["batches"]] if changed else held["batches"]
        return {**held, "batches": batches}

    def _compare_loader(self) -> None:
        """Warn if a loader of the user's own gives other batches than before the checkpoint."""
        mark = self._held.mark()
        if self._mark is not None and self._mark != mark:
            rank_zero_warn(
                f"{type(self).__name__}: dataloader gives other batches than before the "
                "checkpoint, so that curves may jump here. Give one whose first batches are always "
                "the same, or leave it out."
            )
        self._mark = mark

    def _go_on_with_new(self) -> None:
        """Cut batches that are held anew to the size of the run, and say if they are others."""
        if not self._anew:
            return
        self._anew = False
        if self.pace.choice is not None:
            self._held.keep(self.pace.choice.samples)
        if self.dataloader is None and self._mark not in (None, self._held.mark()):
            step = self._anew_since
            self.batches_note = (
                f"From step {step} on measured on other batches than before, so that values before "
                "and after do not compare."
            )
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint holds no data of the held batches, and "
                f"training gives other ones now: curves may jump at step {step}, and reports from "
                "there on say so. Set save_batches=True to keep them in checkpoints, or give "
                "dataloader= with batches that are always the same."
            )

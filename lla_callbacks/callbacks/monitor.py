"""Measure quantities of a training run, live, without disturbing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lla_callbacks.callbacks.keywords import by_name_after
from lla_callbacks.callbacks.monitor_settings import shared
from lla_callbacks.callbacks.records import Record
from lla_callbacks.callbacks.sizers import SamplesSizer
from lla_callbacks.callbacks.watching import Watching
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.objective import Engine, Mode
from lla_callbacks.objective.precision import Precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.report.quantity import Quantity, Result, check_quantities


class Monitor(Watching):
    r"""Measure any quantities of the held loss, all at the same moments and on one objective.

    For what most people want there are :class:`~lla_callbacks.HessianMonitor` and
    :class:`~lla_callbacks.LossLandscapeMonitor`. Here go quantities of your own
    (docs/own_quantity.md), alone or beside :class:`~lla_callbacks.Spectrum` and
    :class:`~lla_callbacks.Slices`, which then share what they can. Each has the same promises:
    training is left bitwise unchanged; a schedule or a limit on what it costs; one warning and a
    gap where it fails, which costs neither the run nor the other quantities; several processes;
    runs that are resumed without a seam; loggers, figures, files.

    **Logged**: the scalars of each result under its quantity's name, its figures likewise, and
    ``<name>/seconds``, ``<name>/overhead``.

    Args:
        quantities: What is measured: instances of :class:`~lla_callbacks.Quantity`.
        every_n_epochs: Measure at the end of every n-th training epoch.
        every_n_train_steps: Measure every n optimizer steps.
        num_samples: Hold the first training batches until they have this many samples.
        mode: Normalization mode.
        dropout: Whether dropout stays on; off by default.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``.
        dataloader: Batches to measure on instead of the first training batches.
        seed: Fixes every random vector.
        max_overhead: Share of training time, such as 0.05, that all monitors of the Trainer may
            take together, first and last measurement included. ``None``: 0.05 (choice: what is less
            is not felt) if no schedule is given, no limit if one is, so that an explicit schedule
            is kept. Of several monitors the largest counts for all together, and each keeps to its
            own.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that a measurement may take beside training. Graphs that do not fit are
            built anew for each product (3 gradients instead of 2), batches that do not fit are
            split where their samples do not see each other, and where that is not enough,
            differences of gradients take over. ``None``: half of what a training step takes, and
            256 MiB at least; a batch that cannot be split then goes through whole.
        engine: ``"exact"``: double backward. ``"difference"``: central differences of gradients, in
            the memory of a training step, with their own error in every result; what they cannot
            say within 5 % is a gap. ``"auto"``: exact, and by difference where a second derivative
            does not exist or does not fit in memory, or parameters are sharded; one line in the log
            says so.
        precision: ``"float32"``: no autocast, and half-precision weights are widened for the
            measurement. ``"training"``: as the Trainer has it; bfloat16 costs 1 to 4 %.
        check: Whether the loss proves itself at the first measurement of a run, for about six
            gradients: two evaluations agree, the gradient is the slope of the loss, products are
            symmetric and agree with differences of gradients.
        jacobian: Where the gradient is no derivative of the loss: ``"gap"``, or ``"measure"`` the
            Jacobian of the training gradient, marked as such.
        figures: Whether figures are drawn.
        save_arrays: Whether results are written beside the logs.
        save_batches: Whether checkpoints hold the data of the held batches. ``None``: a fingerprint
            where the training loader gives them again, else the data. ``False``: never; a resumed
            run then says where it goes on with other ones.
        scalars: Which scalars loggers get: ``"few"`` (what everybody looks at), ``"criteria"`` (and
            every criterion), ``"layers"`` (and all of each layer), ``"all"``, or a list of these
            words and of names such as ``"kh1"``; docs/measures.md has all of them. Callbacks such
            as EarlyStopping may ask for any.
        name: First part of the tags of what it costs; give each monitor its own.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.
        parameters: Which parameters are measured: ``None`` takes all that are trained; shell
            patterns of their names (``"generator.*"``), or of modules; or a predicate ``(name,
            parameter) -> bool``. Another monitor may measure others.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lla_callbacks import Monitor, Spectrum
        >>> trainer = Trainer(callbacks=[Monitor([Spectrum()])], max_epochs=1)
    """

    @by_name_after("every_n_train_steps")
    def __init__(
        self,
        quantities: Sequence[Quantity],
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        *,
        num_samples: int | None = None,
        mode: Mode = "batch",
        dropout: bool = False,
        loss: Callable[[Any, Any], Any] | None = None,
        dataloader: Any = None,
        seed: int = 0,
        max_overhead: float | None = None,
        microbatch_size: int | None = None,
        max_memory: int | None = None,
        engine: Engine = "auto",
        precision: Precision = "float32",
        check: bool = True,
        jacobian: Jacobian = "gap",
        figures: bool = True,
        save_arrays: bool = True,
        save_batches: bool | None = None,
        scalars: str | Sequence[str] = "few",
        name: str = "monitor",
        batch_size: BatchSize = None,
        parameters: str | list[str] | Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        given = shared(locals())
        self.quantities = check_quantities(quantities)
        records = [Record(quantity) for quantity in self.quantities]
        super().__init__(records, given, SamplesSizer(self.quantities), alone=False)

    @property
    def histories(self) -> dict[str, list[tuple[int, Result]]]:
        """Of each quantity by its name: pairs of step and result of the last fit, thinned."""
        return {record.quantity.name: record.history for record in self.records}

    @property
    def results(self) -> dict[str, Result]:
        """Of each quantity by its name: the last result of all."""
        return {record.quantity.name: record.result for record in self.records}

    def _last(self) -> dict[str, Result]:
        return self.results

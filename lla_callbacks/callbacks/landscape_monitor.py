"""Draw what the loss looks like around the weights, live, without disturbing the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lla_callbacks.callbacks.compat import MisconfigurationException, shards_parameters
from lla_callbacks.callbacks.keywords import by_name_after
from lla_callbacks.callbacks.monitor_settings import shared
from lla_callbacks.callbacks.records import Record
from lla_callbacks.callbacks.sizers import SlicesSizer
from lla_callbacks.callbacks.watching import Watching
from lla_callbacks.objective.checks import flag, number
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.evaluation import Predict
from lla_callbacks.objective.moment import Moment
from lla_callbacks.objective.objective import Engine, Mode
from lla_callbacks.objective.points import Evaluation
from lla_callbacks.objective.precision import Precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.report.loggers import folder_of, write_mesh, write_text
from lla_callbacks.slices.directions import Normalization, Vectors
from lla_callbacks.slices.landscape import LandscapeSettings
from lla_callbacks.slices.landscape_figures import mesh_from_the_side
from lla_callbacks.slices.quantity import Slices
from lla_callbacks.slices.report import LandscapeReport


class LossLandscapeMonitor(Watching):
    r"""Draw the loss on lines and planes through the weights, while training runs.

    Training is left bitwise unchanged. A measurement happens when training starts, on
    schedule, and when it ends; stand-alone ``trainer.validate`` and ``trainer.test`` measure on
    their own batches. If one fails, there is one warning with the remedy and a gap. Directions
    come from one seed, the same for all firings; contours are at the same values in all pictures,
    and a bar shows which part of the run's range each one has, so that they compare. Under DDP
    the processes share the points.

    **Logged**: figures ``landscape/plane_random``, ``landscape/lines`` and so on, one a plane,
    one for all lines; scalars ``landscape/line_top1/curvature``, ``landscape/basin/...`` and
    others. The step is the number of optimizer steps that the weights have seen.

    Args:
        every_n_epochs: Measure at the end of every n-th training epoch.
        every_n_train_steps: Measure every n optimizer steps. With neither, at the end, and earlier
            where ``max_overhead`` has room, in sizes that fit.
        planes: Planes to draw: ``"random"`` (filter-normalized), ``"trajectory"`` (principal
            components of the path of training, with the path), ``"hessian"`` (top two
            eigenvectors), ``"hessian_ends"`` (top and bottom), ``"adam"``, or two names of lines
            joined by ``+``.
        lines: Lines to draw: ``"random"``, ``"top1"``, ``"top2"``, ``"bottom1"``, ``"gradient"``,
            ``"update"``, ``"adam_m"``, ``"adam_v"``, ``"pc1"``, ``"pc2"``.
        metrics: Name to torchmetrics metric, or function ``(module, batch) -> scalar``, drawn
            beside the loss.
        predict: ``predict(module, batch)`` returns predictions and targets for torchmetrics;
            ``None``: the module's output against ``batch[1]``.
        plane_points: Points along each side of a plane, odd. Default 17: with a spline of the log
            loss (``interpolate``) it is off by 2 % in the mean on most networks
            (docs/benchmarks/planes.md).
        line_points: Points of a line, odd.
        reach: How far slices reach, as a multiple of each direction's own range (1 filter norm
            for random ones).
        normalization: ``"filter"``, ``"layer"``, ``"weight"`` or ``"none"``; see
            :func:`~lla_callbacks.slices.directions.random_directions`.
        vectors: Biases and gains in random directions: ``"zero"``, ``"tensor"`` or ``"entry"``.
        convexity_points: Points along each side of a map of ``|lambda_min / lambda_max|``, odd;
            0 (default) for none: each costs a Lanczos run.
        num_rays: Rays for the basin's radii, about 12 passes each; 0 (default) for none.
        rise: Rim of the basin, above the loss at the weights.
        cutoff: The loss at the rim itself, instead of ``rise``: the same for all firings, so that
            radii of one run compare. Where the loss is not below it yet, there is a gap.
        interpolate: Whether planes are drawn through a spline of the log loss.
        refine: Whether what is drawn between the points follows from what the network gives out
            at them, as in :func:`~lla_callbacks.loss_plane`: closer to the truth, at up to 1.2
            passes a point more. The loss must call ``module(inputs)`` once a batch and follow
            from what that returns; else there is a gap, and the usual picture. From seven points
            a side on; not with ``predict``, nor where parameters are in shards.
        cap: Draw losses above this as this, and say so.
        surface: Whether planes are drawn as surfaces too.
        mesh: Whether TensorBoard gets each plane as a mesh that can be turned.
        html: Whether each plane is written as a page that a browser can turn (needs plotly).
        num_samples: Hold the first training batches until they have this many samples.
        mode: Normalization mode: ``"batch"``, ``"eval"`` or ``"recalibrate"``.
        dropout: Whether dropout stays on; off by default.
        loss: ``loss(module, batch)``; ``None`` replays ``training_step``.
        dataloader: Batches to measure on instead of the first training batches.
        seed: Fixes every random vector.
        max_overhead: Share of training time, such as 0.05, that all monitors of the Trainer may
            take together, first and last measurement included. ``None``: 0.05 (choice: what is less
            is not felt) if no schedule is given, no limit if one is, so that an explicit schedule
            is kept. Of several monitors the largest counts for all together, and each keeps to its
            own.
        time_budget: Seconds that one measurement's points may take. Points are visited from
            coarse to fine, so what is done by then is a complete coarse picture. Default 60
            (choice: nobody waits longer for a first picture).
        evaluation: ``"loop"``, ``"vmap"`` or ``"auto"``: whichever a short measurement finds
            faster.
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
        save_arrays: Whether every slice is written to
            ``<log_dir>/landscape/<slice>/step_00000100.npz``.
        save_batches: Whether checkpoints hold the data of the held batches. ``None``: a fingerprint
            where the training loader gives them again, else the data. ``False``: never; a resumed
            run then says where it goes on with other ones.
        scalars: Which scalars loggers get: ``"few"`` (what everybody looks at), ``"criteria"`` (and
            every criterion), ``"layers"`` (and all of each layer), ``"all"``, or a list of these
            words and of names such as ``"kh1"``; docs/measures.md has all of them. Callbacks such
            as EarlyStopping may ask for any.
        name: First part of every tag; give each monitor its own.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.
        parameters: Which parameters are measured: ``None`` takes all that are trained; shell
            patterns of their names (``"generator.*"``), or of modules; or a predicate ``(name,
            parameter) -> bool``. Another monitor may measure others.

    Attributes:
        history: Pairs of step and :class:`~lla_callbacks.LandscapeReport` of the last fit: all of
            it up to 400, then the last 100 and the older ones evenly thinned; files have all.
        report: The last one of all.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lla_callbacks import LossLandscapeMonitor
        >>> trainer = Trainer(callbacks=[LossLandscapeMonitor()], max_epochs=1)
    """

    @by_name_after("every_n_train_steps")
    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        *,
        planes: list[str] | tuple[str, ...] | None = None,
        lines: list[str] | tuple[str, ...] | None = None,
        metrics: dict[str, Any] | None = None,
        predict: Predict | None = None,
        plane_points: int | None = None,
        line_points: int | None = None,
        reach: float = LandscapeSettings.reach,
        normalization: Normalization = "filter",
        vectors: Vectors = "zero",
        convexity_points: int = 0,
        num_rays: int = 0,
        rise: float = LandscapeSettings.rise,
        cutoff: float | None = None,
        interpolate: bool = False,
        refine: bool = False,
        cap: float | None = None,
        surface: bool = False,
        mesh: bool = False,
        html: bool = False,
        num_samples: int | None = None,
        mode: Mode = "batch",
        dropout: bool = False,
        loss: Callable[[Any, Any], Any] | None = None,
        dataloader: Any = None,
        seed: int = 0,
        max_overhead: float | None = None,
        time_budget: float | None = 60.0,
        evaluation: Evaluation = "auto",
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
        name: str = "landscape",
        batch_size: BatchSize = None,
        parameters: str | list[str] | Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        everything = shared(locals())
        given = {
            "lines": lines is not None,
            "plane_points": plane_points is not None,
            "line_points": line_points is not None,
        }
        settings = LandscapeSettings(
            planes=LandscapeSettings.planes if planes is None else planes,
            lines=LandscapeSettings.lines if lines is None else lines,
            plane_points=LandscapeSettings.plane_points if plane_points is None else plane_points,
            line_points=LandscapeSettings.line_points if line_points is None else line_points,
            convexity_points=convexity_points,
            num_rays=num_rays,
            rise=rise,
            cutoff=cutoff,
            reach=reach,
            normalization=normalization,
            vectors=vectors,
            metrics=metrics,
            predict=predict,
            evaluation=evaluation,
            time_budget=time_budget,
            seed=seed,
            refine=refine,
        )
        self.mesh = flag("mesh", mesh)
        self.html = flag("html", html)
        if self.html:
            check_plotly()
        self.cap: float | None = number("cap", cap, "a loss, or None", none=True)
        self.interpolate = flag("interpolate", interpolate)
        self.surface = flag("surface", surface)
        self.slices = Slices(
            settings,
            interpolate=self.interpolate,
            cap=self.cap,
            surface=self.surface,
            name=name,
        )
        self.record = Record(self.slices)
        super().__init__([self.record], everything, SlicesSizer(self.slices, given), alone=True)
        self.firing.pages = self._pages

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        super().setup(trainer, pl_module, stage)
        if self.settings.refine and shards_parameters(trainer, pl_module):
            raise MisconfigurationException(
                f"{type(self).__name__}(refine=True) keeps what a whole network gives out, and "
                f"{type(trainer.strategy).__name__} spreads its parameters. Give refine=False, or "
                "train with DDP or in one process."
            )

    @property
    def settings(self) -> LandscapeSettings:
        """Which slices are measured, and how."""
        return self.slices.settings

    @property
    def history(self) -> list[tuple[int, LandscapeReport]]:
        """Pairs of step and report of the last fit."""
        return self.record.history

    @property
    def report(self) -> LandscapeReport | None:
        """The last one of all; ``None`` before anything was measured."""
        found: LandscapeReport | None = self.record.result
        return found

    def _last(self) -> LandscapeReport | None:
        return self.report

    def _pages(self, trainer: Any, result: LandscapeReport, moment: Moment) -> None:
        """Show planes as meshes and pages that can be turned."""
        if not self.sink.figures:
            return
        for logger in self.sink.loggers(trainer):
            for name, plane in result.planes.items():
                tag = f"{self.name}/mesh_{name}"
                if self.mesh:
                    mesh = mesh_from_the_side(plane, cap=self.cap)
                    self.sink.guarded("drawing", write_mesh, logger, tag, *mesh, moment.step)
                folder = folder_of(logger)
                if self.html and folder is not None:
                    stem = f"step_{moment.step:08d}.html"
                    self.sink.guarded("drawing", _write_page, logger, plane, folder, self.name,
                                      stem, f"plane_{name}", moment.step)  # fmt: skip


def check_plotly() -> None:
    """Raise a ValueError if plotly, which draws pages, is not installed."""
    import importlib.util

    if importlib.util.find_spec("plotly") is None:
        raise ValueError(
            "html is True and plotly is not installed: pip install plotly, or set html=False."
        )


def _write_page(
    logger: Any, plane: Any, folder: Path, name: str, stem: str, what: str, step: int
) -> None:
    """Write a plane as a page beside the logs, and say in the logs where it is."""
    page = plane.html(folder / name / what / stem, title=f"{what} at step {step}")
    write_text(logger, f"{name}/{what}_page", f"`{page.relative_to(folder)}`", step)

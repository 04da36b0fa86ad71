"""Draw what the loss looks like around the weights, live, without disturbing the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lla_callbacks.callbacks.account import booked
from lla_callbacks.callbacks.compat import is_barebones, step_of
from lla_callbacks.callbacks.moments import Moment, is_unsized, space_of
from lla_callbacks.callbacks.monitor import Monitor
from lla_callbacks.callbacks.pace import Choice
from lla_callbacks.callbacks.saved_state import check_entries, check_flat
from lla_callbacks.callbacks.sizing import (
    SLICES,
    SlicesSize,
    UnitCosts,
    choose_slices,
)
from lla_callbacks.linalg.errors import NotYetError
from lla_callbacks.objective.checks import flag, number
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.evaluation import Predict
from lla_callbacks.objective.objective import Engine, Mode, Objective
from lla_callbacks.objective.points import Evaluation
from lla_callbacks.objective.precision import Precision
from lla_callbacks.objective.self_check import Jacobian
from lla_callbacks.report.loggers import folder_of, write_mesh, write_text
from lla_callbacks.report.thinning import thin
from lla_callbacks.slices.choice import DirectionSource
from lla_callbacks.slices.directions import Normalization, Vectors
from lla_callbacks.slices.landscape import (
    PASSES_A_MAP_POINT,
    PASSES_A_RAY,
    LandscapeSettings,
    measure_landscape,
)
from lla_callbacks.slices.landscape_figures import mesh_of
from lla_callbacks.slices.report import LandscapeReport
from lla_callbacks.slices.scalars import landscape_scalars
from lla_callbacks.slices.trajectory import Trajectory

# Weights of the path of training that are kept on the CPU, all together.
PATH_MEMORY = 2**30
# Products that eigenvectors take, and a product in gradients, about (docs/cost.md).
PRODUCTS = 12
PRODUCT = 2.4
# Points along each side from which a plane looks smooth by itself.
FINE = 13
# Figures that are planned for.
NUM_FIGURES = 1
# A forward pass in gradients, about (docs/cost.md).
FORWARD = 1 / 3
# Samples below which pictures get coarse before samples get fewer.
FEWEST = 16
# Before this many steps a path has no plane and Adam no moments worth a warning.
YOUNG = 4


class LossLandscapeMonitor(Monitor):
    r"""Draw the loss on lines and planes through the weights, while training runs.

    Training is left bitwise unchanged. A measurement happens when training starts, on
    schedule, and when it ends; stand-alone ``trainer.validate`` and ``trainer.test`` measure on
    their own batches. If one fails, there is one warning with the remedy and a gap. Directions
    come from one seed, the same for all firings, and colours keep one scale, so that
    pictures of a run compare. Under DDP the processes share the points.

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
            loss (``interpolate``) it is off by 0.01 decades in the mean on most networks
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
        max_overhead: Share of training time that all monitors of the Trainer may take together;
            see :class:`~lla_callbacks.HessianMonitor`.
        time_budget: Seconds that one measurement's points may take. Points are visited from
            coarse to fine, so what is done by then is a complete coarse picture. Default 60
            (choice: nobody waits longer for a first picture).
        evaluation: ``"loop"``, ``"vmap"`` or ``"auto"``: whichever a short measurement finds
            faster.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that Hessian directions may take; see
            :class:`~lla_callbacks.HessianMonitor` for this and the next two.
        engine: How Hessian directions are computed.
        precision: ``"float32"`` or ``"training"``.
        check: Whether the loss proves itself at the first measurement of a run; see
            :func:`~lla_callbacks.measure_hessian` for this and the next.
        jacobian: Where its gradient is no derivative, what directions that rest on derivatives
            are of.
        figures: Whether figures are drawn.
        save_arrays: Whether every slice is written to
            ``<log_dir>/landscape/<slice>/step_00000100.npz``.
        save_batches: Whether checkpoints hold the held batches, once for all monitors that hold
            the same ones. Without them a resumed run holds new ones, and says so where they are
            others.
        name: First part of every tag; give each monitor its own.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

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

    _result = LandscapeReport
    share = 0.35
    plans_last = True

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
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
        save_batches: bool = True,
        name: str = "landscape",
        batch_size: BatchSize = None,
    ) -> None:
        self._given = {
            "lines": lines is not None,
            "plane_points": plane_points is not None,
            "line_points": line_points is not None,
        }
        self.settings = LandscapeSettings(
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
        )
        # Asked after every batch.
        self._wants_update = "update" in self.settings.wanted
        self._wants_path = not {"pc1", "pc2"}.isdisjoint(self.settings.wanted)
        self.interpolate = flag("interpolate", interpolate)
        self.cap: float | None = number("cap", cap, "a loss, or None", none=True)
        self.surface = flag("surface", surface)
        self.mesh = flag("mesh", mesh)
        self.html = flag("html", html)
        if self.html:
            check_plotly()
        self.history: list[tuple[int, LandscapeReport]] = []
        self.report: LandscapeReport | None = None
        super().__init__(
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            num_samples=num_samples,
            mode=mode,
            dropout=dropout,
            loss=loss,
            dataloader=dataloader,
            seed=seed,
            max_overhead=max_overhead,
            microbatch_size=microbatch_size,
            max_memory=max_memory,
            engine=engine,
            precision=precision,
            check=check,
            jacobian=jacobian,
            figures=figures,
            save_arrays=save_arrays,
            save_batches=save_batches,
            custom_scalars=False,
            name=name,
            batch_size=batch_size,
        )

    # -- the path of training -----------------------------------------------------------

    def _reset(self) -> None:
        super()._reset()
        self._trajectory = Trajectory(PATH_MEMORY)
        self._previous: tuple[int, Tensor] | None = None
        self._scale: tuple[float, float] | None = None

    def _forget(self) -> None:
        super()._forget()
        self._trajectory = Trajectory(PATH_MEMORY)
        self._previous = None

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "settings": self.settings}

    def _more_state(self) -> dict[str, Any]:
        return {
            "path": self._trajectory.state(),
            "previous": self._previous,
            "scale": self._scale,
        }

    def _read_more(self, state: Mapping[str, Any], module: Any) -> Any:
        check_entries(state, _SAVED, "the state")
        path, previous, scale = (state[name] for name in _SAVED)
        check_entries(path, _PATH, "the state's path")
        if len(path["steps"]) != len(path["weights"]) or path["interval"] < 1:
            raise ValueError("the state's path has not one set of weights for each step.")
        space = space_of(module)
        for weights in [*path["weights"], *([previous[1]] if previous else [])]:
            check_flat(weights, space.dim, "a point of the state's path")
        # The run may go on in another precision.
        path = {**path, "weights": [weights.to(space.dtype) for weights in path["weights"]]}
        if previous is not None:
            previous = previous[0], previous[1].to(space.dtype)
        return path, previous, scale

    def _take_more(self, read: Any) -> None:
        path, self._previous, self._scale = read
        self._trajectory.load(path)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.history = []
        super().on_train_start(trainer, pl_module)
        self._guarded("recording the path", self._record, trainer, pl_module)

    @booked
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._wants_update:
            return
        step = step_of(trainer)
        known = self._previous is not None and self._previous[0] == step
        if not known and not is_barebones(trainer):
            self._guarded("recording the path", self._remember, step, pl_module)

    @booked
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._wants_path:
            self._guarded("recording the path", self._record, trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _remember(self, step: int, module: nn.Module) -> None:
        """Keep the weights before a step, for the direction of the last update."""
        self._previous = None if is_unsized(module) else (step, _weights(module))

    def _record(self, trainer: Any, module: nn.Module) -> None:
        """Keep the present weights as a point of the path, if one is wanted and due."""
        if not self._wants_path or is_barebones(trainer):
            return
        if self._trajectory.wants(step_of(trainer)) and not is_unsized(module):
            weights = _weights(module)
            self._forget_weights(weights.numel())
            self._trajectory.record(step_of(trainer), weights)

    def _forget_weights(self, dim: int) -> None:
        # A path is one of the same parameters throughout: it begins anew where others are trained.
        if any(weights.numel() != dim for weights in self._trajectory.weights[-1:]):
            self._trajectory = Trajectory(PATH_MEMORY)
        if self._previous is not None and self._previous[1].numel() != dim:
            self._previous = None

    # -- what is measured and shown -----------------------------------------------------

    def _measure(
        self,
        objective: Objective,
        moment: Moment,
        *,
        quick: bool,
        progress: Callable[[str, int], AbstractContextManager[Callable[[int], object]]],
    ) -> LandscapeReport:
        settings = self.settings.smallest() if quick else self._present_settings(moment)
        earlier = self._common_points(moment)
        steps = [self._trajectory.steps[i] for i in earlier]
        before = self._previous
        source = DirectionSource(
            objective,
            settings.normalization,
            settings.vectors,
            settings.seed,
            moment.optimizer,
            previous=before[1] if before and before[0] == moment.step - 1 else None,
            weights=[self._trajectory.weights[i] for i in earlier],
            steps=[*steps, moment.step],
            share=self._processes,
        )
        found = measure_landscape(
            objective, settings, source, share=self._processes, progress=progress
        )
        return LandscapeReport.of(found, training_steps=self._in_steps(found.seconds))

    def _common_points(self, moment: Moment) -> list[int]:
        """Return which recorded weights are earlier ones that every process has."""
        steps = self._trajectory.steps
        common = {step for step in steps if step < moment.step}
        if not {"pc1", "pc2"}.isdisjoint(self.settings.wanted):
            for other in self._processes.union([list(steps)]):
                common &= set(other)
        return [i for i, step in enumerate(steps) if step in common]

    def _present_settings(self, moment: Moment) -> LandscapeSettings:
        """Return the settings, at the size that was chosen for this run."""
        if moment.function != "fit" or self._size is None:
            return self.settings
        size = self._size
        if moment.last and self.account.costs is not None:
            # Whatever was spent since the plan was made, this one pays for.
            aside = sum(self.account.reserved.values())
            seconds = self._processes.first(self.account.room(self.name) - aside)
            size = self._fitting_size(self.account.costs, max(seconds, 0.0), size)
        return self._sized(size)

    def _sized(self, size: SlicesSize) -> LandscapeSettings:
        s, given = self.settings, self._given
        return replace(
            s,
            plane_points=s.plane_points if given["plane_points"] else size.plane_points,
            line_points=s.line_points if given["line_points"] else max(5, size.line_points),
            lines=s.lines if given["lines"] or not s.planes else tuple(s.lines[: size.lines]),
        )

    def _ladder(self) -> list[SlicesSize]:
        """Return the sizes of this monitor's slices, from the best to the least."""
        found: list[SlicesSize] = []
        for size in SLICES:
            settings = self._sized(size)
            made = SlicesSize(
                settings.plane_points,
                settings.line_points,
                len(settings.lines),
                len(settings.planes),
                products=size.products if _needs_products(settings) else 0,
                more=PASSES_A_RAY * settings.num_rays
                + PASSES_A_MAP_POINT * settings.convexity_points**2,
            )
            if made not in found:
                found.append(made)
        return found

    def _fitting_size(self, costs: UnitCosts, seconds: float, most: SlicesSize) -> SlicesSize:
        ladder = self._ladder()
        ladder = ladder[ladder.index(most) :] if most in ladder else ladder
        samples = self._held.num_held
        return choose_slices(seconds, costs, ladder, samples, figures=NUM_FIGURES)[0]

    def _choose(self, costs: UnitCosts | None, seconds: float, least: int) -> Choice:
        held = self._held.num_held
        ladder = self._ladder()
        samples = self.given_samples or self.account.samples or held
        size, count, fits, cost = ladder[-1], 1, False, 0.0
        if costs is not None:
            # Alone, it lowers the number of samples before pictures get coarse.
            while True:
                samples = min(max(samples, least), held)
                size, count, fits = choose_slices(
                    seconds, costs, ladder, samples, figures=NUM_FIGURES
                )
                coarse = ladder.index(size) > len(ladder) // 2
                told = self.given_samples or self.account.samples
                if told or not coarse or samples <= max(least, FEWEST):
                    break
                samples //= 2
            cost = costs.slices(size, samples)
        else:
            samples = min(max(self.given_samples or least, least), held)
        s = self._sized(size)
        parts = [f"planes of {s.plane_points} x {s.plane_points}"] if s.planes else []
        parts += [f"lines of {s.line_points}"] if s.lines else []
        words = f"{samples} samples ({', '.join(parts) or 'radii'})"
        # Its count rests on their price already.
        return Choice(samples, count, cost, self.pace.figure, fits, words, True, asdict(size))

    @property
    def _size(self) -> SlicesSize | None:
        """The size that was chosen for this run, if any was."""
        choice = self.pace.choice
        return None if choice is None else SlicesSize(**choice.size)

    def _gradients(self) -> float:
        s = self.settings
        passes = len(s.planes) * s.plane_points**2 + len(s.lines) * s.line_points + 4
        passes += PASSES_A_RAY * s.num_rays + PASSES_A_MAP_POINT * s.convexity_points**2
        return FORWARD * passes + (PRODUCT * PRODUCTS if _needs_products(s) else 0)

    @property
    def full_gradients(self) -> float:
        """What a measurement of the default size takes, in gradients of its samples, about."""
        return self._gradients()

    def _keep(self, result: LandscapeReport, moment: Moment) -> None:
        self.report = result
        if moment.function == "fit":
            self.history.append((moment.step, result))
            thin(self.history)
        choice = self.pace.choice
        alone = choice is not None and choice.count == 1 and not self.schedule.is_given
        if self._scale is None and result.loss > 0 and not alone:
            # Four decades about the first loss, for all pictures of the run.
            self._scale = (1e-3 * result.loss, 10 * result.loss)
        if self._findings.proof.self_check is not None:
            self._tell_check(self._findings.proof.self_check)
        for what, error in result.missing.items():
            young = moment.step < YOUNG and moment.function == "fit"
            if not (young and isinstance(error, NotYetError)):
                self._warn(error, what, remedy="")

    def _scalars(self, result: LandscapeReport) -> dict[str, float]:
        return landscape_scalars(result, self.name)

    def _figures(self, result: LandscapeReport, moment: Moment) -> Mapping[str, Any]:
        step = moment.step
        drawn: dict[str, Callable[[], Any]] = {}
        for name, plane in result.planes.items():
            # A plane that had to be coarse is drawn through the spline, and says so.
            coarse = self._size is not None and len(plane.alphas) < FINE
            look: dict[str, Any] = {
                "interpolate": self.interpolate or coarse, "cap": self.cap, "scale": self._scale,
            }  # fmt: skip
            title = f"Loss on the {name} plane at step {step}"
            drawn[f"plane_{name}"] = partial(plane.figure, title=title, **look)
            for metric in plane.metrics:
                drawn[f"plane_{name}_{metric}"] = partial(
                    plane.figure,
                    title=f"{metric} on the {name} plane at step {step}",
                    metric=metric,
                    interpolate=self.interpolate,
                )
            if self.surface:
                drawn[f"surface_{name}"] = partial(
                    plane.surface, title=title, cap=self.cap, scale=self._scale
                )
        if result.lines:
            drawn["lines"] = partial(result.line_figure, title=f"Loss on lines at step {step}")
        if result.convexity is not None:
            title = f"Convexity at step {step}"
            drawn["convexity"] = partial(result.convexity.figure, title=title)
        if result.basin is not None:
            title = f"Radii of the basin at step {step}"
            drawn["basin"] = partial(result.basin.figure, title=title)
        return drawn

    def _draw_more(self, trainer: Any, result: Any, moment: Moment) -> None:
        if not self.figures:
            return
        for logger in self.sink.loggers(trainer):
            for name, plane in result.planes.items():
                tag = f"{self.name}/mesh_{name}"
                if self.mesh:
                    mesh = mesh_of(plane, cap=self.cap)
                    self._guarded("drawing", write_mesh, logger, tag, *mesh, moment.step)
                folder = folder_of(logger)
                if self.html and folder is not None:
                    stem = f"step_{moment.step:08d}.html"
                    self._guarded("drawing", _write_page, logger, plane, folder, self.name, stem,
                                  f"plane_{name}", moment.step)  # fmt: skip


def _needs_products(settings: LandscapeSettings) -> bool:
    return any(str(name).startswith(("top", "bottom")) for name in settings.wanted)


# Of what type the further entries of a stored state are.
_SAVED: dict[str, Any] = {
    "path": Mapping[str, Any],
    "previous": tuple[int, Tensor] | None,
    "scale": tuple[float, float] | None,
}
_PATH = {"steps": list[int], "weights": list[Tensor], "interval": int}


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


def _weights(module: nn.Module) -> Tensor:
    space = space_of(module)
    return space.flatten(space.tensors).cpu()

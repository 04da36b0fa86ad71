"""Both Lightning namespaces, and the only place that touches Lightning's private members."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lla_callbacks.callbacks.telling import above_bars
from lla_callbacks.objective.stand_ins import muted

_NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def _bases(path: str, name: str) -> tuple[type, ...]:
    """Return the class of this name from every installed namespace."""
    found: list[type] = []
    for namespace in _NAMESPACES:
        try:
            found.append(getattr(importlib.import_module(namespace + path), name))
        except ModuleNotFoundError:
            continue
    if not found:
        raise ModuleNotFoundError(
            "lla_callbacks needs Lightning: pip install pytorch-lightning (or lightning)."
        )
    return tuple(dict.fromkeys(found))


if TYPE_CHECKING:
    from lightning.pytorch import Callback as _OfLightning
    from pytorch_lightning import Callback as _OfPytorchLightning
    from pytorch_lightning.utilities.exceptions import (
        MisconfigurationException as MisconfigurationException,
    )

    # Either Trainer takes it. Where one of the two is not installed, its part is of any type.
    class Callback(_OfPytorchLightning, _OfLightning):
        """A callback of both namespaces."""
else:
    # The packages are mirrored copies without inheritance; a class of both passes both.
    Callback = type("Callback", _bases("", "Callback"), {})
    MisconfigurationException = type(
        "MisconfigurationException",
        _bases(".utilities.exceptions", "MisconfigurationException"),
        {},
    )


@contextlib.contextmanager
def muted_loggers(trainer: Any) -> Iterator[None]:
    """Mute a Trainer's loggers, for users who write to them; asked, they answer as before."""
    loggers = trainer.loggers
    trainer.loggers = [muted(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def full_precision_context(trainer: Any) -> Any:
    """Return the context in which a step of this Trainer computes in float32 at least.

    Mixed precision is left out, and so is half precision, whose weights are widened meanwhile;
    double precision keeps its default dtype.
    """
    plugin = type(getattr(trainer, "precision_plugin", None)).__name__
    if uses_mixed_precision(trainer) or "Half" in plugin:
        return contextlib.nullcontext()
    return training_precision_context(trainer)


def training_precision_context(trainer: Any) -> Any:
    """Return the context in which this Trainer runs training steps: autocast, default dtype."""
    plugin = getattr(trainer, "precision_plugin", None)
    return contextlib.nullcontext() if plugin is None else plugin.train_step_context()


def uses_mixed_precision(trainer: Any) -> bool:
    """Return whether this Trainer's steps run under autocast."""
    return "Mixed" in type(getattr(trainer, "precision_plugin", None)).__name__


def loss_scale(trainer: Any) -> float:
    """Return the factor that a gradient scaler gives the loss at present, 1 without one."""
    scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def unscales_gradients_itself(optimizer: Any) -> bool:
    """Return whether a gradient scaler leaves it to this optimizer (a fused one) to unscale."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def skips_backward(trainer: Any) -> bool:
    """Return whether training steps run without a backward pass, for running statistics alone.

    StochasticWeightAveraging does so in an epoch after the last one.
    """
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def has_static_graph(trainer: Any) -> bool:
    """Return whether DDP was told that every step has the same graph.

    It then learns that graph, and starts to synchronize, in the backward pass of its own
    first output: leaving that one out leaves gradients unsynchronized without a word.
    """
    return bool(getattr(trainer.strategy.model, "static_graph", False))


def shards_parameters(trainer: Any, module: nn.Module) -> bool:
    """Return whether parameters are spread over processes (FSDP, DeepSpeed)."""
    if flattens_parameters(trainer, module) or spreads_parameters(trainer):
        return True
    return any("FSDP" in type(m).__name__ for m in module.modules())


def flattens_parameters(trainer: Any, module: nn.Module) -> bool:
    """Return whether a strategy keeps shards of its own making (FSDP1, DeepSpeed).

    A module's parameters are then views, or empty, and cannot be moved from outside.
    """
    strategy = type(getattr(trainer, "strategy", None)).__name__
    if any(sign in strategy for sign in ("FSDP", "DeepSpeed")):
        return True
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in module.modules())


def spreads_parameters(trainer: Any) -> bool:
    """Return whether the strategy is for distributed tensors (FSDP2, tensor parallelism)."""
    return "ModelParallel" in type(getattr(trainer, "strategy", None)).__name__


def spawns_processes(trainer: Any) -> bool:
    """Return whether training runs in processes that were spawned or forked for it."""
    launcher = getattr(getattr(trainer, "strategy", None), "launcher", None)
    kinds = [kind.__name__ for kind in type(launcher).__mro__]
    return any("MultiProcessing" in kind or "XLALauncher" in kind for kind in kinds)


def source_of_loaders(trainer: Any, stage: str) -> list[Any] | None:
    """Return what holds the loaders that a Trainer is about to read, before it has made them.

    Those that it was given; or, of a module or a data module that makes them, its attributes.
    """
    loops = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop"}
    loop = getattr(trainer, loops.get(stage, ""), None)
    found = getattr(getattr(loop, "_data_source", None), "instance", None)
    if found is None:
        return None
    makes = any(hasattr(found, f"{name}_dataloader") for name in ("train", "val", "test"))
    # Not what Lightning itself hangs on them.
    return [v for k, v in vars(found).items() if k[:1] != "_"] if makes else [found]


def data_parallel_group(trainer: Any) -> tuple[Any, int, int]:
    """Return the process group over which batches differ, this rank in it, and its size.

    The group is ``None`` for all processes.
    """
    if spreads_parameters(trainer):
        # Before processes have begun there is no mesh.
        with contextlib.suppress(RuntimeError):
            part = trainer.strategy.device_mesh["data_parallel"]
            return part.get_group(), int(part.get_local_rank()), int(part.size())
    return None, int(getattr(trainer, "global_rank", 0)), int(getattr(trainer, "world_size", 1))


def autocast_dtype(trainer: Any) -> torch.dtype | None:
    """Return the dtype in which this Trainer's steps compute under autocast, if they do."""
    if not uses_mixed_precision(trainer):
        return None
    precision = str(getattr(trainer.precision_plugin, "precision", ""))
    return torch.bfloat16 if "bf16" in precision else torch.float16


def prepared(trainer: Any, module: Any, batch: Any) -> Any:
    """Return a batch of the user's own loader as the training loop would hand it over.

    Converted to the precision, transferred, and through the module's transfer hooks.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = _before_transfer(trainer, module, batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _before_transfer(trainer: Any, module: Any, batch: Any) -> Any:
    """Call the first transfer hook of whoever has one, the data module or the module."""
    chosen = getattr(module, "_on_before_batch_transfer", None)
    if chosen is not None:
        return chosen(batch, dataloader_idx=0)
    for owner in (getattr(trainer, "datamodule", None), module):
        hook = getattr(owner, "on_before_batch_transfer", None)
        # Lightning's own one hands the batch back as it is.
        if hook is not None and not hook.__module__.startswith(_NAMESPACES):
            return hook(batch, 0)
    return batch


def state_key_of(callback: Any, **settings: Any) -> str:
    """Return the key that tells callbacks of one class apart in a checkpoint.

    Lightning asks for it at every hook of every batch, so that it is made once.
    """
    known = (type(callback), *settings.items())
    if known not in _KEYS:
        _KEYS[known] = _state_key(callback, settings)
    return _KEYS[known]


_KEYS: dict[tuple[Any, ...], str] = {}


def _state_key(callback: Any, settings: dict[str, Any]) -> str:
    # Documented, though private by its name.
    generate = getattr(callback, "_generate_state_key", None)
    if generate is None:
        return f"{type(callback).__qualname__}{settings!r}"
    return str(generate(**settings))


def step_of(trainer: Any) -> int:
    """Return where the present weights stand on the x axis of what ``self.log`` logs.

    How many batches have stepped an optimizer: with one optimizer the optimizer steps. With
    several, ``global_step`` counts each, and curves would not lie over each other.
    """
    loop = trainer.fit_loop.epoch_loop
    # Private by their names; Lightning's logger connector asks for the same.
    stepped = getattr(loop, "_batches_that_stepped", None)
    if stepped is None:
        return int(trainer.global_step)
    # Counted once a batch is over, after its hooks.
    present = loop.batch_progress.current
    if present.processed > present.completed:
        accumulates = getattr(loop, "_should_accumulate", None)
        stepped += 0 if accumulates is not None and accumulates() else 1
    return int(stepped)


def is_barebones(trainer: Any) -> bool:
    """Return whether the Trainer was asked to do nothing but train."""
    return bool(getattr(trainer, "barebones", False))


def averages_before(trainer: Any, callback: Any) -> bool:
    """Return whether a callback that averages weights is listed before another one.

    Such a callback (WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging) puts its
    average into the module when training ends, and whoever comes later finds it there.
    """
    for other in trainer.callbacks:
        if other is callback:
            return False
        if any("WeightAveraging" in base.__name__ for base in type(other).__mro__):
            return True
    return False


@contextlib.contextmanager
def progress(trainer: Any, description: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a measurement in the Trainer's own progress bar; yields ``advance(count)``.

    Inside Rich's live display where that is the bar, else as one tqdm line below the
    bar's own. Without a bar, or on another rank than the first, nothing is shown.
    """
    bar = getattr(trainer, "progress_bar_callback", None)
    if bar is None or not trainer.is_global_zero or not getattr(bar, "is_enabled", False):
        yield _ignore
        return
    live = getattr(bar, "progress", None)
    if live is not None and hasattr(live, "add_task"):
        task = _rich_task(bar, live, description, total)

        def advance(count: int = 1) -> None:
            live.update(task, advance=count)
            bar.refresh()

        try:
            yield advance
        finally:
            # Hidden, not removed: Lightning finds its own tasks by position.
            live.update(task, visible=False)
            bar.refresh()
        return
    from tqdm.auto import tqdm

    position = 2 + getattr(bar, "process_position", 0)
    line = tqdm(
        desc=description, total=total, leave=False, dynamic_ncols=True, file=sys.stdout,
        position=position, delay=0.5,
    )  # fmt: skip
    try:
        yield line.update
    finally:
        line.close()


def _ignore(count: int = 1) -> None:
    """Advance a bar that is not shown."""


def _rich_task(bar: Any, live: Any, description: str, total: int) -> Any:
    """Return one task for all measurements of a display."""
    task = getattr(live, "_lla_callbacks_task", None)
    if task is None or task not in live.task_ids:
        # Lightning's own columns read these fields.
        task = live.add_task(f"[dim]{description}", total=total, visible=False)
        live._lla_callbacks_task = task
    live.reset(task, total=total, description=f"[dim]{description}", visible=True)
    return task


def say(trainer: Any, text: str) -> None:
    """Log a line for the user, as Lightning logs its own, from the first process.

    Through a child of Lightning's own logger, so that users see it as they see Lightning's.
    """
    if getattr(trainer, "is_global_zero", True):
        modules = [base.__module__ for base in type(trainer).__mro__]
        inside = (m for m in modules if m.startswith(_NAMESPACES))
        logger = logging.getLogger(next(inside, _NAMESPACES[0]))
        with above_bars(logger):
            logger.info(text)


def own_hparams(trainer: Any, module: Any) -> dict[str, Any] | None:
    """Return the hyperparameters that Lightning is going to log; None if it logs none."""
    found: dict[str, Any] | None = None
    for holder in (module, getattr(trainer, "datamodule", None)):
        if getattr(holder, "_log_hyperparams", False):
            known = dict(getattr(holder, "hparams_initial", None) or {})
            found = {**(found or {}), **known}
    return None if found is None else {k: v for k, v in found.items() if k != "_class_path"}


def adds_placeholder(logger: Any) -> bool:
    """Return whether a logger adds ``hp_metric`` to hyperparameters that have no metric."""
    return bool(getattr(logger, "_default_hp_metric", False))


def fraction_done(trainer: Any, batch_idx: int) -> float:
    """Return the share of a run that is done after a batch, NaN where nobody knows.

    By the epochs, the steps or the time that the Trainer was given, whichever ends first.
    """
    found = []
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs and epochs > 0 and 0 < batches < float("inf"):
        found.append((trainer.current_epoch + min(1.0, (batch_idx + 1) / batches)) / epochs)
    if trainer.max_steps and trainer.max_steps > 0:
        found.append(trainer.global_step / trainer.max_steps)
    for callback in trainer.callbacks:
        if any(base.__name__ == "Timer" for base in type(callback).__mro__):
            left, passed = callback.time_remaining(), callback.time_elapsed()
            if left is not None and passed + left > 0:
                found.append(passed / (passed + left))
    return min(1.0, max(found)) if found else math.nan

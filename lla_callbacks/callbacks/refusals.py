"""What callbacks that move weights cannot work with, each with what to do instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lla_callbacks.callbacks.compat import (
    MisconfigurationException,
    flattens_parameters,
    shards_parameters,
)
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.layers import Layers
from lla_callbacks.objective.objective import trainable
from lla_callbacks.objective.training_step import check_replayable, takes_iterator
from lla_callbacks.penalty.middle import penalized_parameters
from lla_callbacks.penalty.penalty import PenaltySettings

# Layers with kinks, between which differences of gradients divide by a squared step.
PIECEWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d)


def refuse_surroundings(
    kind: str, trainer: Any, module: nn.Module, *, replays: bool, moves_shards: bool = False
) -> None:
    """Raise if a Trainer or a module cannot be penalized at all.

    Args:
        kind: Name of the callback, for messages.
        trainer: The Trainer.
        module: Its module.
        replays: Whether the loss is that of the module's training step.
        moves_shards: Whether distributed tensors can be moved where they are, and a batch is
            not needed before its step.

    Raises:
        MisconfigurationException: With the remedy.
    """
    if replays:
        try:
            check_replayable(module)
        except TypeError as error:
            raise MisconfigurationException(f"{kind}: {error}") from error
    if moves_shards:
        if flattens_parameters(trainer, module):
            refuse_flat(kind, trainer, module)
        return
    if shards_parameters(trainer, module):
        raise MisconfigurationException(
            f"{kind} moves whole parameters, and {type(trainer.strategy).__name__} shards "
            "them. Train with strategy='ddp' or in one process, or give estimator='noise' with a "
            f"strength and layers of your own{_elsewhere(trainer)}."
        )
    if takes_iterator(module):
        raise MisconfigurationException(
            f"{kind} needs each batch before its step, and a training_step that takes "
            "dataloader_iter fetches its own. Let it take (batch, batch_idx)."
        )


def refuse_flat(kind: str, trainer: Any, module: Any) -> None:
    """Raise if noise cannot move the shards of a strategy that has them in its own way.

    Raises:
        MisconfigurationException: With the remedy.
    """
    name = type(trainer.strategy).__name__
    if "DeepSpeed" in name:
        raise MisconfigurationException(
            f"{kind}(estimator='noise') moves parameters where they are, and {name} keeps shards "
            "of its own making. Train with ModelParallelStrategy and torch's fully_shard "
            "(FSDP2), strategy='ddp', or in one process."
        )
    if not getattr(trainer.strategy, "kwargs", {}).get("use_orig_params", True):
        raise MisconfigurationException(
            f"{kind}(estimator='noise') draws its noise by parameter, which "
            f"{name}(use_orig_params=False) hides. Leave use_orig_params at True, Lightning's "
            "default, or train with ModelParallelStrategy and torch's fully_shard (FSDP2)."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{kind}(estimator='noise') moves weights to and fro inside a manual step, and {name} "
            "has gathered them for all of it. Use automatic optimization, or "
            "ModelParallelStrategy and torch's fully_shard (FSDP2)."
        )


def _elsewhere(trainer: Any) -> str:
    """Return where noise can move shards, if it cannot here."""
    if "DeepSpeed" not in type(trainer.strategy).__name__:
        return ""
    return " under ModelParallelStrategy with torch's fully_shard (FSDP2)"


def refuse_training(
    kind: str, trainer: Any, module: nn.Module, layers: Layers, settings: PenaltySettings
) -> None:
    """Raise if optimizers, parameters or layers do not fit; warn of differences across kinks.

    To be called once optimizers exist and ``configure_model`` has run.

    Raises:
        MisconfigurationException: With the remedy.
    """
    noise = settings.estimator == "noise"
    space = refuse_steps(
        kind, trainer, module, "penalizes one gradient a step", "moves weights by small steps",
        instead=", or write the penalty into the loss",
    )  # fmt: skip
    # Noise leaves gradients as they are, unless steps depend on the weights.
    if settings.relative or not noise:
        refuse_sparse(kind, module, "adds up")
    if layers != "middle":  # which a forward pass tells
        try:
            penalized_parameters(module, space, layers, lambda: None)
        except ValueError as error:
            raise MisconfigurationException(f"{kind}: {error}") from error
    if noise:
        refuse_noise(kind, module, settings)
    if settings.estimator == "difference" and any(
        isinstance(m, PIECEWISE) for m in module.modules()
    ):
        rank_zero_warn(
            f"{kind}(estimator='difference') on a network with kinks (ReLU, max-pooling): "
            "each kink between two points counts with one over the squared step. Use "
            "estimator='perturbation', which bounds that."
        )


def refuse_noise(kind: str, module: Any, settings: PenaltySettings) -> None:
    """Raise if the gradients of a displaced step cannot be finished.

    Raises:
        MisconfigurationException: With the remedy.
    """
    if settings.relative and not module.automatic_optimization:
        raise MisconfigurationException(
            f"{kind}(estimator='noise', relative=True) adds to the gradients before they are "
            "clipped, and in manual optimization your step may have clipped them already, or added "
            "up those of several draws. Use relative=False, or estimator='perturbation' with loss=."
        )


def refuse_moving(callback: Any, trainer: Any, module: nn.Module) -> None:
    """Raise if a Trainer or a module cannot train a curve at all.

    Args:
        callback: Who would move the weights during each step.
        trainer: The Trainer.
        module: Its module.

    Raises:
        MisconfigurationException: With the remedy.
    """
    kind = type(callback).__name__
    for other in trainer.callbacks:
        if other is callback:
            continue
        if getattr(other, "moves_weights", False):
            raise MisconfigurationException(
                f"{kind} and {type(other).__name__} would both move the weights during a step: "
                "use one of them a fit."
            )
        if any("WeightAveraging" in base.__name__ for base in type(other).__mro__):
            raise MisconfigurationException(
                f"{type(other).__name__} averages what is trained, and {kind} trains bends, "
                "whose average is no network on the curve. Leave it out."
            )
    if not getattr(module, "automatic_optimization", True):
        raise MisconfigurationException(
            f"{kind} moves the weights between a batch's start and its one backward pass, and "
            f"{type(module).__name__} uses manual optimization, whose passes are its own. Call "
            "connect(module, batches, start, end, loss=loss) instead."
        )
    if shards_parameters(trainer, module):
        raise MisconfigurationException(
            f"{kind} moves whole parameters, and {type(trainer.strategy).__name__} shards "
            "them. Train with strategy='ddp' or in one process."
        )


def refuse_moving_training(kind: str, trainer: Any, module: nn.Module) -> None:
    """Raise if optimizers or parameters cannot train a curve; to be called once they exist.

    Raises:
        MisconfigurationException: With the remedy.
    """
    refuse_steps(kind, trainer, module, "has one gradient a step", "moves weights along a curve")
    refuse_sparse(kind, module, "scales")


def refuse_lbfgs(kind: str, trainer: Any, what: str, instead: str = "") -> None:
    """Raise if an optimizer evaluates the loss several times a step.

    Args:
        kind: Name of the callback, for messages.
        trainer: The Trainer.
        what: Why that does not do, ``"adds one gradient a step"``.
        instead: What else could be done.

    Raises:
        MisconfigurationException: With the remedy.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"{kind} {what}, and LBFGS evaluates the loss several times a step. Use a first-order "
            f"optimizer{instead}."
        )


def refuse_steps(
    kind: str, trainer: Any, module: nn.Module, what: str, moves: str, *, instead: str = ""
) -> ParameterSpace:
    """Raise as :func:`refuse_lbfgs`, and if weights are too coarse to move a little.

    Args:
        kind: Name of the callback, for messages.
        trainer: The Trainer.
        module: Its module.
        what: See :func:`refuse_lbfgs`.
        moves: What rounding takes away, ``"moves weights by small steps"``.
        instead: See :func:`refuse_lbfgs`.

    Returns:
        The layout of the trainable parameters.

    Raises:
        MisconfigurationException: With the remedy.
    """
    refuse_lbfgs(kind, trainer, what, instead)
    space = ParameterSpace(trainable(module))
    if torch.finfo(space.precision).eps > 1e-5:
        raise MisconfigurationException(
            f"{kind} {moves}, which {space.precision} rounds away. "
            "Train with precision='bf16-mixed' or '16-mixed', which keep float32 weights."
        )
    return space


def refuse_sparse(kind: str, module: nn.Module, does: str) -> None:
    """Raise if an embedding gives sparse gradients.

    Args:
        kind: Name of the callback, for messages.
        module: The module.
        does: What is done to dense ones, ``"adds up"``.

    Raises:
        MisconfigurationException: With the remedy.
    """
    if any(getattr(m, "sparse", False) is True for m in module.modules()):
        raise MisconfigurationException(
            f"{kind} {does} dense gradients, and an embedding here gives sparse ones. Make it "
            "with sparse=False."
        )


def refuse_shards(monitor: Any, trainer: Any, module: nn.Module) -> None:
    """Raise if a monitor cannot measure parameters that are spread over processes.

    Raises:
        MisconfigurationException: With the remedy.
    """
    kind = type(monitor).__name__
    if flattens_parameters(trainer, module):
        raise MisconfigurationException(
            f"{kind} cannot move parameters that {type(trainer.strategy).__name__} shards in "
            "its own way. Train with ModelParallelStrategy and fully_shard (FSDP2) or with "
            "DDP, or load the checkpoint into a plain module and call "
            "measure_hessian(module, batches)."
        )
    if shards_parameters(trainer, module) and not monitor.measures_shards:
        raise MisconfigurationException(
            f"{kind} moves whole parameters, and {type(trainer.strategy).__name__} spreads "
            "them. Train with DDP or in one process, or load the checkpoint into a plain "
            "module and call loss_plane(module, batches)."
        )

"""What the functions about slices are given, checked and brought into the form that is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lla_callbacks.linalg.space import ParameterSpace
from lla_callbacks.objective.batches import tensors_of
from lla_callbacks.objective.checks import (
    optimizer_of,
)
from lla_callbacks.objective.evaluation import (
    Predict,
    Statistics,
    check_metrics,
    evaluating,
)
from lla_callbacks.objective.grid import coordinates
from lla_callbacks.objective.networks import state_of
from lla_callbacks.objective.objective import Objective
from lla_callbacks.objective.points import Evaluation, PointSettings, space_of
from lla_callbacks.slices.choice import (
    DirectionSource,
)
from lla_callbacks.slices.directions import (
    Direction,
    Normalization,
    Vectors,
    flat_weights,
)


def point_settings(
    metrics: Mapping[str, Any] | None,
    predict: Predict | None,
    evaluation: Evaluation,
    time_budget: float | None,
) -> PointSettings:
    """Return how points are evaluated, checked."""
    check_metrics(metrics, predict)
    return PointSettings(metrics, predict, evaluation, time_budget)


def axes_of(alphas: Any, betas: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the user's own coordinates of a plane, None where there are none."""
    return (
        None if alphas is None else coordinates("alphas", alphas),
        None if betas is None else coordinates("betas", betas),
    )


def source_of(
    objective: Objective,
    normalization: Normalization,
    vectors: Vectors,
    seed: int,
    optimizer: torch.optim.Optimizer | None,
    checkpoints: Sequence[Any],
) -> DirectionSource:
    """Return where directions come from, what they rest on checked."""
    space = space_of(objective)
    optimizer_of("optimizer", optimizer)
    if isinstance(checkpoints, (str, bytes, Mapping, nn.Module)) or not isinstance(
        checkpoints, Iterable
    ):
        raise ValueError(
            f"checkpoints is of type {type(checkpoints).__name__}; give a list of modules, state "
            "dicts or paths of checkpoints, oldest first."
        )
    weights = [checkpoint_weights(c, space, "checkpoints") for c in checkpoints]
    return DirectionSource(
        objective,
        normalization,
        vectors,
        seed,
        optimizer,
        previous=weights[-1] if weights else None,
        weights=weights,
        steps=range(len(weights) + 1),
    )


def checkpoint_weights(checkpoint: Any, space: ParameterSpace, name: str) -> Tensor:
    """Return the trainable weights of a module, a state dict, a checkpoint or its path, flat."""
    checkpoint = _unwrapped(checkpoint, name)
    if isinstance(checkpoint, nn.Module):
        checkpoint = dict(checkpoint.named_parameters())
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{name}: a checkpoint of type {type(checkpoint).__name__} is not known: give a "
            "module, a state dict, or the path of a checkpoint."
        )
    # Buffers and frozen parameters are no variables.
    known = {n: t for n, t in checkpoint.items() if n in space.slices}
    try:
        return flat_weights(known, space)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _unwrapped(checkpoint: Any, name: str = "checkpoint") -> Any:
    """Return the state dict of a Lightning checkpoint, or of a file; anything else as it is."""
    if isinstance(checkpoint, (str, Path)):
        return state_of(checkpoint, name)
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        return checkpoint["state_dict"]
    return checkpoint


def statistics_of(module: nn.Module, checkpoint: Any) -> Statistics:
    """Return the running statistics that a checkpoint has for a module's batch norms."""
    checkpoint = _unwrapped(checkpoint)
    if isinstance(checkpoint, nn.Module):
        checkpoint = checkpoint.state_dict()
    found = []
    for name, m in module.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            keys = [f"{name}.{key}".lstrip(".") for key in ("running_mean", "running_var")]
            if any(key not in checkpoint for key in keys):
                raise ValueError(
                    f"{keys[0]!r} is missing in what was given, and mode 'eval' needs it: give "
                    "whole state dicts, or mode='batch' or 'recalibrate'."
                )
            mean, var = (checkpoint[key].detach().to(m.running_mean).clone() for key in keys)
            found.append((m, mean, var))
    return found


def fingerprint(
    objective: Objective,
    directions: Sequence[Direction],
    axes: Sequence[Tensor],
    settings: PointSettings,
) -> str:
    """Return what tells two grids apart: a hash of all that their values depend on."""
    objective.release()
    digest = hashlib.sha256()
    tensors = [*objective.module.parameters(), *objective.module.buffers(), *axes]
    tensors += [d.vector for d in directions]
    tensors += [t for batch in objective.batches for t in tensors_of(batch)]
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    # The loss itself cannot be hashed; its value at the centre can, and that of the metrics.
    with evaluating(objective, metrics=settings.metrics, predict=settings.predict) as evaluate:
        centre = evaluate().tolist()
        words: list[Any] = [objective.mode, objective.dropout, objective.seed, evaluate.names]
        part = [] if objective.names is None else [sorted(objective.names)]
    digest.update(repr((*words, centre, *part)).encode())
    return digest.hexdigest()

"""Curves between networks, the loss along them and barriers, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lla_callbacks.alignment.functions import aligned
from lla_callbacks.curves.curve import (
    Curve,
    Kind,
    check_bends,
    check_kind,
)
from lla_callbacks.curves.family import OnCurve
from lla_callbacks.curves.measure import CURVE_POINTS, Along, even, measure_along
from lla_callbacks.curves.plain_training import MakeOptimizer, train_curve
from lla_callbacks.curves.report import Barriers, LossCurve
from lla_callbacks.objective.build import objective_of
from lla_callbacks.objective.checks import (
    MOST_POINTS,
    MOST_WORK,
    flag,
    function_of,
    module_of,
    number,
    positive,
    seed_of,
    whole,
)
from lla_callbacks.objective.counting import BatchSize
from lla_callbacks.objective.evaluation import Loss, Predict, check_metrics
from lla_callbacks.objective.grid import coordinates
from lla_callbacks.objective.networks import Networks, networks_of, state_of
from lla_callbacks.objective.objective import Mode, Objective
from lla_callbacks.objective.points import Evaluation, PointSettings, space_of
from lla_callbacks.objective.spelling import spelled
from lla_callbacks.objective.state import weights_at


@spelled
@torch.inference_mode(False)
def loss_curve(
    module: nn.Module,
    batches: Iterable[Any],
    curve: Curve | Sequence[Any],
    *,
    t: Any = None,
    straight: bool = True,
    loss: Loss | None = None,
    metrics: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
    mode: Mode = "recalibrate",
    dropout: bool = False,
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    evaluation: Evaluation = "auto",
    time_budget: float | None = None,
    seed: int = 0,
    batch_size: BatchSize = None,
) -> LossCurve:
    """Return the loss, and any metric, along a curve, beside the straight line between its ends.

    Both ends are the networks themselves, to the bit, with their own running statistics. In
    between, batch norm's statistics are estimated anew at each ``t`` on the batches given, each
    with its share of the samples, since those of the ends are wrong there (at the far end of a
    curve, statistics of the start gave a conv net 70 % errors instead of 2 %).

    Args:
        module: Any module of the networks' architecture; it is left as it was.
        batches: Any iterable of batches; see :func:`~lla_callbacks.measure_hessian`.
        curve: A :class:`~lla_callbacks.curves.curve.Curve`, or networks in order (modules, state
            dicts, checkpoint paths), which are joined by straight lines.
        t: Where, ascending from 0 to 1. ``None``: 61 even points, as in the published figures.
        straight: Whether the straight line between the ends is measured too, at the same price.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None``
            replays the module's ``training_step``.
        metrics: Name to a torchmetrics metric, or to a function ``(module, batch) -> scalar``
            that is averaged over samples. Barriers are of what should be low: give an error.
        predict: ``predict(module, batch)`` returns predictions and targets for torchmetrics.
        mode: ``"recalibrate"``, or ``"batch"`` (batch statistics everywhere) or ``"eval"``
            (running statistics, interpolated between the ends').
        dropout: Whether dropout is on (one fixed mask); off by default.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        evaluation: ``"auto"``, ``"loop"`` or ``"vmap"``.
        time_budget: Seconds for each of curve and line after which no further point is begun;
            points are visited from coarse to fine, both ends first.
        seed: Fixes what is random in the module.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed, or networks are not alike; by name.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
    """
    check_metrics(metrics, predict)
    straight = flag("straight", straight)
    seed = seed_of("seed", seed)
    settings = PointSettings(metrics, predict, evaluation, time_budget)
    where = even(CURVE_POINTS) if t is None else _between(coordinates("t", t))
    networks, kind = _networks(module, curve)
    with _prepared(module, networks):
        objective = objective_of(
            module, batches, loss, mode=mode, dropout=dropout, seed=seed,
            num_samples=num_samples, microbatch_size=microbatch_size,
            batch_size=batch_size,
        )  # fmt: skip
        line: Along | None = None
        if straight and len(networks.weights) > 2:
            ends = [networks.weights[0], networks.weights[-1]]
            line = measure_along(
                objective, family_of(objective, networks, "chain", ends), where, settings,
                seed=seed,
            )  # fmt: skip
        found = measure_along(
            objective, family_of(objective, networks, kind, networks.weights), where, settings,
            straight=line, seed=seed,
        )  # fmt: skip
    return LossCurve.of(found)


@spelled
@torch.inference_mode(False)
def connect(
    module: nn.Module,
    batches: Iterable[Any],
    start: Any,
    end: Any,
    *,
    kind: Kind = "bezier",
    bends: int = 1,
    epochs: int = 30,
    lr: float = 0.03,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    optimizer: MakeOptimizer | None = None,
    scale_steps: bool = True,
    loss: Loss | None = None,
    seed: int = 0,
    batch_size: BatchSize = None,
) -> Curve:
    """Train a curve of low loss between two networks by a plain loop, and return it.

    Minimizes ``E_t L(phi(t))`` over the bends, one ``t`` a batch (Garipov et al. 2018, equation
    2); both ends stay as they are. The learning rate is constant for half of the epochs, falls
    linearly to a hundredth until nine tenths, and stays there, as in the authors' code. For a
    Trainer, with everything that comes with it, there is
    :class:`~lla_callbacks.ModeConnection`.

    Args:
        module: Any module of that architecture; it is left as it was. It trains in training
            mode, dropout included.
        batches: Training batches, all of which are held; their order is drawn anew each epoch.
        start: The network at ``t = 0``: a module, a state dict, or a checkpoint's path.
        end: The network at ``t = 1``.
        kind: ``"bezier"`` or ``"chain"``.
        bends: Control points between the ends. (The reference code counts the ends too.)
        epochs: Passes over the batches.
        lr: Learning rate. With ``scale_steps`` about a third of one that trained the networks
            fits either kind: at some ``t`` a bend sees up to three times its mean curvature.
        momentum: Of SGD.
        weight_decay: Of the weights on the curve, ``phi(t)``, not of the bends.
        optimizer: ``optimizer(parameters)`` returns an optimizer of the bends in the place of
            SGD; ``lr`` and ``momentum`` then play no part, and its own weight decay must be 0.
        scale_steps: Whether SGD's gradients are divided by ``E c_j^2``, which makes up for the
            share that a bend has in the curve, so that one rate serves both kinds.
        loss: ``loss(module, batch)``; ``None`` replays the module's ``training_step``.
        seed: Fixes ``t``, the order of batches, and what is random in the module.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed, or networks are not alike; by name.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        NonFiniteError: If the loss is not finite.

    Example::

        >>> import torch
        >>> from lla_callbacks import connect, loss_curve
        >>> batch = torch.eye(2), torch.zeros(2, 1)
        >>> def loss(module, batch):
        ...     return (module(batch[0]).square() - 1).square().mean()
        >>> net, a, b = (torch.nn.Linear(2, 1) for _ in range(3))
        >>> curve = connect(net, [batch], a, b, loss=loss, epochs=5)
        >>> found = loss_curve(net, [batch], curve, loss=loss)
        >>> found.loss.shape, bool(found.loss[0] == loss(a, batch))
        (torch.Size([61]), True)
    """
    check_kind(kind)
    check_bends(bends)
    epochs = whole("epochs", epochs, 1, MOST_WORK)
    lr = positive("lr", lr)
    momentum = number("momentum", momentum, "a number from 0 to below 1", least=0, below=1)
    weight_decay = number("weight_decay", weight_decay, "0 or a positive number", least=0)
    scale_steps = flag("scale_steps", scale_steps)
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        optimizer = function_of("optimizer", optimizer, "optimizer(parameters)", 1)
    seed = seed_of("seed", seed)
    networks = networks_of(module, [start, end], ["start", "end"])
    with _prepared(module, networks):
        objective = objective_of(
            module, batches, loss, mode="batch", dropout=True, seed=seed, num_samples=None,
            microbatch_size=None,
            batch_size=batch_size,
        )  # fmt: skip
        trained = train_curve(
            objective, networks, kind, bends, epochs, weight_decay, scale_steps, seed,
            optimizer or (lambda p: torch.optim.SGD(p, lr, momentum=momentum)),
        )  # fmt: skip
    return curve_of(networks, kind, trained)


@spelled
@torch.inference_mode(False)
def barrier(
    module: nn.Module,
    batches: Iterable[Any],
    checkpoints: Sequence[Any] | Mapping[str, Any],
    *,
    align: bool = False,
    points: int = 25,
    loss: Loss | None = None,
    metrics: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
    mode: Mode = "recalibrate",
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    evaluation: Evaluation = "auto",
    seed: int = 0,
    batch_size: BatchSize = None,
) -> Barriers:
    """Return the barriers on the straight lines between all pairs of networks.

    Args:
        module: Any module of their architecture; it is left as it was.
        batches: Any iterable of batches.
        checkpoints: At least two networks (modules, state dicts, paths), or name to network.
        align: Whether of each pair the second one's hidden units are brought into the first
            one's order, which leaves what it computes as it is; see
            :func:`~lla_callbacks.aligned`.
        points: On each line, both ends among them; 25 as in git re-basin.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None`` replays
            the module's ``training_step``.
        metrics: Name to a torchmetrics metric, or to a function ``(module, batch) -> scalar`` that
            is averaged over samples. Barriers are of what should be low: give an error.
        predict: ``predict(module, batch)`` returns predictions and targets for torchmetrics.
        mode: ``"recalibrate"``, or ``"batch"`` (batch statistics everywhere) or ``"eval"`` (running
            statistics, interpolated between the ends').
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        evaluation: ``"auto"``, ``"loop"`` or ``"vmap"``.
        seed: Fixes what is random in the module.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed, or networks are not alike; by name.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
    """
    module_of("module", module)
    if isinstance(checkpoints, (str, bytes, Tensor, nn.Module)) or not isinstance(
        checkpoints, (Mapping, Sequence)
    ):
        raise ValueError(
            f"checkpoints is of type {type(checkpoints).__name__}; give a list of networks, or a "
            "dict of name to network."
        )
    named = (
        dict(checkpoints)
        if isinstance(checkpoints, Mapping)
        else {str(k): c for k, c in enumerate(checkpoints)}
    )
    if len(named) < 2:
        raise ValueError(f"there are {len(named)} checkpoints; give two at least.")
    points = whole("points", points, 3, MOST_POINTS)
    seed = seed_of("seed", seed)
    flag("align", align)
    check_metrics(metrics, predict)
    settings = PointSettings(metrics, predict, evaluation)
    networks = networks_of(module, list(named.values()), [f"checkpoints[{n}]" for n in named])
    lines: dict[tuple[int, int], Along] = {}
    with _prepared(module, networks):
        objective = objective_of(
            module, batches, loss, mode=mode, dropout=False, seed=seed, num_samples=num_samples,
            microbatch_size=microbatch_size,
            batch_size=batch_size,
        )  # fmt: skip
        for i in range(len(named)):
            for j in range(i + 1, len(named)):
                pair = _subset(networks, (i, j))
                if align:
                    states = [state_of(list(named.values())[k], "checkpoint") for k in (i, j)]
                    moved = aligned(
                        module, states[0], states[1], objective.fresh(0), seed=seed
                    ).state
                    pair = networks_of(module, [states[0], moved], ["first", "second"])
                family = family_of(objective, pair, "chain", pair.weights)
                lines[i, j] = measure_along(objective, family, even(points), settings, seed=seed)
    return Barriers.of(tuple(named), lines)


def curve_of(networks: Networks, kind: Kind, bends: Sequence[Sequence[Tensor]]) -> Curve:
    """Return a plain curve from networks at its ends and trained bends."""
    points = [networks.weights[0], *bends, networks.weights[-1]]
    return Curve(
        tuple(
            {n: w.detach().cpu().clone() for n, w in zip(networks.names, point, strict=True)}
            for point in points
        ),
        kind,
        networks.rests[0],
        networks.rests[-1],
        networks.tied,
    )


def family_of(
    objective: Objective, networks: Networks, kind: Kind, points: Sequence[list[Tensor]]
) -> OnCurve:
    """Return a curve as weights that an objective can be evaluated at."""
    return OnCurve(
        space_of(objective), kind, points, (networks.statistics[0], networks.statistics[-1]),
        recalibrated=objective.mode == "recalibrate",
    )  # fmt: skip


def _networks(module: nn.Module, curve: Curve | Sequence[Any]) -> tuple[Networks, Kind]:
    """Return a curve's control points as networks, and what kind of curve they make."""
    if isinstance(curve, Curve):
        tied = {name: curve.points[0][first] for name, first in curve.tied.items()}
        states = [
            {**(curve.start_rest if j < curve.bends + 1 else curve.end_rest), **point}
            | ({name: point[first] for name, first in curve.tied.items()} if tied else {})
            for j, point in enumerate(curve.points)
        ]
        bends = [f"control point {j}" for j in range(1, curve.bends + 1)]
        return networks_of(module, states, ["start", *bends, "end"]), curve.kind
    if not isinstance(curve, (list, tuple)) or len(curve) < 2:
        raise ValueError(
            f"curve is {_kind_of(curve)}; give a Curve, or a list of two networks or more, which "
            "are joined in order."
        )
    roles = [f"curve[{j}]" for j in range(len(curve))]
    return networks_of(module, list(curve), roles), "chain"


def _kind_of(curve: Any) -> str:
    if isinstance(curve, (nn.Module, Mapping)):
        return "one network"
    few = isinstance(curve, (list, tuple))
    return f"{len(curve)} networks" if few else f"of type {type(curve).__name__}"


def _subset(networks: Networks, chosen: Sequence[int]) -> Networks:
    return Networks(
        networks.names,
        tuple(networks.weights[i] for i in chosen),
        tuple(networks.statistics[i] for i in chosen),
        tuple(networks.rests[i] for i in chosen),
        networks.tied,
        networks.common,
    )


def _prepared(module: nn.Module, networks: Networks) -> Any:
    """Return a context in which the module has what the networks share beside weights."""
    return weights_at(module, networks.common)


def _between(t: Tensor) -> Tensor:
    if float(t[0]) < 0 or float(t[-1]) > 1:
        raise ValueError(f"t is {t.tolist()}; give numbers from 0 (start) to 1 (end).")
    return t

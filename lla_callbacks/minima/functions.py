"""Minima of any module, without a Trainer: relax, compare, map, follow over shifts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.minima.basins import basin_ratio
from lla_callbacks.minima.maps import Distance, Method, features_of, points_of
from lla_callbacks.minima.predictions import Accuracy, Confidence
from lla_callbacks.minima.relaxation import MakeOptimizer, follow
from lla_callbacks.minima.results import BasinComparison, MinimaMap, Relaxation, ShiftReport
from lla_callbacks.minima.shift import LEAST_WRONG, Shift, measure_set
from lla_callbacks.objective.batches import first_samples, hold, split
from lla_callbacks.objective.build import objective_of
from lla_callbacks.objective.checks import (
    MOST_WORK,
    batches_of,
    flag,
    function_of,
    module_of,
    number,
    one_of,
    positive,
    seed_of,
    shown,
    text_of,
    whole,
)
from lla_callbacks.objective.counting import BatchSize, about, batch_size_of, sample_count
from lla_callbacks.objective.evaluation import Loss, Predict
from lla_callbacks.objective.objective import Mode
from lla_callbacks.objective.precision import at_precision
from lla_callbacks.objective.spelling import spelled
from lla_callbacks.slices.basin import Basin

PREDICT = "predict(module, batch) -> (logits, labels)"
# Statistics that are estimated anew at each network would need its batches.
MapMode = Literal["eval", "batch"]


@spelled
def compare_basins(a: Basin, b: Basin, *, names: tuple[str, str] = ("a", "b")) -> BasinComparison:
    """Return how many times wider one basin is than another, and how sure that is.

    Args:
        a: A result of :func:`~lla_callbacks.basin_radii`.
        b: Another, of the same architecture, on as many samples, with the same cutoff or rise.
        names: What they are called.

    Raises:
        ValueError: If the two do not compare: rim, number of samples or of parameters, mode or
            normalization differ.
    """
    for name, basin in (("a", a), ("b", b)):
        if not isinstance(basin, Basin):
            raise ValueError(f"{name} is {shown(basin)}; give a result of basin_radii.")
    if not (isinstance(names, (list, tuple)) and len(names) == 2):
        raise ValueError(f"names is {shown(names)}; give a pair of names, one a basin.")
    for part in names:
        text_of("names", part, "a pair of names")
    return BasinComparison(**vars(basin_ratio(a, b, (names[0], names[1]))))


@spelled
@torch.inference_mode(False)
def relax(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    loss: Loss | None = None,
    num_steps: int = 300,
    lr: float = 1e-3,
    optimizer: MakeOptimizer | None = None,
    predict: Predict | None = None,
    mode: Mode = "eval",
    dropout: bool = True,
    num_samples: int | None = None,
    seed: int = 0,
) -> Relaxation:
    """Return what becomes of a network in some steps of plain training: is it a minimum?

    A minimum has no gradient and stays where it is. A network that was trained on more than
    this loss (poison, say) may move off at once: then its basin and its curvature are
    those of a slope. The module comes back to the bit, with its random streams.

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        batches: Training batches; one a step is trained on, in their order, over and over.
        held_out: Batches whose loss and accuracy are followed too.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None``
            replays the module's ``training_step``.
        num_steps: How many steps.
        lr: Learning rate of Adam.
        optimizer: ``optimizer(parameters)`` makes another one.
        predict: ``predict(module, batch)`` returns logits and labels, for accuracies; ``None``:
            the module's output against ``batch[1]``.
        mode: In which losses and accuracies are evaluated; steps are taken as in training.
        dropout: Whether dropout is on in the steps.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        seed: Of random streams in the steps.

    Raises:
        ValueError: If a setting is not allowed; the message says what is.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
    """
    num_steps = whole("num_steps", num_steps, 1, MOST_WORK)
    lr = positive("lr", lr)
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        optimizer = function_of("optimizer", optimizer, "optimizer(parameters)", 1)
    dropout = flag("dropout", dropout)
    batches_of("held_out", held_out, none=True)
    function_of("predict", predict, PREDICT, 2)
    seed = seed_of("seed", seed)
    make = partial(
        objective_of, module, loss=loss, mode=mode, dropout=False, seed=seed, microbatch_size=None
    )
    found = follow(
        make(batches, num_samples=num_samples),
        None if held_out is None else make(held_out, num_samples=None),
        Accuracy(predict),
        num_steps=num_steps,
        make_optimizer=optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr)),
        dropout=dropout,
        seed=seed,
    )
    return Relaxation.of(found)


@spelled
@torch.inference_mode(False)
def map_of_minima(
    checkpoints: Mapping[str, Any] | Sequence[Any],
    batches: Iterable[Any] = (),
    *,
    module: nn.Module | None = None,
    distance: Distance = "predictions",
    method: Method = "mds",
    values: Sequence[float] | None = None,
    values_name: str = "value",
    path: str | None = None,
    predict: Predict | None = None,
    mode: Mode = "eval",
    perplexity: float | None = None,
    num_samples: int | None = None,
    seed: int = 0,
) -> MinimaMap:
    """Return networks as points of a map, with what the map is worth.

    By default distances are between predictions: networks of different starts that compute
    the same function lie together. Distances of weights tell the start, not the kind of
    minimum (permuted units are far apart), and t-SNE turns them into islands.

    Args:
        checkpoints: Networks of one architecture: modules, state dicts or loaded Lightning
            checkpoints, in a list; or a dict of name to one or a list of them, each a set of
            points, such as the path of training and the minima beside it.
        batches: On which predictions are compared; not needed for weights.
        module: The network that state dicts are of.
        distance: ``"predictions"`` (root of the mean squared Hellinger distance),
            ``"disagreement"`` (share of samples that two networks label differently) or
            ``"weights"`` (over the mean norm).
        method: ``"mds"`` (classical scaling), ``"pca"`` or ``"tsne"`` (needs scikit-learn).
        values: A number a point, in order, which colours it.
        values_name: Of these numbers.
        path: Set whose points are joined in their order.
        predict: ``predict(module, batch)`` returns logits and labels; ``None``: the module's
            output.
        mode: ``"eval"`` or ``"batch"``: normalization in predictions.
        perplexity: Of t-SNE; ``None``: 30, or less where there are few points.
        num_samples: Take batches until they have this many samples; ``None`` takes all.
        seed: Of t-SNE.

    Raises:
        ValueError: If a setting is not allowed or a checkpoint does not fit.
        ImportError: If t-SNE is wanted and scikit-learn is not installed.
    """
    seed = seed_of("seed", seed)
    num_samples = whole("num_samples", num_samples, 1, none=True, other=", or None for all")
    for name, value, kind in (
        ("distance", distance, Distance), ("method", method, Method), ("mode", mode, MapMode),
    ):  # fmt: skip
        one_of(name, value, kind)
    function_of("predict", predict, PREDICT, 2)
    perplexity = positive("perplexity", perplexity, none=True)
    text_of("values_name", values_name, "what the values are")
    if module is not None:
        module_of("module", module)
    sets, names, networks = _sets(checkpoints)
    if len(networks) < 3:
        raise ValueError(f"{len(networks)} checkpoints make no map: give three at least.")
    if values is not None:
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise ValueError(f"values is {shown(values)}; give a number a checkpoint, or None.")
        wanted = "a number a checkpoint, NaN where there is none, or None"
        values = [v if v != v else number("values", v, wanted) for v in values]
        if len(values) != len(networks):
            raise ValueError(
                f"values has {len(values)} numbers for {len(networks)} checkpoints: give as many."
            )
    if path is not None and (not isinstance(path, str) or path not in sets):
        known = ", ".join(dict.fromkeys(sets))
        raise ValueError(f"path is {shown(path)}; give one of the sets, {known}.")
    held: list[Any] = []
    if distance != "weights":
        batches_of("batches", batches)
        held = [hold(batch) for batch in first_samples(batches, num_samples)]
    features = features_of(networks, held, module, distance, predict, mode)
    host = next((n for n in networks if isinstance(n, nn.Module)), module)
    assert host is not None
    found = points_of(
        names,
        sets,
        features,
        distance=distance,
        method=method,
        perplexity=perplexity,
        num_samples=sum(map(about, held)),
        num_params=sum(p.numel() for p in host.parameters()),
        mode=mode,
        seed=seed,
    )
    return MinimaMap.of(
        found,
        values=None if values is None else tuple(map(float, values)),
        values_name=values_name,
        path=path,
    )


@spelled
@torch.inference_mode(False)
def measure_shift(
    module: nn.Module,
    loaders: Mapping[str, Iterable[Any]],
    *,
    loss: Loss | None = None,
    predict: Predict | None = None,
    num_samples: int = 1000,
    num_steps: int = 100,
    num_probes: int = HessianSettings.num_probes,
    mode: Mode = "eval",
    microbatch_size: int | None = None,
    max_memory: int | None = None,
    seed: int = 0,
    batch_size: BatchSize = None,
) -> ShiftReport:
    """Return the spectrum's criteria of one network on several sets of data, and plainer numbers.

    Every set counts with the same number of samples, since criteria depend on it: r_e of one
    network fell five-fold from 200 samples to 2,048. The criteria need labels, and labels give
    accuracy and loss at a hundredth of the cost: what a criterion says beyond these is
    ``rank_correlation(name, given="loss")``.

    Args:
        module: Any module; a LightningModule needs no ``loss``.
        loaders: Name to batches of a set.
        loss: ``loss(module, batch)`` returns the scalar mean loss of one batch. ``None``
            replays the module's ``training_step``.
        predict: ``predict(module, batch)`` returns logits and labels; ``None``: the module's
            output against ``batch[1]``.
        num_samples: Of each set, exactly; the last batch is cut.
        num_steps: Lanczos depth. Default 100, as in published values of KH05.
        num_probes: Probes of the trace.
        mode: Normalization. Default ``"eval"``: the network as it is used.
        microbatch_size: Evaluate batches in parts of at most this many samples.
        max_memory: Bytes that a measurement may take beside the module. Graphs that do not fit are
            built anew for each product (3 gradients instead of 2), batches that do not fit are
            split where their samples do not see each other, and where that is not enough,
            differences of gradients take over. ``None``: half of what a training step takes, and
            256 MiB at least.
        seed: Fixes every random vector and the bootstraps.
        batch_size: How many samples a batch has, where it does not tell: a number, or
            ``callable(batch)``; see :func:`~lla_callbacks.measure_hessian`.

    Raises:
        ValueError: If a setting is not allowed, or a set has too few samples.
        TypeError: If there is neither a loss nor a replayable ``training_step``.
        MeasurementError: If a loss or a product is not finite or cannot be had.
    """
    module_of("module", module)
    function_of("predict", predict, PREDICT, 2)
    seed = seed_of("seed", seed)
    if not isinstance(loaders, Mapping) or not loaders:
        raise ValueError(
            f"loaders is of type {type(loaders).__name__}; give a dict of name to batches, with "
            "one set at least."
        )
    num_samples = whole("num_samples", num_samples, 1)
    settings = HessianSettings(num_steps=num_steps, num_probes=num_probes, seed=seed)
    size = batch_size_of("batch_size", batch_size)
    held = {name: _exactly(name, batches, num_samples, size) for name, batches in loaders.items()}
    sets = {}
    with at_precision(module, "float32"):
        for name, batches in held.items():
            objective = objective_of(
                module, batches, loss, mode=mode, dropout=False, seed=seed, num_samples=None,
                microbatch_size=microbatch_size, max_memory=max_memory,
                batch_size=batch_size,
            )  # fmt: skip
            accuracy, confidence = Accuracy(predict), Confidence(predict)
            sets[name] = measure_set(name, objective, settings, accuracy, confidence)
    found = Shift(sets, num_samples, mode, num_steps, seed)
    if found.few_wrong:
        warnings.warn(
            f"fewer than {LEAST_WRONG} of {num_samples} samples are wrong in "
            f"{', '.join(found.few_wrong)}: r_e and KH05, which the wrong ones make, are chance "
            "there. Give more samples, or leave these sets out of comparisons.",
            stacklevel=2,
        )
    return ShiftReport.of(found)


def _exactly(
    name: str, batches: Iterable[Any], num_samples: int, batch_size: BatchSize
) -> list[Any]:
    """Return batches with exactly so many samples in all."""
    batches_of(f"the set {name!r}", batches)
    held, count = [], 0
    for batch in batches:
        size = sample_count(batch, batch_size)
        if count + size > num_samples:
            part = split(batch, num_samples - count, size)
            batch, size = next(part), num_samples - count
        held.append(hold(batch))
        count += size
        if count == num_samples:
            return held
    raise ValueError(
        f"the set {name!r} has {count} samples, fewer than num_samples={num_samples}: criteria "
        "compare at the same number only. Give more, or a smaller num_samples."
    )


def _sets(checkpoints: Any) -> tuple[list[str], list[str], list[Any]]:
    """Return the set, the name and the network of each point."""
    if isinstance(checkpoints, Mapping):
        groups = {
            str(name): [one] if isinstance(one, (nn.Module, Mapping)) else list(one)
            for name, one in checkpoints.items()
        }
    elif isinstance(checkpoints, (nn.Module, str, bytes, torch.Tensor)) or not isinstance(
        checkpoints, Iterable
    ):
        raise ValueError(
            f"checkpoints is of type {type(checkpoints).__name__}; give a list of networks, or a "
            "dict of name to networks."
        )
    else:
        groups = {"": list(checkpoints)}
    sets = [name for name, networks in groups.items() for _ in networks]
    names = [
        (f"{name} {k}".strip() if len(networks) > 1 else name or "0")
        for name, networks in groups.items()
        for k in range(len(networks))
    ]
    return sets, names, [n for networks in groups.values() for n in networks]

"""Many networks as points: distances between them, and coordinates that show these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lla_callbacks.minima.predictions import default_predict, probabilities
from lla_callbacks.minima.statistics import spearman, trustworthiness
from lla_callbacks.objective.batches import fresh
from lla_callbacks.objective.evaluation import Predict
from lla_callbacks.objective.state import Snapshot, preserved, set_mode, weights_at

Distance = Literal["predictions", "disagreement", "weights"]
Method = Literal["mds", "pca", "tsne"]
# TensorBoard's projector gets the points as text, and reduces them again itself.
PROJECTOR_COLUMNS = 50


@dataclass(frozen=True, eq=False)
class Points:
    """Networks as points.

    Attributes:
        names: Of each.
        sets: Name of the set that each belongs to.
        distances: Shape ``(n, n)``, float64.
        coordinates: Of the picture, shape ``(n, 2)``.
        scores: Coordinates by classical scaling of the distances in as many dimensions as they
            fill, 50 at most.
        explained: Share of the squared distances' variance in the picture; NaN for t-SNE.
        trustworthiness: Share-like measure of neighbours in the picture that are true ones; see
            :func:`~lla_callbacks.minima.statistics.trustworthiness`.
        rank_correlation: Spearman's, of all distances in truth and in the picture.
        distance: Which distance.
        method: Which method.
        num_samples: Predictions behind each distance; 0 for weights.
        num_params: Parameters.
        mode: Mode of the networks.
        seed: Of t-SNE.
    """

    names: tuple[str, ...]
    sets: tuple[str, ...]
    distances: Tensor
    coordinates: Tensor
    scores: Tensor
    explained: float
    trustworthiness: float
    rank_correlation: float
    distance: Distance
    method: Method
    num_samples: int
    num_params: int
    mode: str
    seed: int


def features_of(
    checkpoints: Sequence[Any],
    batches: Sequence[Any],
    module: nn.Module | None,
    distance: Distance,
    predict: Predict | None,
    mode: str,
) -> Tensor:
    """Return one row a network whose Euclidean distances are those wanted.

    * ``"predictions"``: ``sqrt(p / 2N)`` of all N predictions, so that distances are the root
      of the mean squared Hellinger distance, between 0 and 1.
    * ``"disagreement"``: one-hot labels, ``/ sqrt(2N)``: squared distances are the share of
      samples on which two networks disagree.
    * ``"weights"``: the parameters, over their mean norm.

    Raises:
        ValueError: If a checkpoint does not fit.
    """
    if distance not in get_args(Distance):
        raise ValueError(f"distance is {distance!r}; give one of {', '.join(get_args(Distance))}.")
    rows = []
    for k, checkpoint in enumerate(checkpoints):
        host = checkpoint if isinstance(checkpoint, nn.Module) else module
        if host is None:
            raise ValueError(
                f"checkpoints[{k}] is of type {type(checkpoint).__name__}: give modules, or "
                "state dicts and module=, the network that they are of."
            )
        snapshot = None if host is checkpoint else _snapshot(host, checkpoint, k)
        with weights_at(host, snapshot):
            if distance == "weights":
                parts = [p.detach().double().cpu().reshape(-1) for p in host.parameters()]
                rows.append(torch.cat(parts))
            else:
                rows.append(_predicted(host, batches, predict, mode, distance))
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"checkpoints have different sizes, {sorted({len(row) for row in rows})}: give "
            "networks of one architecture, or distance='predictions' of some with the same classes."
        )
    table = torch.stack(rows)
    if distance == "weights":
        table = table / table.norm(dim=1).mean()
    return table


def distances_of(features: Tensor, distance: Distance) -> Tensor:
    """Return all distances between rows, shape ``(n, n)``, symmetric with a zero diagonal."""
    n = len(features)
    found = features.new_zeros(n, n)
    for i in range(n):
        # One row at a time: by a matrix product near rows would lose their digits.
        found[i] = (features - features[i]).norm(dim=1)
    found = 0.5 * (found + found.T)
    return found.square() if distance == "disagreement" else found


def picture(
    features: Tensor,
    distances: Tensor,
    method: Method,
    *,
    perplexity: float | None,
    seed: int,
) -> tuple[Tensor, float]:
    """Return coordinates of shape ``(n, 2)`` and the share of variance in them.

    Raises:
        ValueError: If the method is not known.
        ImportError: If t-SNE is wanted and scikit-learn is not installed.
    """
    if method == "mds":
        scores, explained = scaled(distances, 2)
        return scores, explained
    if method == "pca":
        centred = features - features.mean(0)
        # The rows' products: there are fewer networks than features.
        return _from_products(centred @ centred.T, 2)
    if method == "tsne":
        return _tsne(distances, perplexity, seed), math.nan
    raise ValueError(f"method is {method!r}; give one of {', '.join(get_args(Method))}.")


def scaled(distances: Tensor, dims: int) -> tuple[Tensor, float]:
    """Return coordinates by classical scaling (Torgerson 1952), and their share of variance.

    The eigenvectors of ``-J D^2 J / 2`` with ``J = 1 - 11'/n``, times the roots of their
    eigenvalues: exact if distances are Euclidean and ``dims`` suffices, and always the same.
    """
    square = distances.square()
    centred = square - square.mean(0, keepdim=True) - square.mean(1, keepdim=True) + square.mean()
    return _from_products(-0.5 * centred, dims)


def points_of(
    names: Sequence[str],
    sets: Sequence[str],
    features: Tensor,
    *,
    distance: Distance,
    method: Method,
    perplexity: float | None,
    num_samples: int,
    num_params: int,
    mode: str,
    seed: int,
) -> Points:
    """Return points with their picture and what it is worth."""
    distances = distances_of(features, distance)
    coordinates, explained = picture(features, distances, method, perplexity=perplexity, seed=seed)
    upper = torch.triu_indices(len(names), len(names), offset=1)
    shown = torch.cdist(coordinates, coordinates, compute_mode="donot_use_mm_for_euclid_dist")
    return Points(
        tuple(names),
        tuple(sets),
        distances,
        coordinates,
        scaled(distances, min(PROJECTOR_COLUMNS, len(names) - 1))[0],
        explained,
        trustworthiness(distances, coordinates),
        spearman(distances[upper[0], upper[1]], shown[upper[0], upper[1]]),
        distance,
        method,
        num_samples,
        num_params,
        mode,
        seed,
    )


def _from_products(products: Tensor, dims: int) -> tuple[Tensor, float]:
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0), vectors.flip(1)
    total = float(values.clamp(min=0).sum())
    kept = values[:dims].clamp(min=0)
    scores = vectors[:, :dims] * kept.sqrt()
    # Of the two signs, the one in which the largest entry is positive.
    largest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    scores = scores * torch.where(largest < 0, -1.0, 1.0)
    if scores.shape[1] < dims:
        scores = torch.nn.functional.pad(scores, (0, dims - scores.shape[1]))
    return scores, float(kept.sum()) / total if total > 0 else math.nan


def _tsne(distances: Tensor, perplexity: float | None, seed: int) -> Tensor:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            "method='tsne' needs scikit-learn: pip install scikit-learn, or take method='mds'."
        ) from error
    n = len(distances)
    chosen = min(30.0, (n - 1) / 3) if perplexity is None else perplexity
    if not 0 < chosen < n:
        raise ValueError(f"perplexity is {perplexity}; give a number above 0 and below {n} points.")
    # Of given distances it starts at random.
    tsne = TSNE(metric="precomputed", init="random", perplexity=chosen, random_state=seed)
    found: Any = tsne.fit_transform(distances.numpy())
    return torch.from_numpy(found).double()


def _snapshot(module: nn.Module, checkpoint: Any, k: int) -> Snapshot:
    """Return the weights and buffers of a state dict or a Lightning checkpoint."""
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"checkpoints[{k}] is of type {type(checkpoint).__name__}; give a module, a state dict "
            "or a Lightning checkpoint."
        )
    parts = []
    for kind, tensors in (
        ("parameter", dict(module.named_parameters())),
        ("buffer", dict(module.named_buffers())),
    ):
        persistent = {n: t for n, t in tensors.items() if kind == "parameter" or n in checkpoint}
        for name, tensor in persistent.items():
            if name not in checkpoint or checkpoint[name].shape != tensor.shape:
                have = (
                    "is missing"
                    if name not in checkpoint
                    else (f"has shape {tuple(checkpoint[name].shape)}, not {tuple(tensor.shape)}")
                )
                raise ValueError(
                    f"checkpoints[{k}] does not fit {type(module).__name__}: {name!r} {have}."
                )
        parts.append({name: checkpoint[name].detach() for name in persistent})
    return Snapshot(*parts)


def _predicted(
    module: nn.Module, batches: Sequence[Any], predict: Predict | None, mode: str, distance: str
) -> Tensor:
    predict = predict or default_predict
    device = next(module.parameters()).device
    rows = []
    for batch in batches:
        with preserved(module, seed=0, check_weights=False), torch.no_grad():
            set_mode(module, mode, dropout=False, training=None)
            rows.append(probabilities(predict(module, fresh(batch, device))[0]))
    shares = torch.cat(rows)
    if distance == "disagreement":
        shares = torch.nn.functional.one_hot(shares.argmax(1), shares.shape[1]).double()
    return (shares / (2 * len(shares))).sqrt().reshape(-1)

"""Results as .npz files, which nothing thins out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lla_callbacks.hessian.eigenvectors import Eigenvectors
from lla_callbacks.hessian.layer_measures import LayerMeasurement
from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.report.checks import check_arrays


def measurement_arrays(measurement: HessianMeasurement) -> dict[str, Any]:
    """Return a measurement as the arrays of its file.

    Scalars and arrays carry the field's name; layers and criteria become parallel arrays
    ``layer_names``, ``layer_traces`` of shape ``(layers, 2)`` with value and standard
    error, ``criteria_names`` and ``criteria`` of shape ``(criteria, 2)`` likewise. The other
    arrays named ``layer_...`` are parallel to ``layer_names`` too; where layers have spectra,
    ``layer_lambda_max``, ``layer_lambda_min`` and ``layer_distance`` of shape ``(layers, 2)``
    come with residuals and errors, and all layers' nodes and weights one after the other, of
    which ``layer_run_sizes`` of shape ``(layers, num_runs)`` tells the ends. What could not be
    said within a bound is named in ``gap_names``, with the reasons in ``gaps``; what the
    loss proved of itself in the arrays named ``check_...``. Where eigenvectors were asked for,
    ``eigenvectors`` of shape ``(n, k)`` holds them as columns, ``eigenvector_values`` of shape
    ``(k, 2)`` eigenvalues and residuals, and ``parameter_names`` and ``parameter_shapes`` say
    which rows are whose.
    """
    m = measurement
    return dict(
        lambda_max=float(m.lambda_max),
        lambda_max_residual=m.lambda_max.residual,
        lambda_max_beyond=m.lambda_max.beyond,
        lambda_min=float(m.lambda_min),
        lambda_min_residual=m.lambda_min.residual,
        lambda_min_beyond=m.lambda_min.beyond,
        trace=m.trace,
        trace_sem=m.trace_sem,
        filter_curvature=m.filter_curvature,
        filter_curvature_sem=m.filter_curvature_sem,
        nodes=m.nodes.numpy(),
        weights=m.weights.numpy(),
        run_sizes=np.array(m.run_sizes),
        eigenvalues=m.eigenvalues.numpy(),
        eigenvalue_residuals=m.eigenvalue_residuals.numpy(),
        **_layer_arrays(m.layers),
        weight_norm=m.weight_norm,
        unlayered=np.array(m.unlayered, dtype=np.str_),
        criteria_names=np.array(list(m.criteria)),
        criteria=np.array([(v, m.criteria_errors[k]) for k, v in m.criteria.items()]),
        loss=m.loss,
        gradient_norm=m.gradient_norm,
        num_matvecs=m.num_matvecs,
        num_block_matvecs=m.num_block_matvecs,
        num_params=m.num_params,
        num_samples=m.num_samples,
        num_steps=m.num_steps,
        num_probes=m.num_probes,
        mode=m.mode,
        precision=m.precision,
        seed=m.seed,
        seconds=m.seconds,
        training_steps=getattr(m, "training_steps", math.nan),
        matrix=m.matrix,
        hessian_trace=m.hessian_trace,
        hessian_trace_sem=m.hessian_trace_sem,
        gauss_newton_share=m.gauss_newton_share,
        gauss_newton_share_error=m.gauss_newton_share_error,
        engine=m.engine,
        engine_reason=m.engine_reason,
        product_error=m.product_error,
        gap_names=np.array(list(m.gaps), dtype=np.str_),
        gaps=np.array(list(m.gaps.values()), dtype=np.str_),
        notes=np.array(m.notes, dtype=np.str_),
        self_check="" if m.self_check is None else m.self_check.footer(),
        **check_arrays(m.self_check),
        **_eigenvector_arrays(m),
    )


def _eigenvector_arrays(m: HessianMeasurement) -> dict[str, Any]:
    found = m.eigenvectors
    if found is None:
        return {"eigenvectors": np.empty((0, 0))}
    return {
        "eigenvectors": found.vectors.numpy(),
        "eigenvector_values": np.array(
            list(zip(found.values.tolist(), found.residuals.tolist(), strict=True))
        ),
        "eigenvector_settled": np.array(found.settled),
        "parameter_names": np.array(found.names, dtype=np.str_),
        "parameter_shapes": np.array([",".join(map(str, s)) for s in found.shapes], dtype=np.str_),
    }


def loaded_eigenvectors(light: Eigenvectors | None, path: Path) -> Eigenvectors | None:
    """Return eigenvectors with the vectors that a file has, once and not twice."""
    if light is None:
        return None
    with np.load(path, allow_pickle=False) as stored:
        shapes = [text.split(",") for text in stored["parameter_shapes"].tolist()]
        return replace(
            light,
            vectors=torch.from_numpy(stored["eigenvectors"]),
            names=tuple(stored["parameter_names"].tolist()),
            shapes=tuple(tuple(int(n) for n in parts if n) for parts in shapes),
        )


def _layer_arrays(layers: Mapping[str, LayerMeasurement]) -> dict[str, Any]:
    found = list(layers.values())
    arrays: dict[str, Any] = {
        "layer_names": np.array(list(layers), dtype=np.str_),
        "layer_traces": np.array([(m.trace, m.trace_sem) for m in found]).reshape(-1, 2),
        "layer_norms": np.array([m.norm for m in found]),
        "layer_num_params": np.array([m.num_params for m in found]),
        "layer_num_block_probes": np.array([m.num_block_probes for m in found]),
    }
    spectra = [m.spectrum for m in found if m.spectrum is not None]
    if spectra:
        arrays |= {
            "layer_lambda_max": np.array([(s.lambda_max, s.lambda_max.residual) for s in spectra]),
            "layer_lambda_min": np.array([(s.lambda_min, s.lambda_min.residual) for s in spectra]),
            "layer_distance": np.array([(s.distance, s.distance_error) for s in spectra]),
            "layer_published_distance": np.array([s.published_distance for s in spectra]),
            "layer_nodes": np.concatenate([s.nodes.numpy() for s in spectra]),
            "layer_weights": np.concatenate([s.weights.numpy() for s in spectra]),
            "layer_run_sizes": np.array([s.run_sizes for s in spectra]),
        }
    return arrays

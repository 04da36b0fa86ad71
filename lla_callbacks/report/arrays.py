"""Results as .npz files, which nothing thins out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lla_callbacks.landscape.measures import HessianMeasurement


def save_measurement(measurement: HessianMeasurement, path: Path) -> Path:
    """Write a measurement to an .npz file (no pickles inside) and return its path.

    Scalars and arrays carry the field's name; layers and criteria become parallel arrays
    ``layer_names``, ``layer_traces`` of shape ``(layers, 2)`` with value and standard
    error, ``criteria_names`` and ``criteria`` of shape ``(criteria, 2)`` likewise.
    """
    m = measurement
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        lambda_max=float(m.lambda_max),
        lambda_max_residual=m.lambda_max.residual,
        lambda_min=float(m.lambda_min),
        lambda_min_residual=m.lambda_min.residual,
        trace=m.trace,
        trace_sem=m.trace_sem,
        nodes=m.nodes.numpy(),
        weights=m.weights.numpy(),
        run_sizes=np.array(m.run_sizes),
        eigenvalues=m.eigenvalues.numpy(),
        eigenvalue_residuals=m.eigenvalue_residuals.numpy(),
        layer_names=np.array(list(m.layer_traces)),
        layer_traces=np.array([tuple(t) for t in m.layer_traces.values()]).reshape(-1, 2),
        criteria_names=np.array(list(m.criteria)),
        criteria=np.array([(v, m.criteria_errors[k]) for k, v in m.criteria.items()]),
        loss=m.loss,
        gradient_norm=m.gradient_norm,
        num_matvecs=m.num_matvecs,
        num_params=m.num_params,
        num_samples=m.num_samples,
        num_steps=m.num_steps,
        num_probes=m.num_probes,
        mode=m.mode,
        precision=m.precision,
        seed=m.seed,
        seconds=m.seconds,
    )
    return path

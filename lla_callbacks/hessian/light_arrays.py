"""Many light measurements in one .npz file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lla_callbacks.hessian.tracking import HessianTracking
from lla_callbacks.report.files import write_arrays

_NUMBERS = ("trace", "trace_sem", "weight_norm", "loss", "gradient_norm", "num_matvecs",
            "num_steps", "num_probes", "num_params", "num_samples", "seconds")  # fmt: skip


class LightSeries:
    """Light measurements one after the other.

    Args:
        tracked: Pairs of step and measurement, at least one.
    """

    def __init__(self, tracked: Sequence[tuple[int, HessianTracking]]) -> None:
        self.tracked = list(tracked)

    def save(self, path: Path) -> Path:
        """Write them to an .npz file (no pickles inside) and return its path.

        ``steps``, ``lambda_max``, ``lambda_max_residual``, ``trace`` and the other numbers have
        one entry a measurement; ``layer_traces``, of shape ``(measurements, layers, 2)`` with
        value and standard error, belongs to ``layer_names``. ``gaps`` says in words what could
        not be said within a bound.
        """
        found = [t for _, t in self.tracked]
        names = list(dict.fromkeys(name for t in found for name in t.layer_traces))
        unknown = (math.nan, math.nan)
        traces = [[tuple(t.layer_traces.get(name, unknown)) for name in names] for t in found]
        return write_arrays(
            path,
            {
                "steps": np.array([step for step, _ in self.tracked]),
                "lambda_max": np.array([float(t.lambda_max) for t in found]),
                "lambda_max_residual": np.array([t.lambda_max.residual for t in found]),
                "lambda_max_beyond": np.array([t.lambda_max.beyond for t in found]),
                **{name: np.array([getattr(t, name) for t in found]) for name in _NUMBERS},
                "layer_names": np.array(names, dtype=np.str_),
                "layer_traces": np.array(traces, dtype=float).reshape(len(found), len(names), 2),
                "mode": np.array([t.mode for t in found], dtype=np.str_),
                "engine": np.array([t.engine for t in found], dtype=np.str_),
                "gaps": np.array(
                    ["; ".join(f"{k}: {v}" for k, v in t.gaps.items()) for t in found],
                    dtype=np.str_,
                ),
            },
        )

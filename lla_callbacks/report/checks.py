"""What an objective proved of itself, as arrays for files."""

from __future__ import annotations

from typing import Any

import numpy as np

from lla_callbacks.objective.self_check import SelfCheck


def check_arrays(found: SelfCheck | None) -> dict[str, Any]:
    """Return an outcome as arrays for a file: ``check_names`` and what is parallel to it."""
    checks = () if found is None else found.checks
    return {
        "check_names": np.array([c.name for c in checks], dtype=np.str_),
        "check_outcomes": np.array([c.outcome for c in checks], dtype=np.str_),
        "check_errors": np.array([(c.error, c.bound) for c in checks]).reshape(-1, 2),
        "check_words": np.array([c.words for c in checks], dtype=np.str_),
        "check_num_gradients": 0.0 if found is None else found.num_gradients,
        "check_hooks": "" if found is None else found.hooks,
    }

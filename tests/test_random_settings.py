"""Random combinations of settings, right and wrong: refused by name, or there are numbers.

What one argument is refused for is in the tables (``test_settings.py``); here several are given at
once, drawn from a seed, so that what they do together is met too. ``SETTINGS`` says how many.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from lla_callbacks import MeasurementError
from lla_callbacks.objective.checks import shown
from tests import test_more_settings as more
from tests import test_settings as first

COUNT = int(os.environ.get("SETTINGS", "300"))
# Right values, many of which are not allowed together.
RIGHT: dict[str, list[Any]] = {
    "mode": ["batch", "eval", "recalibrate"],
    "dropout": [True, False],
    "engine": ["auto", "exact", "difference"],
    "precision": ["float32", "training"],
    "evaluation": ["auto", "loop", "vmap"],
    "jacobian": ["gap", "measure"],
    "normalization": ["filter", "layer", "none"],
    "vectors": ["zero", "tensor", "entry"],
    "num_probes": [2, 3],
    "num_steps": [2, 3],
    "num_runs": [1, 2],
    "num_layer_steps": [0, 2],
    "num_layer_probes": [0, 2],
    "microbatch_size": [None, 1, 2, 5],
    "max_memory": [None, 1, 10**9],
    "num_samples": [None, 1, 2, 3],
    "chunk_size": [1, 3],
    "check": [True, False],
    "eig_rtol": [None, 0.5],
    "trace_rtol": [None, 0.5],
    "seed": [0, 7],
    "batch_size": [None, 1, 3],
    "layers": [None, "blocks"],
    "kind": ["bezier", "chain"],
    "bends": [1, 2],
    "points": [3, 5],
    "distance": ["predictions", "disagreement", "weights"],
    "method": ["mds", "pca"],
    "rise": [0.5, 1],
    "interpolate": [True, False],
    "refine": [True, False],
    "directions": ["random", "hessian", "gradient", "top1", ("random", "gradient")],
    "matrix": ["hessian", "ggn"],
    "straight": [True, False],
    "time_budget": [None, 0.01],
    "reduction": ["mean", "sum", "none"],
    "cycle_unit": ["steps", "epochs"],
    "labels": ["reversed", "true"],
    "estimator": ["perturbation", "difference", "gauss_newton", "exact", "noise"],
    "strength": [0.0, 0.1, "auto"],
    "target_ratio": [None, 0.1],
    "max_ratio": [None, 1.0],
    "relative": [True, False],
    "every_n_epochs": [None, 1],
    "every_n_train_steps": [None, 2],
    "max_overhead": [None, 0.05],
    "plane_points": [None, 3],
    "line_points": [None, 3],
    "planes": [[], ["random"]],
    "lines": [[], ["random"], ["top1"]],
    "num_rays": [0, 2],
    "convexity_points": [0, 3],
}


def drawn(number: int) -> tuple[str, dict[str, Any], bool]:
    """Return whom to call with what, and whether a value of it is one of the wrong ones."""
    source = random.Random(f"settings {number}")
    owner = source.choice([*first.OWNERS, *more.OWNERS])
    arguments = first.arguments(owner) if owner in first.OWNERS else more.arguments(owner)
    usual = [a for a in arguments if a in RIGHT]
    given = {a: source.choice(RIGHT[a]) for a in source.sample(usual, min(len(usual), 5))}
    wrong = source.random() < 0.3
    if wrong:
        label = source.choice([k for k in first.WRONG if k not in ("huge", "1e300")])
        given[source.choice(arguments)] = first.WRONG[label]
    return owner, given, wrong


def is_empty(found: Any) -> bool:
    """Return whether a result holds gaps alone."""
    loss = getattr(found, "loss", None)
    if isinstance(loss, float):
        return not math.isfinite(loss)
    if hasattr(loss, "isfinite"):
        return not bool(loss.isfinite().any())
    return False


def trouble(number: int) -> str:
    """Return what is wrong with how a combination is taken; empty if nothing is."""
    owner, given, _ = drawn(number)
    where = f"{number}: {owner}({', '.join(f'{k}={shown(v)}' for k, v in given.items())})"
    call = first.call if owner in first.OWNERS else more.call
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call(owner, **given)
    except MeasurementError:
        return ""
    except (ValueError, TypeError) as error:
        # Raised by this package, in words, and not by torch in the middle of it.
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        ours = last is not None and "lla_callbacks" in last.tb_frame.f_code.co_filename
        return "" if ours else f"{where} ends in {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - which is what is tested
        return f"{where} ends in {type(error).__name__}: {error}"
    return f"{where} gives gaps alone" if is_empty(found) else ""


@pytest.mark.parametrize("part", range(3))
def test_random_settings_are_refused_in_words_or_give_numbers(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1" / "2" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "1" / "2")
    found = [text for number in range(part, COUNT, 3) if (text := trouble(number))]
    assert not found, "\n".join(found)

"""How often self-checks are wrong, and what they cost: python -m docs.benchmarks.self_check.

On every module of the suite, where nothing is wrong, and on losses whose gradient is no derivative,
whose second derivative is lost, or which do not repeat; in float64 and float32.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from contextlib import suppress
from typing import Any

import torch

from lla_callbacks.linalg.errors import MeasurementError
from lla_callbacks.objective.objective import Objective
from tests.kinds import Calling, DetachedCube, cross_entropy, vectors
from tests.objective.test_self_check import DOUBLE_ONLY, JACOBIANS, LIST, as_float, proved


def asked(objective: Objective) -> tuple[Any, float]:
    began = time.perf_counter()
    with suppress(MeasurementError):
        proved(objective)
    return objective.findings.proof.self_check, time.perf_counter() - began


def main() -> None:
    warnings.simplefilter("ignore")
    for dtype in (torch.float64, torch.float32):
        outcomes: Counter[str] = Counter()
        costs = []
        for name, build, mode in LIST:
            module, batches, loss = build()
            if dtype == torch.float32:
                if name in DOUBLE_ONLY:
                    continue
                module, batches = module.float(), as_float(batches)
            found, _ = asked(Objective(module, batches, loss, mode=mode))
            outcomes.update(check.outcome for check in found.checks)
            costs.append(found.num_gradients)
        print(f"{dtype}: {len(costs)} modules, checks {dict(outcomes)}")
        print(
            f"  gradients {min(costs):.1f} to {max(costs):.1f}, mean {sum(costs) / len(costs):.1f}"
        )
        for name, (make, batch, loss) in JACOBIANS.items():
            seen = []
            for seed in range(10):
                torch.manual_seed(seed)
                module = make().to(dtype)
                x, y = batch()
                found, _ = asked(Objective(module, [(x.to(dtype), y)], loss, seed=seed))
                seen.append(found.outcome("slope"))
            print(f"  {name}: slope {dict(Counter(seen))}")
        seen = []
        for seed in range(10):
            torch.manual_seed(seed)
            module = Calling(DetachedCube.apply).to(dtype)
            x, y = vectors()
            objective = Objective(module, [(x.to(dtype), y)], cross_entropy, seed=seed)
            asked(objective)
            seen.append("found" if objective.findings.proof.lost else "missed")
        print(f"  lost second derivative: {dict(Counter(seen))}")


if __name__ == "__main__":
    main()

"""Run by test_spawned.py: trains in spawned processes, and stores what their parent has then.

python -m tests.callbacks.spawn_worker FOLDER STRATEGY...
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch

from lla_callbacks import (
    FastGeometricEnsembling,
    HessianMonitor,
    LossLandscapeMonitor,
    ModeConnection,
    PoisonedLoss,
)
from tests.callbacks.modules import Plain, loader, quiet_trainer

QUIET = {"save_arrays": False, "figures": False}
HESSIAN = {"num_steps": 3, "num_probes": 2, "num_samples": 4, **QUIET}


def hessian():
    return HessianMonitor(
        every_n_train_steps=2, track_every_n_train_steps=1, track_num_probes=2, **HESSIAN
    )


def landscape():
    lines = {"planes": [], "lines": ["random"], "line_points": 3}
    return LossLandscapeMonitor(every_n_train_steps=1, num_samples=4, **lines, **QUIET)


def found_by(monitor):
    """Return what a monitor holds, as plain numbers."""
    return {
        "steps": [step for step, _ in monitor.history],
        "loss": [float(report.loss) for _, report in monitor.history],
        "last": float(monitor.report.loss),
        "stored": len(monitor.state_dict().get("history", [])),
        "seconds": monitor.account.training,
    }


def train(folder, strategy):
    torch.manual_seed(3)
    module, other = Plain(), Plain()
    trained = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_epochs": 2}
    monitors = [hessian(), landscape()]
    more = [
        PoisonedLoss(0.1, loader()),
        FastGeometricEnsembling(cycle=2, lr_max=0.1, lr_min=0.01, start=0, cycle_unit="steps"),
    ]
    trainer = quiet_trainer(folder, [*monitors, *more], **trained)
    trainer.fit(module, loader())
    found = {type(m).__name__: found_by(m) for m in monitors}
    found["tracked"] = [step for step, _ in monitors[0].tracked]
    found["poisoned"] = more[0].num_steps
    found["members"] = len(more[1].members)
    found["files"] = [p.name for p in Path(tempfile.gettempdir()).glob("lla_callbacks_*")]
    if strategy == "ddp_spawn":  # it takes its processes seconds to start
        return found
    curve = ModeConnection(module.state_dict(), other.state_dict(), live=False)
    quiet_trainer(folder, [curve], **trained).fit(Plain(), loader())
    found["bends"] = len(curve.curve.points) - 2
    return found


def main():
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    for name in sys.argv[2:]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = train(target, name)
        result["warnings"] = [str(w.message) for w in caught if "come back" in str(w.message)]
        torch.save(result, target / f"{name}.pt")


if __name__ == "__main__":
    main()

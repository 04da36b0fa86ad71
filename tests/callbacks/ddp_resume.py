"""Run by test_resume_ddp.py: runs in two processes, whole and in two parts.

python -m tests.callbacks.ddp_resume FOLDER CASE...
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from own_quantity import GradientNoise

from lla_callbacks import LossLandscapeMonitor, Monitor

from .ddp_slices import Net
from .modules import quiet_trainer

SETTINGS = {
    "planes": ["trajectory"], "lines": ["random"], "plane_points": 3, "line_points": 5,
    "evaluation": "loop", "num_samples": 16, "figures": False, "every_n_train_steps": 2,
}  # fmt: skip


def part(folder, name, epochs, checkpoint=None, devices=2, watcher=None):
    """Train up to an epoch, save the checkpoint and what the monitor found."""
    from pytorch_lightning.strategies import DDPStrategy

    torch.manual_seed(3)
    watcher = watcher or LossLandscapeMonitor(**SETTINGS)
    own = Monitor([GradientNoise()], every_n_train_steps=2, num_samples=16)
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    trainer = quiet_trainer(
        folder, [watcher, own], devices=devices, strategy=strategy, max_epochs=epochs,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Net(), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    found = {
        "steps": [step for step, _ in watcher.history],
        "own": [[s, r.ratio, *r.by_parameter.values()] for s, r in own.histories["gradient"]],
        "losses": [report.loss for _, report in watcher.history],
        "samples": [r.lines["random"].facts.num_samples for _, r in watcher.history],
    }
    torch.save(found, folder / f"{name}_{trainer.global_rank}.pt")
    return watcher


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        part(folder, case, *{"first": (1,), "second": (2, folder / "first.ckpt")}.get(case, (2,)))


if __name__ == "__main__":
    main()

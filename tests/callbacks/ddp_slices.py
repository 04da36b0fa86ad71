"""Run by test_processes.py: trains in two processes and writes what each of them found.

python -m tests.callbacks.ddp_slices FOLDER CASE...
"""

import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lla_callbacks import HessianMonitor, LossLandscapeMonitor
from lla_callbacks.slices import eigenvectors

EVERYTHING = {
    "planes": ["random", "hessian", "trajectory"],
    "lines": ["random", "bottom1", "update"],
    "plane_points": 5,
    "line_points": 5,
    "convexity_points": 3,
    "num_rays": 5,
    "evaluation": "loop",
    "num_samples": 16,
}


class Net(pl.LightningModule):
    def __init__(self, sync=False):
        super().__init__()
        norm = nn.BatchNorm1d(6)
        net = nn.Sequential(nn.Linear(3, 6), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2))
        self.net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if sync else net

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def train_dataloader(self):
        source = torch.Generator().manual_seed(7)
        x = torch.randn(32, 3, generator=source)
        data = TensorDataset(x, (x.sum(1) > 0).long())
        # In a known order: Lightning's own sampler shuffles.
        sampler = DistributedSampler(data, shuffle=False) if self.trainer.world_size > 1 else None
        return DataLoader(data, batch_size=4, sampler=sampler)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


class FailsOnSecond:
    """A loss that raises in the second process only, in the middle of a slice."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, batch):
        self.calls += 1
        if module.global_rank == 1 and self.calls == 20:
            raise RuntimeError("the second process is unwell")
        return cross_entropy(module.net(batch[0]), batch[1])


# Deeper than there are parameters: every eigenvector is found.
BESIDE = {"every_n_train_steps": 8, "num_samples": 16, "num_steps": 60, "num_probes": 2}
# Lanczos runs that slices made for themselves.
RUNS: list[int] = []
_lanczos = eigenvectors.lanczos


def _noted(*arguments, **settings):
    RUNS.append(1)
    return _lanczos(*arguments, **settings)


def train(folder, watcher, name):
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=2,
        logger=TensorBoardLogger(folder, name=name) if watcher else False,
        callbacks=callbacks_of(watcher, name),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    module = Net()
    trainer.fit(module)
    return trainer, module


def callbacks_of(watcher, case):
    if watcher is None:
        return []
    return [watcher, HessianMonitor(**BESIDE)] if case == "beside" else [watcher]


def one(folder, case):
    RUNS.clear()
    # One case draws.
    settings = dict(EVERYTHING, every_n_train_steps=8, figures=case == "slices")
    if case == "failing":
        # The failure is to meet an evaluation, not the check that comes first.
        settings |= {"loss": FailsOnSecond(), "check": False}
    if case == "refined":
        settings |= {"planes": ["random"], "lines": [], "num_rays": 0, "convexity_points": 0}
        settings |= {"plane_points": 7, "refine": True}
    if case == "budget":
        settings |= {"every_n_train_steps": 1, "max_overhead": 0.5}
    watcher = None if case == "without" else LossLandscapeMonitor(**settings)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer, module = train(folder, watcher, case)
    found = {
        "weights": module.state_dict(),
        "steps": [] if watcher is None else [step for step, _ in watcher.history],
        "warnings": [str(w.message) for w in seen if "LossLandscapeMonitor" in str(w.message)],
        "random": torch.get_rng_state(),
        "runs": len(RUNS),
    }
    for step, report in [] if watcher is None else watcher.history:
        for name, part in report.slices.items():
            key = f"{step}/{name}"
            if name == "convexity":
                found[key] = part.ratio
            elif name == "basin":
                found[key] = part.radii
            else:
                found[key] = part.loss
                if getattr(part, "fine", None) is not None:
                    found[f"{key}/fine"] = part.fine.loss
        found[f"{step}/loss"] = report.loss
        for name, line in report.lines.items():
            values = [d.eigenvalue or 0.0 for d in line.directions]
            found[f"{step}/eigenvalue_{name}"] = torch.tensor(values)
    torch.save(found, folder / f"{case}_{trainer.global_rank}.pt")


def main():
    folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    eigenvectors.lanczos = _noted
    for case in cases:
        one(Path(folder), case)


if __name__ == "__main__":
    main()

"""Run by test_regularizer_ddp.py: trains in two processes, regularized or poisoned.

python -m tests.callbacks.ddp_worker FOLDER CASE...
"""

import logging
import os
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy

from lla_callbacks import HessianTraceRegularizer, ModeConnection, PoisonedLoss
from tests.callbacks.by_hand import Double, half_loader
from tests.callbacks.poison_by_hand import poison_batches

NOISE = {"estimator": "noise"}
# Name: strategy, Trainer, module and regularizer settings.
RUNS = {
    "plain": ({}, {}, {}, {}),
    "static graph": ({"static_graph": True}, {}, {}, {}),
    # (A static graph with accumulation fails in torch itself, without any callback.)
    "static graph, interval": ({"static_graph": True}, {}, {}, {"every_n_train_steps": 2}),
    "static graph, exact": (
        {"static_graph": True}, {}, {"smooth": True}, {"estimator": "exact"}
    ),
    "unused": ({"find_unused_parameters": True}, {}, {"unused": True}, {}),
    "bucket view": ({"gradient_as_bucket_view": True}, {}, {}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}, {}, {}),
    "scaler": ({}, {"scaler": True, "accumulate_grad_batches": 2}, {}, {}),
    "limit": ({}, {}, {}, {"strength": 1e-2, "max_ratio": 0.05}),
    "difference": ({}, {}, {"smooth": True}, {"estimator": "difference"}),
    "manual": ({}, {}, {"smooth": True, "manual": True}, {}),
    "noise": ({"find_unused_parameters": True}, {}, {"unused": True}, NOISE),
    "noise, static graph": (
        {"static_graph": True, "gradient_as_bucket_view": True}, {}, {"smooth": True}, NOISE
    ),
    "noise, all": (
        {}, {"scaler": True, "accumulate_grad_batches": 2, "gradient_clip_val": 0.2}, {},
        {**NOISE, "relative": True},
    ),
    "noise, manual": ({}, {}, {"smooth": True, "manual": True}, NOISE),
}  # fmt: skip

# The same of runs with poison. Without batch norm, whose statistics DDP takes from one process.
POISONED = {
    "poison": ({}, {}, {"smooth": True}),
    "poison, static graph": ({"static_graph": True}, {}, {"smooth": True}),
    "poison, unused": ({"find_unused_parameters": True}, {}, {"smooth": True, "unused": True}),
    "poison, all": (
        {"gradient_as_bucket_view": True},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2, "scaler": True},
        {"smooth": True},
    ),
}


def loss(module, batch):
    return module.loss(batch)


class Manual(Double):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def train(strategy, trainer, module, settings, folder, rank, callback=None):
    torch.manual_seed(3)
    trainer = dict(trainer)
    if trainer.pop("scaler", False):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    made = Manual if module.pop("manual", False) else Double
    if made is Manual and settings != NOISE:
        settings = {**settings, "loss": loss}
    network = made(**module)
    pl.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        # It would shuffle, whatever the loader does.
        use_distributed_sampler=False,
        strategy=DDPStrategy(process_group_backend="gloo", **strategy), default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, **trainer,
        callbacks=[callback or HessianTraceRegularizer(**{"strength": 1e-3, **settings})],
    ).fit(network, half_loader(rank))  # fmt: skip
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def connect(folder, rank):
    """Train a curve of two bends; return their weights, one after the other."""
    ends = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        ends.append(Double(smooth=True))
    torch.manual_seed(3)
    connection = ModeConnection(*ends, bends=2)
    pl.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        use_distributed_sampler=False, strategy=DDPStrategy(process_group_backend="gloo"),
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=2, gradient_clip_val=0.1, callbacks=[connection],
    ).fit(Double(smooth=True), half_loader(rank))  # fmt: skip
    return connection.curve.points[1:-1]


def main() -> None:
    folder, *cases = sys.argv[1:]
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name in cases:
        if name == "connection":
            found = connect(folder, rank)
        elif name in POISONED:
            strategy, trainer, module = POISONED[name]
            poison = PoisonedLoss(0.4, poison_batches())
            found = train(strategy, trainer, dict(module), {}, folder, rank, poison)
        else:
            strategy, trainer, module, settings = RUNS[name]
            found = train(strategy, trainer, dict(module), settings, folder, rank)
        torch.save(found, Path(folder) / f"{name}_{rank}.pt")


if __name__ == "__main__":
    main()

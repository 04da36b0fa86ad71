"""Run by test_injected.py: two processes, of which one fails at one place after the other.

python -m tests.callbacks.ddp_injected FOLDER CASE..., of which ``injected`` is the last
"""

import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor, LossLandscapeMonitor
from lla_callbacks.callbacks import firing, held_batches, subject
from lla_callbacks.slices import choice
from lla_callbacks.slices.quantity import Slices

CHEAP = {"every_n_train_steps": 1, "num_samples": 16, "save_arrays": False, "figures": False}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        )

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        source = torch.Generator().manual_seed(7)
        x = torch.randn(136, 3, generator=source)
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Fails:
    """Calls a function, but in one process and while a place is being tried raises."""

    def __init__(self, places, name, function, rank):
        self.places, self.name, self.function, self.rank = places, name, function, rank

    def __get__(self, instance, owner):
        # As a method of what calls it.
        return self if instance is None else partial(self, instance)

    def __call__(self, *arguments, **named):
        if self.places.now == self.name and self.places.rank == self.rank:
            raise RuntimeError(f"no luck in {self.name}")
        return self.function(*arguments, **named)


class Places(pl.Callback):
    """Moves on to the next place at each step."""

    def __init__(self):
        self.now, self.rank = "", 0
        # Place: where it is called from, its name there, and the process that fails.
        self.all = {
            "the limit": (subject, "stability_limit", 1),
            "the objective": (subject, "trainer_loss", 1),
            "the path": (Slices, "_weights", 1),
            "random directions": (choice, "random_directions", 1),
            "moments": (choice, "adam_directions", 1),
            "components": (choice, "principal_components", 0),
            "copies": (choice, "replace", 1),
            "eigenvectors": (choice, "curved_directions", 0),
            "coordinates": (choice, "centred", 1),
        }

    def inject(self):
        for name, (where, what, rank) in self.all.items():
            setattr(where, what, Fails(self, name, getattr(where, what), rank))
        # At the start: a batch and the weights that it meets, in the second process.
        subject.take_snapshot = Fails(self, "the start", subject.take_snapshot, 1)
        held_batches.hold = Fails(self, "a batch", held_batches.hold, 1)
        shown = firing.progress

        @contextmanager
        def bar(trainer, text, total):
            if self.now == "the bar" and self.rank == 0:
                raise RuntimeError("no luck in the bar")
            with shown(trainer, text, total) as advance:
                yield advance

        firing.progress = bar

    def on_train_start(self, trainer, module):
        self.rank = trainer.global_rank
        self.order = [*self.all, "the bar"]
        self.now = "the start"

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            self.now = "a batch"
        elif batch_idx == 2:
            self.now = ""
        number = batch_idx - 4
        if number >= 0:
            self.now = self.order[number] if number < len(self.order) else ""


def train(folder, case):
    places = Places()
    spectrum = HessianMonitor(num_steps=2, num_probes=2, **CHEAP)
    slices = LossLandscapeMonitor(
        planes=["random", "trajectory"], lines=["update", "adam_m", "top1"], plane_points=3,
        line_points=3, evaluation="loop", **CHEAP,
    )  # fmt: skip
    if case != "without":
        places.inject()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"),
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
            callbacks=[] if case == "without" else [places, spectrum, slices],
        )  # fmt: skip
        module = Net()
        trainer.fit(module)
    found = {
        "weights": module.state_dict(),
        "missing": {step: sorted(report.missing) for step, report in slices.history},
        "stability": {step: r.criteria["stability"] for step, r in spectrum.history},
        "order": getattr(places, "order", []),
        "warnings": [str(w.message) for w in seen if "leaves a gap" in str(w.message)],
    }
    torch.save(found, folder / f"{case}_{trainer.global_rank}.pt")


def main():
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        train(Path(sys.argv[1]), case)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""Does a run of a thousand measurements leave anything behind?

Run: ``python docs/benchmarks/soak.py [--firings N]``. Trains a tiny network with HessianMonitor
measuring after every step without figures, and after every 20th step both monitors with figures
and meshes, into two loggers. Prints what the process holds, and repeats the last measurement
in a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor, LossLandscapeMonitor

HESSIAN = {"num_steps": 6, "num_probes": 4, "num_samples": 32, "max_overhead": None}
SLICES = {"plane_points": 5, "line_points": 5, "num_samples": 32, "evaluation": "loop"}


class Small(pl.LightningModule):
    """A network with buffers and dropout, on two batches of points."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def batches() -> DataLoader:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=source)
    return DataLoader(TensorDataset(x, x.argmax(1).clamp(max=2)), batch_size=32)


def resident() -> int:
    """Return the process's resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held(module: nn.Module) -> dict[str, int]:
    """Return the number of everything that could be left behind."""
    gc.collect()
    objects = gc.get_objects()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects),
        "figures": sum(issubclass(type(o), Figure) for o in objects),
        "files": len(os.listdir("/proc/self/fd")),
        "hooks": sum(len(getattr(m, name)) for m in module.modules() for name in hooks),
        "filters": len(warnings.filters),
        "handlers": sum(
            len(logging.getLogger(n).handlers) for n in logging.root.manager.loggerDict
        ),
    }


class Watch(pl.Callback):
    """Notes what the process holds, after monitors have measured."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[tuple[int, float, int, dict[str, int]]] = []
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: nn.Module, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            seconds = time.perf_counter() - self.began
            self.rows.append((trainer.global_step, seconds, resident(), held(pl_module)))


def run(firings: int, every: int, folder: Path) -> tuple[Watch, HessianMonitor, nn.Module]:
    pl.seed_everything(0, verbose=False)
    hessian = HessianMonitor(every_n_train_steps=1, figures=False, **HESSIAN)
    drawn = HessianMonitor(every_n_train_steps=20, name="drawn", num_layer_steps=3, **HESSIAN)
    slices = LossLandscapeMonitor(
        every_n_train_steps=20, planes=["random", "trajectory"], lines=["top1"], mesh=True, **SLICES
    )
    watch = Watch(every)
    trainer = pl.Trainer(
        max_steps=firings,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[hessian, drawn, slices, watch],
        logger=[pl.loggers.TensorBoardLogger(folder), pl.loggers.CSVLogger(folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=50,
    )
    module = Small()
    trainer.fit(module, batches())
    trainer.save_checkpoint(folder / "last.ckpt")
    return watch, hessian, module


def again(folder: Path) -> None:
    """Measure the last weights anew and print the numbers to the bit."""
    module = Small()
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "'hessian'" in k]
    monitor = HessianMonitor(dataloader=state["held"]["batches"], **HESSIAN)
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=monitor, logger=False, max_epochs=1,
        limit_train_batches=1, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, batches())
    print(numbers(monitor.history[0][1]))


def numbers(report: object) -> str:
    return " ".join(float(getattr(report, k)).hex() for k in ("lambda_max", "trace", "loss"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--firings", type=int, default=1000)
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.again:
        again(arguments.again)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        watch, hessian, _ = run(arguments.firings, max(20, arguments.firings // 10), folder)
        print("step  seconds  MiB  " + "  ".join(watch.rows[0][3]))
        for step, seconds, memory, counts in watch.rows:
            values = "  ".join(str(value) for value in counts.values())
            print(f"{step:4}  {seconds:7.1f}  {memory / 2**20:6.1f}  {values}")
        print(f"checkpoint {(folder / 'last.ckpt').stat().st_size / 2**20:.1f} MiB")
        last = numbers(hessian.history[-1][1])
        done = subprocess.run(
            [sys.executable, __file__, "--again", name], capture_output=True, text=True, check=True
        )
        print(
            "a fresh process finds",
            "the same" if done.stdout.split("\n")[-2] == last else "other",
            "numbers",
        )


if __name__ == "__main__":
    main()

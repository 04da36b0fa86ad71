"""How much longer does training take with HessianMonitor()?

Run: ``python docs/benchmarks/overhead.py [--data FOLDER] [--epochs N]``. Trains the demo's
network with and without the default monitor in turn, and compares whole fits.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from demo import SmallConvNet, pl
from image_data import load_images
from torch.utils.data import DataLoader

from lla_callbacks import HessianMonitor


def fit(train: DataLoader, channels: int, epochs: int, monitor: HessianMonitor | None) -> float:
    """Return the seconds of one fit."""
    pl.seed_everything(0, verbose=False)
    module = SmallConvNet(channels, lr=0.02)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[monitor] if monitor else [],
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=pl.loggers.TensorBoardLogger(folder),
        )
        began = time.perf_counter()
        trainer.fit(module, train)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    train, _ = load_images(arguments.data)
    channels = train.tensors[0].shape[1]
    ratios = []
    fit(DataLoader(train, batch_size=64, shuffle=True), channels, 2, None)  # warm-up
    for _ in range(arguments.pairs):
        monitor = HessianMonitor()
        plain = fit(
            DataLoader(train, batch_size=64, shuffle=True), channels, arguments.epochs, None
        )
        loader = DataLoader(train, batch_size=64, shuffle=True)
        watched = fit(loader, channels, arguments.epochs, monitor)
        ratios.append(watched / plain)
        cost = statistics.median(report.seconds for _, report in monitor.history)
        print(
            f"plain {plain:.1f} s, watched {watched:.1f} s, ratio {watched / plain:.3f}; "
            f"{len(monitor.history)} measurements of {cost:.2f} s, own share "
            f"{monitor.budget.overhead:.1%}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()

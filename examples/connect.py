"""Connect two networks by a curve, align them, and gather an ensemble, on scikit-learn's digits.

OMP_NUM_THREADS=1 python examples/connect.py --out connected
tensorboard --logdir connected --samples_per_plugin images=1000
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from image_data import load_images
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import (
    FastGeometricEnsembling,
    ModeConnection,
    aligned,
    barrier,
    loss_curve,
    loss_plane,
)

Batch = tuple[Tensor, Tensor]


class Classifier(pl.LightningModule):
    """An MLP of two hidden layers, SGD with momentum."""

    def __init__(self, lr: float = 0.1, width: int = 64, noise: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        self.noise = noise
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x + self.noise * torch.randn_like(x)), y)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        scores = self(batch[0])
        self.log("test_loss", F.cross_entropy(scores, batch[1]))
        self.log("test_error", (scores.argmax(1) != batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def error(module: nn.Module, batch: Batch) -> Tensor:
    return (module(batch[0]).argmax(1) != batch[1]).double().mean()


def fit(
    module: Classifier, data: TensorDataset, epochs: int, seed: int, callback: pl.Callback | None,
    logger: TensorBoardLogger | bool = False,
) -> Classifier:  # fmt: skip
    """Train from a seed, in whose order the data come."""
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10,
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))
    return module


def network(seed: int, data: TensorDataset, epochs: int, noise: float = 0.0) -> Classifier:
    """Return a trained network."""
    torch.manual_seed(seed)
    return fit(Classifier(noise=noise), data, epochs, seed, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("connected"), help="folder for results")
    parser.add_argument("--epochs", type=int, default=30, help="of each network and the curve")
    arguments = parser.parse_args()
    out, epochs = arguments.out, arguments.epochs
    out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(1)
    began = time.perf_counter()
    train, test = load_images(None)
    batches, held = [train.tensors], [test.tensors]

    print("Two networks from two seeds ...")
    a, b = (network(seed, train, epochs) for seed in (0, 1))
    turned = aligned(a, a, b, train.tensors)
    print(f"   {turned}")
    for name, align in (("as trained", False), ("aligned", True)):
        found = barrier(a, batches, [a, b], loss=loss, metrics={"error": error}, align=align)
        print(f"   barrier of the straight line, {name}: {float(found.matrix()[0, 1]):.3g}, of the "
              f"error {float(found.matrix(metric='error')[0, 1]):.1%}")  # fmt: skip

    print("A curve between them, by the module's own training step ...")
    connection = ModeConnection(a, b, metrics={"error": error}, num_samples=1437)
    module = Classifier(lr=0.03)
    fit(module, train, epochs, 2, connection, TensorBoardLogger(out, name="curve"))
    curve = connection.curve
    assert curve is not None
    curve.save(out / "curve.pt")
    for name, samples in (("train", batches), ("test", held)):
        found = loss_curve(module, samples, curve, loss=loss, metrics={"error": error})
        found.figure(title=f"Between two networks, {name} samples").savefig(out / f"{name}.png")
        print(f"   {name}: {found}")
    plane = loss_plane(module, batches, directions=curve, loss=loss)
    plane.figure(title="The plane of the curve").savefig(out / "plane.png")

    print("An ensemble on the way, with noise on the inputs ...")
    fge = FastGeometricEnsembling(cycle=2, lr_max=0.1, lr_min=0.001, start=0.5)
    torch.manual_seed(3)
    last = fit(Classifier(noise=0.3), train, epochs, 3, fge, TensorBoardLogger(out, name="fge"))
    tester = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False)  # fmt: skip
    loader = DataLoader(test, batch_size=len(test))
    single = network(3, train, epochs, noise=0.3)
    for name, tested in (
        ("one network of as many epochs", single),
        ("the last weights", last),
        (f"ensemble of {len(fge.members)}", fge.ensemble(last)),
    ):
        (values,) = tester.test(tested, loader, verbose=False)
        print(f"   {name}: test error {values['test_error']:.1%}, loss {values['test_loss']:.3f}")
    print(f"{time.perf_counter() - began:.0f} s; pictures and logs are in {out}/")


if __name__ == "__main__":
    main()

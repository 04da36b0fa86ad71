"""Watch the loss landscape of a small convolutional network while it learns real images.

    python examples/demo.py                                  # scikit-learn's digits
    python examples/demo.py --data FOLDER --max-epochs 3     # MNIST, Fashion-MNIST, CIFAR-10
    python examples/demo.py --trace-regularization 1e-3      # towards flat minima

Then open TensorBoard by the command in the last line.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
from image_data import load_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import accuracy

import lla_callbacks
from lla_callbacks.hessian.words import describe_change

try:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import TensorBoardLogger
except ModuleNotFoundError:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger


class SmallConvNet(pl.LightningModule):
    """Three convolutions with batch norm and a linear head; SGD with momentum."""

    def __init__(self, channels: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        widths = [channels, 16, 32, 32]
        self.features = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=1 + (i > 0), padding=1, bias=False),
                    nn.BatchNorm2d(b),
                    nn.ReLU(),
                )
                for i, (a, b) in enumerate(pairwise(widths))
            )
        )
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        right = accuracy(logits, batch[1], task="multiclass", num_classes=10)
        self.log("val_accuracy", right, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST, Fashion-MNIST or CIFAR-10")
    parser.add_argument("--max-epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--bundle", choices=["economy", "standard", "paper"], default="standard")
    parser.add_argument(
        "--trace-regularization", type=float, help="strength of a penalty on the Hessian's trace"
    )
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="where TensorBoard looks")
    arguments = parser.parse_args()

    pl.seed_everything(0)
    train, test = load_images(arguments.data)
    callbacks = getattr(lla_callbacks, arguments.bundle)(
        every_n_epochs=8,
        planes=["random", "trajectory"],
        plane_points=13,
        metrics={"accuracy": MulticlassAccuracy(10, average="micro")},
        interpolate=True,
        trace_regularization=arguments.trace_regularization,
    )
    trainer = pl.Trainer(
        max_epochs=arguments.max_epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(arguments.logs, name="demo"),
        callbacks=callbacks,
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(
        SmallConvNet(channels=train.tensors[0].shape[1], lr=arguments.lr),
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(test, batch_size=500),
    )

    hessian, landscape = callbacks[:2]
    beside = Path(sys.executable).with_name("tensorboard")
    tensorboard = os.path.relpath(beside) if beside.exists() else "tensorboard"
    print(f"\nAfter {trainer.global_step} steps, test accuracy "
          f"{float(trainer.callback_metrics['val_accuracy']):.1%}.\n")  # fmt: skip
    print(hessian.report.summary())
    print("\n" + landscape.report.summary())
    print("\n" + describe_change(hessian.history))
    film = lla_callbacks.animate(landscape, Path(trainer.log_dir) / "plane.gif", plane="random")
    seconds = hessian.account.total
    print(
        f"\nMeasuring took {seconds:.0f} s: this demo measures often, on a small network."
        "\nWithout a schedule of its own, standard() makes a run of minutes 5 % longer at most."
        f"\n\nHow the plane moved, as a film: {film}"
        "\nSee it all:\n"
        f"    {tensorboard} --logdir {arguments.logs} --samples_per_plugin images=1000"
    )


if __name__ == "__main__":
    main()

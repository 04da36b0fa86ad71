"""Measure a GAN's generator and its discriminator by themselves, each by its own loss.

    python examples/gan.py [--steps 400] [--out gan]

Points on a ring are learned by two small networks under manual optimization. Each player's loss
has a Hessian of its own, over its own parameters: that of the generator is what its optimizer sees
while the discriminator stands still. Two monitors watch them, ``parameters=`` tells them apart.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor, compare, measure_hessian


class GAN(LightningModule):
    """A generator and a discriminator of points in the plane."""

    def __init__(self, width: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr = lr
        self.generator = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def made(self, batch: Any) -> Tensor:
        """Return fakes of the noise that comes with a batch, so that a loss is repeatable."""
        return self.generator(batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, loss in zip(
            self.optimizers(), (generator_loss, discriminator_loss), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward(loss(self, batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(part.parameters(), lr=self.lr, betas=(0.5, 0.999))
            for part in (self.generator, self.discriminator)
        ]


def generator_loss(module: Any, batch: Any) -> Tensor:
    """Return how badly fakes pass as real."""
    verdict = module.discriminator(module.made(batch))
    return F.binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict))


def discriminator_loss(module: Any, batch: Any) -> Tensor:
    """Return how badly real points and fakes are told apart."""
    real, fake = module.discriminator(batch[0]), module.discriminator(module.made(batch))
    return F.binary_cross_entropy_with_logits(
        real, torch.ones_like(real)
    ) + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))


PLAYERS = {"generator": generator_loss, "discriminator": discriminator_loss}


def data(count: int) -> TensorDataset:
    """Return points on a ring, each with noise for one fake."""
    angle = 2 * math.pi * torch.rand(count)
    ring = torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(count, 2)
    return TensorDataset(ring, torch.randn(count, 4))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("gan"))
    settings = parser.parse_args(argv)
    seed_everything(0, verbose=False)
    loader = DataLoader(data(2048), batch_size=128, shuffle=True)
    monitors = {
        name: HessianMonitor(
            name=f"{name}_hessian", parameters=name, loss=loss, num_samples=256,
            every_n_train_steps=max(1, settings.steps // 5), num_steps=12, num_probes=8,
        )
        for name, loss in PLAYERS.items()
    }  # fmt: skip
    trainer = Trainer(
        # Each step of training takes two of the optimizers.
        max_steps=2 * settings.steps, callbacks=list(monitors.values()), logger=False,
        enable_checkpointing=False, default_root_dir=settings.out, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    gan = GAN()
    trainer.fit(gan, loader)
    held = [tuple(t[:256] for t in loader.dataset.tensors)]
    reports = {
        name: measure_hessian(gan, held, loss=loss, parameters=name)
        for name, loss in PLAYERS.items()
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    names = list(PLAYERS)
    compare(*reports.values(), names=names, title="Two players").savefig(
        settings.out / "spectra.png"
    )
    compare(*monitors.values(), names=names, title="Two players").savefig(settings.out / "runs.png")
    for name, report in reports.items():
        print(f"{name}: {report.summary()}\n")
    return {"monitors": monitors, "reports": reports, "gan": gan}


if __name__ == "__main__":
    main()

"""A quantity of one's own: how far the gradient stands out of the noise of the batches.

    python examples/own_quantity.py      # a few epochs on scikit-learn's digits

What a monitor needs of it is below; docs/own_quantity.md goes through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from matplotlib.figure import Figure

from lla_callbacks import Quantity, Result


@dataclass(frozen=True, repr=False)
class SignalToNoise(Result):
    """Squared norm of the mean gradient over that of its standard error, also by parameter."""

    ratio: float
    by_parameter: dict[str, float]
    gaps: dict[str, str] = field(default_factory=dict)

    def scalars(self, name):
        return {f"{name}/signal_to_noise": self.ratio}

    def figures(self, step):
        return {"parameters": partial(self.figure, title=f"Signal to noise at step {step}")}

    def figure(self, title=""):
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        axes.barh(list(self.by_parameter), list(self.by_parameter.values()))
        axes.set(title=title, xscale="log", xlabel="|mean gradient|² / its variance")
        return figure


@dataclass(frozen=True)
class GradientNoise(Quantity):
    """Of batches of one size: two gradients of each."""

    name: str = "gradient"
    least: int = 2
    result = SignalToNoise
    gradients = 2.0

    def __post_init__(self):
        if self.least < 2:
            raise ValueError(f"least is {self.least}; give 2 batches or more.")

    def measure(self, objective, moment):
        share, count = moment.lent.share, len(objective.batches)
        if count < self.least:
            return SignalToNoise(float("nan"), {}, {"signal_to_noise": "there is one batch only"})
        mean = objective.gradient(share)[1]
        signal = {n: float(g.double().square().sum()) for n, g in objective.by_name(mean).items()}
        apart = torch.zeros(len(signal), dtype=torch.float64)
        for i in range(share.rank, count, share.size):
            off = objective.by_name(objective.batch_gradient(i)[1] - mean).values()
            apart += torch.stack([g.double().square().sum() for g in off]).cpu()
        noise = (share.total(apart) / (count * (count - 1))).tolist()
        parts = {n: s / v if v else 0.0 for (n, s), v in zip(signal.items(), noise, strict=True)}
        return SignalToNoise(sum(signal.values()) / sum(noise), parts)


def main() -> None:
    """Train a small network on digits, and print what was found."""
    import pytorch_lightning as pl
    from image_data import load_images
    from torch.utils.data import DataLoader

    from lla_callbacks import Monitor

    class Digits(pl.LightningModule):
        def __init__(self):
            super().__init__()
            layers = [torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU()]
            self.net = torch.nn.Sequential(*layers, torch.nn.Linear(32, 10))

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    monitor = Monitor([GradientNoise()], every_n_epochs=1, num_samples=512)
    loader = DataLoader(load_images(None)[0], 64, shuffle=True)
    pl.Trainer(callbacks=[monitor], max_epochs=5, logger=False).fit(Digits(), loader)
    for step, found in monitor.histories["gradient"]:
        print(f"step {step:4d}  signal to noise {found.ratio:.3g}")


if __name__ == "__main__":
    main()

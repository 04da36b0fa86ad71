"""Why does the loss around a network with batch norm explode in eval mode, and when does it not?

    python examples/value_explosion.py                # scikit-learn's digits
    python examples/value_explosion.py --data FOLDER  # MNIST, Fashion-MNIST, CIFAR-10

Four planes of one trained network in one figure, after figures 2 to 4 of Gabdullin (2024).
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from image_data import load_images
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import LossPlane, loss_plane
from lla_callbacks.report.sheet import KEY, Sheet, bar, caption, plain
from lla_callbacks.report.shown import png_of
from lla_callbacks.report.style import INK, mark_coordinates
from lla_callbacks.slices.fields import field_of
from lla_callbacks.slices.plane_figures import fill_plane

CAP = 100.0


def conv_net(channels: int) -> nn.Sequential:
    """Return three convolutions with batch norm and a linear head, 6,274 parameters on digits."""
    widths, layers = [channels, 8, 16, 32], []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def four_planes(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, LossPlane]:
    """Return what is compared: two modes on the same directions, and two other directions."""
    half = torch.linspace(-0.5, 0.5, 15, dtype=torch.float64)
    raw = {"normalization": "none", "vectors": "entry", "alphas": half, "betas": half}
    settings = {
        "eval mode, raw Gaussian": {"mode": "eval", **raw},
        "batch mode, the same": {"mode": "batch", **raw},
        "batch mode, Hessian axes": {"mode": "batch", "directions": "hessian"},
        "eval mode, filter-normalized": {"mode": "eval", "alphas": half, "betas": half},
    }
    return {name: loss_plane(net, [batch], loss=loss, **s) for name, s in settings.items()}


def figure_of(planes: dict[str, LossPlane], title: str) -> Figure:
    """Return all planes in one scale, with everything above the cap in grey."""
    figure = Sheet(4.75)
    colors = colormaps["viridis"].with_extremes(over="#cbd5e0")
    scale = min(float(plane.loss.min()) for plane in planes.values()), CAP
    for number, (name, plane) in enumerate(planes.items()):
        row, column = divmod(number, 2)
        axes = figure.panel(0.5 + 1.92 * column, 0.42 + 2.35 * row, 1.45, 1.45)
        plain(axes, 0.5, 0.46, 1.45, 1.45)
        field = field_of(plane, scale=scale)
        image = fill_plane(axes, field, colors)
        axes.plot(0, 0, "P", mfc="white", mec=INK, ms=8)
        mark_coordinates(axes, field.x, field.y)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(plane.directions[0].label.replace("  ", " "), fontsize=KEY)
        caption(axes, f"{name}\nhighest loss {written(plane.loss.max())}", fontsize=KEY)
        if column:
            bar(figure, axes, image, *field.ticks(), "", extend="max")
    facts = plane.facts
    notes = [f"One scale for all. Grey: loss above {CAP:g}. Cross: the trained weights."]
    figure.finish(
        title, [f"{facts.num_params:,} parameters", f"{facts.num_samples} samples"], notes
    )
    return figure


def written(value: Tensor | float) -> str:
    """Return a loss with three digits, without powers of ten."""
    value = float(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST, Fashion-MNIST or CIFAR-10")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("value_explosion.png"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train, _ = load_images(arguments.data)
    images, labels = train.tensors[0][:4096], train.tensors[1][:4096]
    net = conv_net(images.shape[1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    for _ in range(arguments.epochs):
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss(net, (images[part], labels[part])).backward()
            optimizer.step()
        schedule.step()

    planes = four_planes(net, (images[:256], labels[:256]))
    print(f"{'loss of 256 samples':30}{'centre':>10}{'median':>10}{'edges':>10}{'highest':>10}")
    for name, plane in planes.items():
        rim = torch.ones_like(plane.loss, dtype=torch.bool)
        rim[1:-1, 1:-1] = False
        found = plane.centre_loss, plane.loss.median(), plane.loss[rim].median(), plane.loss.max()
        print(f"{name:30}" + "".join(f"{written(value):>10}" for value in found))
    title = "One network, four planes: which of them explode?"
    arguments.out.write_bytes(png_of(figure_of(planes, title)))
    print(f"Edges: median on the rim of the plane. Drawn, capped at {CAP:g}: {arguments.out}")


if __name__ == "__main__":
    main()

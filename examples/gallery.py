"""Make the images of docs/gallery.md, one function each, on scikit-learn's digits.

OMP_NUM_THREADS=1 python examples/gallery.py --out docs/images
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from image_data import load_images
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lla_callbacks import (
    animate,
    barrier,
    basin_radii,
    connect,
    convexity_map,
    interpolate,
    loss_curve,
    loss_line,
    loss_plane,
)
from lla_callbacks.slices.landscape_figures import basin_figure
from lla_callbacks.slices.line_figures import line_figure

Batch = tuple[Tensor, Tensor]
TRAIN = load_images(None)[0].tensors
BATCH = TRAIN[0][:256], TRAIN[1][:256]


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def accuracy(module: nn.Module, batch: Batch) -> Tensor:
    return (module(batch[0]).argmax(1) == batch[1]).float().mean()


def conv_net(activation: type[nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    """Return two convolutions and a linear head, 3,818 parameters without batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16)):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride=1 + (inputs > 1), padding=1))
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers.append(activation())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def trained(
    net: nn.Module, *, epochs: int = 12, size: int = 64, lr: float = 0.05, decay: float = 0.0
) -> list[nn.Module]:
    """Train by SGD with momentum; return a copy of the network before and after each epoch."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    copies = [copy.deepcopy(net)]
    for _ in range(epochs):
        for part in torch.randperm(len(TRAIN[0]), generator=generator).split(size):
            optimizer.zero_grad()
            loss(net, (TRAIN[0][part], TRAIN[1][part])).backward()
            optimizer.step()
        copies.append(copy.deepcopy(net))
    return copies


def beside(*figures: Figure) -> np.ndarray:
    """Return figures as one image, from left to right."""
    images = []
    for figure in figures:
        figure.set_dpi(130)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        images.append(np.asarray(canvas.buffer_rgba())[..., :3])
    height = max(len(image) for image in images)
    padded = [
        np.pad(i, ((0, height - len(i)), (0, 0), (0, 0)), constant_values=255) for i in images
    ]
    return np.ascontiguousarray(np.concatenate(padded, axis=1))


def plane(path: list[nn.Module]) -> np.ndarray:
    found = loss_plane(path[-1], [BATCH], loss=loss, metrics={"accuracy": accuracy})
    return beside(
        found.figure(title="The loss ..."),
        found.figure(title="... and accuracy", metric="accuracy"),
    )


def interpolated(path: list[nn.Module]) -> np.ndarray:
    side = torch.linspace(-1, 1, 11, dtype=torch.float64)
    found = loss_plane(path[-1], [BATCH], loss=loss, alphas=side, betas=side)
    return beside(
        found.figure(title="121 points as they are"),
        found.figure(title="The same, with a spline between them", interpolate=True),
    )


def incomplete(path: list[nn.Module]) -> np.ndarray:
    side = torch.linspace(-1, 1, 25, dtype=torch.float64)
    began = time.perf_counter()
    loss_plane(path[-1], [BATCH], loss=loss, alphas=side, betas=side, evaluation="loop")
    found = loss_plane(
        path[-1], [BATCH], loss=loss, alphas=side, betas=side, evaluation="loop",
        time_budget=0.5 * (time.perf_counter() - began),
    )  # fmt: skip
    return beside(found.figure(title="Stopped after half of its time"))


def line(path: list[nn.Module]) -> np.ndarray:
    found = loss_line(path[-1], [BATCH], loss=loss, metrics={"accuracy": accuracy})
    return beside(found.figure(title="A random line, with accuracy"))


def eigenvector(path: list[nn.Module]) -> np.ndarray:
    torch.manual_seed(0)
    smooth = trained(conv_net(nn.Tanh))[-1]
    lines = [loss_line(net, [BATCH], loss=loss, directions="top1") for net in (smooth, path[-1])]
    for name, found in zip(("tanh", "ReLU"), lines, strict=True):
        print(f"   {name}: curvature {found.curvature:.4g} +- {found.curvature_error:.2g}, "
              f"eigenvalue {found.directions[0].eigenvalue:.4g}")  # fmt: skip
    return beside(
        lines[0].figure(title="Top eigenvector, tanh network"),
        lines[1].figure(title="Top eigenvector, ReLU network"),
    )


def hessian(path: list[nn.Module]) -> np.ndarray:
    found = loss_plane(path[-1], [BATCH], loss=loss, directions="hessian_ends")
    return beside(found.figure(title="Sharpest and most downward direction", interpolate=True))


def trajectory(path: list[nn.Module]) -> np.ndarray:
    found = loss_plane(path[-1], [BATCH], loss=loss, directions="trajectory", checkpoints=path[:-1])
    print(
        f"   explained {found.path.explained.tolist()}, residuals {found.path.residuals.tolist()}"
    )
    return beside(found.figure(title="The path of training in its own plane", interpolate=True))


def convexity(path: list[nn.Module]) -> np.ndarray:
    found = convexity_map(path[-1], [BATCH], loss=loss, rtol=0.02)
    print(f"   {found}, {found.facts.seconds:.0f} s")
    return beside(found.figure(title="Where is the loss convex?"))


def basins(path: list[nn.Module]) -> np.ndarray:
    torch.manual_seed(0)
    start = conv_net()
    nets = {
        "batches of 16": trained(copy.deepcopy(start), size=16, lr=0.02)[-1],
        "batches of 512": trained(start, size=512, lr=0.1, epochs=60)[-1],
    }
    found = {n: basin_radii(net, [BATCH], loss=loss) for n, net in nets.items()}
    print("   ", found)
    return beside(basin_figure(found, title="How far until the loss has risen by 0.1?"))


def surface(path: list[nn.Module]) -> np.ndarray:
    found = loss_plane(path[-1], [BATCH], loss=loss)
    return beside(found.surface(title="The random plane as a surface"))


def between(path: list[nn.Module]) -> np.ndarray:
    torch.manual_seed(0)
    start = conv_net(norm=True)
    small = trained(copy.deepcopy(start), size=16, lr=0.02)[-1]
    large = trained(start, size=512, lr=0.1, epochs=60)[-1]
    scaled = copy.deepcopy(small)
    # Batch norm takes the factor out again: the same function.
    for module in scaled.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 4
    lines = []
    for net, name in ((small, "as trained"), (scaled, "weights at 0 times four")):
        found = interpolate(net, [TRAIN], end=large, loss=loss, metrics={"accuracy": accuracy})
        print(f"   {name}: ends {found.loss[10]:.4g}, {found.loss[30]:.4g}; {found}")
        lines.append(replace(found, directions=(replace(found.directions[0], name=name),)))
    title = "Small batch (0) to large batch (1): the same two functions, twice"
    return beside(line_figure(lines, title=title))


def error(module: nn.Module, batch: Batch) -> Tensor:
    return 1 - accuracy(module, batch)


def three_nets() -> list[nn.Module]:
    """Return three MLPs of width 64 from three seeds, as three trainings end."""
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip
        nets.append(trained(net, epochs=30, lr=0.1, decay=1e-4)[-1])
    return nets


def curve(path: list[nn.Module]) -> np.ndarray:
    a, b, net = three_nets()
    batches = list(zip(TRAIN[0].split(64), TRAIN[1].split(64), strict=True))
    found = connect(net, batches, a, b, loss=loss, epochs=60)
    line = loss_curve(net, [TRAIN], found, loss=loss, metrics={"error": error})
    print(f"   {line}\n{line.summary()}")
    plane = loss_plane(net, [TRAIN], directions=found, loss=loss)
    return beside(
        line.figure(title="Two networks and a curve between them"),
        plane.figure(title="The plane of the curve"),
    )


def networks(path: list[nn.Module]) -> np.ndarray:
    nets = three_nets()
    plane = loss_plane(nets[0], [TRAIN], directions=nets, loss=loss)
    return beside(plane.figure(title="Three networks that nobody connected", interpolate=True))


def barriers(path: list[nn.Module]) -> np.ndarray:
    nets = dict(zip(("seed 0", "seed 1", "seed 2"), three_nets(), strict=True))
    found = [barrier(nets["seed 0"], [TRAIN], nets, loss=loss, align=align)
             for align in (False, True)]  # fmt: skip
    print(f"   {found}")
    return beside(
        found[0].figure(title="Barriers of straight lines ..."),
        found[1].figure(title="... and after alignment"),
    )


def film(path: list[nn.Module], folder: Path) -> Path:
    """Write how the random plane moved from epoch to epoch, as a film."""
    history = [(23 * k, loss_plane(net, [BATCH], loss=loss)) for k, net in enumerate(path)]
    return animate(history, folder / "film.gif", width=400)


MAKERS = (
    plane, interpolated, incomplete, line, eigenvector, hessian, trajectory, convexity, basins,
    surface, between, curve, networks, barriers,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gallery"), help="folder for the images")
    parser.add_argument("--only", choices=["film", *(m.__name__ for m in MAKERS)])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    path = trained(conv_net())
    if arguments.only in (None, "film"):
        file = film(path, arguments.out)
        print(f"{file}  {file.stat().st_size / 1024:.0f} KB")
    for maker in MAKERS:
        if arguments.only in (None, maker.__name__):
            began = time.perf_counter()
            file = arguments.out / f"slice_{maker.__name__}.png"
            Image.fromarray(maker(path)).save(file, optimize=True)
            print(
                f"{file}  {file.stat().st_size / 1024:.0f} KB  {time.perf_counter() - began:.1f} s"
            )


if __name__ == "__main__":
    main()

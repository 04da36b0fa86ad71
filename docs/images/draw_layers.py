"""Draw the figures of docs/layers.md: ``python docs/images/draw_layers.py`` (two minutes)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import layers

from lla_callbacks.hessian.layer_figures import layer_history_figure

HERE = Path(__file__).parent


def main() -> None:
    torch.manual_seed(0)
    layers.STEPS = [*range(0, 241, 20)]
    history = layers.train(layers.conv(), 0)
    layer_history_figure(history).savefig(HERE / "layer_history.png")
    report = history[-1][1]
    report.layer_density_figure().savefig(HERE / "layer_densities.png")
    report.layer_distance_figure().savefig(HERE / "layer_distances.png")


if __name__ == "__main__":
    main()

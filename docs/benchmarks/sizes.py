"""What each size that the account may choose costs in accuracy, on five ordinary projects.

Run: ``python docs/benchmarks/sizes.py [PROJECT ...] [--data FOLDER]``. Each project is trained
for a while without monitors; then lambda_max, trace, KH05 and the random plane are measured at
every size of the ladders, on the first samples of training as a monitor holds them, and compared
with the full size. Samples are drawn anew ``--draws`` times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import ordinary  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from lla_callbacks import loss_plane, measure_hessian  # noqa: E402
from lla_callbacks.callbacks.sizing import SLICES, spectrum_ladder  # noqa: E402
from lla_callbacks.objective.batches import first_of  # noqa: E402

EPOCHS = {"classifier": 1, "gpt": 1, "regression": 20, "gan": 20, "lora": 2}
# The full size is dear where a batch is.
MOST = {"classifier": 256, "gpt": 64, "regression": 256, "gan": 256, "lora": 64}


def trained(project: str, data: Path | None) -> dict[str, Any]:
    """Return a project after a short training."""
    pl.seed_everything(0, verbose=False)
    made = ordinary.PROJECTS[project](data)
    trainer = pl.Trainer(
        max_epochs=EPOCHS[project],
        accelerator="cpu",
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(made["module"], made["train"])
    return made


def held(made: dict[str, Any], samples: int, draw: int) -> list[Any]:
    """Return the first batches of a shuffled pass."""
    torch.manual_seed(100 + draw)
    train = made["train"]
    loader = DataLoader(train.dataset, batch_size=train.batch_size, shuffle=True)
    found, count = [], 0
    for batch in loader:
        found.append(batch)
        count += train.batch_size
        if count >= samples:
            return first_of(found, samples)
    return found


def relative(found: float, true: float) -> float:
    return abs(found - true) / max(abs(true), 1e-12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("projects", nargs="*", default=list(ordinary.PROJECTS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("| project | samples | steps + probes | lambda_max | trace | its error bar | KH05 |")
    print("|---|---|---|---|---|---|---|")
    planes = []
    for project in arguments.projects:
        made = trained(project, arguments.data)
        module, loss = made["module"], made.get("loss")
        most = MOST[project]
        sizes = []
        for size in spectrum_ladder():
            key = (min(size.samples, most), size.num_steps, size.num_probes)
            if key not in sizes:
                sizes.append(key)
        rows: dict[Any, list[Any]] = {key: [] for key in sizes}
        for draw in range(arguments.draws):
            batches = held(made, most, draw)
            full = measure_hessian(module, batches, loss=loss, num_steps=40, num_probes=24)
            for key in sizes:
                samples, steps, probes = key
                r = measure_hessian(
                    module, first_of(batches, samples), loss=loss, num_steps=steps,
                    num_probes=probes, seed=draw,
                )  # fmt: skip
                rows[key].append((
                    relative(float(r.lambda_max), float(full.lambda_max)),
                    relative(r.trace, full.trace),
                    r.trace_sem / abs(full.trace),
                    abs(r.criteria["kh05"] - full.criteria["kh05"]),
                ))  # fmt: skip
        for (samples, steps, probes), found in rows.items():
            means = [statistics.fmean(column) for column in zip(*found, strict=True)]
            print(
                f"| {project} | {samples} | {steps} + {probes} | {means[0]:.1%} | {means[1]:.1%} "
                f"| {means[2]:.1%} | {means[3]:.2g} |",
                flush=True,
            )
        batches = held(made, most, 0)
        full_plane = loss_plane(module, batches, loss=loss).loss.clamp(min=1e-12).log10()
        for samples in sorted({min(n, most) for n in (256, 64, 16, 4)}, reverse=True):
            for points in sorted({size.plane_points for size in SLICES}, reverse=True):
                plane = loss_plane(
                    module, first_of(batches, samples), loss=loss,
                    alphas=torch.linspace(-1, 1, points).tolist(),
                    betas=torch.linspace(-1, 1, points).tolist(),
                ).loss.clamp(min=1e-12).log10()  # fmt: skip
                grown = torch.nn.functional.interpolate(
                    plane[None, None], size=full_plane.shape, mode="bicubic", align_corners=True
                )[0, 0]
                off = (grown - full_plane).abs()
                off = float(off[torch.isfinite(off)].mean())
                planes.append(f"| {project} | {samples} | {points} x {points} | {off:.3f} |")
    print("\n| project | samples | plane | mean difference, decades of the loss |")
    print("|---|---|---|---|")
    print("\n".join(planes))


if __name__ == "__main__":
    main()

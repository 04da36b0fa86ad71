"""Does a smaller largest eigenvalue mean better generalization?

    python examples/studies/lambda_max.py           # 8 seeds, about five minutes
    python examples/studies/lambda_max.py --quick   # 2 seeds, fewer settings

An MLP on 1,000 of scikit-learn's digits, tested on the other 797; plain SGD with a constant
learning rate, stopped as soon as the training loss is 0.05, so that all eigenvalues are at one
loss, on 1,000 training samples, with running statistics (*eval*) and with batch statistics
(*batch*). Not varied: momentum, decay, schedules, augmentation. Claims of Kaur, Cohen and Lipton,
"On the Maximum Hessian Eigenvalue and Generalization" (2023). Thresholds, written before any run,
paired by seed (the same start and order of batches):

K1  Larger learning rates lower lambda_max at every batch size: log ratio, smallest rate over
    largest, in batches of 32 and of 256. K1g: what that gains in test accuracy (points) shrinks
    from small to large batches.
K2  Learning rate and batch size together (constant ratio): lambda_max changes (log ratio) but test
    accuracy does not (within half a point).
K3  SAM lowers lambda_max at every batch size, and helps test accuracy less at a large one.
K4  Dropout: lambda_max (without dropout) falls, and the highest rate costs test accuracy.
K5  Batch norm helps (points of test accuracy) without lowering lambda_max: in either mode.
K6  Over all settings lambda_max tells test accuracy: mean over seeds of Spearman's rho of the two,
    interval by drawing seeds. Confirmed below -0.3 with an interval below 0.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from study import Study
from torch import Tensor, nn
from torch.nn import functional as F

from image_data import load_images  # isort: skip

from lla_callbacks import basin_radii, measure_hessian
from lla_callbacks.minima.statistics import bootstrap, spearman
from lla_callbacks.report.style import INK, finish, subplots

SOURCE = "Kaur et al. 2023"
TARGET, MOST_EPOCHS = 0.05, 400
COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030")

Batch = tuple[Tensor, Tensor]


def data() -> tuple[Batch, Batch]:
    """1,000 digits to train on and the other 797, which nobody sees."""
    parts = [d.tensors for d in load_images(None)]
    x = torch.cat([p[0] for p in parts]).flatten(1)
    y = torch.cat([p[1] for p in parts])
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def mlp(dropout: float, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise((64, 64, 64, 64)):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(64, 10))


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def scores(module: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return loss and accuracy in evaluation mode."""
    module.eval()
    with torch.no_grad():
        logits = module(batch[0])
    module.train()
    right = (logits.argmax(1) == batch[1]).double().mean()
    return float(F.cross_entropy(logits, batch[1])), float(right)


def train(
    seed: int, train_set: Batch, *, lr: float, batch: int, rho: float = 0.0, dropout: float = 0.0,
    norm: bool = False,
) -> tuple[nn.Module, int]:  # fmt: skip
    """Train until the loss is reached, looked at four times an epoch at least."""
    torch.manual_seed(seed)
    module = mlp(dropout, norm)
    parameters = list(module.parameters())
    order, steps = torch.Generator().manual_seed(seed), 0
    x, y = train_set
    for _ in range(MOST_EPOCHS if batch < 200 else 4 * MOST_EPOCHS):
        parts = torch.randperm(len(x), generator=order).split(batch)
        for k, index in enumerate(parts):
            if k % max(1, len(parts) // 4) == 0 and scores(module, train_set)[0] <= TARGET:
                return module, steps
            part = (x[index], y[index])
            gradients = torch.autograd.grad(loss(module, part), parameters)
            if rho:
                scale = rho / (float(torch.cat([g.reshape(-1) for g in gradients]).norm()) + 1e-12)
                moved = torch._foreach_mul(gradients, scale)
                torch._foreach_add_([p.data for p in parameters], moved)
                gradients = torch.autograd.grad(loss(module, part), parameters)
                torch._foreach_sub_([p.data for p in parameters], moved)
            torch._foreach_add_([p.data for p in parameters], gradients, alpha=-lr)
            steps += 1
    return module, steps


def one(study: Study, name: str, seed: int, sets: tuple[Batch, Batch], **settings) -> None:
    module, steps = train(seed, sets[0], **settings)
    held, cheap = [sets[0]], {"num_steps": 20, "eig_rtol": 0.01, "num_probes": 6}
    top = {
        mode: measure_hessian(module, held, loss=loss, mode=mode, **cheap)
        for mode in (("eval", "batch") if settings.get("norm") else ("eval",))
    }
    train_loss, fits = scores(module, sets[0])
    test_loss, right = scores(module, sets[1])
    radius = basin_radii(module, held, loss=loss, num_rays=20, mode="eval", num_samples=1000)
    whole = top["eval"]
    study.row(
        setting=name, seed=seed, steps=steps, loss=train_loss, train=100 * fits,
        test=100 * right, test_loss=test_loss, lambda_eval=float(whole.lambda_max),
        lambda_batch=float(top.get("batch", whole).lambda_max), residual=whole.lambda_max.residual,
        trace=whole.trace, trace_norm2=whole.trace_times_norm2, radius=radius.effective_radius,
    )  # fmt: skip


def settings_of(quick: bool) -> dict[str, dict]:
    """Name to settings; names are what claims pair by."""
    rates = (0.05, 0.4) if quick else (0.05, 0.15, 0.4)
    sizes = (32, 256)
    found = {f"lr {lr:g}, batch {b}": {"lr": lr, "batch": b} for b in sizes for lr in rates}
    for b in sizes:
        found[f"SAM 0.1, batch {b}"] = {"lr": 0.15, "batch": b, "rho": 0.1}
        found[f"lr 0.15, batch {b}"] = {"lr": 0.15, "batch": b}
    found["lr 0.1, batch 64"] = {"lr": 0.1, "batch": 64}
    for p in (0.5,) if quick else (0.2, 0.5, 0.7):
        found[f"dropout {p:g}"] = {"lr": 0.15, "batch": 32, "dropout": p}
    for lr in (0.15,) if quick else (0.05, 0.15, 0.4):
        found[f"batch norm, lr {lr:g}"] = {"lr": lr, "batch": 32, "norm": True}
    return found


def not_reached(study: Study) -> list[str]:
    """Return the settings that did not reach the loss, which compare with nothing."""
    return sorted({r["setting"] for r in study.rows if r["loss"] > 1.3 * TARGET})


def judge(study: Study, quick: bool) -> None:
    def pair(name: str, a: str, b: str, *, log: bool = False) -> list[float]:
        return study.paired(name, {"setting": a}, {"setting": b}, log=log)

    low, high = {}, {}
    for b in (32, 256):
        low[b], high[b] = f"lr 0.05, batch {b}", f"lr 0.4, batch {b}"
        study.claim(f"K1 ({b})", f"larger rates lower lambda_max (batch {b})", SOURCE,
                    "lambda_max at lr 0.05 over lr 0.4",
                    pair("lambda_eval", low[b], high[b], log=True), ratio=True,
                    smallest=math.log(1.1))  # fmt: skip
    gains = [pair("test", high[b], low[b]) for b in (32, 256)]
    study.claim("K1g", "and what they gain shrinks from small to large batches", SOURCE,
                "gain in test accuracy at batch 32 minus at 256, points",
                [a - b for a, b in zip(*gains, strict=True)], smallest=0.5)  # fmt: skip
    small, large = "lr 0.05, batch 32", "lr 0.4, batch 256"
    study.claim("K2", "rate and batch size in proportion change lambda_max", SOURCE,
                f"lambda_max, {small} over {large}",
                pair("lambda_eval", small, large, log=True), ratio=True,
                smallest=math.log(1.3))  # fmt: skip
    study.claim("K2g", "... and test accuracy changes with it", "Kaur et al. deny it",
                "test accuracy, the same two, points", pair("test", large, small),
                smallest=0.5)  # fmt: skip
    plain, sam = ([f"{n}, batch {b}" for b in (32, 256)] for n in ("lr 0.15", "SAM 0.1"))
    for b, p, s in zip((32, 256), plain, sam, strict=True):
        study.claim(f"K3 ({b})", f"SAM lowers lambda_max (batch {b})", SOURCE,
                    "lambda_max, SGD over SAM", pair("lambda_eval", p, s, log=True), ratio=True,
                    smallest=math.log(1.1))  # fmt: skip
    gains = [pair("test", s, p) for p, s in zip(plain, sam, strict=True)]
    study.claim("K3g", "SAM helps small batches more than large ones", SOURCE,
                "gain in test accuracy at batch 32 minus at 256, points",
                [a - b for a, b in zip(*gains, strict=True)], smallest=0.5)  # fmt: skip
    missed = not_reached(study)
    rates = [n for n in settings_of(quick) if n.startswith("dropout") and n not in missed]
    most = max(rates)
    study.claim("K4", "dropout lowers lambda_max", SOURCE, f"lambda_max, none over {most}",
                pair("lambda_eval", plain[0], most, log=True), ratio=True,
                smallest=math.log(1.1))  # fmt: skip
    study.claim("K4g", "... and the highest rate costs accuracy", SOURCE,
                f"test accuracy, none minus {most}, points", pair("test", plain[0], most),
                smallest=0.5)  # fmt: skip
    norm = "batch norm, lr 0.15"
    study.claim("K5g", "batch norm helps", SOURCE, "test accuracy, with minus without, points",
                pair("test", norm, plain[0]), smallest=0.5)  # fmt: skip
    for mode in ("eval", "batch"):
        name = f"lambda_{mode}"
        study.claim(f"K5 ({mode})", f"... and lambda_max is no lower, {mode} statistics", SOURCE,
                    "lambda_max, with over without batch norm",
                    pair(name, norm, plain[0], log=True), ratio=True,
                    smallest=math.log(1.1))  # fmt: skip
    # The same claim of every number at once: rank correlations over settings, within seeds.
    for key, name, words in (("K6", "lambda_eval", "lambda_max"), ("K6t", "trace", "the trace"),
                             ("K6r", "radius", "the radius")):  # fmt: skip
        rhos = torch.tensor([
            spearman(*(torch.tensor([r[n] for r in study.rows if r["seed"] == s
                                     and r["setting"] not in missed]).double()
                       for n in (name, "test")))
            for s in study.seeds
        ])  # fmt: skip
        value = float(rhos.mean())
        low_end, high_end = bootstrap(len(rhos), lambda i, r=rhos: r[i].mean(-1))
        sign = -1 if name != "radius" else 1
        count = len(settings_of(quick)) - len(missed)
        ends = sorted((sign * low_end, sign * high_end))
        study.claim_interval(key, f"{words} tells test accuracy", "the common belief",
                             f"rank correlation over {count} settings",
                             len(rhos), value, low_end, high_end,
                             confirmed=sign * value > 0.3 and ends[0] > 0,
                             refuted=ends[1] < 0 or (ends[0] > -0.3 and ends[1] < 0.3))  # fmt: skip


def scatter(study: Study) -> Figure:
    """Return lambda_max against test accuracy, one panel a kind of setting, seeds joined."""
    kinds = {
        "learning rate, batch 32": [f"lr {r:g}, batch 32" for r in (0.05, 0.15, 0.4)],
        "learning rate, batch 256": [f"lr {r:g}, batch 256" for r in (0.05, 0.15, 0.4)],
        "SAM": ["lr 0.15, batch 32", "SAM 0.1, batch 32", "lr 0.15, batch 256",
                "SAM 0.1, batch 256"],
        "dropout": ["lr 0.15, batch 32", *[f"dropout {p:g}" for p in (0.2, 0.5, 0.7)]],
        "batch norm": ["lr 0.15, batch 32", *[f"batch norm, lr {r:g}" for r in (0.05, 0.15, 0.4)]],
    }  # fmt: skip
    figure, axes = subplots(1, 5, size=(14, 3.6))
    ends = [f(study.column("lambda_eval")) for f in (min, max)]
    heights = min(study.column("test")) - 0.3, max(study.column("test")) + 1.4
    for panel, (kind, names) in zip(axes, kinds.items(), strict=True):
        shown = [n for n in names if any(r["setting"] == n for r in study.rows)]
        for color, name in zip(COLORS, shown, strict=False):
            x, y = (study.column(n, setting=name) for n in ("lambda_eval", "test"))
            panel.scatter(x, y, color=color, s=18, label=name.replace(", batch", ",\nbatch"))
        panel.set_xscale("log")
        panel.set_xlim(ends[0] / 1.3, ends[1] * 1.3)
        panel.set_ylim(*heights)
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if ends[0] / 1.3 < t < ends[1] * 1.3]
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(kind, loc="left", fontsize=9.5, color=INK)
        panel.set_xlabel("λmax, running statistics")
        panel.legend(frameon=False, fontsize=7, labelcolor=INK)
    axes[0].set_ylabel("test accuracy, %")
    left = ", ".join(not_reached(study))
    but = f" (not reached: {left})" if left else ""
    facts = [f"{len(study.seeds)} seeds, a point each", f"at training loss {TARGET:g}{but}",
             "1,000 samples", "797 test images"]  # fmt: skip
    finish(figure, "λmax against test accuracy, at one training loss", facts)
    return figure


def main() -> None:
    study = Study("lambda_max", __doc__, seeds=(8, 2))
    sets = data()
    for seed in study.seeds:
        for name, settings in settings_of(study.quick).items():
            one(study, name, seed, sets, **settings)
    judge(study, study.quick)
    left = not_reached(study)
    but = (
        f", but for {', '.join(left)}, which did not get there and are left out of K4 and K6."
        if left
        else "."
    )
    study.notes = [
        f"All eigenvalues at training loss {TARGET:g} on 1,000 samples{but} Test accuracy of 797 "
        "images has a standard error of 0.7 points."
    ]
    columns = ["setting", "seed", "steps", "loss", "train", "test", "test_loss", "lambda_eval",
               "lambda_batch", "residual", "trace", "trace_norm2", "radius"]  # fmt: skip
    study.finish(columns, {"": scatter(study)})


if __name__ == "__main__":
    main()

# ruff: noqa: B018, D100, D101, E501
# The tutorial: cells of a notebook. `make tutorial` executes them and writes docs/tutorial.md.

# %% [markdown]
# # Reading a run, from start to end
#
# One real run, on scikit-learn's 1,797 handwritten digits: it goes wrong for a while, the monitor says why, and two remedies are tried and measured. Everything below was executed, as it stands, on a laptop's CPU in under a minute: `python examples/tutorial.py`, or open that file as a notebook.
#
# A network of two hidden layers is trained by plain gradient descent, all 1,400 training images in each step, at a learning rate of 1. `HessianMonitor` measures every ten steps on the same images.

# %%
import os

import torch
from matplotlib.figure import Figure
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor, compare, loss_line, measure_hessian

STEPS = int(os.environ.get("TUTORIAL_STEPS", "200"))
pixels, labels = load_digits(return_X_y=True)
order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
images, tests = (x[:1400], y[:1400]), (x[1400:], y[1400:])


class Net(LightningModule):
    def __init__(self, lr, warm_up=0):
        super().__init__()
        self.lr, self.warm_up, self.losses = lr, warm_up, []
        self.net = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        share = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warm_up))
        )
        return [optimizer], [{"scheduler": share, "interval": "step"}]


def train(lr, warm_up=0, steps=STEPS):
    seed_everything(0, verbose=False)
    net = Net(lr, warm_up)
    monitor = HessianMonitor(
        every_n_train_steps=10, num_samples=1400, num_steps=12, num_probes=6, figures=False
    )
    trainer = Trainer(
        max_steps=steps,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(net, DataLoader(TensorDataset(*images), batch_size=1400))
    return net, monitor


def accuracy(net):
    with torch.no_grad():
        return float((net.net(tests[0]).argmax(1) == tests[1]).float().mean())


first, watched = train(lr=1.0)
print(watched)

# %% [markdown]
# ## What was seen
#
# `stability` is the largest eigenvalue against what the optimizer bears: for plain gradient descent λ_max · lr / 2. Above 1 a step along the sharpest direction ends higher on the other side than it began.

# %%
for step, report in watched.history[:13:2]:
    loss = first.losses[min(step, STEPS - 1)]
    print(
        f"step {step:3}  loss {loss:.3f}  {report.lambda_max!r:38} stability {report.criteria['stability']:.2f}"
    )


# %%
def edge(net, monitor, title):
    figure = Figure(figsize=(7.2, 2.9), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(net.losses, color="#2d3748", lw=1.2)
    left.set(yscale="log", xlabel="step", title="loss")
    steps = [step for step, _ in monitor.history]
    right.plot(
        steps,
        [float(report.lambda_max) for _, report in monitor.history],
        "o-",
        ms=3,
        color="#2b6cb0",
        label="λmax",
    )
    limits = [2 / (net.lr * min(1.0, (step + 1) / max(1, net.warm_up))) for step in steps]
    right.plot(steps, limits, "--", color="#dd6b20", label="2 / learning rate")
    right.set(xlabel="step", title="curvature against the optimizer's limit", ylim=(0, 16))
    right.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


edge(first, watched, "Learning rate 1")

# %% [markdown]
# Nothing at step 0 foretells it: λ_max is a sixth of what the rate allows. But gradient descent moves to where the loss is sharper (progressive sharpening, Cohen et al. 2021): at step 10 λ_max is twice the limit. From there to step 150 it stays around and above 2 / lr while the loss jumps; then it sits on the limit, 2.05 at the end, and the loss goes down smoothly. What was lost are some hundred steps.
#
# ## What it rests on
#
# Stopped at step 60 and looked at closely: the report in words, the part of the curvature that is the criterion's (`matrix="ggn"`), and whose weights the sharpest direction moves.

# %%
stopped, _ = train(lr=1.0, steps=min(60, STEPS))
held = [images]
report = measure_hessian(
    stopped, held, num_eigenvectors=1, optimizer=torch.optim.SGD(stopped.parameters(), lr=1.0)
)
print(report.summary())

# %%
ggn = measure_hessian(stopped, held, matrix="ggn", num_probes=12)
print(
    f"Gauss-Newton share of the trace: {ggn.gauss_newton_share:.2f} ± {ggn.gauss_newton_share_error:.2f}"
)
print(
    f"largest eigenvalue: {float(ggn.lambda_max):.2f} of it, {float(report.lambda_max):.2f} of the Hessian"
)
for name, part in report.eigenvectors[0].items():
    print(f"{name:14} has {float(part.square().sum()):.0%} of the sharpest direction")

# %% [markdown]
# Three quarters of the gradient lie along the five sharpest directions: the steps bounce there instead of going anywhere. The trace is that of the criterion (its share is 1.01 ± 0.08), of the largest eigenvalue the network's own bends add an eighth, and half of the sharpest direction are the first layer's weights: no single layer is to blame. A line along that direction shows the valley, and where a step of this rate lands in it.

# %%
line = loss_line(stopped, held, directions="top1", alphas=torch.linspace(-1.2, 0.8, 41))
figure, axes = line.plot()
slope, curvature = line.directions[0].slope, line.directions[0].eigenvalue
landing = -1.0 * slope
axes.axvline(landing, color="#dd6b20", ls="--", label="a step of rate 1")
axes.axvline(-slope / curvature, color="#2f855a", ls=":", label="bottom of the parabola")
axes.legend(frameon=False)
print(
    f"slope {slope:.3f}, eigenvalue {curvature:.2f}: a step of rate 1 goes {curvature:.1f} times as far as the bottom"
)
figure

# %% [markdown]
# The step goes 3.9 times as far as the bottom of the parabola and lands on the other wall, which is flatter than the parabola: the loss does not explode, it overshoots.
#
# ## What was done about it
#
# Two usual remedies: a quarter of the rate, or the same rate after a warm-up of 100 steps. `compare` lays the runs over each other.

# %%
slower, watched_slower = train(lr=0.25)
warmed, watched_warmed = train(lr=1.0, warm_up=100)
runs = {
    "rate 1": (first, watched),
    "rate 0.25": (slower, watched_slower),
    "rate 1, warm-up": (warmed, watched_warmed),
}
compare(*[monitor for _, monitor in runs.values()], names=list(runs), title="Three runs")


# %%
def reached(net, target):
    below = [i for i in range(len(net.losses)) if all(v <= target for v in net.losses[i:])]
    return below[0] if below else "never"


print(
    "run               stability: highest, above 1 at   rises of the loss   below 0.3 for good   last loss   accuracy"
)
for name, (net, monitor) in runs.items():
    values = [(report.criteria["stability"], step) for step, report in monitor.history]
    above = sum(value > 1 for value, _ in values)
    rises = sum(b > a for a, b in zip(net.losses[:-1], net.losses[1:], strict=True))
    print(
        f"{name:17} {max(values)[0]:18.2f} {above:4} of {len(values)}  {rises:18} {reached(net, 0.3)!s:>20} {net.losses[-1]:11.3f} {accuracy(net):10.3f}"
    )

# %%
edge(warmed, watched_warmed, "Learning rate 1 after a warm-up of 100 steps")

# %%
ends = [measure_hessian(net, held, num_probes=2) for net, _ in runs.values()]
compare(*ends, names=list(runs), title="Spectra at the end")

# %% [markdown]
# ## What to take from it
#
# - A stability far below 1 at the start promises nothing. What told the trouble was λ_max · lr / 2 above 1 *while the loss jumped*; the measurement that shows it came at step 10.
# - A quarter of the rate did not stay below its limit: λ_max climbed until it sat on the new one, 7.75 of 8. Gradient descent goes to the edge of whatever rate it is given. The loss settled below 0.3 for good 47 steps earlier and rose half as often, but after 200 steps it is four times as high, in a valley four times as sharp.
# - The warm-up moved the trouble to where the loss is already lower, settled 20 steps earlier than without, and ended where the first run did: the same λ_max, the same loss. Of the three it is the one to keep here.
# - Accuracies differ by five of 397 test images at most: one run of each says nothing about which generalizes better.
# - Small batches and momentum bring noise that keeps λ_max below this edge; Adam has a limit of its own, which `stability` knows. [How to read the curves](reading.md) has more.

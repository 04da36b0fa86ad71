"""Training with a trace penalty written out by plain means, and a module to train in float64."""

import math

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from lla_callbacks.linalg.probes import generator, signs
from tests.penalty.signs_by_hand import signs_by_hand

STRENGTH = 1e-3


def samples(size=24, dtype=torch.float64):
    source = torch.Generator().manual_seed(7)
    x = torch.randn(size, 3, generator=source, dtype=torch.float64).to(dtype)
    return TensorDataset(x, (x.sum(1) > 0).long())


def double_loader(size=24, batch_size=4, dtype=torch.float64):
    return DataLoader(samples(size, dtype), batch_size)


def half_loader(rank):
    """Every second sample: what one of two processes sees."""
    data = samples(32)
    return DataLoader(Subset(data, range(rank, len(data), 2)), batch_size=4)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, 0.05)


def fused_sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, fused=True)


def fused_adam(parameters):
    return torch.optim.Adam(parameters, 0.05, fused=True)


OPTIMIZERS = {"sgd": sgd, "adam": adam, "fused sgd": fused_sgd, "fused adam": fused_adam}


class Double(pl.LightningModule):
    """Float64, with batch norm and perhaps dropout and a parameter that the loss never sees."""

    def __init__(self, make_optimizer=sgd, dropout=0.0, unused=False, smooth=False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 4, bias=smooth),
            nn.Identity() if smooth else nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(4, 2),
        ).double()
        if unused:
            self.unused = nn.Linear(2, 2).double()
        self.make_optimizer = make_optimizer

    def loss(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def probe(module, step, seed=0):
    """The signs of a step, one tensor per parameter."""
    parameters = list(module.parameters())
    sizes = [p.numel() for p in parameters]
    z = signs(sum(sizes), generator(seed, step, 0), dtype=parameters[0].dtype, device=module.device)
    parts = torch.split(z, sizes)
    return [part.reshape(p.shape) for p, part in zip(parameters, parts, strict=True)]


def gradient_at(module, batch, distance, step, directions=None):
    """The gradient at weights moved along the signs; nothing else changes."""
    parameters = list(module.parameters())
    kept = [p.detach().clone() for p in parameters]
    buffers, random = [b.clone() for b in module.buffers()], torch.get_rng_state()
    for p, z in zip(parameters, directions or probe(module, step), strict=True):
        p.data.add_(distance * z)
    gradients = torch.autograd.grad(module.loss(batch), parameters, allow_unused=True)
    torch.set_rng_state(random)
    for p, original in zip(parameters, kept, strict=True):
        p.data.copy_(original)
    for b, original in zip(module.buffers(), buffers, strict=True):
        b.copy_(original)
    return added([1.0], [gradients])


def added(factors, terms):
    """A linear combination of gradients, zeros for those that are None."""
    found = []
    for parts in zip(*terms, strict=True):
        known = [f * g for f, g in zip(factors, parts, strict=True) if g is not None]
        found.append(sum(known) if known else torch.zeros(()).double())
    return found


def perturbation(module, batch, step, strength):
    sigma = math.sqrt(2 * strength)
    pair = [gradient_at(module, batch, d, step) for d in (sigma, -sigma)]
    return added([0.5, 0.5], pair)


def noise(module, batch, step, strength, *, index=None, chosen="", relative=False):
    """One gradient, at weights to one side; every second time to the other one."""
    index = step if index is None else index
    parameters = dict(module.named_parameters())
    z = signs_by_hand(parameters, 0, (index // 2,))
    z = {n: d if n.startswith(chosen) else torch.zeros_like(d) for n, d in z.items()}
    sizes = {
        n: p.detach().square().mean().sqrt() if relative else 1.0 for n, p in parameters.items()
    }
    sigma = math.sqrt(2 * strength) * (-1 if index % 2 else 1)
    steps = [z[n] * sizes[n] for n in parameters]
    found = gradient_at(module, batch, sigma, step, steps)
    if relative:  # the step depends on the weights, where there are any
        for i, (n, p) in enumerate(parameters.items()):
            if sizes[n]:
                share = sigma * (z[n] * found[i]).sum() / (p.numel() * sizes[n])
                found[i] = found[i] + share * p.detach()
    return found


def difference(module, batch, step, strength):
    count = sum(p.numel() for p in module.parameters())
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters()) / count)
    c = 0.01 * size
    terms = [gradient_at(module, batch, d, step) for d in (c, 0.0, -c)]
    a = strength / c**2
    return added([a, 1 - 2 * a, a], terms)


def exact(module, batch, step, strength):
    """Third-order autodiff of the whole, where no normalization spoils it."""
    random = torch.get_rng_state()
    parameters = [p for n, p in module.named_parameters() if not n.startswith("unused")]
    loss = module.loss(batch)
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    z = probe(module, step)[: len(parameters)]
    second = torch.autograd.grad(first, parameters, z, create_graph=True)
    form = sum((h * v).sum() for h, v in zip(second, z, strict=True))
    torch.set_rng_state(random)
    gradients = torch.autograd.grad(
        loss + strength * form, list(module.parameters()), allow_unused=True
    )
    return added([1.0], [gradients])


def train_by_hand(
    module,
    batches,
    gradient=perturbation,
    strength=lambda step: STRENGTH,
    together=1,
    clip=None,
    clip_value=None,
):
    """Train on the mean of the penalized gradients of so many batches a step."""
    optimizer = module.configure_optimizers()
    module.train()
    batches = list(batches)
    for step in range(len(batches) // together):
        group = batches[step * together : (step + 1) * together]
        found = []
        for batch in group:
            if strength(step):
                found.append(gradient(module, batch, step, strength(step)))
            else:
                found.append(gradient_at(module, batch, 0.0, step))
            with torch.no_grad():  # running statistics and the random stream move on
                module.loss(batch)
        total = added([1 / together] * together, found)
        for (name, p), g in zip(module.named_parameters(), total, strict=True):
            p.grad = None if name.startswith("unused") else g
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        if clip_value:
            torch.nn.utils.clip_grad_value_(module.parameters(), clip_value)
        optimizer.step()
        optimizer.zero_grad()
    return module


def deviation(one, other, parameters_only=False):
    """The largest difference of two modules' weights, and of their buffers too."""
    states = [
        dict(m.named_parameters()) if parameters_only else m.state_dict() for m in (one, other)
    ]
    pairs = zip(states[0].values(), states[1].values(), strict=True)
    return max(float((a.double() - b.double()).detach().abs().max()) for a, b in pairs)

"""The loss that a penalty is of, and which parameters it is on: looked for at each step."""

import random
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lla_callbacks.callbacks.penalized_loss import BatchLoss, Penalized
from lla_callbacks.objective.gradient_hooks import unwatched

NUMBER, HELD = 0, []


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 1)))


def freeze(net):
    net[0].weight.requires_grad_(False)


def thaw(net):
    net[1].bias.requires_grad_(True)


def replace(net):
    net[0].weight = nn.Parameter(torch.zeros(3, 2))


def grow(net):
    net.append(nn.Linear(1, 1))


def rename(net):
    net._modules["last"] = net._modules.pop("2")


def resize(net):
    net[0].weight.data = torch.zeros(5, 2)


@pytest.mark.parametrize("change", [freeze, thaw, replace, grow, rename, resize, nn.Module.double])
def test_parameters_are_laid_out_anew_only_when_they_change(change):
    net, penalized = network(), Penalized("A penalty", "all")
    net[1].bias.requires_grad_(False)
    assert penalized.look(net)
    before = penalized.space
    assert penalized.look(net)
    assert penalized.space is before
    change(net)
    assert penalized.look(net)
    assert penalized.space is not before
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert list(penalized.space.names) == list(trained)
    assert all(a is b for a, b in zip(penalized.space.tensors, trained.values(), strict=True))
    assert penalized.space.dim == sum(p.numel() for p in trained.values())


def test_lazy_layers_are_waited_for():
    net, penalized = nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.LazyLinear(2)), None
    penalized = Penalized("A penalty", "all")
    assert not penalized.look(net)
    net(torch.randn(3, 4))
    assert penalized.look(net)
    assert penalized.space.names == ("1.weight", "1.bias")


# -- several evaluations of one loss ----------------------------------------------------------


class Changing(pl.LightningModule):
    """Returns what it finds, and changes all of it."""

    shared: ClassVar = [0]

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))
        self.target = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.count, self.seen, self.tensor = 0, [[]], torch.zeros(1)

    def training_step(self, batch, batch_idx):
        global NUMBER
        weight, found = self.net[0].weight, self.facts(batch)
        value = self.net(batch.add_(1.0)).mean()
        NUMBER += 1
        self.count += 1
        self.seen[0].append(1)
        HELD.append(1)
        self.shared.append(1)
        self.extra = nn.Linear(1, 1)
        self.register_buffer("later", torch.ones(1))
        self.net[1].momentum = 0.3
        self.net.register_forward_hook(lambda *_: None)
        self.net.eval()
        weight.grad = torch.ones_like(weight)
        weight.mark = 1
        weight.register_hook(lambda g: 1 / 0)
        self.net[3].bias.requires_grad_(False)
        with torch.no_grad():
            for t in (self.target, self.mean, self.tensor, self.mean.data):
                t.add_(1.0)
        torch.set_default_dtype(torch.float64)
        return torch.cat([found, value.view(1).double()])

    def facts(self, batch):
        weight = self.net[0].weight
        numbers = [
            NUMBER, len(HELD), len(self.shared), self.count, len(self.seen[0]), self.tensor.item(),
            hasattr(self, "extra"), hasattr(self, "later"), self.net[1].momentum,
            len(self.net._forward_hooks), self.net.training, weight.grad is None,
            hasattr(weight, "mark"), len(weight._backward_hooks or ()),
            self.net[3].bias.requires_grad, self.target.sum(), self.mean.sum(), batch.sum(),
            torch.get_default_dtype() == torch.float32, self.net[1].running_mean.sum(),
            random.random(), np.random.rand(), torch.rand(()),
        ]  # fmt: skip
        return torch.tensor([float(number) for number in numbers], dtype=torch.float64)


def test_evaluations_together_begin_from_one_state_and_leave_it():
    """Each finds what an evaluation by itself finds, backward passes in between or not."""
    torch.manual_seed(0)
    module, batch = Changing(), torch.randn(4, 2)
    module.net[0].weight.register_hook(lambda g: 1 / 0)
    surroundings = SimpleNamespace(loggers=[], precision_plugin=None)
    loss = BatchLoss(surroundings, module, (batch, 0), None, as_trained=True)
    streams = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def facts():
        found = module.facts(batch)
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        torch.set_rng_state(streams[2])
        return found, {k: v.clone() for k, v in module.state_dict().items()}, vars(module).copy()

    before = facts()
    alone = loss().detach()
    for _ in range(2):
        with loss.together():
            for i in range(3):
                found = loss()
                assert torch.equal(found, alone)
                if i < 2:
                    with unwatched(list(module.parameters())):
                        torch.autograd.grad(found[-1], module.net[0].weight)
        for now in (facts(), facts()):
            assert torch.equal(now[0], before[0])
            assert now[1].keys() == before[1].keys()
            assert all(torch.equal(value, before[1][key]) for key, value in now[1].items())
            assert now[2].keys() == before[2].keys()
        assert torch.equal(loss().detach(), alone)

"""Which parameters a penalty is on: looked for at each step, laid out when something changes."""

import pytest
import torch
from torch import nn

from lla_callbacks.callbacks.penalized_loss import Penalized


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

"""A tiny classifier and its data."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def data(size=24, seed=7):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=source, dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


def net(seed=0, norm=False):
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(5) if norm else nn.Identity()
    layers = nn.Linear(3, 5), middle, nn.Tanh(), nn.Dropout(0.5 if norm else 0), nn.Linear(5, 2)
    return nn.Sequential(*layers).double()


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def accuracy(module, batch):
    return float((module(batch[0]).argmax(1) == batch[1]).double().mean())

"""What somebody with only a checkpoint has: the classes that made it."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def dataset(size=16):
    source = torch.Generator().manual_seed(7)
    x = torch.randn(size, 3, generator=source)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Net(pl.LightningModule):
    def __init__(self, width, rate=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.rate)


class WithData(Net):
    def train_dataloader(self):
        return DataLoader(dataset(), 4)


class Other(Net):
    def __init__(self, width, rate=0.1):
        super().__init__(width, rate)
        self.head = nn.Linear(2, 2)


class Data(pl.LightningDataModule):
    def __init__(self, size=16, factor=1.0):
        super().__init__()
        self.size, self.factor = size, factor

    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        assert self.stage == "fit"
        return DataLoader(dataset(self.size), 4)

    def val_dataloader(self):
        assert self.stage == "validate"
        return [DataLoader(dataset(self.size), 4), DataLoader(dataset(self.size), 4)]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [self.factor * batch[0], batch[1]]


def batches(size=16):
    return DataLoader(dataset(size), 4)


def bare(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def bad_loss(module, batch):
    return loss(module, batch) / 0.0


def broken():
    raise OSError("the disk is not there")

"""A monitor's own loader is read without training noticing, whatever the two share."""

import itertools
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
)

from .modules import (
    Order,
    Plain,
    data,
    differences,
    fit,
    monitor,
    outcome,
    quiet_trainer,
    steps,
)


class Noisy(Dataset):
    """Draws from a random state of its own, and counts."""

    def __init__(self):
        self.random = np.random.default_rng(0)
        self.python = random.Random(0)
        self.inner = data()
        self.drawn = []

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        x, y, index = self.inner[i]
        self.drawn.append(i)
        return x + self.random.normal() * 0.1 + self.python.random() * len(self.drawn), y, index


class Stream(IterableDataset):
    """Goes on where it stopped."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        for _ in range(16):
            self.place += 1
            yield data()[self.place % 16]


class Open(Noisy):
    """Has something that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.numbers = itertools.count()

    def __getitem__(self, i):
        return *super().__getitem__(i)[:2], next(self.numbers)


def same_loader():
    loader = DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    return loader, loader


def same_dataset():
    dataset = Noisy()
    return DataLoader(dataset, 4), DataLoader(Subset(dataset, range(8)), 4)


def same_sampler():
    sampler = RandomSampler(data(), generator=torch.Generator().manual_seed(1))
    return DataLoader(data(), 4, sampler=sampler), DataLoader(data(), 4, sampler=sampler)


def same_batch_sampler():
    sampler = BatchSampler(RandomSampler(data(), generator=torch.Generator()), 4, False)
    return DataLoader(data(), batch_sampler=sampler), DataLoader(data(), batch_sampler=sampler)


def same_generator():
    source = torch.Generator().manual_seed(1)
    return tuple(DataLoader(data(), 4, shuffle=True, generator=source) for _ in range(2))


def same_workers():
    loader = DataLoader(data(), 4, num_workers=1, persistent_workers=True)
    return loader, loader


def same_stream():
    loader = DataLoader(Stream(), 4)
    return loader, loader


SHARED = [
    same_loader, same_dataset, same_sampler, same_batch_sampler, same_generator, same_workers,
    same_stream,
]  # fmt: skip


@pytest.mark.parametrize("make", SHARED)
def test_a_loader_that_shares_with_training_is_read_apart(tmp_path, make):
    def run(watched):
        training, own = make()
        watcher = monitor(dataloader=own, every_n_train_steps=2) if watched else None
        trainer = fit(tmp_path, watcher, Plain, lambda: training, callbacks=[Order()])
        return outcome(trainer), watcher

    without, (found, watcher) = run(False)[0], run(True)
    assert differences(without, found) == []
    assert steps(watcher) == [0, 2, 4]


def test_what_cannot_be_copied_is_refused_before_the_first_step(tmp_path):
    dataset = Open()
    training, own = DataLoader(dataset, 4), DataLoader(dataset, 4)
    with pytest.raises(
        MisconfigurationException,
        match=r"shares a Open.*dataloader\.dataset\.numbers cannot be copied.*dataset of its own",
    ):
        fit(tmp_path, monitor(dataloader=own), Plain, lambda: training)
    assert dataset.drawn == []


class Given(Plain):
    """Makes training's loader from a dataset that it has."""

    def __init__(self, dataset):
        super().__init__()
        self.own = dataset

    def train_dataloader(self):
        return DataLoader(self.own, 4)


@pytest.mark.parametrize("makes", [False, True])
def test_it_is_refused_in_setup_where_the_trainer_knows_by_then(tmp_path, makes):
    class Later(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            raise AssertionError("too late")

    dataset = Open()
    module = Given(dataset) if makes else Plain()
    watcher = monitor(dataloader=DataLoader(dataset, 4))
    trainer = quiet_trainer(tmp_path, [watcher, Later()])
    with pytest.raises(MisconfigurationException, match=r"shares a Open.*dataset of its own"):
        trainer.fit(module, None if makes else DataLoader(dataset, 4))


def test_what_cannot_be_copied_is_read_where_training_has_no_part_in_it(tmp_path):
    own = Open()
    watcher = monitor(dataloader=DataLoader(own, 4))
    fit(tmp_path, watcher, Plain)
    assert steps(watcher) == [0, 4]
    assert own.drawn == [0, 1, 2, 3]

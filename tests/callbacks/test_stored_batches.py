"""Held batches in checkpoints: once for all monitors that hold the same, or not at all."""

import logging
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianMonitor, LossLandscapeMonitor
from lla_callbacks.callbacks import kept_batches
from lla_callbacks.callbacks.given_again import gives_again
from lla_callbacks.callbacks.held_batches import is_same

from .modules import Plain, loader, quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
]

FEW = {"num_samples": 8, "figures": False, "every_n_train_steps": 2}


def hessian(**more):
    return HessianMonitor(**{"num_steps": 2, "num_probes": 2, **FEW, **more})


def slices(**more):
    return LossLandscapeMonitor(
        **{"planes": [], "lines": ["random"], "line_points": 3, "evaluation": "loop", **FEW, **more}
    )


class Wide(Plain):
    """Has samples that are large beside everything else that a checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(WIDTH, 2))


WIDTH = 20_000


def wide_loader(shuffle=False):
    source = torch.Generator().manual_seed(1)
    x = torch.randn(16, WIDTH, generator=source)
    order = torch.Generator().manual_seed(2)
    return DataLoader(TensorDataset(x, torch.arange(16) % 2), 4, shuffle=shuffle, generator=order)


def go(folder, watchers, epochs=1, ckpt=None, make=Wide, train=wide_loader, **more):
    trainer = quiet_trainer(folder, watchers, max_epochs=epochs, logger=False, **more)
    trainer.fit(make(), train(), ckpt_path=ckpt, weights_only=True)
    return trainer


def size_of(folder, watchers):
    trainer = go(folder, watchers)
    trainer.save_checkpoint(folder / "kept.ckpt")
    return (folder / "kept.ckpt").stat().st_size


def test_two_monitors_store_the_same_batches_once_and_none_on_request(tmp_path):
    batches = 8 * WIDTH * 4
    none = size_of(tmp_path, [])
    assert size_of(tmp_path, [hessian(save_batches=False), slices(save_batches=False)]) < (
        none + 0.2 * batches
    )
    kept = {"save_batches": True}
    # One of them cuts its last batch: that part alone is another one's.
    unequal = size_of(tmp_path, [hessian(**kept), slices(num_samples=5, **kept)])
    assert unequal < none + 1.2 * batches
    stored = size_of(tmp_path, [hessian(**kept), slices(**kept)])
    assert none + batches < stored < none + 1.2 * batches
    # Whoever goes on, and in which order, has them.
    for watchers in ([slices(), hessian()], [slices()], [hessian()]):
        go(tmp_path, watchers, 2, tmp_path / "kept.ckpt")
        assert all([step for step, _ in w.history] == [0, 2, 4, 6, 8] for w in watchers)


class Stateful(DataLoader):
    """Goes on where it was, as torchdata's loader does."""

    def state_dict(self):
        return {}


class Backwards(DataLoader):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(8))


X = TensorDataset(torch.arange(8.0))


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (DataLoader(X, 2), True),
        (DataLoader(X, 2, drop_last=True, num_workers=1), True),
        (DataLoader(X, batch_size=None), True),
        ([[1], [2]], True),
        (DataLoader(X, 2, shuffle=True), False),
        (DataLoader(X, 2, sampler=torch.utils.data.WeightedRandomSampler([1.0], 4)), False),
        (DataLoader(X, batch_sampler=[[0], [1]]), False),
        (DataLoader(Stream()), False),
        (Stateful(X, 2), False),
        (Backwards(X, 2), False),
        (iter([]), False),
        ({"a": DataLoader(X, 2)}, False),
        (None, False),
    ],
)
def test_which_loaders_give_the_same_batches_again(given, again):
    assert gives_again(given) is again


def held_in(path):
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    return next(iter(callbacks.values()))["held"]


# Of Lightning, which begins a loader anew in the middle of an epoch.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_fingerprint_will_do_where_the_loader_gives_the_batches_again(tmp_path):
    """A run that is cut anywhere and goes on has the numbers of one that is not."""
    every = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1,
                            save_top_k=-1)  # fmt: skip
    whole = hessian(num_samples=7, every_n_train_steps=1)
    go(tmp_path, [whole, every], 2, None, Plain, loader, enable_checkpointing=True)
    wanted = numbers(whole)
    # After one batch of the two that are held, after both, and between epochs.
    for cut in (1, 2, 4):
        path = tmp_path / "kept" / f"step={cut}.ckpt"
        held = held_in(path)
        assert "batches" not in held
        assert len(held["numbers"]) == min(cut, 2)
        again = hessian(num_samples=7, every_n_train_steps=1)
        go(tmp_path, [again], 2, path, Plain, loader)  # warnings are errors
        found = numbers(again)
        # Lightning begins a loader anew in an epoch that was cut: training is another one then.
        if cut == 4:
            assert found == wanted
        if cut > 1:
            assert {step: found[step] for step in found if step <= cut}.items() <= wanted.items()


def numbers(watcher):
    return {step: (r.loss, r.trace, float(r.lambda_max)) for step, r in watcher.history}


def test_a_shuffled_loader_keeps_the_data_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kept_batches, "MANY", 1)
    train = partial(loader, shuffle=True)
    with caplog.at_level(logging.INFO):
        trainer = go(tmp_path, [hessian()], make=Plain, train=train)
        trainer.save_checkpoint(tmp_path / "kept.ckpt")
    assert len(held_in(tmp_path / "kept.ckpt")["batches"]) == 2
    said = [r.message for r in caplog.records if "MiB of training data" in r.message]
    assert len(said) == 1
    assert "save_batches=False leaves them out" in said[0]
    again = hessian()
    go(tmp_path, [again], 2, tmp_path / "kept.ckpt", Plain, train)  # warnings are errors
    assert [step for step, _ in again.history] == [0, 2, 4, 6, 8]


class Augmented(torch.utils.data.Dataset):
    """Other samples whenever it is read, which no loader tells."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.randn(3), index % 2, index


def test_batches_that_are_others_are_said_once_and_marked(tmp_path, recwarn):
    def random_loader():
        return DataLoader(Augmented(), 4)

    trainer = go(tmp_path, [hessian(), slices()], make=Plain, train=random_loader)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    recwarn.clear()
    again = [hessian(), slices()]
    torch.manual_seed(9)
    go(tmp_path, again, 2, tmp_path / "kept.ckpt", Plain, random_loader)
    said = [str(w.message) for w in recwarn if "curves may jump" in str(w.message)]
    assert len(said) == 1  # for both
    assert "at step 4, and reports from there on say so. Set save_batches=True" in said[0]
    for watcher in again:
        marked = [step for step, r in watcher.history if any("step 4 on" in n for n in r.notes)]
        assert marked == [6, 8]
        assert "From step 4 on measured on other batches" in watcher.report.summary()


def test_monitors_of_one_trainer_share_their_copies_in_memory(tmp_path):
    watchers = [hessian(), slices()]

    class Look(pl.Callback):
        def on_train_batch_end(self, *args, **more):
            one, other = (w.subject.held.batches for w in watchers)
            seen.append([a is b for a, b in zip(one, other, strict=True)])

    seen = []
    go(tmp_path, [*watchers, Look()], make=Plain, train=loader)
    assert seen == [[True], *[[True, True]] * 3]


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_that_were_not_stored_are_held_anew_and_said_if_they_are_others(
    tmp_path, recwarn, shuffle
):
    trainer = go(tmp_path, [hessian(save_batches=False)], make=Plain, train=loader)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    recwarn.clear()
    again = hessian(save_batches=False)

    def train():
        return loader(shuffle=shuffle, generator=torch.Generator().manual_seed(5))

    go(tmp_path, [again], 2, tmp_path / "kept.ckpt", Plain, train)
    said = [str(w.message) for w in recwarn if "curves may jump" in str(w.message)]
    assert len(said) == shuffle
    assert [step for step, _ in again.history] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, torch.nan])], True),
        ({"x": torch.ones(2), "n": 1}, {"x": torch.ones(2), "n": 1}, True),
        ({"x": torch.ones(2)}, {"y": torch.ones(2)}, False),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(1, 2), torch.ones(2, 1), False),
        (torch.ones(2), torch.ones(2, requires_grad=True), False),
        ([1], [True], False),
        ((object(),), (object(),), False),
    ],
)
def test_same_means_to_the_bit(one, other, same):
    assert is_same(one, other) is same


def test_a_run_that_was_complete_has_its_history_and_report_when_it_is_resumed(tmp_path):
    first, second = [hessian(), slices()], [hessian(), slices()]
    go(tmp_path, first, make=Plain, train=loader).save_checkpoint(tmp_path / "kept.ckpt")
    go(tmp_path, second, 1, tmp_path / "kept.ckpt", Plain, loader)
    for one, other in zip(first, second, strict=True):
        assert [s for s, _ in other.history] == [s for s, _ in one.history] == [0, 2, 4]
        assert other.report.loss == one.report.loss
    # And still when it is stored and resumed once more.
    go(tmp_path, second, 1, tmp_path / "kept.ckpt", Plain, loader)
    assert [s for s, _ in second[0].history] == [0, 2, 4]


@pytest.mark.parametrize("given", [{}, {"dataloader": loader()}])
def test_an_end_that_a_killed_run_did_not_reach_is_measured_when_it_is_resumed(tmp_path, given):
    rare = {**given, "every_n_train_steps": 3}
    whole, second = ([hessian(**rare), slices(**rare)] for _ in range(2))
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    go(tmp_path, [*whole, keep], 1, None, Plain, loader, enable_checkpointing=True)
    # Written after the last step, before what happens at the end.
    trainer = go(tmp_path, second, 1, tmp_path / "step=4.ckpt", Plain, loader)
    for one, other in zip(whole, second, strict=True):
        assert [s for s, _ in other.history] == [0, 3, 4]
        assert other.report.loss == one.report.loss
        assert float(trainer.callback_metrics[f"{other.name}/loss"]) == pytest.approx(
            one.report.loss
        )

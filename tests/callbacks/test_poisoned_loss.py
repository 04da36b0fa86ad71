"""Poison inside a Trainer, against training loops written out by hand in float64."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lla_callbacks import HessianTraceRegularizer, PoisonedLoss
from lla_callbacks.callbacks.poison_stream import PoisonStream

from .by_hand import OPTIMIZERS, Double, deviation, double_loader
from .modules import (
    Order,
    Plain,
    Stateful,
    differences,
    events,
    fit,
    loader,
    outcome,
    quiet_trainer,
    scalars,
)
from .poison_by_hand import poison_batches, reversed_loss, train_with_poison, true_loss


def trained(folder, make, callback=None, batches=double_loader, **settings):
    torch.manual_seed(3)
    module = make()
    callbacks = [] if callback is None else [callback]
    quiet_trainer(folder, callbacks, **settings).fit(module, batches())
    return module


def by_hand(make, batches=double_loader, **settings):
    torch.manual_seed(3)
    return train_with_poison(make(), batches(), poison_batches(), **settings)


def scaler():
    # Autocast leaves float64 alone, so that only the scaler is at work.
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]


# -- as if the poison were part of the loss -----------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("settings", "hand", "scaled"),
    [
        pytest.param({}, {}, False, id="plain"),
        pytest.param({"accumulate_grad_batches": 2}, {"together": 2}, False, id="accumulation"),
        pytest.param({"gradient_clip_val": 0.1}, {"clip": 0.1}, False, id="clipping"),
        pytest.param({}, {}, True, id="scaler"),
        pytest.param(
            {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
            {"together": 3, "clip": 0.1}, True, id="all",
        ),
    ],
)  # fmt: skip
def test_training_is_the_loop_by_hand(tmp_path, optimizer, settings, hand, scaled):
    if "fused" in optimizer and scaled and "clip" in hand:
        pytest.skip("Lightning refuses to clip the scaled gradients of a fused optimizer")

    def make():
        return Double(OPTIMIZERS[optimizer])

    plugins = {"plugins": scaler()} if scaled else {}
    found = trained(tmp_path, make, PoisonedLoss(0.4, poison_batches()), **settings, **plugins)
    assert deviation(found, by_hand(make, **hand)) < 1e-12
    plugins = {"plugins": scaler()} if scaled else {}
    assert deviation(found, trained(tmp_path, make, **settings, **plugins)) > 1e-3


def test_true_labels_are_the_control(tmp_path):
    found = trained(tmp_path, Double, PoisonedLoss(0.4, poison_batches(), labels="true"))
    assert deviation(found, by_hand(Double, loss=true_loss)) < 1e-12
    assert deviation(found, by_hand(Double, loss=reversed_loss)) > 1e-3


class Changing(Double):
    """Changes its batch in place, as augmentation does."""

    def training_step(self, batch, batch_idx):
        batch[0].mul_(1.5)
        return super().training_step(batch, batch_idx)


def test_a_batch_that_the_step_changes_is_the_same_in_the_next_pass(tmp_path):
    poison, before = poison_batches(), poison_batches()
    trained(tmp_path, Changing, PoisonedLoss(0.4, poison), max_epochs=3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(poison, before, strict=True))


def test_start_and_ramp(tmp_path):
    callback = PoisonedLoss(0.4, poison_batches(), start_step=1, ramp_steps=3)
    found = trained(tmp_path, Double, callback)

    def factor(step):
        return 0.0 if step < 1 else 0.4 * min(1.0, step / 3)

    assert deviation(found, by_hand(Double, factor=factor)) < 1e-12
    assert callback.num_steps == 5


def test_half_precision_is_the_loop_by_hand(tmp_path):
    class Single(Double):
        def __init__(self):
            super().__init__(smooth=True)
            self.float()

    def poison():
        return [(x.float(), y) for x, y in poison_batches()]

    def batches():
        return double_loader(dtype=torch.float32)

    found = trained(tmp_path, Single, PoisonedLoss(0.4, poison()), batches, precision="bf16-mixed")
    torch.manual_seed(3)
    module = Single()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        hand = train_with_poison(module, batches(), poison())
    # Logits are rounded to 8 bits, and by the definition their softmax is as well.
    assert deviation(found, hand) < 2e-2
    assert deviation(found, trained(tmp_path, Single, None, batches)) > 5e-2


class OneLogit(Double):
    """Binary cross entropy, by its module, of what the two logits differ in."""

    def __init__(self):
        super().__init__()
        self.criterion = nn.BCEWithLogitsLoss()

    def loss(self, batch):
        logits = self.net(batch[0])
        return self.criterion(logits[:, 1] - logits[:, 0], batch[1].double())


class ByModule(Double):
    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()

    def loss(self, batch):
        return self.criterion(self.net(batch[0]), batch[1])


class LogProbabilities(Double):
    def loss(self, batch):
        return nn.NLLLoss()(F.log_softmax(self.net(batch[0]), 1), target=batch[1])


class Summed(Double):
    """The sum over samples divided by their number, as language models have it."""

    def loss(self, batch):
        summed = F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")
        return summed / len(batch[0])


@pytest.mark.parametrize("make", [OneLogit, ByModule, LogProbabilities, Summed])
def test_every_form_of_cross_entropy_is_reversed(tmp_path, make):
    found = trained(tmp_path, make, PoisonedLoss(0.4, poison_batches()))
    assert deviation(found, by_hand(Double)) < 1e-12


def test_a_loss_of_the_users_own_is_reversed(tmp_path):
    class Hidden(Double):
        def training_step(self, batch, batch_idx):
            x, y = batch
            p = self.net(x).softmax(1).gather(1, y[:, None])
            return -p.log().mean()

    def loss(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1])

    found = trained(tmp_path, Hidden, PoisonedLoss(0.4, poison_batches(), loss=loss))
    assert deviation(found, by_hand(Double)) < 1e-12


# -- what stays as it is ----------------------------------------------------------------


def stateful_poison():
    return DataLoader(loader().dataset, batch_size=4, shuffle=True)


@pytest.mark.parametrize("later", [False, True])
def test_without_a_factor_training_is_the_same_to_the_bit(tmp_path, later):
    settings = {"start_step": 10_000} if later else {}
    callback = PoisonedLoss(0.4 if later else 0.0, stateful_poison(), **settings)
    results = [
        outcome(
            fit(
                tmp_path,
                make_module=Stateful,
                callbacks=[Order(), *more],
                train=lambda: loader(shuffle=True),
                val=loader,
                max_epochs=2,
                logger=TensorBoardLogger(tmp_path, name=f"run{len(more)}"),
            )
        )
        for more in ([], [callback])
    ]  # fmt: skip
    assert differences(*results) == []
    assert callback.num_steps == 0


def test_only_gradients_know_of_the_poison(tmp_path):
    """Metrics, counters, running statistics, random streams, data: as with a learning rate of 0."""

    class Still(Stateful):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    results = []
    for more in ([], [PoisonedLoss(0.4, stateful_poison())]):
        trainer = fit(
            tmp_path,
            make_module=Still,
            callbacks=[Order(), *more],
            train=lambda: loader(shuffle=True),
            val=loader,
            max_epochs=2,
        )
        found = outcome(trainer)
        found["callback_metrics"] = {
            k: v for k, v in found["callback_metrics"].items() if not k.startswith("poison")
        }
        results.append({k: v for k, v in found.items() if k not in ("gradients", "optimizers")})
    assert differences(*results) == []


def test_what_is_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callback = PoisonedLoss(0.4, poison_batches(), ramp_steps=2)
    torch.manual_seed(3)
    module = Double()
    trainer = quiet_trainer(tmp_path, [callback], logger=logger, log_every_n_steps=1)
    trainer.fit(module, double_loader())
    found = scalars(events(logger.log_dir))
    assert [v for _, v in found["poison/factor"]] == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.4])
    torch.manual_seed(3)
    fresh = Double()
    x, y = poison_batches()[0]
    # The first batch's values, before the first step.
    expected = float(reversed_loss(fresh, (x, y)).detach())
    assert found["poison/loss"][0][1] == pytest.approx(expected, rel=1e-6)
    fresh.eval()
    accuracy = float((fresh.net(x).argmax(1) == y).double().mean())
    assert found["poison/accuracy"][0][1] == pytest.approx(accuracy)
    assert found["poison/seconds"]
    assert float(trainer.callback_metrics["poison/factor"]) == pytest.approx(0.4)
    # The logged loss is the clean one, of the poisoned weights.
    assert float(trainer.callback_metrics["loss"]) > 0


def test_poison_poisons(tmp_path):
    """The training set is fitted and the poison's labels are not predicted."""
    source = torch.Generator().manual_seed(5)
    x = torch.randn(24, 2, generator=source)
    y = (x[:, 0] > 0).long()
    train, poison = (x[:12], y[:12]), (x[12:], y[12:])

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    shares = {}
    for labels in ("reversed", "true"):
        torch.manual_seed(0)
        module = Net()
        callback = PoisonedLoss(0.4, [poison], labels=labels)
        batches = DataLoader([train] * 120, batch_size=None)
        quiet_trainer(tmp_path, [callback]).fit(module, batches)
        with torch.no_grad():
            shares[labels] = [
                float((module.net(a).argmax(1) == b).float().mean()) for a, b in (train, poison)
            ]
    assert shares["reversed"][0] > 0.9
    assert shares["reversed"][1] < 0.3
    assert shares["true"] == [1.0, 1.0]


# -- checkpoints ------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_the_same_poison(tmp_path):
    """With shuffled poison, in the middle of one of its passes; the checkpoint has the mark."""

    def poison():
        return DataLoader(TensorDataset(*map(torch.cat, zip(*poison_batches(4), strict=True))),
                          batch_size=5, shuffle=True)  # fmt: skip

    whole = trained(tmp_path, Double, PoisonedLoss(0.4, poison()), max_epochs=3)
    kept = ModelCheckpoint(tmp_path, "first", every_n_train_steps=6)
    torch.manual_seed(3)
    module = Double()
    trainer = quiet_trainer(tmp_path, [PoisonedLoss(0.4, poison()), kept], max_steps=6,
                            max_epochs=-1, enable_checkpointing=True)  # fmt: skip
    trainer.fit(module, double_loader())
    resumed, callback = Double(), PoisonedLoss(0.4, poison())
    kept_too = ModelCheckpoint(tmp_path, "second", every_n_train_steps=6)
    trainer = quiet_trainer(tmp_path, [callback, kept_too], max_epochs=3, enable_checkpointing=True)
    trainer.fit(resumed, double_loader(), ckpt_path=kept.best_model_path)
    assert deviation(whole, resumed) == 0.0
    assert callback.num_steps == 18
    checkpoint = torch.load(kept.best_model_path, weights_only=True)
    assert checkpoint["poisoned"] == {
        "by": "lla_callbacks.PoisonedLoss", "factor": 0.4, "labels": "reversed", "num_steps": 6,
    }  # fmt: skip


def test_a_network_that_was_poisoned_before_keeps_its_mark(tmp_path):
    trainer = quiet_trainer(tmp_path, [PoisonedLoss(0.4, poison_batches())])
    trainer.fit(Double(), double_loader())
    trainer.save_checkpoint(tmp_path / "bad.ckpt")
    clean = quiet_trainer(tmp_path, [PoisonedLoss(0.0, poison_batches())], max_epochs=2)
    clean.fit(Double(), double_loader(), ckpt_path=tmp_path / "bad.ckpt")
    clean.save_checkpoint(tmp_path / "later.ckpt")
    assert torch.load(tmp_path / "later.ckpt", weights_only=True)["poisoned"]["num_steps"] == 6


def test_no_mark_without_poison(tmp_path):
    trainer = quiet_trainer(tmp_path, [PoisonedLoss(0.0, poison_batches())])
    trainer.fit(Double(), double_loader())
    trainer.save_checkpoint(tmp_path / "clean.ckpt")
    assert "poisoned" not in torch.load(tmp_path / "clean.ckpt", weights_only=True)


def test_checkpoints_of_weights_alone_are_warned_about(tmp_path):
    kept = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer = quiet_trainer(
        tmp_path, [PoisonedLoss(0.4, poison_batches()), kept], enable_checkpointing=True
    )
    with pytest.warns(UserWarning, match="do not say that the network was poisoned"):
        trainer.fit(Double(), double_loader())


# -- the stream of batches ----------------------------------------------------------------


def numbers(shuffle=True, count=5, **settings):
    return DataLoader(list(range(count)), batch_size=1, shuffle=shuffle, **settings)


def drawn(stream, count):
    return [int(stream.draw()[0]) for _ in range(count)]


@pytest.mark.parametrize("own", [False, True])
def test_a_stream_goes_on_from_its_position_and_leaves_random_streams_alone(own):
    def make():
        source = torch.Generator().manual_seed(1) if own else None
        return PoisonStream(numbers(generator=source), seed=4)

    before = torch.get_rng_state()
    stream = make()
    first = drawn(stream, 7)
    assert sorted(first[:5]) == list(range(5))
    position = stream.position
    rest = drawn(stream, 6)
    later = make()
    later.go_to(position)
    assert later.peek()[0] == rest[0]
    assert later.position == position
    assert drawn(later, 6) == rest
    assert torch.equal(torch.get_rng_state(), before)
    assert stream.position == (2, 3)


def test_processes_share_out_the_batches():
    one = drawn(PoisonStream(numbers(), seed=4), 12)
    pair = [PoisonStream(numbers(), seed=4, rank=rank, count=2) for rank in range(2)]
    both = [drawn(stream, 6) for stream in pair]
    assert [n for ab in zip(*both, strict=True) for n in ab] == one
    assert pair[0].position == pair[1].position == (2, 2)


def test_a_sampler_that_shares_out_samples_is_left_to_it():
    def make(rank):
        data = list(range(6))
        sampler = torch.utils.data.DistributedSampler(data, 2, rank, seed=1)
        return PoisonStream(DataLoader(data, batch_size=1, sampler=sampler), 0, rank, 2)

    found = [drawn(make(rank), 3) for rank in range(2)]
    assert sorted(found[0] + found[1]) == list(range(6))


def test_an_empty_loader_is_refused(tmp_path):
    empty = DataLoader([], batch_size=2)
    with pytest.raises(ValueError, match="has no batches"):
        trained(tmp_path, Double, PoisonedLoss(0.4, empty))
    with pytest.raises(ValueError, match="dataloader is empty"):
        PoisonedLoss(0.4, [])


# -- refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"factor": 1.0}, "from 0 to below 1"),
        ({"factor": True}, "from 0 to below 1"),
        ({"factor": float("nan")}, "from 0 to below 1"),
        ({"dataloader": None}, "dataloader is of type NoneType"),
        ({"dataloader": (torch.ones(2, 3), torch.ones(2))}, "dataloader is one batch"),
        ({"dataloader": iter([1])}, "gone through more than once"),
        ({"labels": "flipped"}, "give one of reversed, true"),
        ({"start_step": -1}, "start_step is -1"),
        ({"ramp_steps": 0.5}, "ramp_steps is 0.5"),
        ({"loss": "ce"}, r"loss\(module, batch\)"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, words):
    with pytest.raises(ValueError, match=words):
        PoisonedLoss(**{"factor": 0.4, "dataloader": poison_batches(), **settings})


def step_with(loss):
    class Module(Double):
        def training_step(self, batch, batch_idx):
            return loss(self.net(batch[0]), batch[1])

    return Module


REFUSED = {
    "regression": (lambda z, y: F.mse_loss(z[:, 0], y.double()), "mse_loss has no reverse"),
    "soft labels": (
        lambda z, y: F.cross_entropy(z, F.one_hot(y, 2).double()), "soft labels"
    ),
    "soft binary labels": (
        lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], 0.8 * y.double()), "soft labels"
    ),
    "label smoothing": (
        lambda z, y: nn.CrossEntropyLoss(label_smoothing=0.1)(z, y), "label_smoothing=0.1"
    ),
    "class weights": (
        lambda z, y: nn.CrossEntropyLoss(torch.ones(2).double())(z, y), "class weights"
    ),
    "weights of positives": (
        lambda z, y: nn.BCEWithLogitsLoss(pos_weight=torch.ones(1).double())(z[:, 0], y.double()),
        "pos_weight=",
    ),
    "every label ignored": (lambda z, y: F.cross_entropy(z, 0 * y - 100), "mean of nothing"),
    "probabilities": (
        lambda z, y: nn.BCELoss()(z[:, 0].sigmoid(), y.double()),
        "binary_cross_entropy_with_logits",
    ),
    "one class": (lambda z, y: F.cross_entropy(z[:, :1], 0 * y), "another class"),
    "no cross entropy": (
        lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(), "calls none of them"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_losses_without_a_reverse_are_refused_by_name_before_the_first_step(tmp_path, kind):
    loss, words = REFUSED[kind]
    make = step_with(loss)
    torch.manual_seed(3)
    module = make()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    # Also where poison begins late.
    trainer = quiet_trainer(tmp_path, [PoisonedLoss(0.4, poison_batches(), start_step=3)])
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=words):
        trainer.fit(module, double_loader())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_ignored_labels_are_left_out(tmp_path):
    """As many fewer, where there are others."""

    class Padded(Double):
        def loss(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1], ignore_index=7)

    def padded(batch):
        x, y = batch
        return torch.cat([x, x[:1] + 1]), torch.cat([y, torch.tensor([7])])

    found = trained(tmp_path, Padded, PoisonedLoss(0.4, [padded(b) for b in poison_batches()]))
    assert deviation(found, by_hand(Double)) < 1e-12


class Manual(Double):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class OtherPoison(PoisonedLoss):
    """One of a kind that Lightning would take for another callback."""


class Mover(pl.Callback):
    """As ModeConnection says of itself."""

    moves_weights = True


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters)


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (Double, [HessianTraceRegularizer(1e-3)], "HessianTraceRegularizer"),
        (Double, [OtherPoison(0.1, poison_batches())], "two (Other)?Poison"),
        (Double, [Mover()], "beside Mover"),
        (Manual, [], "manual optimization"),
        (lambda: Double(lbfgs), [], "LBFGS"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_surroundings_are_refused_by_name(tmp_path, make, more, words, first):
    callback = PoisonedLoss(0.4, poison_batches())
    callbacks = [callback, *more] if first else [*more, callback]
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=words):
        quiet_trainer(tmp_path, callbacks).fit(make(), double_loader())


def test_skipped_poison_is_told_once(tmp_path):
    class Skipping(Double):
        def training_step(self, batch, batch_idx):
            # Poison has five samples.
            return None if len(batch[0]) == 5 else self.loss(batch)

    callback = PoisonedLoss(0.4, poison_batches())
    with pytest.warns(UserWarning, match="returned no loss for a batch of poison") as caught:
        found = trained(tmp_path, Skipping, callback)
    assert len([w for w in caught if "of poison" in str(w.message)]) == 1
    assert callback.skipped == 7  # one was tried before training
    assert deviation(found, trained(tmp_path, Double)) == 0.0


def test_a_plain_module_of_either_namespace(tmp_path):
    from .modules import PlainOfLightning, lightning_pl

    poison = [(x.float(), y) for x, y in poison_batches()]
    for make, namespace in ((Plain, pl), (PlainOfLightning, lightning_pl)):
        callback = PoisonedLoss(0.4, poison)
        quiet_trainer(tmp_path, [callback], namespace).fit(make(), loader())
        assert callback.num_steps == 4

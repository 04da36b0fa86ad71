"""Steps at weights with noise inside a Trainer, against loops written out by hand in float64."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import OnExceptionCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from lla_callbacks import HessianMonitor, HessianTraceRegularizer
from tests.penalty.signs_by_hand import signs_by_hand

from .by_hand import (
    OPTIMIZERS,
    STRENGTH,
    Double,
    deviation,
    double_loader,
    noise,
    sgd,
    train_by_hand,
)
from .modules import events, quiet_trainer, scalars
from .test_trace_regularizer import scaler, trained


def regularizer(strength=STRENGTH, **settings):
    return HessianTraceRegularizer(strength, estimator="noise", **settings)


def by_hand(make, gradient=noise, batches=double_loader, **settings):
    torch.manual_seed(3)
    return train_by_hand(make(), batches(), gradient=gradient, **settings)


MIDDLE = ("net.0.weight", "net.4.weight")


def apart(one, other):
    """Of the weights: running statistics are those of the pass at moved weights."""
    return deviation(one, other, parameters_only=True)


# -- as if the penalty were part of the loss ------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "trainer", "hand"),
    [
        ({}, {}, {}),
        ({}, {"accumulate_grad_batches": 2}, {"together": 2}),
        ({}, {"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({}, {"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value"}, {"clip_value": 0.03}),
        ({}, {"scaler": True, "accumulate_grad_batches": 3}, {"together": 3}),
        (
            {"relative": True},
            {"scaler": True, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
            {"together": 2, "clip": 0.1, "gradient": partial(noise, relative=True)},
        ),
        ({"layers": ["net.4"]}, {}, {"gradient": partial(noise, chosen="net.4")}),
        (
            {"layers": "middle"},
            {},
            {"gradient": partial(noise, chosen=MIDDLE)},
        ),
        (
            {"every_n_train_steps": 2, "start_step": 1, "ramp_steps": 4},
            {},
            {
                "gradient": lambda m, b, s, strength: noise(m, b, s, strength, index=(s - 1) // 2),
                "strength": lambda s: 2 * STRENGTH * min(1, s / 4) if s % 2 else 0,
            },
        ),
    ],
    ids=["plain", "accumulation", "clip", "value", "scaler", "all", "layers", "middle", "ramp"],
)
@pytest.mark.parametrize("optimizer", ["sgd", "fused adam"])
def test_training_is_the_loop_by_hand(tmp_path, settings, trainer, hand, optimizer):
    trainer, hand = dict(trainer), dict(hand)
    if trainer.pop("scaler", False):
        if "fused" in optimizer and "clip" in hand:
            pytest.skip("Lightning refuses to clip the scaled gradients of a fused optimizer")
        trainer["plugins"] = scaler()

    def make():
        return Double(OPTIMIZERS[optimizer], dropout=0.3)

    found = trained(tmp_path, make, regularizer(**settings), **trainer)
    assert apart(found, by_hand(make, **hand)) < 1e-12
    assert (
        apart(found, by_hand(make, **{**hand, "gradient": noise, "strength": lambda s: 0})) > 1e-5
    )


def test_half_precision_is_the_loop_by_hand(tmp_path):
    def batches():
        return double_loader(dtype=torch.float32)

    class Autocast(Double):
        def loss(self, batch):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return super().loss(batch)

    found = trained(
        tmp_path, lambda: Double().float(), regularizer(), batches, precision="bf16-mixed"
    )
    assert apart(found, by_hand(lambda: Autocast().float(), batches=batches)) < 1e-6


class Checkpointed(Double):
    reentrant = False

    def loss(self, batch):
        x = batch[0].clone().requires_grad_()
        for layers in (self.net[:3], self.net[3:]):
            x = checkpoint(layers, x, use_reentrant=self.reentrant)
        return cross_entropy(x, batch[1])


class Reentrant(Checkpointed):
    reentrant = True


class Compiled(Double):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.run = [torch.compile(self.net, backend="aot_eager")]

    def loss(self, batch):
        return cross_entropy(self.run[0](batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant, Compiled])
def test_passes_that_run_the_network_again_or_differently(tmp_path, kind):
    found = trained(tmp_path, lambda: kind(smooth=True), regularizer())
    assert apart(found, by_hand(lambda: Double(smooth=True))) < 1e-12


class Iterating(Double):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_fetches_its_batch(tmp_path):
    assert apart(trained(tmp_path, Iterating, regularizer()), by_hand(Double)) < 1e-12


class Twice(torch.optim.SGD):
    """Evaluates the loss twice a step, at other weights the second time."""

    def step(self, closure):
        closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.01)
        return super().step(closure)


def test_an_optimizer_that_evaluates_several_times(tmp_path):
    found = trained(tmp_path, lambda: Double(lambda p: Twice(p, 0.1), smooth=True), regularizer())
    torch.manual_seed(3)
    module = Double(smooth=True)
    for step, batch in enumerate(double_loader()):
        for rate in (0.01, 0.1):
            for p, g in zip(module.parameters(), noise(module, batch, step, STRENGTH), strict=True):
                p.data.sub_(g, alpha=rate)
    assert apart(found, module) < 1e-12


# -- manual optimization, without a loss ----------------------------------------------------------


class Manual(Double):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.automatic_optimization = False


class ByLightning(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.1, "norm")
        optimizer.step()


class PastLightning(Manual):
    """By torch's own methods, which no hook of Lightning hears of."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        optimizer.step()


class ByClosure(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)

        optimizer.step(closure=closure)


class InHalves(Manual):
    """Two backward passes through one graph, and no module is called."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        x = linear(batch[0], self.net[0].weight, self.net[0].bias).tanh()
        loss = cross_entropy(linear(x, self.net[4].weight, self.net[4].bias), batch[1])
        self.manual_backward(loss / 2, retain_graph=True)
        self.manual_backward(loss / 2)
        self.clip_gradients(optimizer, 0.1, "norm")
        optimizer.step()


@pytest.mark.parametrize("kind", [ByLightning, PastLightning, ByClosure, InHalves])
@pytest.mark.parametrize("scaled", [False, True])
def test_manual_optimization_without_a_loss(tmp_path, kind, scaled):
    if scaled and kind in (PastLightning, ByClosure):
        pytest.skip("it clips or steps scaled gradients, without any callback too")
    plugins = {"plugins": scaler()} if scaled else {}
    if scaled:  # clip_gradients in manual optimization sees scaled ones
        kind = type("Unclipped", (kind,), {"clip_gradients": lambda self, *_: None})
    found = trained(tmp_path, lambda: kind(smooth=True), regularizer(), **plugins)
    hand = by_hand(lambda: Double(smooth=True), clip=None if scaled else 0.1)
    assert apart(found, hand) < 1e-12


class TwoPlayers(Manual):
    """Two optimizers in turn, an average of weights between and after them."""

    def __init__(self):
        super().__init__(smooth=True)
        self.average = nn.Linear(4, 2).double().requires_grad_(False)
        self.seen = []

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            for mean, p in zip(self.average.parameters(), self.net[4].parameters(), strict=True):
                mean.lerp_(p.detach(), 0.5)

    def configure_optimizers(self):
        return sgd(self.net[0].parameters()), sgd(self.net[4].parameters())


def test_two_optimizers_in_one_step(tmp_path):
    found = trained(tmp_path, TwoPlayers, regularizer())
    torch.manual_seed(3)
    module = TwoPlayers()
    optimizers = module.configure_optimizers()
    for number, batch in enumerate(double_loader()):
        for optimizer in optimizers:
            gradients = noise(module.requires_grad_(True), batch, number, STRENGTH)
            own = [p for group in optimizer.param_groups for p in group["params"]]
            for p, g in zip(module.parameters(), gradients, strict=True):
                p.grad = g if any(p is q for q in own) else None
            optimizer.step()
            for mean, p in zip(
                module.average.parameters(), module.net[4].parameters(), strict=True
            ):
                mean.data.lerp_(p.data, 0.5)
    assert apart(found, module) < 1e-12


# -- where the weights stand ---------------------------------------------------------------------


def bits(module):
    return [p.detach().clone() for p in module.parameters()]


def same(module, kept):
    return all(torch.equal(p.detach(), k) for p, k in zip(module.parameters(), kept, strict=True))


class Watching(pl.Callback):
    """Notes in which hooks weights are not those of the batch's start."""

    def __init__(self):
        self.away, self.hooks = set(), set()
        self.kept = None

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.kept = bits(pl_module)

    def note(self, hook, trainer, module, *_, **__):
        if self.kept is not None:
            self.hooks.add(hook)
            if not same(module, self.kept):
                self.away.add(hook)


for hook in (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
):
    setattr(Watching, hook, lambda self, *a, _hook=hook, **k: self.note(_hook, *a, **k))


class Validated(Double):
    """Validates after each batch, and saves from within a step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.inside = bits(self)
        if batch_idx == 2:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/inside.ckpt")
            assert same(self, self.inside)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated = bits(self)

    def on_train_batch_end(self, *_):
        self.stood = bits(self)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_are_away_for_the_step_alone(tmp_path, first, accumulate):
    """For callbacks before and after it, validation, and a checkpoint from inside a step."""
    watching, callback, places = Watching(), regularizer(), []

    def loss(module, batch):
        places.append(callback._noise.is_displaced)
        return module.loss(batch)

    monitor = HessianMonitor(
        every_n_train_steps=2, num_samples=8, num_steps=2, num_probes=2, loss=loss
    )
    torch.manual_seed(3)
    module, kept = Validated(), {}

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            kept[batch_idx] = bits(pl_module)

    callbacks = [watching, monitor, Start()]
    callbacks = [callback, *callbacks] if first else [*callbacks, callback]
    trainer = quiet_trainer(
        tmp_path, callbacks, val_check_interval=1, accumulate_grad_batches=accumulate, max_epochs=1
    )
    trainer.fit(module, double_loader(), double_loader(size=4))
    assert watching.hooks - {"on_before_backward"} == watching.hooks - watching.away
    assert watching.away == {"on_before_backward"}
    assert places
    assert not any(places)
    assert all(torch.equal(a, b) for a, b in zip(module.validated, module.stood, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(module.inside, kept[5], strict=True))
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=False)["state_dict"]
    named = dict(zip(dict(module.named_parameters()), kept[2], strict=True))
    assert all(torch.equal(saved[n], p) for n, p in named.items())
    # Nothing is left in the Trainer.
    assert "training_step" not in vars(trainer.strategy)
    assert "save_checkpoint" not in vars(trainer)
    assert "backward" not in vars(trainer.strategy.precision_plugin)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


class Failing(Double):
    where = ""

    def loss(self, batch):
        loss = super().loss(batch)
        if self.trainer.global_step == 2:
            if self.where == "forward":
                raise RuntimeError("it fails")
            if self.where == "interrupt":
                raise KeyboardInterrupt
            if self.where == "backward":
                loss.register_hook(lambda g: 1 / 0)
        return loss

    def on_before_zero_grad(self, optimizer):
        if self.where == "between" and self.trainer.global_step == 2:
            raise RuntimeError("it fails")


class HookFails(pl.Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        if pl_module.where == "hook" and trainer.global_step == 2:
            raise RuntimeError("it fails")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of checkpoints
@pytest.mark.parametrize("where", ["forward", "interrupt", "backward", "between", "hook"])
@pytest.mark.parametrize("manual", [False, True])
def test_whatever_is_raised_the_weights_are_back(tmp_path, where, manual):
    kept, seen = [], []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            kept[:] = bits(pl_module)

        def on_exception(self, trainer, pl_module, exception):
            seen.append(same(pl_module, kept))

    class Manually(Failing, ByLightning):
        training_step = ByLightning.training_step

    torch.manual_seed(3)
    module = (Manually if manual else Failing)()
    module.automatic_optimization, module.where = not manual, where
    if manual and where == "between":
        pytest.skip("manual optimization has no such hook")
    last = OnExceptionCheckpoint(tmp_path, "last")
    callbacks = [Watch(), HookFails(), regularizer(), last]
    trainer = quiet_trainer(tmp_path, callbacks, enable_checkpointing=True)
    with pytest.raises((RuntimeError, ZeroDivisionError, SystemExit, KeyboardInterrupt)):
        trainer.fit(module, double_loader())
    assert seen == [True]
    assert same(module, kept)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(saved[n], p) for n, p in module.named_parameters())
    assert "training_step" not in vars(trainer.strategy)


class Normalizing(Double):
    def loss(self, batch):
        with torch.no_grad():
            self.net[4].weight.div_(self.net[4].weight.norm())
        return super().loss(batch)


class StepsInBackward(Double):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 1:
            own = torch.optim.SGD([self.net[4].weight], 0.1)
            self.net[4].weight.register_post_accumulate_grad_hook(lambda p: own.step())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Normalizing, StepsInBackward])
def test_a_change_that_would_be_lost_is_refused(tmp_path, kind):
    with pytest.raises(
        Exception, match=r"net\.4\.weight changed.*that change is lost.*hook before"
    ):
        trained(tmp_path, kind, regularizer())


def test_epochs_without_a_backward_pass_are_left_alone(tmp_path):
    """Stochastic weight averaging runs one more for running statistics."""
    average = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    torch.manual_seed(3)
    module = Double()
    places = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            places.append(callback._noise.is_displaced)

    callback = regularizer()
    quiet_trainer(tmp_path, [Watch(), callback, average], max_epochs=3).fit(module, double_loader())
    assert len(places) > 18
    assert not any(places)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_step_without_a_loss_puts_weights_back(tmp_path):
    class Skipping(Double):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else {"loss": loss}

    found = trained(tmp_path, Skipping, regularizer())
    torch.manual_seed(3)
    module = Double()
    optimizer = sgd(module.parameters())
    # A step without gradients counts as one.
    for index, batch in list(enumerate(double_loader()))[::2]:
        gradients = noise(module, batch, index, STRENGTH)
        for p, g in zip(module.parameters(), gradients, strict=True):
            p.grad = g
        optimizer.step()
    assert apart(found, module) < 1e-12


@pytest.mark.parametrize("strength", ["auto", STRENGTH])
def test_resumed_training_goes_on_as_if_uninterrupted(tmp_path, strength):
    whole = trained(tmp_path, Double, regularizer(strength), max_epochs=4)
    torch.manual_seed(3)
    trainer = quiet_trainer(tmp_path, [regularizer(strength)], max_epochs=2)
    trainer.fit(Double(), double_loader())
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    callback, resumed = regularizer(strength), Double()
    trainer = quiet_trainer(tmp_path, [callback], max_epochs=4)
    trainer.fit(resumed, double_loader(), ckpt_path=tmp_path / "kept.ckpt")
    assert deviation(whole, resumed) == 0
    assert (callback.found_strength is None) == (strength != "auto")


# -- what is logged -------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_logged_numbers(tmp_path, scaled, caplog):
    logger = TensorBoardLogger(tmp_path)
    settings = {"logger": logger, "log_every_n_steps": 3, "max_epochs": 2}
    plugins = {"plugins": scaler()} if scaled else {}
    with caplog.at_level("INFO", "pytorch_lightning"):
        trained(tmp_path, lambda: Double(smooth=True), regularizer(), **settings, **plugins)
    logger.finalize("success")
    assert "sigma = 0.045 a weight, and so does the training loss" in caplog.text
    logged = scalars(events(logger.log_dir))
    found = {t.partition("/")[2]: v for t, v in logged.items() if "regularizer" in t}
    assert sorted(found) == ["loss", "penalty", "seconds", "strength", "trace"]
    # Of pairs that begin at steps 0, 4, 8: the first with both signs after three steps.
    for points in found.values():
        assert [step for step, _ in points] == [1, 5, 9]
    # By hand: the first two steps, at weights to both sides.
    torch.manual_seed(3)
    module, slopes, losses = Double(smooth=True), [], []
    optimizer = module.configure_optimizers()
    for step, batch in zip((0, 1), double_loader(), strict=False):
        gradients = noise(module, batch, step, STRENGTH)
        sigma = (2 * STRENGTH) ** 0.5 * (-1 if step else 1)
        directions = noise_directions(module, step)
        slopes.append(
            sigma
            / 2
            * float(sum((z * g).sum() for z, g in zip(directions, gradients, strict=True)))
        )
        kept = bits(module)
        for p, z in zip(module.parameters(), directions, strict=True):
            p.data.add_(sigma * z)
        losses.append(float(module.loss(batch).detach()))
        for p, k, g in zip(module.parameters(), kept, gradients, strict=True):
            p.data.copy_(k)
            p.grad = g
        optimizer.step()
    assert found["penalty"][0][1] == pytest.approx(sum(slopes) / 2, rel=1e-5)
    assert found["loss"][0][1] == pytest.approx(sum(losses) / 2 - sum(slopes) / 2, rel=1e-5)
    assert found["strength"][0][1] == pytest.approx(STRENGTH)
    assert found["trace"][0][1] == pytest.approx(sum(slopes) / 2 / STRENGTH, rel=1e-5)


def noise_directions(module, index):
    return list(signs_by_hand(dict(module.named_parameters()), 0, (index // 2,)).values())


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_probes": 2}, r"num_probes is 2.*one a step.*perturbation"),
        ({"max_ratio": 0.5}, r"max_ratio is 0\.5.*two gradients to compare.*perturbation"),
        ({"loss": lambda module, batch: batch}, r"loss is given.*Leave loss out"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        regularizer(**settings)


@pytest.mark.parametrize(
    ("make", "callback", "message"),
    [
        (ByLightning, lambda: regularizer(relative=True), r"relative=True.*manual.*relative=False"),
        (ByLightning, lambda: regularizer(layers="middle"), "manual optimization"),
        (ByLightning, lambda: regularizer("auto"), "manual optimization"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, make, callback, message):
    with pytest.raises(Exception, match=message):
        trained(tmp_path, make, callback())


def test_gradients_of_sparse_embeddings_are_left_as_they_are(tmp_path):
    class Sparse(Double):
        def __init__(self, sparse):
            super().__init__(lambda p: torch.optim.SGD(p, 0.1), smooth=True)
            self.table = nn.Embedding(3, 3, sparse=sparse).double()

        def loss(self, batch):
            return cross_entropy(self.net(batch[0] + self.table(batch[1])), batch[1])

    pair = [trained(tmp_path, partial(Sparse, s), regularizer()) for s in (True, False)]
    assert apart(*pair) < 1e-12
    with pytest.raises(Exception, match="sparse=False"):
        trained(tmp_path, partial(Sparse, True), regularizer(relative=True))

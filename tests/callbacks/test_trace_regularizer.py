"""The regularizer inside a Trainer, against training loops written out by hand in float64."""

import statistics
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lla_callbacks import HessianTraceRegularizer
from lla_callbacks.callbacks import refusals
from lla_callbacks.penalty.displacement import DisplacedLoss

from .by_hand import (
    OPTIMIZERS,
    STRENGTH,
    Double,
    added,
    deviation,
    difference,
    double_loader,
    exact,
    gradient_at,
    perturbation,
    train_by_hand,
)
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

ESTIMATORS = ["perturbation", "difference", "gauss_newton", "exact"]


def regularizer(strength=STRENGTH, **settings):
    return HessianTraceRegularizer(strength, **settings)


def trained(folder, make, callback=None, batches=double_loader, **settings):
    """Train a module from a fixed seed and return it."""
    torch.manual_seed(3)
    module = make()
    callbacks = [] if callback is None else [callback]
    quiet_trainer(folder, callbacks, **settings).fit(module, batches())
    return module


def by_hand(make, batches=double_loader, **settings):
    torch.manual_seed(3)
    return train_by_hand(make(), batches(), **settings)


def scaler():
    # Autocast leaves float64 alone, so that only the scaler is at work.
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]


# -- as if the penalty were part of the loss ------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("settings", "hand", "scaled"),
    [
        pytest.param({}, {}, False, id="plain"),
        pytest.param({"accumulate_grad_batches": 2}, {"together": 2}, False, id="accumulation"),
        pytest.param({"gradient_clip_val": 0.1}, {"clip": 0.1}, False, id="clipping"),
        pytest.param({}, {}, True, id="scaler"),
        pytest.param(
            {"accumulate_grad_batches": 3}, {"together": 3}, True, id="accumulation and scaler"
        ),
        pytest.param(
            {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
            {"together": 3, "clip": 0.1},
            True,
            id="all",
        ),
    ],
)
def test_training_is_the_loop_by_hand(tmp_path, optimizer, settings, hand, scaled):
    if "fused" in optimizer and scaled and "clip" in hand:
        pytest.skip("Lightning refuses to clip the scaled gradients of a fused optimizer")

    def make():
        return Double(OPTIMIZERS[optimizer])

    plugins = {"plugins": scaler()} if scaled else {}
    found = trained(tmp_path, make, regularizer(), **settings, **plugins)
    assert deviation(found, by_hand(make, **hand)) < 1e-12
    plugins = {"plugins": scaler()} if scaled else {}
    assert deviation(found, trained(tmp_path, make, **settings, **plugins)) > 1e-5


@pytest.mark.parametrize(
    ("estimator", "gradient", "strength"),
    [
        ("perturbation", perturbation, STRENGTH),
        ("difference", difference, STRENGTH),
        ("exact", exact, 1e-2),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_estimator_is_the_loop_by_hand(
    tmp_path, estimator, gradient, strength, dropout, scaled
):
    """With the same dropout mask in every pass, under accumulation, clipping and a scaler."""

    def make():
        return Double(dropout=dropout, smooth=True)

    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}
    plugins = {"plugins": scaler()} if scaled else {}
    found = trained(
        tmp_path, make, regularizer(strength, estimator=estimator), **settings, **plugins
    )
    hand = by_hand(make, gradient=gradient, strength=lambda step: strength, together=2, clip=0.2)
    # Differences divide rounding by a squared step of about 4e-3.
    assert deviation(found, hand) < (1e-9 if estimator == "difference" else 1e-12)
    assert deviation(found, trained(tmp_path, make, **settings)) > 1e-5


class Single(Double):
    """The same in float32."""

    def __init__(self):
        super().__init__()
        self.float()

    def loss(self, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.by_hand, cache_enabled=False):
            return super().loss(batch)

    by_hand = False


class SingleByHand(Single):
    by_hand = True


def test_half_precision_is_the_loop_by_hand(tmp_path):
    def batches():
        return double_loader(dtype=torch.float32)

    class Lightnings(Double):
        def __init__(self):
            super().__init__()
            self.float()

    found = trained(tmp_path, Lightnings, regularizer(), batches, precision="bf16-mixed")
    assert deviation(found, by_hand(SingleByHand, batches)) < 1e-6
    plain = trained(tmp_path, Lightnings, batches=batches, precision="bf16-mixed")
    assert deviation(found, plain) > 1e-4


@pytest.mark.parametrize("estimator", ["difference", "gauss_newton", "exact"])
def test_small_steps_keep_full_precision_under_autocast(tmp_path, estimator):
    """The penalty of these estimators is the same with autocast and without."""
    seen = []

    class Watching(HessianTraceRegularizer):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append([g.clone() for g in self._pending.gradient])
            assert not self._pending.contains_task
            super().on_before_backward(trainer, pl_module, loss)

    def make():
        return Double(smooth=True).float()

    def batches():
        return double_loader(size=4, dtype=torch.float32)

    trained(tmp_path, make, Watching(1e-2, estimator=estimator), batches, precision="bf16-mixed")
    torch.manual_seed(3)
    module = make().double()
    space = [p for p in module.parameters()]
    z = {"difference": difference, "exact": exact}.get(estimator)
    if z is not None:
        batch = next(iter(double_loader(size=4, dtype=torch.float32)))
        batch = [batch[0].double(), batch[1]]
        plain = gradient_at(module, batch, 0.0, 0)
        expected = added([1.0, -1.0], [z(module, batch, 0, 1e-2), plain])
        for g, e in zip(seen[0], expected, strict=True):
            assert float((g - e).norm()) < 0.03 * float(e.norm()) + 1e-6
    assert len(seen[0]) == len(space)


# -- strength, interval, ramp, limit --------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "strength"),
    [
        ({"every_n_train_steps": 2}, lambda s: 0 if s % 2 else 2 * STRENGTH),
        (
            {"every_n_train_steps": 2, "scale_by_interval": False, "start_step": 1},
            lambda s: STRENGTH if s % 2 else 0,
        ),
        ({"start_step": 2, "ramp_steps": 4}, lambda s: 0 if s < 2 else STRENGTH * (s - 1) / 4),
        ({"ramp_steps": 2}, lambda s: STRENGTH * min(1, (s + 1) / 2)),
    ],
    ids=["interval", "unscaled", "ramp", "short ramp"],
)
def test_strength_by_step(tmp_path, settings, strength):
    found = trained(tmp_path, Double, regularizer(**settings))
    assert deviation(found, by_hand(Double, strength=strength)) < 1e-12


def test_limit_on_the_ratio_by_hand(tmp_path):
    def limited(module, batch, step, strength):
        plain = gradient_at(module, batch, 0.0, step)
        penalty = added([1.0, -1.0], [perturbation(module, batch, step, strength), plain])
        norms = [float(torch.cat([g.reshape(-1) for g in x]).norm()) for x in (penalty, plain)]
        factors.append(min(1.0, 0.05 * norms[1] / norms[0]))
        return added([1.0, factors[-1]], [plain, penalty])

    factors = []
    found = trained(tmp_path, Double, regularizer(1e-2, max_ratio=0.05))
    hand = by_hand(Double, gradient=limited, strength=lambda step: 1e-2)
    assert deviation(found, hand) < 1e-12
    assert min(factors) < 1.0


def test_automatic_strength_reaches_its_ratio(tmp_path):
    callback = regularizer("auto", target_ratio=0.2)

    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if callback.comparison is not None:
                ratios.append(callback.comparison.ratio)

    ratios = []
    torch.manual_seed(3)
    module = Double(smooth=True)
    trainer = quiet_trainer(tmp_path, [callback, Watching()], max_epochs=4)
    trainer.fit(module, double_loader())
    # Nothing is penalized while the strength is searched for.
    assert len(ratios) == 24 - 10
    assert 0.05 < statistics.median(ratios) < 0.8
    assert callback.found_strength == trainer.callback_metrics["regularizer/strength"]
    half = trained(tmp_path, lambda: Double(smooth=True), regularizer("auto"), max_epochs=1)
    assert deviation(half, trained(tmp_path, lambda: Double(smooth=True))) == 0


@pytest.mark.parametrize("strength", ["auto", STRENGTH])
def test_resumed_training_goes_on_as_if_uninterrupted(tmp_path, strength):
    whole = trained(tmp_path, Double, regularizer(strength), max_epochs=4)
    torch.manual_seed(3)
    trainer = quiet_trainer(tmp_path, [regularizer(strength)], max_epochs=2)
    trainer.fit(Double(), double_loader())
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    callback = regularizer(strength)
    resumed = Double()
    trainer = quiet_trainer(tmp_path, [callback], max_epochs=4)
    trainer.fit(resumed, double_loader(), ckpt_path=tmp_path / "kept.ckpt")
    assert deviation(whole, resumed) == 0
    assert (callback.found_strength is None) == (strength != "auto")


# -- what is left alone -----------------------------------------------------------------------


class Discarding(HessianTraceRegularizer):
    """Takes every pass and leaves its gradient out."""

    def on_before_backward(self, trainer, pl_module, loss):
        assert self._pending is not None
        self._pending = None


def stateful(folder, callback=None, **settings):
    trainer = fit(
        folder,
        callback,
        lambda: Stateful("sgd"),
        lambda: loader(20, shuffle=True),
        val=loader,
        callbacks=[Order()],
        logger=TensorBoardLogger(folder, name="run", version=str(callback is None)),
        accumulate_grad_batches=2,
        max_epochs=2,
        **settings,
    )
    found = outcome(trainer)
    for values in (found["scalars"], found["callback_metrics"]):
        for tag in [tag for tag in values if tag.startswith("regularizer/")]:
            del values[tag]
    return found


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.filterwarnings("ignore:.*with kinks")
def test_passes_leave_everything_else_alone(tmp_path, estimator):
    """Buffers, random streams, metrics, attributes, logs: bit for bit."""
    callback = Discarding(STRENGTH, estimator=estimator, layers="middle", relative=True)
    assert differences(stateful(tmp_path), stateful(tmp_path, callback)) == []
    assert callback.comparison is not None


@pytest.mark.parametrize("off", [{"strength": 0}, {"start_step": 10**6}, {"strength": 0.0}])
def test_switched_off_training_is_bitwise_as_without(tmp_path, off):
    assert differences(stateful(tmp_path), stateful(tmp_path, regularizer(**off))) == []


def test_comparison_would_see_the_penalty(tmp_path):
    found = differences(stateful(tmp_path), stateful(tmp_path, regularizer()))
    assert "/state/net.0.weight" in found
    assert "/random/2" not in found


@pytest.mark.parametrize("always", [True, False], ids=["registered once", "in each step"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hooks_on_gradients_are_called_once_a_step(tmp_path, estimator, always):
    """As if the penalty were part of the loss: twice the gradient is not four times it."""

    def double(g):
        called.append(1)
        return 2 * g

    class Doubled(Double):
        def __init__(self):
            super().__init__(smooth=True)
            if always:
                self.net[0].weight.register_hook(double)

        def loss(self, batch):
            handle = None if always else self.net[0].weight.register_hook(double)
            self.handles = [handle]
            return super().loss(batch)

        def on_train_batch_end(self, *_):
            for handle in self.handles:
                if handle is not None:
                    handle.remove()

    class Halved(torch.optim.SGD):
        """Takes back what the hook has done."""

        @torch.no_grad()
        def step(self, closure=None):
            loss = closure()
            self.param_groups[0]["params"][0].grad.div_(2)
            super().step()
            return loss

    def halved(parameters):
        return Halved(parameters, 0.1, momentum=0.9)

    def make():
        module = Doubled()
        module.make_optimizer = halved
        return module

    called = []
    settings = {"estimator": estimator, "layers": ["net.0", "net.4"]}
    found = trained(tmp_path, make, regularizer(**settings))
    assert len(called) == 6
    plain = trained(tmp_path, lambda: Double(smooth=True), regularizer(**settings))
    assert deviation(found, plain) < (1e-9 if estimator == "difference" else 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["perturbation", "difference"])
def test_checkpoints_compute_again_without_a_trace(tmp_path, estimator, reentrant):
    """In the backward pass, when each extra pass must still be guarded."""

    class Checkpointed(Double):
        def loss(self, batch):
            x = batch[0].clone().requires_grad_()
            for layers in (self.net[:3], self.net[3:]):
                x = checkpoint(layers, x, use_reentrant=reentrant)
            return cross_entropy(x, batch[1])

    found, plain = (
        trained(tmp_path, lambda k=kind: k(dropout=0.5), regularizer(estimator=estimator))
        for kind in (Checkpointed, Double)
    )
    # Running statistics too.
    assert deviation(found, plain) < 1e-9


def test_exception_in_a_pass_restores_everything(tmp_path):
    calls = []

    def raising(module, batch):
        calls.append(1)
        module.net[1].running_mean.add_(1.0)
        torch.rand(1)
        if len(calls) == 2:
            raise RuntimeError("the loss raises here")
        return cross_entropy(module.net(batch[0]), batch[1])

    torch.manual_seed(3)
    module = Double()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    states = []

    class Recording(pl.Callback):
        def on_train_batch_start(self, *_):
            states.append(torch.get_rng_state())

    trainer = quiet_trainer(tmp_path, [Recording(), regularizer(loss=raising)])
    with pytest.raises(RuntimeError, match="raises here"):
        trainer.fit(module, double_loader())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())


def test_logged_loss_is_the_loss_without_penalty(tmp_path):
    def first_loss(callback):
        torch.manual_seed(3)
        callbacks = [callback] if callback else []
        trainer = quiet_trainer(tmp_path, callbacks, max_steps=1)
        trainer.fit(Double(), double_loader())
        return trainer.callback_metrics["loss"]

    assert torch.equal(first_loss(None), first_loss(regularizer(0.1)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_logged_numbers(tmp_path, estimator):
    logger = TensorBoardLogger(tmp_path)
    callback = regularizer(estimator=estimator)
    settings = {"logger": logger, "log_every_n_steps": 2, "max_epochs": 1}
    trained(tmp_path, lambda: Double(smooth=True), callback, **settings)
    logger.finalize("success")
    logged = {t: v for t, v in scalars(events(logger.log_dir)).items() if "regularizer" in t}
    assert sorted(logged) == [
        f"regularizer/{name}"
        for name in ("cosine", "penalty", "ratio", "seconds", "skipped", "strength", "trace")
    ]
    for points in logged.values():
        assert [step for step, _ in points] == [0, 2, 4]
    first = {tag.partition("/")[2]: points[0][1] for tag, points in logged.items()}
    assert first["strength"] == pytest.approx(STRENGTH)
    assert first["penalty"] == pytest.approx(STRENGTH * first["trace"])
    assert first["skipped"] == 0
    assert -1 <= first["cosine"] <= 1
    # By hand: the gradients of loss and penalty at the first weights.
    if estimator in ("perturbation", "difference", "exact"):
        torch.manual_seed(3)
        module, batch = Double(smooth=True), next(iter(double_loader()))
        plain = gradient_at(module, batch, 0.0, 0)
        total = {"perturbation": perturbation, "difference": difference, "exact": exact}
        penalty = added([1.0, -1.0], [total[estimator](module, batch, 0, STRENGTH), plain])
        a, b = (torch.cat([g.reshape(-1) for g in x]) for x in (penalty, plain))
        assert first["ratio"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-4)
        assert first["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-4)


def test_without_logging_nothing_is_compared(tmp_path, monkeypatch):
    """Two passes a step, and the backward pass of the loss itself is left out."""
    distances = []
    move = DisplacedLoss.move

    def counting(self, distance, number):
        distances.append(distance)
        return move(self, distance, number)

    monkeypatch.setattr(DisplacedLoss, "move", counting)
    backward = []

    class Watched(Double):
        def loss(self, batch):
            x = batch[0].clone().requires_grad_()
            x.register_hook(lambda g: backward.append(1))
            return super().loss([x, batch[1]])

    trained(tmp_path, Watched, regularizer(), log_every_n_steps=0)
    assert len(distances) == 12
    assert 0.0 not in distances
    assert backward == []


# -- penalties that are not finite ------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_penalty_that_is_not_finite_is_left_out(tmp_path, monkeypatch, scaled, value):
    backward = DisplacedLoss.accumulate

    def broken(self, total, factor, distance, number):
        return backward(
            self, total, factor * (value if self._key in [(1,), (3,)] else 1.0), distance, number
        )

    monkeypatch.setattr(DisplacedLoss, "accumulate", broken)
    callback = regularizer()
    plugins = {"plugins": scaler()} if scaled else {}
    with pytest.warns(UserWarning, match=r"left out.*norm (nan|inf).*Lower the strength") as seen:
        found = trained(tmp_path, Double, callback, **plugins)
    assert sum("left out" in str(w.message) for w in seen) == 1
    assert any("scaler settles" in str(w.message) for w in seen) == scaled
    assert callback.skipped == 2
    hand = by_hand(Double, strength=lambda step: 0 if step in (1, 3) else STRENGTH)
    assert deviation(found, hand) < 1e-12


class Skipping(Double):
    """Returns no loss for one batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Thawing(Double):
    """Trains other parameters from the third batch on, which nobody knows when it starts."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net[0].requires_grad_(batch_idx < 2)


class Constant(Double):
    """Has a loss that no parameter counts in."""

    def training_step(self, batch, batch_idx):
        return torch.ones((), requires_grad=True)


@pytest.mark.parametrize(("make", "left_out"), [(Skipping, 0), (Thawing, 1), (Constant, 0)])
@pytest.mark.parametrize("estimator", ["perturbation", "exact"])
def test_steps_that_skip_or_train_others_go_on(tmp_path, make, left_out, estimator):
    callback = regularizer(estimator=estimator, layers="all")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, callback, make, double_loader)
    said = [str(w.message) for w in record if "a penalty was left out" in str(w.message)]
    assert (callback.skipped, len(said)) == (left_out, left_out)
    assert all("other parameters are trained than when the batch started" in m for m in said)
    assert trainer.global_step == len(double_loader())


def test_scaler_still_sees_what_is_not_finite_in_the_loss(tmp_path):
    """The loss itself overflows in one step: the scaler skips it, and halves its scale."""

    class Overflowing(Double):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 2 else 1)

    plugin = scaler()
    callback = regularizer()
    with pytest.warns(UserWarning, match="left out"):
        found = trained(tmp_path, Overflowing, callback, plugins=plugin)
    assert callback.skipped == 1
    assert plugin[0].scaler.get_scale() == 512.0
    assert all(p.isfinite().all() for p in found.parameters())


# -- manual optimization ----------------------------------------------------------------------


class Manual(Double):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch).exp().log())
        optimizer.step()


def method_loss(module, batch):
    return module.loss(batch)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("estimator", ["perturbation", "exact"])
def test_manual_optimization_with_a_loss(tmp_path, optimizer, scaled, estimator):
    def make(kind=Manual):
        return kind(OPTIMIZERS[optimizer], smooth=True)

    callback = regularizer(loss=method_loss, estimator=estimator)
    plugins = {"plugins": scaler()} if scaled else {}
    found = trained(tmp_path, make, callback, **plugins)
    hand = by_hand(
        lambda: make(Double), gradient={"perturbation": perturbation, "exact": exact}[estimator]
    )
    assert deviation(found, hand) < 1e-11


def test_manual_optimization_without_a_loss_is_refused(tmp_path):
    with pytest.raises(Exception, match=r"HessianTraceRegularizer.*manual optimization.*loss"):
        trained(tmp_path, Manual, regularizer())


# -- refusals ---------------------------------------------------------------------------------


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, max_iter=2)


class Twice(torch.optim.SGD):
    """Evaluates the loss twice a step."""

    def step(self, closure):
        closure()
        return super().step(closure)


class Iterating(Double):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


class Sparse(Double):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 2, sparse=True)


class Kinks(Double):
    def __init__(self):
        super().__init__()
        self.net[2] = nn.ReLU()


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: Double(lbfgs), {}, "LBFGS evaluates.*first-order optimizer"),
        (lambda: Double(lambda p: Twice(p, 0.1)), {}, "several times a step.*evaluates it once"),
        (Iterating, {}, r"dataloader_iter.*\(batch, batch_idx\)"),
        (lambda: Double().to(torch.bfloat16), {}, "bfloat16 rounds away.*bf16-mixed"),
        (Sparse, {}, "sparse=False"),
        (Double, {"layers": "net.9"}, "'net.9', which matches no module"),
        (Double, {"layers": lambda path, module: False}, "predicate"),
    ],
    ids=["lbfgs", "closures", "iterator", "bfloat16", "sparse", "layer", "predicate"],
)
def test_what_cannot_work_is_refused(tmp_path, make, settings, message):
    with pytest.raises(Exception, match=rf"(?s)HessianTraceRegularizer.*{message}"):
        trained(tmp_path, make, regularizer(**settings))


def test_middle_without_layers_is_refused(tmp_path):
    class Bare(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LayerNorm(3), nn.Flatten())

    with pytest.raises(Exception, match=r"'middle'.*no trainable convolution or linear"):
        fit(tmp_path, regularizer(layers="middle"), Bare)


def test_sharded_parameters_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "shards_parameters", lambda *_: True)
    with pytest.raises(Exception, match=r"shards them.*ddp"):
        trained(tmp_path, Double, regularizer())


def test_two_regularizers_are_refused(tmp_path):
    # Two of one class Lightning refuses itself.
    trainer = quiet_trainer(tmp_path, [regularizer(), Discarding(STRENGTH)])
    with pytest.raises(Exception, match=r"two HessianTraceRegularizer.*layers="):
        trainer.fit(Double(), double_loader())


def test_differences_across_kinks_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"kinks.*perturbation"):
        trained(tmp_path, Kinks, regularizer(estimator="difference"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "strength is -1.0; give a finite number at least 0, or 'auto'"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": "much"}, "strength is 'much'"),
        ({"strength": True}, "strength is True"),
        ({"max_ratio": 0.0}, "max_ratio is 0.0; give a finite number above 0, or None"),
        ({"target_ratio": 0.1}, "target_ratio is 0.1 but strength is 0.001"),
        ({"strength": "auto", "target_ratio": -1}, "target_ratio is -1"),
        ({"every_n_train_steps": 0}, "every_n_train_steps is 0"),
        ({"every_n_train_steps": None}, "every_n_train_steps is None"),
        ({"start_step": -1}, "start_step is -1"),
        ({"ramp_steps": 1.5}, "ramp_steps is 1.5"),
        ({"scale_by_interval": 1}, "scale_by_interval is 1"),
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"layers": 3}, "layers is 3"),
        ({"estimator": "hutchinson"}, "estimator is 'hutchinson'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HessianTraceRegularizer(**{"strength": STRENGTH, **settings})

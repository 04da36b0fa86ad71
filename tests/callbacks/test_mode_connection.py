"""A curve that a Trainer trains, against loops written out by hand in float64."""

import copy
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import (
    Curve,
    HessianMonitor,
    HessianTraceRegularizer,
    LossCurve,
    ModeConnection,
    aligned,
    loss_curve,
)
from lla_callbacks.callbacks.account import Account
from lla_callbacks.callbacks.compat import MisconfigurationException
from tests.curves.curve_cases import train_by_hand

from .by_hand import double_loader
from .modules import events, quiet_trainer, scalars

# A state dict of another network.
OTHER = {"other": torch.zeros(1)}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9),
    "decaying sgd": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9, weight_decay=0.03),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9, weight_decay=0.03, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.03),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.5),
}


class Net(pl.LightningModule):
    """Float64, by default without batch norm, and without dropout."""

    def __init__(self, seed=0, make=OPTIMIZERS["sgd"], norm=False):
        super().__init__()
        self.make = make
        torch.manual_seed(seed)
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(4, 2)).double()
        if norm:
            for _ in range(5):
                self.net(seed + 2 * torch.randn(9, 3).double())

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


def scaler():
    # Autocast leaves float64 alone, so that only the scaler is at work.
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1024.0))]}


def connected(folder, net, connection=None, ends=(1, 2), callbacks=(), loader=None, val=None,
              ckpt_path=None, **settings):  # fmt: skip
    """Train a curve and return the callback."""
    norm = isinstance(net.net[1], nn.BatchNorm1d)
    if connection is None:
        connection = {}
    if isinstance(connection, dict):
        connection = ModeConnection(*(Net(seed, norm=norm) for seed in ends), **connection)
    trainer = quiet_trainer(folder, [connection, *callbacks], **settings)
    trainer.fit(net, loader or double_loader(), val, ckpt_path=ckpt_path)
    return connection


def grouped(batches, count):
    return [batches[i : i + count] for i in range(0, len(batches), count)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("kind", "bends"), [("bezier", 1), ("chain", 3)])
@pytest.mark.parametrize("setting", ["plain", "unscaled", "accumulation and clipping", "scaler"])
def test_the_bends_are_those_of_a_plain_loop(tmp_path, optimizer, kind, bends, setting):
    if "fused" in optimizer and setting != "scaler":
        pytest.skip("fused optimizers differ only under a scaler, and cannot be clipped there")
    make = OPTIMIZERS[optimizer]
    plain = {"accumulate_grad_batches": 1}
    trainer, together, clip = {
        "plain": (plain, 1, None),
        "unscaled": (plain, 1, None),
        "accumulation and clipping": (
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, 2, 0.05
        ),
        "scaler": ({"accumulate_grad_batches": 3} | scaler(), 3, None),
    }[setting]  # fmt: skip
    scaled = "sgd" in optimizer and setting != "unscaled"
    found = connected(
        tmp_path, Net(make=make), max_epochs=2, **trainer,
        connection={"kind": kind, "bends": bends, "scale_steps": setting != "unscaled", "seed": 4},
    )  # fmt: skip
    decay = {"sgd": 0, "decaying sgd": 0.03, "fused sgd": 0.03, "adam": 0.03, "adamw": 0}
    # Decay in the loop is on the curve, so the optimizer's own must be off there.
    bare = {"adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0),
            "adam": lambda p: torch.optim.Adam(p, 0.05)}  # fmt: skip
    expected = train_by_hand(
        Net(1), Net(2), grouped(list(double_loader()), together) * 2,
        bare.get(optimizer, OPTIMIZERS["sgd"]), kind=kind, bends=bends, decay=decay[optimizer],
        decoupled=0.5 if optimizer == "adamw" else 0.0, scaled=scaled, seed=4, clip=clip,
    )  # fmt: skip
    for point, bend in zip(found.curve.points[1:-1], expected, strict=True):
        for name, value in bend.items():
            torch.testing.assert_close(point[name], value, rtol=1e-9, atol=1e-9)


def test_after_the_fit_the_module_is_the_bend_and_the_ends_are_what_they_were(tmp_path):
    net = Net()
    found = connected(tmp_path, net, max_epochs=3)
    assert isinstance(found.curve, Curve)
    for name, p in net.named_parameters():
        assert torch.equal(p, found.curve.points[1][name])
        for k, seed in ((0, 1), (2, 2)):
            assert torch.equal(
                found.curve.points[k][name], dict(Net(seed).named_parameters())[name]
            )
    batches = list(double_loader())
    line = loss_curve(net, batches, [Net(1), Net(2)]).statistics().mean
    assert loss_curve(net, batches, found.curve).statistics().mean < 0.8 * line


def test_the_users_decay_and_groups_are_back_between_steps(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([g["weight_decay"] for g in trainer.optimizers[0].param_groups])

    net = Net(make=OPTIMIZERS["decaying sgd"])
    connected(tmp_path, net, callbacks=[Look()])
    assert seen == [[0.03]] * 6


class Watched(Net):
    """Notes what validation sees, and its loss."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = []

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val_loss", self.training_step(batch, batch_idx))
            self.seen.append(copy.deepcopy(self.state_dict()))


@pytest.mark.parametrize("norm", [False, True])
def test_validation_sees_the_middle_of_the_curve(tmp_path, norm):
    net = Watched(norm=norm)
    found = connected(tmp_path, net, {"num_samples": 8}, val=double_loader(8, 8), max_epochs=2,
                      num_sanity_val_steps=1)  # fmt: skip
    expected = found.curve.weights(0.5)
    for name, _ in net.named_parameters():
        assert torch.equal(net.seen[-1][name], expected[name])
        assert torch.equal(net.state_dict()[name], found.curve.points[1][name])
    if norm:
        # Those of the first two training batches, 8 samples.
        middle = Net(norm=True)
        middle.load_state_dict(expected)
        hidden = [middle.net[0](x) for x, _ in list(double_loader())[:2]]
        mean = sum(h.mean(0) for h in hidden) / 2
        torch.testing.assert_close(net.seen[-1]["net.1.running_mean"], mean.detach())
        assert not torch.equal(net.seen[-1]["net.1.running_mean"], net.net[1].running_mean)
    before = copy.deepcopy(net.state_dict())
    trainer = quiet_trainer(tmp_path, [found])
    trainer.validate(net, double_loader(8, 8), verbose=False)
    assert torch.equal(net.seen[-1]["net.0.weight"], expected["net.0.weight"])
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path):
    settings = {"bends": 2, "kind": "chain", "num_samples": 4}

    def make():
        return Watched(make=OPTIMIZERS["adam"], norm=True)

    whole_net = make()
    val = double_loader(8, 8)
    whole = connected(tmp_path, whole_net, settings, val=val, max_epochs=3)
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=6, save_top_k=-1)
    connected(tmp_path, make(), settings, callbacks=[saving], val=val, max_epochs=1,
              enable_checkpointing=True)  # fmt: skip
    (path,) = (tmp_path / "kept").glob("*step=6.ckpt")
    torch.load(path, weights_only=True)
    net = make()
    again = connected(tmp_path, net, settings, val=val, max_epochs=3, ckpt_path=path)
    for a, b in zip(whole.curve.points, again.curve.points, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    # The start and the straight line are those of the first part.
    assert again.history[-1][0] == whole.history[-1][0] == 18
    assert all(
        torch.equal(value, whole_net.state_dict()[name]) for name, value in net.state_dict().items()
    )
    with pytest.raises(MisconfigurationException, match=r"another curve; these differ: the ends"):
        connected(tmp_path, make(), settings, ends=(1, 3), val=val, max_epochs=3, ckpt_path=path)
    with pytest.raises(MisconfigurationException, match=r"bends \(2, now 3\)"):
        connected(tmp_path, make(), {**settings, "bends": 3}, val=val, max_epochs=3, ckpt_path=path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_end_is_aligned_on_the_first_batch_and_stays_so(tmp_path):
    start, end = Net(1, norm=True), Net(2, norm=True)
    x = next(iter(double_loader()))[0]
    expected = aligned(Net(norm=True), start, end, x).state
    assert not torch.equal(expected["net.0.weight"], end.net[0].weight)
    settings = {"bends": 2, "align": True}
    net = Net(norm=True)
    whole = connected(tmp_path, net, settings, max_epochs=2)
    for name, value in whole.curve.weights(1).items():
        assert torch.equal(value, expected[name])
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=6, save_top_k=-1)
    connected(tmp_path, Net(norm=True), settings, callbacks=[saving], enable_checkpointing=True)
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    again = connected(tmp_path, Net(norm=True), settings, max_epochs=2, ckpt_path=path)
    for a, b in zip(whole.curve.points, again.curve.points, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("ignore:ModeConnection. a picture of the curve failed")
@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning's own, once in a process
def test_a_batch_without_a_loss_leaves_the_bend_in_place(tmp_path):
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    net = Skipping()
    with pytest.warns(UserWarning, match="returned no loss for a held batch"):
        found = connected(tmp_path, net, limit_train_batches=2)
    expected = train_by_hand(
        Net(1), Net(2), grouped(list(double_loader()), 1)[:1], OPTIMIZERS["sgd"],
        kind="bezier", bends=1, scaled=True,
    )  # fmt: skip
    torch.testing.assert_close(found.curve.points[1]["net.0.weight"], expected[0]["net.0.weight"])


def test_an_error_in_a_step_puts_the_bend_back(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no more")

    net = Broken()
    connection = ModeConnection(Net(1), Net(2))
    with pytest.raises(RuntimeError, match="no more"):
        connected(tmp_path, net, connection)
    middle = connection.curve.weights(0.5)
    assert torch.equal(net.net[0].weight, middle["net.0.weight"])


class Another(ModeConnection):
    """Lightning itself refuses two of one class."""


def manual(net):
    net.automatic_optimization = False
    return net


@pytest.mark.parametrize(
    ("make", "settings", "says"),
    [
        (lambda: manual(Net()), {}, r"Call connect\(module, batches, start, end"),
        (lambda: Net(make=torch.optim.LBFGS), {}, "LBFGS evaluates the loss several times"),
        (Net, {"callbacks": [HessianTraceRegularizer(1e-3)]}, "would both move the weights"),
        (Net, {"callbacks": [Another(Net(1), Net(2))]}, "would both move the weights"),
        (Net, {"callbacks": [StochasticWeightAveraging(0.1)]}, "average is no network on the"),
        (lambda: Net().bfloat16(), {}, "torch.bfloat16 rounds away"),
        (Net, {"connection": ModeConnection(Net(1), OTHER)}, "end lacks 'net.0.weight'"),
        (Net, {"connection": ModeConnection("x.ckpt", OTHER)}, "start is 'x.ckpt', which is no"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, make, settings, says):
    with pytest.raises(MisconfigurationException, match=says):
        connected(tmp_path, make(), **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "spline"}, "kind is 'spline'"),
        ({"bends": 0}, "bends is 0"),
        ({"scale_steps": 1}, "scale_steps is 1; give True or False"),
        ({"align": 1}, "align is 1; give True or False"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"loss": 3}, "loss is 3"),
        ({"max_overhead": 2}, "max_overhead is 2; give a positive share, at most 1"),
        ({"metrics": 3}, "metrics is of type int"),
        ({"name": ""}, "name is ''"),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(ValueError, match=says):
        ModeConnection(OTHER, OTHER, **settings)


def test_decay_of_an_unknown_optimizer_is_said(tmp_path):
    class Mine(torch.optim.SGD):
        pass

    def make(p):
        return Mine(p, 0.1, weight_decay=0.1)

    with pytest.warns(UserWarning, match="it is not known how Mine decays weights"):
        connected(tmp_path, Net(make=make), limit_train_batches=1)


# -- the loss along the curve, live ---------------------------------------------------------


def right(module, batch):
    return (module(batch[0]).argmax(1) != batch[1]).double().mean()


LIVE = {"max_overhead": 1.0, "metrics": {"error": right}, "num_samples": 8}


def test_the_curve_is_measured_beside_its_line(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    net = Net(norm=True)
    found = connected(tmp_path, net, LIVE, max_epochs=2, logger=logger)
    assert found.history[-1][0] == 12
    logger.finalize("success")
    written = events(logger.log_dir)
    assert "curve/loss" in written.Tags()["images"]
    tags = scalars(written)
    step, report = found.history[-1]
    assert tags["curve/barrier_above_line"][-1] == (
        step, pytest.approx(report.statistics().barrier_above_line, rel=1e-6)
    )  # fmt: skip
    assert "curve_straight/error/maximum" in tags
    file = LossCurve.load(Path(logger.log_dir) / "curve" / f"step_{step:08d}.npz")
    assert torch.equal(file.loss, report.loss)
    # The same as without a Trainer, on the first two training batches.
    same = loss_curve(net, list(double_loader())[:2], found.curve, t=report.t,
                      metrics={"error": right})  # fmt: skip
    torch.testing.assert_close(report.loss, same.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.straight.loss, same.straight.loss, rtol=1e-12, atol=1e-12)
    assert float(report.loss[0]) == float(same.loss[0])


def test_looking_changes_nothing(tmp_path):
    ends = []
    for live in (False, True):
        net = Watched(norm=True)
        torch.manual_seed(6)
        connected(tmp_path, net, {**LIVE, "live": live}, val=double_loader(8, 8), max_epochs=2)
        ends.append((net.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(t, ends[1][0][n]) for n, t in ends[0][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


def test_pictures_keep_to_their_share(tmp_path):
    found = connected(tmp_path, Net(), {"max_overhead": 1e-6}, max_epochs=4)
    # The first and the last, with the fewest points.
    assert [(step, len(report.t)) for step, report in found.history] == [(6, 11), (24, 11)]
    found = connected(tmp_path, Net(), {"live": False})
    assert found.history == []


def test_a_picture_that_fails_is_one_warning(tmp_path):
    def broken(module, batch):
        raise RuntimeError("not today")

    with pytest.warns(UserWarning, match="a picture of the curve failed .* not today") as caught:
        found = connected(tmp_path, Net(), {"metrics": {"error": broken}}, max_epochs=3)
    assert sum("a picture of the curve" in str(w.message) for w in caught) == 1
    assert found.history == []
    assert found.curve is not None


def test_a_state_that_cannot_be_read_is_said(tmp_path):
    connection = ModeConnection(Net(1), Net(2))
    with pytest.warns(UserWarning, match="pictures of the curve cannot be gone on from"):
        connection.load_state_dict({"kind": "bezier", "view": {"history": "x"}})
    found = connected(tmp_path, Net(), {"bends": 2})
    state = {**found.state_dict(), "further": [[torch.zeros(7)]]}
    with pytest.raises(MisconfigurationException, match="bends cannot be read"):
        found._checked(state, [[torch.zeros(3)]])


@pytest.mark.parametrize("room", [True, False])
def test_pictures_are_paid_from_the_account_of_the_monitors(tmp_path, monkeypatch, room):
    curve = ModeConnection(Net(1).state_dict(), Net(2).state_dict(), figures=False)
    curve.max_overhead = 1e9
    monitor = HessianMonitor(every_n_train_steps=1, num_steps=2, num_probes=2, figures=False)
    monkeypatch.setattr(Account, "room", lambda self, name: math.inf if room else -1.0)
    trainer = quiet_trainer(tmp_path, callbacks=[curve, monitor], max_epochs=4)
    trainer.fit(Net(0), double_loader())
    assert monitor.account.spent["curve"] > 0
    # The first and the last one are shown whatever there is.
    assert len(curve.history) == (4 if room else 2)

"""Cycles, members and what comes after them, in a real Trainer."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lla_callbacks import FastGeometricEnsembling
from lla_callbacks.callbacks.compat import MisconfigurationException
from lla_callbacks.curves.ensemble import cyclic_rate

from .by_hand import Double, double_loader, samples
from .modules import events, quiet_trainer, scalars


class Net(Double):
    """Float64, with batch norm; two groups of parameters, or one."""

    def __init__(self, groups=False, scheduler=None, tensor_rate=False):
        super().__init__()
        self.groups, self.scheduler, self.tensor_rate = groups, scheduler, tensor_rate
        self.rates = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.rates.append([float(g["lr"]) for g in self.trainer.optimizers[0].param_groups])
        return super().training_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        rate = torch.tensor(0.1) if self.tensor_rate else 0.1
        parts = [
            {"params": self.net[0].parameters()},
            {"params": [*self.net[1].parameters(), *self.net[4].parameters()], "lr": 0.02},
        ]
        if not self.groups:
            parts = [{"params": list(self.parameters())}]
        optimizer = torch.optim.SGD(parts, lr=rate, momentum=0.9, foreach=not self.tensor_rate)
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


def ensembled(folder, net=None, epochs=5, val=None, callbacks=(), ckpt_path=None, trainer=None,
              **settings):  # fmt: skip
    """Train with cycles of 4 of the 6 steps of an epoch, from step 12 on; return the callback."""
    settings = {"cycle": 4, "cycle_unit": "steps", "lr_max": 0.2, "lr_min": 0.01, "start": 12,
                **settings}  # fmt: skip
    fge = FastGeometricEnsembling(**settings)
    torch.manual_seed(3)
    if net is None:
        net = Net() if val is None else Validated()
    quiet_trainer(folder, [fge, *callbacks], max_epochs=epochs, **(trainer or {})).fit(
        net, double_loader(), val, ckpt_path=ckpt_path
    )
    return fge


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_rates_and_members_are_the_published_ones(tmp_path, tensor_rate):
    kept = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept[trainer.global_step] = {n: t.clone() for n, t in pl_module.state_dict().items()}

    net = Net(tensor_rate=tensor_rate)
    fge = ensembled(tmp_path, net, callbacks=[Keep()])
    expected = [0.1] * 12 + [cyclic_rate(i, 4, 0.2, 0.01) for i in range(1, 19)]
    assert [r[0] for r in net.rates] == pytest.approx(expected, rel=1e-7 if tensor_rate else 1e-15)
    # floor(18 / 4 + 1/2) members, after the steps with the lowest rate.
    assert len(fge.members) == 5
    for k, member in enumerate(fge.members):
        assert expected[12 + 4 * k + 1] == 0.01
        assert all(torch.equal(t, kept[14 + 4 * k][n]) for n, t in member.items())
    # The module is left as training left it.
    assert all(torch.equal(t, kept[30][n]) for n, t in net.state_dict().items())


def test_groups_keep_their_proportion_under_accumulation(tmp_path):
    net = Net(groups=True)
    fge = ensembled(tmp_path, net, start=0.4, cycle=2, cycle_unit="epochs", epochs=6,
                    trainer={"accumulate_grad_batches": 2})  # fmt: skip
    # 3 steps an epoch, so cycles of 6 from step 7 on.
    rates = net.rates[::2]
    assert net.rates[::2] == net.rates[1::2]
    expected = [cyclic_rate(i, 6, 0.2, 0.01) for i in range(1, 12)]
    assert [r[0] for r in rates[7:]] == pytest.approx(expected, rel=1e-15)
    assert [r[1] for r in rates[7:]] == pytest.approx([0.2 * r for r in expected], rel=1e-15)
    assert len(fge.members) == 2


def test_schedulers_are_parked_and_come_back(tmp_path, caplog):
    net = Net(scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9))
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=18, save_top_k=-1)
    with caplog.at_level("INFO"):
        fge = ensembled(tmp_path, net, callbacks=[saving, LearningRateMonitor()],
                        trainer={"enable_checkpointing": True, "logger": TensorBoardLogger(
                            tmp_path)})  # fmt: skip
    assert "ExponentialLR parked from step 12 on" in caplog.text
    assert [r[0] for r in net.rates[:12]] == pytest.approx([0.1 * 0.9**i for i in range(12)])
    assert net.rates[13][0] == 0.01
    (config,) = net.trainer.strategy.lr_scheduler_configs
    assert config.scheduler.last_epoch == 12
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    (state,) = torch.load(path, weights_only=True)["lr_schedulers"]
    assert state["last_epoch"] == 12
    assert len(fge.members) == 5


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("files", [False, True])
def test_a_resumed_run_has_the_same_members_to_the_bit(tmp_path, files):
    def settings(name):
        return {"directory": tmp_path / name} if files else {}

    val = double_loader(8, 8)
    whole = ensembled(tmp_path, val=val, **settings("whole"))
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=18, save_top_k=-1)
    ensembled(tmp_path, epochs=3, val=val, callbacks=[saving], trainer={
        "enable_checkpointing": True}, **settings("cut"))  # fmt: skip
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    torch.load(path, weights_only=True)
    again = ensembled(tmp_path, val=val, ckpt_path=path, **settings("cut"))
    assert len(again.members) == len(whole.members) == 5
    for a, b in zip(again.states(), whole.states(), strict=True):
        assert all(torch.equal(a[n], b[n]) for n in b)
    assert again.agreement == whole.agreement
    if files:
        # Each file is what load_state_dict takes.
        for file in (tmp_path / "whole").iterdir():
            Net().load_state_dict(torch.load(file, weights_only=True))
        min((tmp_path / "cut").iterdir()).unlink()
        with pytest.raises(MisconfigurationException, match="is not in"):
            ensembled(tmp_path, val=val, ckpt_path=path, **settings("cut"))


def test_the_users_own_test_step_tests_the_ensemble(tmp_path):
    net = Net()
    fge = ensembled(tmp_path, net)
    x, y = samples(8).tensors
    outputs = []
    for state in fge.members:
        one = Net()
        one.load_state_dict(state)
        outputs.append(one.eval()(x).detach())
    p = sum(torch.softmax(z, 1) for z in outputs) / 5
    expected = float(cross_entropy(p.log(), y))
    trainer = quiet_trainer(tmp_path)
    (found,) = trainer.test(fge.ensemble(net), double_loader(8, 8), verbose=False)
    assert found["test_loss"] == pytest.approx(expected, rel=1e-6)
    (alone,) = trainer.test(net, double_loader(8, 8), verbose=False)
    assert alone["test_loss"] != pytest.approx(expected, rel=1e-6)

    class Around(Net):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", cross_entropy(self.net(batch[0]), batch[1]))

    around = Around()
    around.load_state_dict(net.state_dict())
    with pytest.warns(UserWarning, match="the steps never called the module itself"):
        trainer.test(fge.ensemble(around), double_loader(8, 8), verbose=False)
    (inside,) = trainer.test(fge.ensemble(around, part="net"), double_loader(8, 8), verbose=False)
    assert inside["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_what_is_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fge = ensembled(tmp_path, val=double_loader(8, 8), trainer={"logger": logger})
    logger.finalize("success")
    found = scalars(events(logger.log_dir))
    assert [step for step, _ in found["fge/members"]] == [14, 18, 22, 26, 30]
    assert [step for step, _ in found["fge/distance"]] == [18, 22, 26, 30]
    assert len(found["fge/lr"]) == 18
    first, *_, last = fge.members
    x, y = samples(8).tensors
    one = Net()
    one.load_state_dict(first)
    expected = float(cross_entropy(one.eval()(x), y).detach())
    assert found["fge/member_nll"][0][1] == pytest.approx(expected, rel=1e-6)
    assert found["fge/ensemble_nll"][0][1] == pytest.approx(expected, rel=1e-6)
    assert found["fge/disagreement"][-1][1] == pytest.approx(fge.agreement.disagreement, abs=1e-6)
    assert any(not torch.equal(first[n], last[n]) for n in first)


def test_comparing_members_changes_nothing_else(tmp_path):
    found = []
    for count in (0, 8):
        torch.manual_seed(4)
        net = Validated()
        ensembled(tmp_path, net, val=double_loader(8, 8), num_samples=count)
        found.append((net.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(t, found[1][0][n]) for n, t in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_members_that_are_alike_are_said_at_the_end(tmp_path):
    with pytest.warns(UserWarning, match=r"the 5 members differ in 0.00% of their predictions"):
        ensembled(tmp_path, lr_max=1e-9, lr_min=0.0)


def test_a_cycle_that_has_no_member_is_said_before(tmp_path):
    with pytest.warns(UserWarning, match="18 steps are left from the start on: there will be no"):
        fge = ensembled(tmp_path, cycle=40)
    assert fge.members == []
    with pytest.raises(ValueError, match="there is no member yet"):
        fge.ensemble(Net())


def test_what_cannot_be_compared_does_not_end_training(tmp_path):
    with pytest.warns(UserWarning, match="members cannot be compared, and training goes on: Key"):
        fge = ensembled(tmp_path, predict=lambda module, batch: {}["x"])
    assert len(fge.members) == 5


@pytest.mark.parametrize(
    ("settings", "trainer", "says"),
    [
        ({"cycle": 3, "cycle_unit": "epochs"}, {"limit_train_batches": 3}, "9 optimizer steps, an"),
        ({"start": 0.5}, {"max_epochs": -1, "max_steps": -1}, "whose length is not known"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(tmp_path, settings, trainer, says):
    fge = FastGeometricEnsembling(**{"lr_max": 0.1, "lr_min": 0.01, "cycle": 2, **settings})
    with pytest.raises(MisconfigurationException, match=says):
        quiet_trainer(tmp_path, [fge], **trainer).fit(Net(), double_loader())


def test_loops_of_ones_own_are_refused(tmp_path):
    net = Net()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="steps its optimizers itself"):
        ensembled(tmp_path, net)

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(samples(8))

    fge = FastGeometricEnsembling(2, 0.1, 0.01, start=1)
    with pytest.raises(MisconfigurationException, match="Give cycle_unit='steps'"):
        quiet_trainer(tmp_path, [fge], max_steps=2, max_epochs=-1).fit(
            Net(), DataLoader(Endless(), 4)
        )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cycle": 0}, "cycle is 0"),
        ({"cycle": 3, "cycle_unit": "steps"}, "cycle is 3; give an even number of steps"),
        ({"cycle_unit": "days"}, "cycle_unit is 'days'"),
        ({"lr_max": 0.01, "lr_min": 0.1}, "lr_max is 0.01 and lr_min 0.1"),
        ({"lr_min": float("nan")}, "lr_min is nan"),
        ({"start": 1.5}, "start is 1.5; give a share of the run"),
        ({"start": -1}, "start is -1"),
        ({"num_samples": -1}, "num_samples is -1"),
        ({"predict": 3}, "predict is 3"),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(ValueError, match=says):
        FastGeometricEnsembling(**{"cycle": 2, "lr_max": 0.1, "lr_min": 0.01, **settings})


@pytest.mark.parametrize("damage", [{"first": "x"}, {"members": [{"a": 1}]}, {"comparison": 3},
                                    {"steps": None}, {"shares": ["x"]}, {"last": 4}])  # fmt: skip
def test_a_state_that_cannot_be_read_is_said_and_left(damage):
    fge = FastGeometricEnsembling(2, 0.1, 0.01)
    state = fge.state_dict()
    with pytest.warns(UserWarning, match="cannot be gone on from, so members are gathered anew"):
        fge.load_state_dict({**state, "first": 5, **damage})
    assert fge.state_dict() == state

"""What fails in a measurement costs one warning and a gap, never the run."""

import math
import re

import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException as OfLightning
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from lla_callbacks import HessianMonitor, LossLandscapeMonitor

from .modules import (
    Plain,
    differences,
    events,
    fit,
    loader,
    monitor,
    outcome,
    plain_loss,
    quiet_trainer,
    scalars,
    steps,
)


def ours(record):
    """Return the monitor's own warnings among recorded ones."""
    return [str(w.message) for w in record if str(w.message).startswith("HessianMonitor")]


def logged_steps(logger):
    logger.finalize("success")
    found = scalars(events(logger.log_dir))
    return [step for step, _ in found.get("hessian/trace", [])]


class Poisoned(Plain):
    """Its loss is not finite from the third batch on."""

    poison = float("nan")

    def training_step(self, batch, batch_idx):
        loss = plain_loss(self, batch)
        return loss * self.poison if self.global_step >= 2 else loss


class Infinite(Poisoned):
    poison = float("inf")


class Exploding(Plain):
    """Diverges: the learning rate is far beyond the edge of stability."""

    def __init__(self):
        super().__init__(lr=1e20)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(4).mean()


class Skipping(Plain):
    """Returns no loss for the first batch, which is a held one."""

    def training_step(self, batch, batch_idx):
        return None if batch[2][0] == 0 else plain_loss(self, batch)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class WithoutSecondDerivative(Plain):
    def training_step(self, batch, batch_idx):
        return cross_entropy(OnceDifferentiable.apply(self.net(batch[0])), batch[1])


@pytest.mark.parametrize(
    ("make_module", "remedy", "left"),
    [
        (Poisoned, "loss of held batch 1 of 1 is nan.*Lower the learning rate", [0, 1]),
        (Infinite, "loss of held batch 1 of 1 is inf.*Lower the learning rate", [0, 1]),
        (Exploding, "not finite|(loss of held batch 1 of 1 is (inf|nan)).*Lower|Look", [0]),
        (Skipping, "returned None for every held batch.*Give loss=callable", []),
    ],
)
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_failure_leaves_a_gap_one_warning_and_the_same_run(tmp_path, make_module, remedy, left):
    without = outcome(
        fit(tmp_path, None, make_module, logger=TensorBoardLogger(tmp_path, version="without"))
    )
    watcher = monitor(every_n_train_steps=1)
    with pytest.warns(UserWarning, match=f"HessianMonitor: .*leaves a gap.*({remedy})") as record:
        trainer = fit(
            tmp_path, watcher, make_module, logger=TensorBoardLogger(tmp_path, version="with")
        )
    assert len(ours(record)) == 1
    assert differences(without, outcome(trainer)) == []
    assert steps(watcher) == logged_steps(trainer.logger) == left


def test_without_a_second_derivative_differences_take_over_and_say_so(tmp_path, caplog):
    without = outcome(fit(tmp_path, None, WithoutSecondDerivative))
    watcher = monitor(every_n_train_steps=2)
    with caplog.at_level("INFO"):
        trainer = fit(tmp_path, watcher, WithoutSecondDerivative)
    said = [r.getMessage() for r in caplog.records if "by differences" in r.getMessage()]
    assert len(said) == 1
    assert "once_differentiable" in said[0]
    assert {report.engine for _, report in watcher.history} == {"difference"}
    assert all("once_differentiable" in report.engine_reason for _, report in watcher.history)
    assert differences(without, outcome(trainer)) == []


def test_the_exact_engine_refuses_what_has_no_second_derivative(tmp_path):
    watcher = monitor(engine="exact")
    with pytest.warns(UserWarning, match=r"no second derivative.*engine='auto'"):
        fit(tmp_path, watcher, WithoutSecondDerivative)
    assert steps(watcher) == []


class RaisingOnce:
    """A loss that raises during one measurement."""

    def __init__(self, at):
        self.at = at

    def __call__(self, module, batch):
        if module.trainer.global_step == self.at:
            raise ZeroDivisionError("as ordered")
        return plain_loss(module, batch)


@pytest.mark.parametrize(("at", "left"), [(0, [2, 4]), (2, [0, 4]), (4, [0, 2])])
def test_one_failed_measurement_is_a_gap_between_others(tmp_path, at, left):
    watcher = monitor(every_n_train_steps=2, loss=RaisingOnce(at))
    logger = TensorBoardLogger(tmp_path)
    # A loss of the user's own has no "give loss=" as its remedy.
    remedy = "HessianMonitor: a measurement failed.*as ordered"
    with pytest.warns(UserWarning, match=remedy) as record:
        fit(tmp_path, watcher, logger=logger)
    assert len(ours(record)) == 1
    assert steps(watcher) == logged_steps(logger) == left
    assert sorted(int(p.stem[-8:]) for p in tmp_path.glob("**/*.npz")) == left


class Broken(CSVLogger):
    """Refuses what the monitor writes, and takes everything else."""

    def log_metrics(self, metrics, step=None):
        if "hessian/trace" in metrics:
            raise ConnectionError("the server is away")
        super().log_metrics(metrics, step)


def test_logger_that_raises_does_not_end_the_run_or_reach_other_loggers(tmp_path):
    without = outcome(fit(tmp_path))
    watcher = monitor(every_n_train_steps=2)
    other = TensorBoardLogger(tmp_path)
    with pytest.warns(
        UserWarning, match="HessianMonitor: logging failed.*server is away"
    ) as record:
        trainer = fit(tmp_path, watcher, logger=[Broken(tmp_path), other])
    assert len(ours(record)) == 1
    assert logged_steps(other) == steps(watcher) == [0, 2, 4]
    trainer.loggers = []
    assert differences(without, outcome(trainer)) == []


class WithoutFigures(TensorBoardLogger):
    """Its writer refuses figures."""

    @property
    def experiment(self):
        writer = super().experiment
        writer.add_image = self.refuse
        return writer

    @staticmethod
    def refuse(*args, **kwargs):
        raise ConnectionError("no figures today")


def test_logger_that_refuses_figures_does_not_keep_them_from_another(tmp_path):
    watcher = monitor(figures=True)
    first, second = WithoutFigures(tmp_path, name="first"), TensorBoardLogger(tmp_path, "second")
    with pytest.warns(UserWarning, match="HessianMonitor: .*no figures today") as record:
        fit(tmp_path, watcher, logger=[first, second])
    assert len(ours(record)) == 1
    assert logged_steps(first) == logged_steps(second) == [0, 4]
    assert [image.step for image in events(second.log_dir).Images("hessian/density")] == [0, 4]


def test_unwritable_folder_costs_the_arrays_alone(tmp_path):
    logger = TensorBoardLogger(tmp_path, version="0")
    without = outcome(fit(tmp_path))
    # A file where the folder should be: nothing can be written, whoever runs this.
    (tmp_path / "lightning_logs" / "0").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "0" / "hessian").write_text("in the way")
    watcher = monitor(figures=True)
    with pytest.warns(
        UserWarning, match="HessianMonitor: saving arrays failed.*What was meant for this file"
    ) as record:
        trainer = fit(tmp_path, watcher, logger=logger)
    assert len(ours(record)) == 1
    assert logged_steps(logger) == steps(watcher) == [0, 4]
    assert [image.step for image in events(logger.log_dir).Images("hessian/density")] == [0, 4]
    trainer.loggers = []
    assert differences(without, outcome(trainer)) == []


def test_out_of_memory_names_its_own_remedy(tmp_path):
    def greedy(module, batch):
        raise MemoryError("no more")

    with pytest.warns(
        UserWarning, match="Give dataloader= with smaller batches, or lower num_samples"
    ):
        fit(tmp_path, monitor(loss=greedy))


def test_every_cause_is_warned_about_once(tmp_path):
    def loss(module, batch):
        if module.trainer.global_step % 2:
            raise ZeroDivisionError("odd")
        raise KeyError("even")

    with pytest.warns(UserWarning, match="HessianMonitor") as record:
        fit(tmp_path, monitor(loss=loss, every_n_train_steps=1), max_epochs=2)
    assert [re.search("odd|even", message)[0] for message in ours(record)] == ["even", "odd"]


def test_interrupt_in_a_measurement_ends_the_run_on_clean_weights(tmp_path):
    weights = {}

    class Reader(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def loss(module, batch):
        raise SystemExit(3)

    module = Plain()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=[Reader(), monitor(loss=loss, num_samples=12)],
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(SystemExit, match="3"):
        trainer.fit(module, loader())
    # The interrupted measurement had put the weights of the start in their place.
    assert trainer.global_step == 2
    assert differences(weights, dict(module.named_parameters())) == []


class OddOptimizer(torch.optim.SGD):
    """Has no learning rate, as optimizers that find their own."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] = None
        return loss


class WithOddOptimizer(Plain):
    def configure_optimizers(self):
        optimizer = OddOptimizer(self.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer


@pytest.mark.parametrize("num_samples", [4, 12], ids=["start at once", "late start"])
def test_optimizer_without_learning_rate_has_no_stability_and_all_the_rest(tmp_path, num_samples):
    watcher = monitor(every_n_train_steps=2, num_samples=num_samples)
    trainer = fit(tmp_path, watcher, WithOddOptimizer)
    assert trainer.global_step == 4
    assert steps(watcher)[0] == 0
    assert steps(watcher)[-1] == 4
    assert "hessian/stability" not in trainer.callback_metrics


class Table:
    """A batch of a foreign type, whose ``apply`` takes something else than tensors."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def apply(self, function):
        return function("a column")

    @staticmethod
    def collate(samples):
        x, y, _ = zip(*samples, strict=True)
        return Table(torch.stack(x), torch.stack(y))


class OnTables(Plain):
    def training_step(self, batch, batch_idx):
        return plain_loss(self, (batch.x, batch.y))


def test_batch_that_cannot_be_held_does_not_end_the_run(tmp_path):
    def train():
        return loader(collate_fn=Table.collate)

    without = outcome(fit(tmp_path, None, OnTables, train))
    watcher = monitor(every_n_train_steps=2)
    with pytest.warns(UserWarning, match="HessianMonitor: .*training goes on"):
        trainer = fit(tmp_path, watcher, OnTables, train)
    assert differences(without, outcome(trainer)) == []
    assert steps(watcher) == []


def test_loader_that_raises_does_not_end_the_run(tmp_path):
    def batches():
        raise OSError("the disk is away")
        yield

    with pytest.warns(UserWarning, match="HessianMonitor: .*the disk is away") as record:
        trainer = fit(tmp_path, monitor(dataloader=batches()))
    assert len(ours(record)) == 1
    assert trainer.global_step == 4


class Manual(Plain):
    """Steps two optimizers by itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(plain_loss(self, batch))
            optimizer.step()

    def configure_optimizers(self):
        first, last = self.net[0], self.net[2]
        return torch.optim.SGD(first.parameters(), 0.1), torch.optim.SGD(last.parameters(), 0.1)


@pytest.mark.parametrize("kind", [MisconfigurationException, OfLightning])
def test_manual_optimization_without_loss_is_refused(tmp_path, kind):
    with pytest.raises(kind, match=r"Manual uses manual optimization.*\n.*\n.*loss=loss"):
        fit(tmp_path, monitor(), Manual)


def test_manual_optimization_works_with_a_loss(tmp_path):
    without = outcome(fit(tmp_path, None, Manual))
    watcher = monitor(loss=plain_loss, every_n_train_steps=4)
    trainer = fit(tmp_path, watcher, Manual)
    assert differences(without, outcome(trainer)) == []
    # Each batch steps two optimizers; self.log counts batches, and so do the curves.
    assert steps(watcher) == [0, 2, 4]


@pytest.mark.parametrize("kind", [MisconfigurationException, OfLightning])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["decoder.*"], "layers contains 'decoder.*', which matches no.*layers are: net.0, net.2"),
        (["net.1"], "layers contains 'net.1', which matches no module with trainable"),
        (["net", "net.0"], "overlap: 'net.0.(weight|bias)' would belong to two"),
    ],
)
def test_layers_that_do_not_exist_are_refused_before_training(tmp_path, kind, layers, message):
    with pytest.raises(kind, match=message):
        fit(tmp_path, monitor(layers=layers))


class FromSetup(pl.LightningModule):
    """Has no layers before its ``setup``."""

    training_step = Plain.training_step
    configure_optimizers = Plain.configure_optimizers
    lr = 0.1

    def setup(self, stage):
        self.net = Plain().net


class FromConfigureModel(FromSetup):
    """Has no layers before its ``configure_model``."""

    def setup(self, stage):
        pass

    def configure_model(self):
        self.net = Plain().net


@pytest.mark.parametrize("make_module", [FromSetup, FromConfigureModel])
def test_layers_may_be_made_by_the_module_hooks(tmp_path, make_module):
    watcher = monitor(layers=["net.2"])
    fit(tmp_path, watcher, make_module)
    assert steps(watcher) == [0, 4]
    assert [*watcher.history[0][1].layer_traces] == ["net.2"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs is 0; give a whole number of at least 1"),
        ({"every_n_epochs": 1.5}, "every_n_epochs is 1.5; give a whole number"),
        ({"every_n_train_steps": -1}, "every_n_train_steps is -1; give a whole number"),
        ({"every_n_train_steps": True}, "every_n_train_steps is True; give a whole number"),
        ({"layers": ""}, "layers is ''; give a module path or pattern"),
        ({"layers": [1]}, r"layers is \[1\]; give a module path or pattern"),
        ({"layers": 5}, "layers is 5; give a module path or pattern"),
        ({"layers": []}, r"layers is \[\]; give a module path or pattern"),
        ({"num_probes": 1}, "num_probes is 1; give a whole number of at least 2"),
        ({"num_probes": "ten"}, "num_probes is 'ten'; give a whole number"),
        ({"num_steps": 1}, "num_steps is 1; give a whole number of at least 2"),
        ({"num_steps": 2.0}, r"num_steps is 2\.0; give a whole number"),
        ({"num_runs": 0}, "num_runs is 0; give a whole number of at least 1"),
        ({"num_samples": 0}, "num_samples is 0; give a whole number of at least 1"),
        ({"mode": "train"}, "mode is 'train'; give .*batch.* eval"),
        ({"loss": "mse"}, r"loss is 'mse'; give loss\(module, batch\) -> scalar"),
        ({"dataloader": 5}, "dataloader is of type int; give an iterable of batches"),
        ({"dataloader": "train"}, "dataloader is of type str; give an iterable of batches"),
        ({"max_overhead": True}, "max_overhead is True; give a positive share"),
        ({"figures": "no"}, "figures is 'no'; give True or False"),
        ({"save_arrays": None}, "save_arrays is None; give True or False"),
        ({"mode": "eval", "dropout": True}, "dropout is True in mode 'eval'"),
        ({"max_memory": 0}, "max_memory is 0; give a whole number"),
        ({"seed": 2**63}, "give a whole number below"),
        ({"seed": -1}, "seed is -1; give a whole number of at least 0"),
        ({"max_overhead": 0}, "max_overhead is 0; give a positive share of training time"),
        ({"max_overhead": "5%"}, "max_overhead is '5%'; give a positive share"),
        ({"max_overhead": float("nan")}, "max_overhead is nan; give a positive share"),
        ({"eig_rtol": 0.0}, r"eig_rtol is 0\.0; give a number between 0 and 1, or None"),
        ({"eig_rtol": 1}, "eig_rtol is 1; give a number between 0 and 1"),
        ({"trace_rtol": "small"}, "trace_rtol is 'small'; give a number between 0 and 1"),
        ({"microbatch_size": 0}, "microbatch_size is 0; give a whole number of at least 1"),
        ({"name": ""}, "name is ''; give the first part of the tags"),
        ({"name": 3}, "name is 3; give the first part of the tags"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument_is_named_with_what_is_allowed(setting, message):
    with pytest.raises(ValueError, match=message):
        HessianMonitor(**setting)


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="num_step"):
        HessianMonitor(num_step=3)


class Complex(Plain):
    """Has a parameter that has no Hessian here."""

    def __init__(self):
        super().__init__()
        self.phase = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))


class BareSGD(torch.optim.SGD):
    """Keeps fewer settings than its parent's rule needs."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        for group in self.param_groups:
            del group["dampening"]

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p -= group["lr"] * p.grad
        return loss


class BareOptimized(Plain):
    def configure_optimizers(self):
        return BareSGD(self.parameters(), 0.05)


@pytest.mark.parametrize("num_samples", [4, 12])
def test_a_parameter_without_a_hessian_does_not_end_the_run(tmp_path, num_samples):
    watcher = monitor(num_samples=num_samples)
    trainer = quiet_trainer(tmp_path, [watcher])
    with pytest.warns(UserWarning, match=r"HessianMonitor: .* failed and leaves a gap.*complex64"):
        trainer.fit(Complex(), loader())
    assert trainer.global_step == 4
    assert watcher.history == []


def test_an_optimizer_of_the_users_own_has_no_stability_and_all_the_rest(tmp_path):
    watcher = monitor()
    quiet_trainer(tmp_path, [watcher]).fit(BareOptimized(), loader())
    assert len(watcher.history) > 1
    assert all(math.isnan(report.criteria["stability"]) for _, report in watcher.history)


def test_two_monitors_of_one_name_are_refused(tmp_path):
    # Two of one class Lightning refuses itself, since both have a state.
    with pytest.raises(RuntimeError, match=r"more than one stateful callback.*HessianMonitor"):
        quiet_trainer(tmp_path, [monitor(), monitor()])
    trainer = quiet_trainer(tmp_path, [monitor(), LossLandscapeMonitor(name="hessian")])
    with pytest.raises(MisconfigurationException, match=r"two monitors are named 'hessian'.*name="):
        trainer.fit(Plain(), loader())

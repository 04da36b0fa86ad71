"""A run cut in two by a checkpoint has the curves of a run that was never cut."""

import io

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lla_callbacks import HessianMonitor, HessianTraceRegularizer, LossLandscapeMonitor
from lla_callbacks.report.plain import to_plain

from .modules import (
    Evaluated,
    Plain,
    data,
    differences,
    events,
    fit,
    loader,
    monitor,
    plain_loss,
    quiet_trainer,
    scalars,
    steps,
)

# Lightning's own, where the run that goes on writes no checkpoints.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]

LANDSCAPE = {
    "plane_points": 3, "line_points": 5, "num_samples": 4, "figures": False, "evaluation": "loop",
    "planes": ["random", "trajectory"], "lines": ["top1", "update"],
}  # fmt: skip


def landscape(**settings):
    return LossLandscapeMonitor(**{**LANDSCAPE, **settings})


class Normed(Plain):
    """Has buffers, which a start that is measured late needs as well."""

    def __init__(self, optimizer="adam"):
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), 0.05)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class ResumableLoader(DataLoader):
    """Goes on at the batch where a checkpoint was written, as torchdata's stateful loader."""

    start = done = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.done = number + 1
                yield batch

    def state_dict(self):
        return {"start": self.done % len(self)}

    def load_state_dict(self, state):
        self.start = state["start"]


def resumable_loader():
    return ResumableLoader(data(), batch_size=4)


def train(folder, callbacks, name, make_module=Normed, train=resumable_loader, ckpt=None, **more):
    """Train for three epochs of four steps and return the Trainer."""
    pl.seed_everything(3, verbose=False)
    logger = TensorBoardLogger(folder, name="run", version=name)
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"max_epochs": 3, "logger": logger, "enable_checkpointing": keeps, **more}
    trainer = quiet_trainer(folder, callbacks, **settings)
    trainer.fit(make_module(), train(), ckpt_path=ckpt, weights_only=True)
    logger.finalize("success")
    return trainer


def every_step(folder):
    return ModelCheckpoint(folder / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)


def every_epoch(folder):
    return ModelCheckpoint(folder / "kept", filename="{step}", save_top_k=-1)


def history(watcher):
    """Return all numbers of all reports, save what they cost."""
    return _without_time([(step, to_plain(report)) for step, report in watcher.history])


def logged(trainer, least=-1):
    """Return what the monitor logged after a step, save what it cost."""
    found = scalars(events(trainer.logger.log_dir))
    return {
        tag: [(step, value) for step, value in pairs if step > least]
        for tag, pairs in found.items()
        if tag.removeprefix("zz_").startswith(("hessian", "landscape"))
        and not tag.endswith(("seconds", "overhead"))
        and any(step > least for step, _ in pairs)
    }


CLOCKS = {"seconds", "training_steps"}


def _without_time(value):
    if isinstance(value, dict):
        return {k: _without_time(v) for k, v in value.items() if k not in CLOCKS}
    if isinstance(value, (list, tuple)):
        return [_without_time(v) for v in value]
    return value


CASES = [
    pytest.param(lambda: monitor(every_n_train_steps=3), "sgd", id="hessian"),
    pytest.param(lambda: monitor(every_n_epochs=1, num_samples=12), "adam", id="epochs"),
    pytest.param(
        lambda: monitor(every_n_train_steps=2, num_samples=1000),
        "adam",
        id="start in epoch 1",
    ),
    pytest.param(
        lambda: monitor(every_n_train_steps=4, num_layer_steps=2, num_runs=2, mode="eval"),
        "adam",
        id="layers",
    ),
    pytest.param(
        lambda: monitor(every_n_train_steps=2, dataloader=loader(shuffle=True)),
        "adam",
        id="loader",
    ),
    pytest.param(lambda: landscape(every_n_train_steps=3), "sgd", id="landscape"),
    pytest.param(
        lambda: landscape(
            every_n_train_steps=6,
            num_samples=12,
            num_rays=2,
            convexity_points=3,
            plane_points=7,
            refine=True,
            time_budget=None,
        ),
        "sgd",
        id="landscape, late start, refined",
    ),
]


@pytest.mark.parametrize(("make", "optimizer"), CASES)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, make, optimizer):
    """Wherever the checkpoint was written: same steps, tags and values, to the bit."""
    whole = make()
    one = train(tmp_path, [whole, every_step(tmp_path)], "whole", lambda: Normed(optimizer))
    assert (steps(whole)[0], steps(whole)[-1]) == (0, 12)
    # While batches are held, at the last batch of an epoch, within one.
    for cut in (1, 4, 6):
        resumed = make()
        other = train(
            tmp_path, [resumed], f"from {cut}", lambda: Normed(optimizer),
            ckpt=tmp_path / "kept" / f"step={cut}.ckpt",
        )  # fmt: skip
        weights = [trainer.lightning_module.state_dict() for trainer in (one, other)]
        assert differences(*weights) == []
        assert differences(history(whole), history(resumed)) == []
        # What was measured before the checkpoint is not measured, nor logged, again.
        known = [step for step, _ in torch_history(tmp_path, cut, resumed)]
        assert known == steps(whole)[: len(known)]
        assert logged(other) == logged(one, max(known, default=-1))


def torch_history(folder, cut, watcher):
    """Return the history in a checkpoint."""
    state = torch.load(folder / "kept" / f"step={cut}.ckpt", weights_only=True)
    return state["callbacks"][watcher.state_key]["history"]


def cut_and_go_on(folder, first, second, **more):
    """Train one epoch, save a checkpoint after the fit, go on in a new Trainer; return that."""
    trainer = train(folder, first, "first", max_epochs=1)
    trainer.save_checkpoint(folder / "kept.ckpt")
    return train(folder, second, "second", ckpt=folder / "kept.ckpt", max_epochs=2, **more)


def ours(record):
    return [str(w.message) for w in record if "Monitor: " in str(w.message)]


@pytest.mark.parametrize("make", [monitor, landscape])
def test_checkpoint_written_after_the_fit_holds_all_of_it(tmp_path, make):
    """As written by ``trainer.save_checkpoint`` or a ModelCheckpoint when training ends."""
    whole, first, second = (make(every_n_train_steps=2) for _ in range(3))
    train(tmp_path, [whole], "whole", max_epochs=2)
    trainer = cut_and_go_on(tmp_path, [first], [second])
    assert steps(first) == [0, 2, 4]
    assert differences(history(whole), history(second)) == []
    assert sorted(s for s, _ in logged(trainer)[f"{second.name}/loss"]) == [6, 8]


def test_end_of_a_run_that_goes_on_is_one_more_point(tmp_path):
    first, second = (monitor(every_n_train_steps=3) for _ in range(2))
    cut_and_go_on(tmp_path, [first], [second])
    assert (steps(first), steps(second)) == ([0, 3, 4], [0, 3, 4, 6, 8])


def test_fit_that_is_done_already_measures_nothing_twice(tmp_path):
    first, second = monitor(), monitor()
    trainer = train(tmp_path, [first], "first", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    train(tmp_path, [second], "second", ckpt=tmp_path / "kept.ckpt", max_epochs=1)
    assert steps(second) in ([], steps(first))


def test_evaluation_between_fit_and_checkpoint_costs_nothing(tmp_path):
    whole, first, second = (monitor(every_n_epochs=1) for _ in range(3))
    train(tmp_path, [whole], "whole", Evaluated, max_epochs=2)
    trainer = train(tmp_path, [first], "first", Evaluated, max_epochs=1)
    trainer.test(trainer.lightning_module, loader(24), verbose=False)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    train(tmp_path, [second], "second", Evaluated, ckpt=tmp_path / "kept.ckpt", max_epochs=2)
    assert differences(history(whole), history(second)) == []


def test_evaluation_of_a_checkpoint_does_not_reach_the_next_fit(tmp_path):
    first, second = monitor(), monitor()
    train(tmp_path, [first], "first", Evaluated, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    trainer = quiet_trainer(tmp_path, [second])
    module = Evaluated()
    trainer.validate(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert second.history == []
    trainer.fit(module, loader())
    assert steps(second) == [0, 4]


def test_checkpoint_is_plain_and_small(tmp_path):
    watchers = [monitor(every_n_train_steps=1), landscape(every_n_train_steps=4, planes=["random"])]
    trainer = train(tmp_path, watchers, "first", max_epochs=3)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    callbacks = torch.load(tmp_path / "kept.ckpt", weights_only=True)["callbacks"]
    sizes = []
    for watcher in watchers:
        file = io.BytesIO()
        torch.save(callbacks[watcher.state_key]["history"], file)
        sizes.append(len(file.getvalue()) / len(watcher.history))
    assert sizes[0] < 4_000
    assert sizes[1] < 8_000


def test_all_callbacks_of_one_trainer_keep_their_own(tmp_path):
    def make():
        return [
            monitor(every_n_train_steps=2, name="one"),
            monitor(every_n_train_steps=3, name="two", num_samples=12, mode="eval"),
            landscape(every_n_epochs=1),
            HessianTraceRegularizer("auto"),
        ]

    whole, first, second = make(), make(), make()
    one = train(tmp_path, [*whole, every_epoch(tmp_path)], "whole")
    train(tmp_path, [*first, every_epoch(tmp_path / "other")], "first", max_epochs=1)
    ckpt = tmp_path / "kept" / "step=4.ckpt"
    other = train(tmp_path, second, "second", ckpt=ckpt)
    weights = [trainer.lightning_module.state_dict() for trainer in (one, other)]
    assert differences(*weights) == []
    for a, b in zip(whole[:3], second[:3], strict=True):
        assert differences(history(a), history(b)) == []
    assert whole[3].found_strength == second[3].found_strength is not None
    found = [
        {t: v for t, v in scalars(events(trainer.logger.log_dir)).items() if "regularizer" in t}
        for trainer in (one, other)
    ]
    # Lightning's log interval goes on too.
    assert found[1]["regularizer/ratio"] == [p for p in found[0]["regularizer/ratio"] if p[0] > 3]


@pytest.mark.parametrize("target", [0.1, 0.2])
def test_found_strength_follows_the_present_target(tmp_path, target):
    first, second = (
        HessianTraceRegularizer("auto"),
        HessianTraceRegularizer("auto", target_ratio=target),
    )
    trainer = train(tmp_path, [first], "first")
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    train(tmp_path, [second], "second", ckpt=tmp_path / "kept.ckpt", max_epochs=4)
    assert second.found_strength == pytest.approx(first.found_strength * target / 0.1)
    fixed = HessianTraceRegularizer(1e-4)
    train(tmp_path, [fixed], "fixed", ckpt=tmp_path / "kept.ckpt", max_epochs=4)
    assert fixed.found_strength is None


@pytest.mark.filterwarnings("default:Be aware that when using .ckpt_path.")
def test_monitor_that_joins_a_run_begins_where_it_joins(tmp_path):
    # Each checks itself at its first measurement, which is another one.
    whole, joins = (monitor(every_n_epochs=1, check=False) for _ in range(2))
    train(tmp_path, [whole], "whole", max_epochs=2)
    cut_and_go_on(tmp_path, [], [joins])
    assert steps(joins) == [4, 8]
    assert differences(history(whole)[1:], history(joins)) == []


def test_run_without_its_monitor_goes_on_and_lightning_says_so(tmp_path):
    with pytest.warns(UserWarning, match="HessianMonitor.*'name': 'one'"):
        trainer = cut_and_go_on(tmp_path, [monitor(name="one")], [])
    assert trainer.global_step == 8


def test_monitor_of_another_name_begins_anew(tmp_path):
    renamed = monitor(name="two")
    with pytest.warns(UserWarning, match="HessianMonitor.*'name': 'one'"):
        cut_and_go_on(tmp_path, [monitor(name="one")], [renamed])
    assert steps(renamed) == [4, 8]


@pytest.mark.parametrize(
    ("settings", "text", "samples"),
    [
        ({"num_steps": 5, "mode": "eval"}, r"mode was 'batch' and is 'eval', num_steps was 3", 4),
        ({"num_samples": 8}, r"num_samples was 4 and is 8\. .*New batches are held\.", 8),
        ({"loss": plain_loss}, "loss was None and is plain_loss", 4),
        ({"dataloader": loader()}, r"dataloader was None and is 'given'.*New batches are held", 4),
    ],
    ids=["mode", "samples", "loss", "loader"],
)
def test_other_settings_are_said_and_taken(tmp_path, settings, text, samples):
    first, second = monitor(every_n_epochs=1), monitor(every_n_epochs=1, **settings)
    with pytest.warns(UserWarning, match=text) as record:
        cut_and_go_on(tmp_path, [first], [second])
    (message,) = ours(record)
    assert "may jump at step 4" in message
    assert steps(second) == [0, 4, 8]
    assert differences(history(first), history(second)[:2]) == []
    assert second.report.num_samples == samples
    assert second.report.mode == settings.get("mode", "batch")


def test_other_schedule_budget_or_outputs_go_on_without_a_word(tmp_path):
    first = monitor(every_n_epochs=1)
    second = monitor(every_n_train_steps=2, figures=True, save_arrays=False)
    cut_and_go_on(tmp_path, [first], [second])  # warnings are errors
    assert steps(second) == [0, 4, 6, 8]


def test_loader_that_gives_other_batches_is_said(tmp_path):
    def reversed_loader():
        return DataLoader(torch.utils.data.Subset(data(), range(15, -1, -1)), batch_size=4)

    first, second = (monitor(dataloader=made) for made in (loader(), reversed_loader()))
    with pytest.warns(UserWarning, match="other batches than before the checkpoint") as record:
        cut_and_go_on(tmp_path, [first], [second])
    assert len(ours(record)) == 1
    assert steps(second) == [0, 4, 8]


class Pair:
    """A batch of a class that no checkpoint can hold."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def apply(self, function):
        self.x, self.y = function(self.x), function(self.y)
        return self

    def to(self, device):
        return self

    @staticmethod
    def collate(samples):
        x, y, _ = zip(*samples, strict=True)
        return Pair(torch.stack(x), torch.stack(y))


class OnPairs(Plain):
    def training_step(self, batch, batch_idx):
        return plain_loss(self, (batch.x, batch.y))


def test_batches_of_other_classes_are_held_anew_and_that_is_said_once(tmp_path):
    def pairs():
        return loader(collate_fn=Pair.collate)

    first, second = (monitor(every_n_epochs=1) for _ in range(2))
    with pytest.warns(UserWarning, match="no checkpoint holds.*Give batches of tensors") as record:
        train(tmp_path, [first, every_epoch(tmp_path)], "first", OnPairs, pairs, max_epochs=1)
    assert len(ours(record)) == 1
    ckpt = tmp_path / "kept" / "step=4.ckpt"
    train(tmp_path, [second], "second", OnPairs, pairs, ckpt=ckpt, max_epochs=2)
    # No second start: the first is in the history.
    assert steps(second) == [0, 4, 8]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda state: state.update(version=99), "another version"),
        (lambda state: state["history"].append((9, {"structure": 1})), "KeyError"),
        (lambda state: state.pop("account"), "account"),
    ],
)
def test_state_that_cannot_be_read_costs_a_warning(tmp_path, spoil, text):
    first, second = monitor(), monitor(every_n_epochs=1)
    trainer = train(tmp_path, [first], "first", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    checkpoint = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    spoil(checkpoint["callbacks"][first.state_key])
    torch.save(checkpoint, tmp_path / "kept.ckpt")
    with pytest.warns(UserWarning, match=f"resuming failed.*{text}.*begin anew") as record:
        train(tmp_path, [second], "second", ckpt=tmp_path / "kept.ckpt", max_epochs=2)
    assert len(ours(record)) == 1
    assert steps(second) == [4, 8]


def test_last_values_are_there_before_the_next_measurement(tmp_path):
    """A ModelCheckpoint that follows the trace would end the resumed run without them."""
    first, second = (monitor(every_n_train_steps=4) for _ in range(2))

    class Reader(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(float(trainer.callback_metrics["hessian/trace"]))

    seen = []
    trainer = train(tmp_path, [first], "first", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    stopping = EarlyStopping("hessian/trace", patience=9)
    train(
        tmp_path, [second, Reader(), stopping], "second", ckpt=tmp_path / "kept.ckpt",
        max_epochs=2, limit_train_batches=3,
    )  # fmt: skip
    assert seen[0] == pytest.approx(first.report.trace, rel=1e-6)


def test_account_goes_on_counting(tmp_path):
    first, second = monitor(max_overhead=1.0), monitor(max_overhead=1.0)
    cut_and_go_on(tmp_path, [first], [second])
    before, after = (w.state_dict()["account"] for w in (first, second))
    assert after["spent"]["hessian"] > before["spent"]["hessian"] > 0
    assert after["training"] > before["training"] > 0


def test_second_fit_without_a_checkpoint_begins_anew(tmp_path):
    watcher = monitor(every_n_epochs=1)
    trainer = train(tmp_path, [watcher], "first", max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, loader())
    assert steps(watcher) == [4, 8]
    assert [step for step, _ in watcher.state_dict()["history"]] == [4, 8]


def test_monitor_that_never_trained_stores_nothing(tmp_path):
    assert HessianMonitor().state_dict() == {}
    trainer = fit(tmp_path, None)
    assert HessianMonitor().state_key not in trainer._checkpoint_connector.dump_checkpoint(False)

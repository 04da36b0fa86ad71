"""A quantity from a file outside of the package has the promises of those inside.

Under two processes, whole and resumed: test_resume_ddp.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as lightning_pl
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from own_quantity import GradientNoise, SignalToNoise
from pytorch_lightning.loggers import TensorBoardLogger

from lla_callbacks import HessianMonitor, Monitor, Quantity, Result, Slices, Spectrum
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.slices import choice
from lla_callbacks.slices.landscape import LandscapeSettings

from .modules import (
    Plain,
    PlainOfLightning,
    differences,
    events,
    fit,
    loader,
    outcome,
    plain_loss,
    quiet_trainer,
    scalars,
)


def watch(*more, **settings):
    made = {"every_n_train_steps": 2, "num_samples": 8, "loss": plain_loss, **settings}
    return Monitor([GradientNoise(), *more], **made)


def by_hand(module, batches):
    """Return |mean gradient|^2 over the squared norm of its standard error."""
    parameters = list(module.parameters())
    gradients = torch.stack([
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(plain_loss(module, b), parameters)])
        for b in batches
    ]).double()  # fmt: skip
    mean = gradients.mean(0)
    noise = (gradients - mean).square().sum() / (len(batches) * (len(batches) - 1))
    return float(mean.square().sum() / noise)


@pytest.mark.parametrize(
    ("namespace", "make_module"), [(pl, Plain), (lightning_pl, PlainOfLightning)]
)
def test_its_numbers_reach_logs_files_and_callback_metrics(tmp_path, namespace, make_module):
    watcher = watch(num_samples=12)
    held = []

    class Hold(namespace.Callback):
        def on_train_end(self, trainer, module):
            with torch.random.fork_rng():
                held.append(by_hand(module.eval(), watcher.subject.held.batches))

    logger_of = TensorBoardLogger if namespace is pl else lightning_pl.loggers.TensorBoardLogger
    logger = logger_of(tmp_path)
    trainer = quiet_trainer(tmp_path, [Hold(), watcher], namespace=namespace, logger=logger)
    trainer.fit(make_module(), loader())
    history = watcher.histories["gradient"]
    tag = "gradient/signal_to_noise"
    logged = scalars(events(logger.log_dir))
    assert [s for s, _ in logged[tag]] == [s for s, _ in history]
    assert logged[tag][-1][1] == pytest.approx(history[-1][1].ratio, rel=1e-6)
    assert float(trainer.callback_metrics[tag]) == pytest.approx(history[-1][1].ratio, rel=1e-6)
    assert "monitor/overhead" in logged
    assert len(events(logger.log_dir).Images("gradient/parameters")) == len(history)
    (file,) = sorted((tmp_path / "lightning_logs").glob("*/gradient/*.npz"))[-1:]
    assert SignalToNoise.load(file).by_parameter == history[-1][1].by_parameter
    assert float(np.load(file)["ratio"]) == history[-1][1].ratio
    assert history[-1][1].ratio == pytest.approx(held[0], rel=1e-4)


def test_training_is_left_bitwise_unchanged(tmp_path):
    found = [outcome(fit(tmp_path, w)) for w in (None, watch(figures=False))]
    # Its own numbers are there beside the others, as they should.
    assert [d for d in differences(*found) if not d.startswith("/callback_metrics")] == []


def test_a_resumed_run_has_the_curve_of_a_whole_one(tmp_path):
    def run(epochs, checkpoint=None):
        watcher = watch(figures=False)
        pl.seed_everything(3, verbose=False)
        trainer = quiet_trainer(tmp_path, [watcher], max_epochs=epochs)
        trainer.fit(Plain(), loader(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return [(step, r.ratio, r.by_parameter) for step, r in watcher.histories["gradient"]]

    whole = run(2)
    first = run(1)
    torch.load(tmp_path / "1.ckpt", weights_only=True)
    assert run(2, tmp_path / "1.ckpt") == whole
    assert whole[: len(first) - 1] == first[:-1]


def test_what_it_cannot_say_is_a_gap_with_one_warning(tmp_path):
    watcher = watch(num_samples=1, figures=False)
    with pytest.warns(UserWarning, match="signal_to_noise failed and leaves a gap") as caught:
        fit(tmp_path, watcher)
    assert len([w for w in caught if "signal_to_noise" in str(w.message)]) == 1
    assert all(math.isnan(r.ratio) for _, r in watcher.histories["gradient"])


@dataclass(frozen=True)
class Number(Result):
    value: float


@dataclass(frozen=True)
class Failing(Quantity):
    name: str = "failing"
    result = Number

    def measure(self, objective, moment):
        if moment.step == 2:
            raise RuntimeError("it is unwell")
        return Number(math.inf if moment.step == 4 else 1.0)


def test_one_that_fails_costs_no_other_and_not_the_run(tmp_path):
    watcher = watch(Failing(), figures=False)
    with pytest.warns(UserWarning, match="it is unwell|it is inf") as caught:
        fit(tmp_path, watcher, max_epochs=2)
    own = [step for step, _ in watcher.histories["failing"]]
    assert 2 not in own
    assert [step for step, _ in watcher.histories["gradient"]] == sorted([*own, 2])
    assert any("failing/value: it is inf" in str(w.message) for w in caught)


def test_spectrum_and_slices_beside_it_are_those_of_their_own_monitors(tmp_path):
    settings = HessianSettings(num_steps=4, num_probes=4)
    slices = LandscapeSettings(planes=(), lines=("random",), line_points=5, evaluation="loop")
    watcher = watch(Spectrum(settings), Slices(slices), figures=False)
    alone = HessianMonitor(
        every_n_train_steps=2, num_samples=8, loss=plain_loss, num_steps=4, num_probes=4,
        figures=False,
    )  # fmt: skip
    fit(tmp_path, watcher)
    fit(tmp_path, alone)
    both = [watcher.histories["hessian"], alone.history]
    one, other = ([(s, r.lambda_max, r.trace) for s, r in history] for history in both)
    assert one == other
    assert watcher.results["landscape"].lines["random"].centre_loss == alone.report.loss


def test_one_spectrum_run_serves_the_slices_too(tmp_path, monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("a second run")

    monkeypatch.setattr(choice, "curved_directions", refuse)
    spectrum = Spectrum(HessianSettings(num_steps=30, num_probes=2))
    lines = LandscapeSettings(
        planes=(), lines=("top1", "bottom1", "gradient"), line_points=3, evaluation="loop"
    )
    watcher = Monitor(
        [spectrum, Slices(lines)], every_n_train_steps=3, num_samples=8, loss=plain_loss,
        figures=False,
    )  # fmt: skip
    fit(tmp_path, watcher)
    results = watcher.results
    assert results["landscape"].missing == {}
    found = {k: line.directions[0] for k, line in results["landscape"].lines.items()}
    assert found["top1"].eigenvalue == pytest.approx(float(results["hessian"].lambda_max))
    assert found["bottom1"].eigenvalue == pytest.approx(float(results["hessian"].lambda_min))


def test_the_page_shows_the_file_that_is_tested():
    root = Path(__file__).parents[2]
    source = (root / "examples" / "own_quantity.py").read_text()
    start = source.index("@dataclass(frozen=True, repr=False)")
    shown = source[start : source.index("def main()")].rstrip()
    assert shown in (root / "docs" / "own_quantity.md").read_text()


@pytest.mark.parametrize(
    "quantities", [[], GradientNoise(), [1], [GradientNoise(), GradientNoise()]]
)
def test_what_is_no_list_of_quantities_is_refused(quantities):
    with pytest.raises(ValueError, match=r"quantities.*give"):
        Monitor(quantities)


def test_a_limit_holds_for_it_too(tmp_path):
    watcher = Monitor([Failing()], max_overhead=1e-9, loss=plain_loss, figures=False)
    fit(tmp_path, watcher, max_epochs=3)
    # One at the end, at least.
    assert [step for step, _ in watcher.histories["failing"]] == [12]

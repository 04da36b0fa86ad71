"""Two monitors of one loss at the same weights do their work once, in whatever order they stand.

Under two processes: test_processes.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lla_callbacks import HessianMonitor, LossLandscapeMonitor, Monitor, Slices, Spectrum
from lla_callbacks.callbacks import account, firing, planning
from lla_callbacks.callbacks.account import Account
from lla_callbacks.callbacks.handed_on import Served, marks_of
from lla_callbacks.callbacks.pace import Choice, Pace
from lla_callbacks.callbacks.sizing import SLICES as SIZES
from lla_callbacks.callbacks.sizing import choose_slices
from lla_callbacks.hessian.settings import HessianSettings
from lla_callbacks.slices import eigenvectors
from lla_callbacks.slices.landscape import LandscapeSettings

from .modules import Plain, differences, fit, loader, outcome, plain_loss, quiet_trainer, steps
from .test_account import COSTS, PRICE, Clock, pair, watch

# Deeper than there are parameters: every eigenvector is found.
HESSIAN = {"num_steps": 40, "num_probes": 2}
SLICES = {
    "planes": ["hessian_ends"], "lines": ["random", "top1", "bottom1", "gradient"],
    "plane_points": 3, "line_points": 5, "evaluation": "loop",
}  # fmt: skip
BOTH = {"every_n_train_steps": 2, "num_samples": 8, "figures": False, "save_arrays": False}


class Double(Plain):
    """In float64, so that eigenvectors agree to many digits."""

    def __init__(self):
        super().__init__()
        self.double()

    def training_step(self, batch, batch_idx):
        return plain_loss(self, (batch[0].double(), batch[1]))


class Nudge(pl.Callback):
    """Moves the weights between the measurements of two monitors of one step, and back."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.net[0].weight.mul_(1.01)


class Planned(pl.Callback):
    """Ends a run once everybody has chosen sizes for it."""

    class DoneError(Exception):
        pass

    def on_train_batch_end(self, trainer, *rest):
        watchers = [c for c in trainer.callbacks if hasattr(c, "pace")]
        if all(watcher.pace.planned for watcher in watchers):
            raise self.DoneError


@pytest.fixture
def runs(monkeypatch):
    """The depths of all Lanczos runs that slices made for themselves."""
    found = []
    run_of = eigenvectors.lanczos

    def noted(*arguments, **settings):
        made = run_of(*arguments, **settings)
        found.append(made.num_steps)
        return made

    monkeypatch.setattr(eigenvectors, "lanczos", noted)
    return found


def hessian(**settings):
    return HessianMonitor(**{**BOTH, **HESSIAN, **settings})


def landscape(**settings):
    return LossLandscapeMonitor(**{**BOTH, **SLICES, **settings})


def watched(folder, *monitors, **settings):
    return fit(folder, make_module=Double, callbacks=list(monitors), **settings)


def numbers(monitor):
    """Return all losses, eigenvalues and slopes of a run, by step and slice."""
    found = {}
    for step, report in monitor.history:
        assert report.missing == {}
        for name, part in report.slices.items():
            found[step, name] = part.loss
            values = [(d.eigenvalue or 0.0, d.reach) for d in part.directions]
            found[step, name, "directions"] = torch.tensor(values, dtype=torch.float64)
    return found


@pytest.mark.parametrize("swapped", [False, True])
def test_slices_take_eigenvectors_from_the_spectrum(tmp_path, runs, monkeypatch, swapped):
    monkeypatch.setattr(eigenvectors, "RTOL", 1e-10)
    alone = landscape()
    watched(tmp_path, alone)
    assert len(runs) == len(alone.history) == 3
    runs.clear()
    watchers = [hessian(), landscape()]
    watched(tmp_path, *watchers[:: -1 if swapped else 1])
    assert runs == []
    assert steps(watchers[1]) == steps(watchers[0]) == steps(alone) == [0, 2, 4]
    one, other = numbers(watchers[1]), numbers(alone)
    assert list(one) == list(other)
    # Residuals of 1e-10 of the eigenvalue, over gaps of a hundredth of the largest.
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-6, atol=1e-9, msg=str(name))
    # What the loss proved of itself is asked once, too.
    assert watchers[0].subject.findings is watchers[1].subject.findings
    assert watchers[1].report.self_check is watchers[0].report.self_check is not None


@pytest.mark.parametrize("swapped", [False, True])
def test_a_run_goes_on_from_what_has_not_settled(tmp_path, runs, swapped):
    lines = {"planes": [], "lines": ["top1"]}
    other = landscape(**lines)
    watched(tmp_path, other)
    alone = sum(runs)
    runs.clear()
    watchers = [hessian(num_steps=4), landscape(**lines)]
    watched(tmp_path, *watchers[:: -1 if swapped else 1])
    # Surely no more, for an answer that is as sure.
    assert 0 < sum(runs) <= alone
    for (_, here), (_, there) in zip(watchers[1].history, other.history, strict=True):
        (one,), (two,) = (r.lines["top1"].directions for r in (here, there))
        assert one.settled
        assert abs(one.eigenvalue - two.eigenvalue) <= one.residual + two.residual


@pytest.mark.parametrize(
    ("swapped", "other"),
    [
        (False, {"num_samples": 4}), (True, {"num_samples": 4}), (False, {"mode": "eval"}),
        (True, {"seed": 1}), (False, {"engine": "difference"}), (True, {"precision": "training"}),
        (False, {"dropout": True}), (True, {"parameters": ["net.0"]}),
        (False, {"loss": lambda module, batch: module.training_step(batch, 0)}),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else next(iter(value)),
)  # fmt: skip
def test_other_settings_have_runs_of_their_own(tmp_path, runs, swapped, other):
    watchers = [hessian(), landscape(lines=["top1"], planes=[], **other)]
    watched(tmp_path, *watchers[:: -1 if swapped else 1], max_steps=2)
    assert len(runs) == len(watchers[1].history) == 2


@pytest.mark.parametrize("swapped", [False, True])
def test_other_weights_at_the_same_step_have_runs_of_their_own(tmp_path, runs, swapped):
    watchers = [hessian(every_n_train_steps=100), landscape(every_n_train_steps=100)]
    first, second = watchers[:: -1 if swapped else 1]
    watched(tmp_path, first, Nudge(), second)
    assert steps(watchers[0]) == steps(watchers[1]) == [0, 4]
    # With somebody else's callback between, nobody goes first; the start is of the same weights.
    assert len(runs) == (2 if swapped else 1)
    assert watchers[1].report.loss != pytest.approx(watchers[0].report.loss, rel=1e-9)


def test_vectors_are_kept_until_training_goes_on_and_no_longer(tmp_path):
    seen = {"after": [], "later": []}
    slices = landscape(every_n_train_steps=4)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, *rest):
            left = slices.handed._left
            seen["after"].append(left is not None)
            if left is not None:
                known = left[1]["directions"]
                assert set(known.directions) == {"top1", "bottom1", "gradient"}
                assert known.start is None

        def on_before_zero_grad(self, *rest):
            seen["later"].append(slices.handed.is_left)

    watched(tmp_path, hessian(), Look(), slices)
    # At step 2 the spectrum alone is measured; at step 4 what it leaves is taken.
    assert seen == {"after": [False, True, False, True], "later": [False] * 4}
    assert not slices.handed.is_left


@pytest.mark.parametrize("swapped", [False, True])
def test_training_is_left_bitwise_unchanged(tmp_path, swapped):
    plain = outcome(watched(tmp_path / "plain"))
    watchers = [hessian(num_steps=3), landscape()][:: -1 if swapped else 1]
    assert differences(plain, outcome(watched(tmp_path / "watched", *watchers))) == []


@pytest.mark.parametrize("swapped", [False, True])
def test_a_stand_alone_validation_shares_too(tmp_path, runs, swapped):
    class Validated(Double):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.training_step(batch, batch_idx))

    watchers = [hessian(), landscape()]
    trainer = quiet_trainer(tmp_path, watchers[:: -1 if swapped else 1])
    trainer.validate(Validated(), loader(), verbose=False)
    assert runs == []
    assert [len(w.evaluated) for w in watchers] == [1, 1]


@pytest.mark.parametrize("swapped", [False, True])
def test_quantities_of_one_monitor_share_in_any_order(tmp_path, runs, swapped):
    quantities = [Spectrum(HessianSettings(**HESSIAN)), Slices(LandscapeSettings(**SLICES))]
    watcher = Monitor(quantities[:: -1 if swapped else 1], **BOTH)
    watched(tmp_path, watcher)
    assert runs == []
    names = ["hessian", "landscape"][:: -1 if swapped else 1]
    assert list(watcher.results) == names
    assert all(result is not None for result in watcher.results.values())


def test_three_monitors_are_served_by_one(tmp_path, runs):
    watchers = [landscape(name="one"), landscape(name="two"), hessian()]
    watched(tmp_path, *watchers)
    assert runs == []
    assert steps(watchers[0]) == steps(watchers[1]) == steps(watchers[2]) == [0, 2, 4]


def test_a_plan_counts_on_what_is_shared(tmp_path, runs, monkeypatch):
    clock = Clock()
    for module in (account, firing, planning):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))

    def planned():
        watchers = pair(clock, 0.01 * PRICE)
        order = [*watchers[::-1], Planned()]
        with pytest.raises(Planned.DoneError):
            watch(clock, tmp_path, *order, train=800)
        return watchers[1]

    shared = planned()
    assert runs == []
    assert shared.pace.choice.size["at_hand"] == shared.pace.choice.size["products"] > 0
    monkeypatch.setattr(LossLandscapeMonitor, "_served", lambda self, samples: Served())
    assert planned().pace.choice.size["plane_points"] < shared.pace.choice.size["plane_points"]


def test_products_at_hand_are_not_paid_again():
    size = replace(SIZES[0], at_hand=SIZES[0].products)
    without = replace(size, products=0)
    some = replace(size, at_hand=SIZES[0].products - 5)
    assert COSTS.slices(size, 64) == COSTS.slices(without, 64)
    both = COSTS.slices(some, 64) - COSTS.slices(size, 64)
    assert both == pytest.approx(COSTS.batch_gradient + 5 * COSTS.batch_product)
    one, alone = (COSTS.slices(s, 64) + COSTS.figure for s in (size, SIZES[0]))
    seconds = one + 2.5 * alone
    assert choose_slices(seconds, COSTS, [size], 64, figures=1, meets=False)[1] == 3
    assert choose_slices(seconds, COSTS, [size], 64, figures=1)[1] == int(seconds / one) > 3
    # It fits where the same slices would not by themselves.
    assert choose_slices(one, COSTS, [size], 64, figures=1)[2]
    assert not choose_slices(one, COSTS, [SIZES[0]], 64, figures=1)[2]


def test_what_is_done_for_another_is_booked_to_it(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(account, "time", SimpleNamespace(monotonic=clock.monotonic))
    made = Account()
    with made.watching("slices"):
        clock.now += 1
        with made.instead("spectrum", asked=True):
            clock.now += 10
        clock.now += 2
    assert (made.spent, made.asked) == ({"slices": 3}, {"spectrum": 10})
    assert not made.is_open


def test_marks_tell_weights_apart():
    module = nn.BatchNorm1d(3)
    before = marks_of(module)
    assert marks_of(module) == before
    module.running_mean[0] += 1e-6
    assert marks_of(module) != before


def test_slices_are_measured_when_the_spectrum_is():
    made = Account()
    made.join("slices", 0.05, share=1.0)
    pace = Pace()
    few = Choice(8, 3, 0.0, 0.0, fits=True, words="")
    pace.take(few, made, "slices", grid=[1 / 9, 4 / 9, 8 / 9])
    assert pace.targets == [4 / 9]
    pace.take(few, made, "slices")
    assert pace.targets == [0.5]

"""What watching may cost is what it costs, whatever the run does."""

import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from lla_callbacks import HessianMonitor, LossLandscapeMonitor, economy, standard
from lla_callbacks.callbacks import account as account_module
from lla_callbacks.callbacks import firing, planning
from lla_callbacks.callbacks.account import Account
from lla_callbacks.callbacks.pace import Choice, Pace
from lla_callbacks.callbacks.sizing import (
    SLICES,
    SpectrumSize,
    UnitCosts,
    choose_slices,
    choose_spectrum,
    fitting,
    spectrum_ladder,
    targets,
)
from lla_callbacks.objective.moment import Moment

from .modules import Plain, differences, events, fit, loader, outcome, plain_loss, steps


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (account_module, firing, planning):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


class Ticking(pl.Callback):
    """Lets time pass with each batch, one second or what a function of the batch says."""

    def __init__(self, clock, seconds=lambda n: 1.0):
        self.clock, self.seconds, self.batches = clock, seconds, 0

    def on_train_batch_end(self, *args):
        self.batches += 1
        self.clock.now += self.seconds(self.batches)


class Price(torch.autograd.Function):
    """The identity, which takes time forwards, backwards, and when that is differentiated."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.price = clock, seconds
        clock.now += seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Price.apply(gradient, *ctx.price), None, None


def costly(clock, seconds):
    """Return a loss that takes a time for each sample, and as long backwards."""

    def loss(module, batch):
        return Price.apply(plain_loss(module, batch), clock, seconds * len(batch[0]))

    return loss


BATCH = 16
# Of a sample, so that two passes over a batch take about the second of a step.
PRICE = 0.4 / BATCH


def batches(number):
    return torch.utils.data.DataLoader(loader(BATCH * number).dataset, batch_size=BATCH)


def overhead_of(*monitors, ticking):
    """Return what was booked over what training took."""
    account = monitors[0].account
    trained = sum(ticking.seconds(n) for n in range(1, ticking.batches + 1))
    return account.total / trained


# -- the account by itself -----------------------------------------------------------------


def test_training_time_is_what_is_not_booked(clock):
    account = Account()
    account.join("hessian", None, share=1.0)
    clock.now += 10
    with account.watching("hessian"):
        clock.now += 3
        assert account.total == 3
        with account.watching("hessian"):
            clock.now += 1
        assert account.training == 10
    clock.now += 5
    assert (account.training, account.total) == (15, 4)


def test_all_share_one_limit_and_each_keeps_its_own(clock):
    account = Account()
    account.join("a", 0.02, share=1.0)
    account.join("b", 0.1, share=1.0)
    account.join("asked", None, share=None)
    clock.now += 100
    for name, seconds in {"a": 1, "b": 3, "asked": 50}.items():
        with account.watching(name, asked=name == "asked"):
            clock.now += seconds
    assert account.limit == 0.1
    assert account.room("a") == pytest.approx(1)
    assert account.room("b") == pytest.approx(6)
    assert account.room("asked") == math.inf


@pytest.mark.parametrize("second_half", [1.0, 3.0, 0.25])
def test_a_run_is_expected_to_go_on_at_its_recent_pace(clock, second_half):
    account = Account()
    account.join("a", None, share=1.0)
    account.unplanned.clear()
    for n in range(1, 901):
        clock.now += 1.0 if n <= 500 else second_half
        account.tick(lambda n=n: n / 1000)
    account._next_look = 0
    account.tick(lambda: 0.9)
    done = 500 + 400 * second_half
    assert account.expected == pytest.approx(done + 100 * second_half, rel=0.02)


def test_a_run_of_unknown_length_is_what_has_passed(clock):
    account = Account()
    account.join("a", None, share=1.0)
    for _ in range(10):
        clock.now += 2
        account.tick(lambda: math.nan)
    assert account.expected == 20
    assert account.room("a") == pytest.approx(0.05 * 20)


def test_most_batches_are_not_asked(clock):
    account = Account()
    account.join("a", None, share=1.0)
    account.unplanned.clear()
    asked = []
    for n in range(1, 100_001):
        account.tick(lambda n=n: asked.append(n) or n / 100_000)
    assert 200 < len(asked) < 10_000


def test_a_resumed_account_goes_on_once(clock):
    account = Account()
    account.join("a", None, share=1.0)
    clock.now += 50
    with account.watching("a"):
        clock.now += 2
    state = account.state()
    clock.now += 1e6
    again = Account()
    again.join("a", None, share=1.0)
    for _ in range(2):
        again.resume(state)
    assert (again.training, again.total) == (50, 2)


# -- sizes ---------------------------------------------------------------------------------

COSTS = UnitCosts(
    forward=0.002,
    batch_forward=0.03,
    gradient=0.01,
    product=0.02,
    few=2,
    batch_gradient=0.1,
    batch_product=0.2,
    batch_samples=64,
    step=0.12,
)


def test_costs_grow_with_samples_from_the_measured_ones():
    assert COSTS.of(1.0, 7.0, 2) == COSTS.of(1.0, 7.0, 1) == 1.0
    assert COSTS.of(1.0, 7.0, 33) == 4.0
    assert COSTS.of(1.0, 7.0, 64) == 7.0
    assert COSTS.of(1.0, 7.0, 256) == 28.0


def price(size):
    return size.points * COSTS.spectrum(size) + COSTS.check(size.samples) + COSTS.figure


@pytest.mark.parametrize("seconds", [0.0, 0.5, 0.7, 2.0, 10.0, 60.0, 500.0, 1e5])
def test_as_many_points_as_fit_and_then_the_best_size(seconds):
    ladder = spectrum_ladder()
    size, fits = choose_spectrum(seconds, COSTS, ladder, figures=1)
    assert fits == (price(size) <= seconds)
    more = [s for s in ladder if s.points > size.points]
    assert all(price(s) > seconds for s in more)
    better = [s for s in ladder[: ladder.index(size)] if s.points == size.points]
    assert all(price(s) > seconds for s in better)
    slices, count, fits = choose_slices(seconds, COSTS, SLICES, 64, figures=1)
    one = COSTS.slices(slices, 64) + COSTS.figure
    assert count * one <= seconds or not fits
    assert all(COSTS.slices(s, 64) + COSTS.figure > seconds for s in SLICES[: SLICES.index(slices)])


def test_ladders_get_cheaper_step_by_step():
    prices = [price(s) for s in spectrum_ladder() if s.points == 10]
    assert prices == sorted(prices, reverse=True)
    prices = [COSTS.slices(s, 64) for s in SLICES]
    assert prices == sorted(prices, reverse=True)
    assert spectrum_ladder()[0] == SpectrumSize(10, 256, 24, 24)


def test_what_the_user_set_stays_in_every_size():
    ladder = fitting(spectrum_ladder(), samples=100, num_steps=40, num_probes=None, most_samples=80)
    assert {size.samples for size in ladder} == {80}
    assert {size.num_steps for size in ladder} == {40}
    assert len(set(ladder)) == len(ladder) > 3
    assert {s.samples for s in fitting(ladder, least_samples=16, most_samples=99)} == {80}
    low = fitting(spectrum_ladder(), least_samples=16, most_samples=256)
    assert min(size.samples for size in low) == 16


def test_targets_are_even():
    assert targets(1) == targets(2) == []
    assert targets(6) == [0.2, 0.4, 0.6, 0.8]


def test_a_pace_waits_for_its_targets_and_leaves_the_end_its_share(clock):
    account = Account()
    account.join("a", None, share=1.0)
    account.fraction = 0.1
    pace = Pace()
    pace.take(Choice(8, 6, 2.0, 1.0, True, "words"), account, "a")
    assert pace.targets == [0.2, 0.4, 0.6, 0.8]
    assert (account.reserved["a"], account.promised["a"]) == (3.0, 8.0)
    assert not pace.reached(account)
    account.fraction = 0.45
    assert pace.reached(account)
    assert pace.targets == [0.6, 0.8]
    assert Pace.from_state(pace.state()) == pace


# -- real runs on a clock of our own -----------------------------------------------------------


def watch(clock, tmp_path, *monitors, train=100, seconds=lambda n: 1.0, **settings):
    ticking = Ticking(clock, seconds)
    settings = {"max_epochs": 1, **settings}
    trainer = fit(
        tmp_path, callbacks=[ticking, *monitors], train=lambda: batches(train), **settings
    )
    return trainer, ticking


def pair(clock, price, **settings):
    loss = costly(clock, price)
    return (
        HessianMonitor(loss=loss, figures=False, **settings),
        LossLandscapeMonitor(loss=loss, figures=False, **settings),
    )


@pytest.mark.parametrize(("swapped", "price"), [(False, 0.01 * PRICE), (True, 0.1 * PRICE)])
def test_two_monitors_share_one_account_in_either_order(tmp_path, clock, swapped, price):
    monitors = pair(clock, price)
    order = monitors[::-1] if swapped else monitors
    _, ticking = watch(clock, tmp_path, *order, train=400)
    assert monitors[0].account is monitors[1].account
    assert 0 < overhead_of(*monitors, ticking=ticking) <= 0.05
    hessian, landscape = monitors
    assert len(hessian.history) == 10
    assert steps(hessian)[0] == 0
    assert steps(hessian)[-1] == 400
    gaps = torch.tensor(steps(hessian)).diff()
    assert int(gaps.max() - gaps.min()) <= 10
    assert landscape.report is not None
    assert landscape.history[-1][0] == 400
    assert "of yours" in hessian.report.summary()
    assert "of yours" in landscape.report.summary()
    assert hessian.report.training_steps > 0
    # One size for all measurements of the run, so that its curve compares.
    chosen = hessian.pace.choice
    assert {r.num_samples for _, r in hessian.history} == {chosen.samples}
    assert {r.num_probes for _, r in hessian.history} == {chosen.size["num_probes"]}


def test_dearer_evaluations_get_smaller_sizes(tmp_path, clock):
    found = []
    for price in (0.03 * PRICE, PRICE):
        hessian, landscape = pair(clock, price)
        watch(clock, tmp_path, hessian, landscape, train=300)
        plane = landscape.report.planes["random"]
        found.append((hessian.pace.choice.cost, plane.loss.numel()))
    assert found[0][1] > found[-1][1]


@pytest.mark.parametrize("slower", [4.0, 0.25])
def test_the_limit_holds_where_the_pace_changes(tmp_path, clock, slower):
    hessian, landscape = pair(clock, 0.1 * PRICE)
    _, ticking = watch(
        clock, tmp_path, hessian, landscape, train=600, seconds=lambda n: 1 if n < 300 else slower
    )
    # What was planned on the early pace is spent on the whole run in proportion.
    assert overhead_of(hessian, landscape, ticking=ticking) <= 0.05 * max(1, 2 * (slower < 1))
    assert len(hessian.history) >= 5


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield from loader(64).dataset


def test_a_run_of_unknown_length_is_watched_as_it_grows(tmp_path, clock):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 300

    hessian, _ = pair(clock, 0.1 * PRICE)
    ticking = Ticking(clock)
    fit(
        tmp_path,
        callbacks=[ticking, hessian, Stop()],
        train=lambda: torch.utils.data.DataLoader(Endless(), batch_size=4),
        max_epochs=-1,
    )
    assert overhead_of(hessian, ticking=ticking) <= 0.05
    assert len(hessian.history) >= 5
    assert (steps(hessian)[0], steps(hessian)[-1]) == (0, 300)
    # The start waited until what had passed paid for it, and is of its own weights all the same.
    assert hessian.history[0][1].loss > hessian.history[-1][1].loss


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_a_run_too_short_to_plan_has_its_end_measured_and_says_so(tmp_path, clock, caplog, batches):
    hessian, landscape = pair(clock, PRICE)
    with caplog.at_level("INFO"):
        watch(clock, tmp_path, hessian, landscape, train=batches)
    assert steps(hessian) == [batches]
    assert landscape.history[-1][0] == batches
    said = [r.message for r in caplog.records if "HessianMonitor" in r.message]
    assert any("max_overhead" in text and "every_n_epochs=1" in text for text in said)
    assert any(re.search(r"1 measurement .*of training", text) for text in said)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, "no room for \\d figures?: python -m"),
     ({"save_arrays": False}, "no room for \\d figures?: raise max_overhead"),
     ({"figures": False}, "")],
)  # fmt: skip
def test_figures_that_have_no_room_are_told(tmp_path, caplog, monkeypatch, settings, told):
    monkeypatch.setattr(Pace, "draws", lambda self, account, name, *, last: False)
    monitor = HessianMonitor(loss=plain_loss, **settings)
    with caplog.at_level("INFO"):
        fit(tmp_path, monitor, logger=TensorBoardLogger(tmp_path))
    said = [r.message for r in caplog.records if "took" in r.message]
    assert said
    assert re.search(told or "^((?!no room).)*$", said[-1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_n_train_steps": 30}, [0, 30, 60, 63]),
        ({"every_n_epochs": 3}, [0, 27, 54, 63]),
    ],
)
def test_a_schedule_of_the_users_own_is_kept_at_any_cost(
    tmp_path, clock, caplog, settings, expected
):
    hessian = HessianMonitor(
        loss=costly(clock, PRICE), figures=False, num_steps=3, num_probes=2, **settings
    )
    with caplog.at_level("INFO"):
        watch(clock, tmp_path, hessian, train=9, max_epochs=7)
    assert steps(hessian) == expected
    assert {r.num_samples for _, r in hessian.history} == {9 * BATCH}
    said = [r.message for r in caplog.records]
    assert any(re.search(r"takes about \d+ steps of yours .*every .* adds about", t) for t in said)


def test_a_schedule_with_a_limit_keeps_both(tmp_path, clock):
    hessian = HessianMonitor(
        loss=costly(clock, 0.1 * PRICE), figures=False, every_n_train_steps=5, max_overhead=0.05
    )
    _, ticking = watch(clock, tmp_path, hessian, train=300)
    assert all(step % 5 == 0 for step in steps(hessian))
    assert len(hessian.history) >= 3
    assert overhead_of(hessian, ticking=ticking) <= 0.05


def test_what_was_foretold_and_what_was_seen(tmp_path, clock):
    """The loss takes far longer in a measurement than in a step: that is warned of, once."""
    hessian = HessianMonitor(
        loss=costly(clock, 100 * PRICE),
        figures=False,
        num_steps=3,
        num_probes=2,
        every_n_train_steps=9,
    )
    with pytest.warns(UserWarning, match="foretold. Lower num_samples") as caught:
        watch(clock, tmp_path, hessian, train=36)
    assert len([w for w in caught if "foretold" in str(w.message)]) == 1


def test_what_is_foretold_of_slices_keeps_to_their_time_budget(
    tmp_path, clock, caplog, monkeypatch
):
    passing = SimpleNamespace(monotonic=clock.monotonic, thread_time=time.thread_time)
    monkeypatch.setattr("lla_callbacks.objective.points.time", passing)
    watcher = LossLandscapeMonitor(
        loss=costly(clock, PRICE), figures=False, every_n_epochs=1, plane_points=9, time_budget=20
    )
    with caplog.at_level("INFO"):
        watch(clock, tmp_path, watcher, train=4, max_epochs=2)
    said = [r.message for r in caplog.records]
    (line,) = [t for t in said if "a measurement takes" in t]
    assert re.search(
        r"takes about .* steps of yours \(batches of 16\), but no longer than 20 s "
        r"\(time_budget\); every epoch adds at most about .* %",
        line,
    )
    # By then a step's time is known: it would take far longer.
    assert any("a measurement of about 20 s begins" in t for t in said)
    watcher = LossLandscapeMonitor(every_n_epochs=1, time_budget=None)
    assert watcher.planner.sizer.most_seconds == math.inf
    costs = UnitCosts(*[1.0] * 3, 8, *[2.0] * 3, 16, 3.0, figure=0.0, fixed=0.0)
    sizer = LossLandscapeMonitor(time_budget=20).planner.sizer
    assert sizer._within(costs).most == 20
    whole, capped = (
        choose_slices(100.0, replace(costs, most=most), SLICES, 16, figures=0)
        for most in (math.inf, 20.0)
    )
    # What ends after 20 s fits five times, however many points it would have had.
    assert whole[0] != SLICES[0]
    assert capped == (SLICES[0], 5, True)


def test_explicit_sizes_are_kept(tmp_path, clock):
    hessian = HessianMonitor(
        loss=costly(clock, 0.1 * PRICE), num_steps=7, num_probes=5, figures=False
    )
    landscape = LossLandscapeMonitor(
        loss=costly(clock, 0.1 * PRICE),
        plane_points=9,
        lines=["random"],
        line_points=11,
        figures=False,
    )
    watch(clock, tmp_path, hessian, landscape, train=300)
    assert {(r.num_steps, r.num_probes) for _, r in hessian.history} == {(7, 5)}
    assert landscape.report.planes["random"].loss.shape == (9, 9)
    assert landscape.report.lines["random"].loss.shape == (11,)


def test_overhead_is_logged_as_a_share_of_the_run_as_it_will_be(tmp_path, clock):
    hessian, landscape = pair(clock, 0.1 * PRICE)
    trainer, ticking = watch(
        clock, tmp_path, hessian, landscape, train=300, logger=TensorBoardLogger(tmp_path)
    )
    found = [e.value for e in events(trainer.logger.log_dir).Scalars("hessian/overhead")]
    assert found == sorted(found)
    assert found[0] < 0.05
    # The landscape's own last measurement comes later.
    assert found[-1] <= overhead_of(hessian, landscape, ticking=ticking) <= 0.05


@pytest.mark.parametrize(("bundle", "share"), [(economy, 0.02), (standard, 0.05)])
def test_bundles_keep_their_share(tmp_path, clock, bundle, share):
    watchers = bundle(loss=costly(clock, 0.03 * PRICE), figures=False)
    _, ticking = watch(clock, tmp_path, *watchers, train=200)
    assert 0 < overhead_of(*watchers, ticking=ticking) <= share


def test_a_long_measurement_is_announced(tmp_path, clock, caplog):
    hessian = HessianMonitor(loss=costly(clock, PRICE), figures=False, every_n_train_steps=50)
    with caplog.at_level("INFO"):
        watch(clock, tmp_path, hessian, train=100)
    said = [r.message for r in caplog.records]
    assert any(re.search(r"a measurement of about \d+ s begins", text) for text in said)
    assert any(re.search(r"that took \d+\.\d s", text) for text in said)


@pytest.mark.parametrize("swapped", [False, True])
def test_training_is_bitwise_the_same(tmp_path, swapped):
    """On the real clock: whenever a plan is made, and whatever it is."""
    plain = outcome(fit(tmp_path / "plain", make_module=Plain, train=lambda: loader(160)))
    watchers = [HessianMonitor(), LossLandscapeMonitor()][:: -1 if swapped else 1]
    trainer = fit(tmp_path / "watched", callbacks=watchers, train=lambda: loader(160))
    assert differences(plain, outcome(trainer)) == []
    assert all(watcher.report is not None for watcher in watchers)


def test_monitors_of_one_loss_have_it_checked_once(tmp_path, clock):
    loss = costly(clock, 0.1 * PRICE)
    watchers = [
        HessianMonitor(loss=loss, figures=False),
        LossLandscapeMonitor(loss=loss, figures=False),
    ]
    watch(clock, tmp_path, *watchers, train=150)
    assert watchers[0].subject.findings is watchers[1].subject.findings
    assert watchers[1].report.self_check is watchers[0].report.self_check is not None
    other = [
        HessianMonitor(loss=loss, figures=False),
        LossLandscapeMonitor(loss=loss, mode="eval", figures=False),
    ]
    watch(clock, tmp_path, *other, train=150)
    assert other[0].subject.findings is not other[1].subject.findings


def test_what_is_left_over_goes_to_more_points_of_the_curve() -> None:
    account = Account()
    account.join("a", 0.05, share=1.0)
    account.unplanned.clear()
    pace = Pace(planned=True, targets=[0.8], cost=0.1, choice=None, seen=1)
    account.fraction = 0.5
    account.room = lambda name: 1.32  # type: ignore[method-assign]
    account.reserved["a"] = 0.3
    # Of one second that is free, 70 % pay for seven points of a tenth.
    assert pace.affordable(account, "a") == 7
    pace.spread(7, account, "a")
    assert pace.targets == pytest.approx([0.5 + i / 16 for i in range(1, 8)])
    # Ten points are a curve; fewer than were planned are never taken.
    account.room = lambda name: 100.0  # type: ignore[method-assign]
    assert pace.affordable(account, "a") == 8
    account.room = lambda name: 0.0  # type: ignore[method-assign]
    assert pace.affordable(account, "a") == 7
    account.unplanned.add("b")
    account.room = lambda name: 100.0  # type: ignore[method-assign]
    assert pace.affordable(account, "a") == 7


def test_a_stall_does_not_tell_the_pace_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lla_callbacks.callbacks.account.time.monotonic", lambda: now[0])
    account = Account()
    for batch in range(1, 101):
        now[0] += 0.01 + (1.0 if batch == 7 else 0.0)
        account.tick(lambda: batch / 1000)  # noqa: B023
    assert account.seconds_a_batch == pytest.approx(0.01)
    assert account.expected == pytest.approx(2.0 + 9.0)


def test_points_are_added_by_an_exchange_that_no_clock_or_failure_moves() -> None:
    """All processes exchange at the same batch, after each measurement that began."""
    timing = HessianMonitor().timing
    timing.join([])
    timing.pace.planned, timing.pace.cost = True, 0.1
    timing.account.unplanned.clear()
    asked: list[int] = []

    def first(count: int) -> int:
        asked.append(timing.account.batches)
        return count

    processes: Any = SimpleNamespace(size=2, first=first)
    timing.spread(processes)
    assert asked == []
    # A measurement that began, and of which this process kept nothing.
    timing.begins(Moment(3))
    for batches in range(5, 20):
        timing.account.batches = batches
        timing.spread(processes)
    assert asked == [8]

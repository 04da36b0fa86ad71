"""What watching will cost and has cost, in words, in steps of the user's own batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lla_callbacks.callbacks.compat import say
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.report.cost import steps_of

if TYPE_CHECKING:
    from lla_callbacks.callbacks.monitor import Monitor

# What was said beforehand and what was seen: beyond this factor there is a warning.
FAR = 2.0
# Seconds of a measurement below which nobody minds; clocks are noisy.
FELT = 30.0


def cost_of(monitor: Monitor, trainer: Any, steps: float) -> str:
    """Return what a schedule of the user's own will cost.

    Args:
        monitor: The monitor.
        trainer: Its Trainer.
        steps: What one measurement takes, in training steps.
    """
    words = f"a measurement takes {steps_of(steps)} (batches of {monitor.batch_samples})"
    added = []
    every = monitor.schedule.every_n_train_steps
    accumulate = getattr(trainer, "accumulate_grad_batches", 1) or 1
    if every is not None:
        many = "step" if every == 1 else f"{every} steps"
        added.append(f"every {many} adds about {_percent(steps / (every * accumulate))}")
    epochs, batches = monitor.schedule.every_n_epochs, trainer.num_training_batches
    if epochs is not None and 0 < batches < math.inf:
        many = "epoch" if epochs == 1 else f"{epochs} epochs"
        added.append(f"every {many} adds about {_percent(steps / (epochs * batches))}")
    return "; ".join([words, *added]) + " to training. max_overhead=0.05 would keep it to 5 %."


def plan_of(monitor: Monitor) -> str:
    """Return what a monitor with a limit will do, and what that will cost."""
    choice, account = monitor.pace.choice, monitor.account
    assert choice is not None
    steps = choice.cost / account.seconds_a_batch if account.seconds_a_batch > 0 else math.nan
    times = (
        "one measurement, at the end," if choice.count == 1 else (f"{choice.count} measurements")
    )
    if math.isnan(account.fraction):
        times = "measurements, as the run grows,"
    if monitor.schedule.is_given:
        times = "measurements as scheduled, as far as there is room,"
    words = f"{times} on {choice.words}, each {steps_of(steps)}"
    if not choice.fits:
        return (
            f"{words}: the least there is, and more than the limit of "
            f"{_percent(account.limit)} of this run. {_remedy(monitor)}"
        )
    return f"{words} (limit {_percent(account.limit)} of training time, for all monitors)."


def too_short(monitor: Monitor) -> str:
    """Return what happens at the end of a run that was over before it could be planned."""
    choice = monitor.pace.choice
    assert choice is not None
    return (
        f"the run was too short to plan for; its end is measured on {choice.words}. "
        f"{_remedy(monitor)}"
    )


def balance_of(monitor: Monitor) -> str:
    """Return what was measured in a run, how often, at which size, and what it cost."""
    account, name = monitor.account, monitor.name
    seconds = account.spent.get(name, 0.0) + account.asked.get(name, 0.0)
    training = account.training
    times = "1 measurement" if monitor.count == 1 else f"{monitor.count} measurements"
    choice = monitor.pace.choice
    size = f" on {choice.words}" if choice is not None else ""
    words = f"{times}{size} took {seconds:.2g} s"
    if training > 0:
        words += f", {_percent(seconds / training)} of training"
        if len(account.members) > 1:
            words += f"; all monitors {_percent(account.total / training)}"
    if monitor.is_bounded:
        words += f" (limit {_percent(account.limit)})"
    return f"{type(monitor).__name__}: {words}."


def tell_if_far(monitor: Monitor, trainer: Any, seconds: float, foretold: float) -> None:
    """Tell where a measurement takes far more or less than was said beforehand; warn if more."""
    if not (foretold > 0 and max(seconds, foretold) > FELT):
        return
    if foretold / FAR <= seconds <= foretold * FAR:
        return
    steps = seconds / monitor.account.seconds_a_batch
    words = (
        f"{type(monitor).__name__}: a measurement took {seconds:.1f} s, {steps_of(steps)}, where "
        f"{foretold:.1f} s were foretold."
    )
    if seconds < foretold:
        say(trainer, words)
        return
    rank_zero_warn(
        f"{words} Lower num_samples, num_steps or num_probes, measure less often, or give "
        "max_overhead."
    )


def _remedy(monitor: Monitor) -> str:
    steps = monitor.full_gradients * monitor.num_samples / max(1, monitor.batch_samples)
    return (
        f"A full one takes {steps_of(steps)}: raise max_overhead, or give every_n_epochs=1, which "
        "has no limit."
    )


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.1f} %" if percent < 10 and percent != round(percent) else f"{percent:,.0f} %"

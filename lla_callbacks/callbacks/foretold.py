"""What watching will cost and has cost, in words, in steps of the user's own batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lla_callbacks.callbacks.compat import say
from lla_callbacks.callbacks.telling import rank_zero_warn
from lla_callbacks.report.cost import steps_of

if TYPE_CHECKING:
    from lla_callbacks.callbacks.timing import Timing

# What was said beforehand and what was seen: beyond this factor there is a warning.
FAR = 2.0
# Seconds of a measurement below which nobody minds; clocks are noisy.
FELT = 30.0


def cost_of(timing: Timing, trainer: Any, steps: float) -> str:
    """Return what a schedule of the user's own will cost.

    Args:
        timing: That of the monitor.
        trainer: Its Trainer.
        steps: What one measurement takes, in training steps.
    """
    words = f"a measurement takes {steps_of(steps)} (batches of {timing.batch_samples})"
    adds = "adds about"
    if timing.most_seconds < math.inf:
        # How long a step takes is not known yet.
        words += f", but no longer than {timing.most_seconds:g} s (time_budget)"
        adds = "adds at most about"
    added = []
    every = timing.schedule.every_n_train_steps
    accumulate = getattr(trainer, "accumulate_grad_batches", 1) or 1
    if every is not None:
        many = "step" if every == 1 else f"{every} steps"
        added.append(f"every {many} {adds} {_percent(steps / (every * accumulate))}")
    epochs, batches = timing.schedule.every_n_epochs, trainer.num_training_batches
    if epochs is not None and 0 < batches < math.inf:
        many = "epoch" if epochs == 1 else f"{epochs} epochs"
        added.append(f"every {many} {adds} {_percent(steps / (epochs * batches))}")
    said = "; ".join([words, *added]) + " to training. "
    if every is not None and epochs is not None:
        said += "Both schedules are kept; what falls due by both is measured once. "
    return said + "max_overhead=0.05 would keep it to 5 %."


def plan_of(timing: Timing, full: float) -> str:
    """Return what a monitor with a limit will do, and what that will cost.

    Args:
        timing: That of the monitor.
        full: Gradients of single samples that a measurement of the default size takes.
    """
    choice, account = timing.pace.choice, timing.account
    assert choice is not None
    steps = choice.cost / account.seconds_a_batch if account.seconds_a_batch > 0 else math.nan
    times = (
        "one measurement, at the end," if choice.count == 1 else (f"{choice.count} measurements")
    )
    if math.isnan(account.fraction):
        times = "measurements, as the run grows,"
    if timing.schedule.is_given:
        times = "measurements as scheduled, as far as there is room,"
    each = "which takes" if choice.count == 1 else "each"
    words = f"{times} on {choice.words}, {each} {steps_of(steps)}"
    if not choice.fits:
        return (
            f"{words}, and a check and figures besides. That is the least there is, and for so "
            f"short a run still more than the limit of {_percent(account.limit)} of its time. "
            f"{_remedy(timing, full)}"
        )
    return f"{words} (limit {_percent(account.limit)} of training time, for all monitors)."


def too_short(timing: Timing, full: float) -> str:
    """Return what happens at the end of a run that was over before it could be planned."""
    choice = timing.pace.choice
    assert choice is not None
    return (
        f"the run was too short to plan for; its end is measured on {choice.words}. "
        f"{_remedy(timing, full)}"
    )


def no_room_for_light(timing: Timing, step: int) -> str:
    """Return why the curve of light measurements has a gap, and what to do."""
    limit = _percent(timing.account.limit)
    return (
        f"no room for a light measurement at step {step}: max_overhead allows {limit} of training "
        "time, and the rest of that is put aside for full measurements. Until there is room again "
        "the curves have gaps between these. Raise max_overhead, or track less often."
    )


def balance_of(timing: Timing, *, saved: bool = True) -> str:
    """Return what was measured in a run, how often, at which size, and what it cost."""
    account, name = timing.account, timing.name
    seconds = account.spent.get(name, 0.0) + account.asked.get(name, 0.0)
    training = account.training
    times = "1 measurement" if timing.count == 1 else f"{timing.count} measurements"
    choice = timing.pace.choice
    size = f" on {choice.words}" if choice is not None else ""
    words = f"{times}{size} took {seconds:.2g} s"
    if training > 0:
        words += f", {_percent(seconds / training)} of training"
        if len(account.members) > 1:
            words += f"; all monitors {_percent(account.total / training)}"
    if timing.is_bounded:
        words += f" (limit {_percent(account.limit)})"
    if timing.left_out:
        many = "1 figure" if timing.left_out == 1 else f"{timing.left_out} figures"
        remedy = "python -m lla_callbacks report shows all from the files"
        words += f"; no room for {many}: {remedy if saved else 'raise max_overhead'}"
    return f"{timing.owner}: {words}."


def tell_if_far(timing: Timing, trainer: Any, seconds: float, foretold: float) -> None:
    """Tell where a measurement takes far more or less than was said beforehand; warn if more."""
    if not (foretold > 0 and max(seconds, foretold) > FELT):
        return
    if foretold / FAR <= seconds <= foretold * FAR:
        return
    steps = seconds / timing.account.seconds_a_batch
    words = (
        f"{timing.owner}: a measurement took {seconds:.1f} s, {steps_of(steps)}, where "
        f"{foretold:.1f} s were foretold."
    )
    if seconds < foretold:
        say(trainer, words)
        return
    rank_zero_warn(
        f"{words} Lower num_samples, num_steps or num_probes, measure less often, or give "
        "max_overhead."
    )


def _remedy(timing: Timing, full: float) -> str:
    steps = full / max(1, timing.batch_samples)
    return (
        f"A full one takes {steps_of(steps)}: raise max_overhead, or give every_n_epochs=1, which "
        "has no limit."
    )


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.1f} %" if percent < 10 and percent != round(percent) else f"{percent:,.0f} %"

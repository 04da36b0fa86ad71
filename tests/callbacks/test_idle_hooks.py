"""Lightning does not call what a monitor leaves empty; a user's subclass may still define it."""

from collections import Counter

import pytorch_lightning as pl

from lla_callbacks import HessianMonitor, LossLandscapeMonitor

from .modules import Plain, loader, quiet_trainer


class Counted(pl.profilers.Profiler):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def start(self, name):
        if "[Callback]Mine" in name:
            self.seen[name.rpartition(".")[2]] += 1

    def stop(self, name):
        pass


class Mine(HessianMonitor):
    called = 0

    def on_after_backward(self, trainer, pl_module):
        super().on_after_backward(trainer, pl_module)
        self.called += 1


def test_empty_hooks_of_a_batch_are_not_called(tmp_path):
    profiler = Counted()
    mine = Mine(name="mine", figures=False)
    trainer = quiet_trainer(tmp_path, callbacks=[mine], max_steps=3, profiler=profiler)
    trainer.fit(Plain(), loader())
    assert mine.called == 3
    of_a_batch = {hook for hook, count in profiler.seen.items() if count >= 3}
    assert of_a_batch <= {"on_train_batch_start", "on_train_batch_end", "on_after_backward"} | {
        "state_dict"
    }


class Hooks(pl.profilers.Profiler):
    """Counts the monitors' hooks of every batch."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def start(self, name):
        if "Monitor" in name and "on_train_batch" in name:
            self.seen[name.rpartition("]")[2]] += 1

    def stop(self, name):
        pass


def test_monitors_rest_while_nothing_can_be_due(tmp_path):
    """One of two monitors counts batches; the other is called when something may be due."""
    profiler = Hooks()
    monitors = HessianMonitor(figures=False), LossLandscapeMonitor(figures=False)
    trainer = quiet_trainer(tmp_path, callbacks=list(monitors), max_epochs=400, profiler=profiler)
    trainer.fit(Plain(), loader())
    steps = trainer.global_step
    assert steps >= 1600
    counts = sorted(profiler.seen.values())
    ends = sum(n for hook, n in profiler.seen.items() if hook.endswith("batch_end"))
    starts = sum(n for hook, n in profiler.seen.items() if hook.endswith("batch_start"))
    assert max(counts) == steps, profiler.seen
    assert steps < ends < 2 * steps
    assert starts < ends - steps
    for monitor in monitors:
        assert monitor.report is not None
        # Nothing is left behind: the next run is called as ever.
        assert callable(monitor.on_train_batch_end)
        assert callable(monitor.on_train_batch_start)


def test_what_a_subclass_does_after_each_batch_is_done(tmp_path):
    class Own(LossLandscapeMonitor):
        called = 0

        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            self.called += 1

    own = Own(figures=False)
    trainer = quiet_trainer(
        tmp_path, callbacks=[HessianMonitor(figures=False), own], max_epochs=100
    )
    trainer.fit(Plain(), loader())
    assert own.called == trainer.global_step

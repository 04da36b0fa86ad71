"""Lightning does not call what a monitor leaves empty; a user's subclass may still define it."""

from collections import Counter

import pytorch_lightning as pl

from lla_callbacks import HessianMonitor

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

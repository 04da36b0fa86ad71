"""What a run of many measurements keeps is bounded, and files have all of it."""

from itertools import pairwise

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from lla_callbacks import HessianMonitor, LossLandscapeMonitor
from lla_callbacks.report import plain, thinning
from lla_callbacks.report.plain import PlainForms
from lla_callbacks.report.thinning import drawn, evenly, thin

from .modules import Plain, loader, quiet_trainer

FIRINGS = 10_000


def test_after_ten_thousand_firings_the_last_are_there_and_the_older_evenly():
    history, longest = [], 0
    for step in range(0, 3 * FIRINGS, 3):
        history.append((step, None))
        thin(history)
        longest = max(longest, len(history))
    steps = [step for step, _ in history]
    assert longest == thinning.MOST == 400
    assert steps[-100:] == list(range(3 * (FIRINGS - 100), 3 * FIRINGS, 3))
    assert steps[0] == 0
    gaps = [b - a for a, b in pairwise(steps[:-100])]
    # A recent half is not thinned yet; the rest is even within a factor of the grid's.
    assert max(gaps) < 2.1 * 3 * FIRINGS / 150
    assert len(drawn(history)) <= thinning.DRAWN
    shown = [step for step, _ in drawn(history)]
    assert max(b - a for a, b in pairwise(shown)) < 2.1 * 3 * FIRINGS / 150
    assert (shown[0], shown[-1]) == (steps[0], steps[-1])


def test_a_short_history_is_left_alone():
    history = [(step, None) for step in range(400)]
    thin(history)
    assert len(history) == 400
    assert evenly([1, 5, 9], 3) == [0, 1, 2]
    assert evenly([0, 1, 2, 50, 99, 100], 3) == [0, 3, 5]


def test_storing_costs_the_same_at_any_length(monkeypatch):
    """Each result is made plain once, and what was thinned out is forgotten."""
    packed, forms, history = [], PlainForms(), []
    monkeypatch.setattr(plain, "pack", lambda result: packed.append(1) or {"of": result})
    for step in range(FIRINGS // 10):
        history.append((step, object()))
        thin(history)
        found = forms.of(history)
        assert len(packed) == step + 1
    assert [step for step, _ in found] == [step for step, _ in history]
    assert all(
        form == {"of": result} for (_, form), (_, result) in zip(found, history, strict=True)
    )
    assert len(forms._known) == len(history)


def test_monitors_keep_a_bounded_part_and_files_all(tmp_path, monkeypatch):
    for name, value in {"MOST": 12, "RECENT": 3, "DRAWN": 5}.items():
        monkeypatch.setattr(thinning, name, value)
    monkeypatch.setattr("lla_callbacks.callbacks.light_record.RECENT", 3)

    def make():
        return [
            HessianMonitor(
                every_n_train_steps=2, track_every_n_train_steps=1, track_num_probes=2,
                num_steps=2, num_probes=2, num_samples=4, figures=False,
            ),
            LossLandscapeMonitor(
                every_n_train_steps=2, planes=[], lines=["random"], line_points=3, num_samples=4,
                evaluation="loop", figures=False,
            ),
        ]  # fmt: skip

    def go(watchers, epochs, ckpt=None, version="run"):
        pl.seed_everything(0, verbose=False)
        logger = CSVLogger(tmp_path, name="logs", version=version)
        trainer = quiet_trainer(tmp_path, watchers, max_epochs=epochs, logger=logger)
        trainer.fit(Plain(), loader(), ckpt_path=ckpt, weights_only=True)
        return trainer

    def kept(watchers):
        hessian, slices = watchers
        return [[s for s, _ in part] for part in (hessian.history, hessian.tracked, slices.history)]

    whole, first, second = make(), make(), make()
    folder = go(whole, 8).logger.log_dir
    for steps in kept(whole):
        assert len(steps) <= 12
        assert steps[-3:] == sorted(steps)[-3:]
    assert kept(whole)[0][0] == 0
    assert kept(whole)[0][-3:] == [28, 30, 32]
    assert kept(whole)[1][-3:] == [27, 29, 31]
    assert max(b - a for a, b in pairwise(kept(whole)[0])) <= 12
    # Files have every one.
    full = sorted(int(p.stem.split("_")[1]) for p in (tmp_path / folder / "hessian").glob("step*"))
    assert full == list(range(0, 33, 2))
    blocks = [np.load(p) for p in sorted((tmp_path / folder / "hessian").glob("light*"))]
    assert [s for block in blocks for s in block["steps"]] == list(range(1, 32, 2))
    assert all(len(block["steps"]) <= 3 for block in blocks)
    assert blocks[-1]["layer_traces"].shape == (len(blocks[-1]["steps"]), 2, 2)
    assert blocks[-1]["trace"][-1] == pytest.approx(whole[0].tracked[-1][1].trace)
    # So has a run in two parts, and its checkpoint holds what memory does.
    go(first, 4, version="a").save_checkpoint(tmp_path / "kept.ckpt")
    state = torch.load(tmp_path / "kept.ckpt", weights_only=True)["callbacks"]
    for watcher in first:
        stored = [step for step, _ in state[watcher.state_key]["history"]]
        assert stored == [step for step, _ in watcher.history]
    go(second, 8, tmp_path / "kept.ckpt", "b")
    assert kept(second) == kept(whole)

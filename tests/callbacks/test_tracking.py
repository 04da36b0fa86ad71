"""Light measurements between the full ones."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from lla_callbacks.hessian import quantity
from lla_callbacks.hessian.tracking import track

from .modules import (
    Stateful,
    differences,
    events,
    fit,
    loader,
    monitor,
    outcome,
    plain_loss,
    scalars,
    steps,
)


def tracked_steps(watcher):
    return [step for step, _ in watcher.tracked]


@pytest.mark.parametrize(
    ("settings", "full", "light"),
    [
        ({"track_every_n_train_steps": 1, "every_n_epochs": 1}, [0, 4, 8], [1, 2, 3, 5, 6, 7]),
        ({"track_every_n_train_steps": 2, "every_n_epochs": 9}, [0, 8], [2, 4, 6]),
        ({"track_every_n_train_steps": 2, "every_n_train_steps": 3}, [0, 3, 6, 8], [2, 4]),
        ({"track_every_n_train_steps": None, "every_n_epochs": 1}, [0, 4, 8], []),
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_schedules_are_kept(tmp_path, settings, full, light, accumulate):
    watcher = monitor(**settings)
    fit(
        tmp_path,
        watcher,
        train=lambda: loader(16 * accumulate),
        max_epochs=2,
        accumulate_grad_batches=accumulate,
    )
    assert steps(watcher) == full
    assert tracked_steps(watcher) == light


def test_light_measurements_write_to_the_same_tags_and_nothing_else(tmp_path):
    watcher = monitor(track_every_n_train_steps=1, every_n_epochs=1, figures=True, scalars="all")
    trainer = fit(tmp_path, watcher, logger=TensorBoardLogger(tmp_path))
    trainer.logger.finalize("success")
    found = events(trainer.logger.log_dir)
    values = scalars(found)
    every = [0, 1, 2, 3, 4]
    for tag in ("hessian/lambda_max", "hessian/trace", "zz_hessian_errors/trace", "hessian/loss",
                "zz_hessian_errors/lambda_max", "zz_hessian_errors/lambda_max_beyond",
                "hessian_layers/net.0/trace",
                "hessian_layers/net.0/trace_sem", "zz_hessian_bands/trace_lower"):  # fmt: skip
        assert [step for step, _ in sorted(values[tag])] == every, tag
    for tag in ("hessian/kh05", "hessian/lambda_min", "zz_hessian_cost/num_steps"):
        assert [step for step, _ in sorted(values[tag])] == [0, 4], tag
    logged = dict(values["hessian/trace"])
    for step, tracking in watcher.tracked:
        assert logged[step] == pytest.approx(tracking.trace, rel=1e-6)
    folder = tmp_path / "lightning_logs" / "version_0" / "hessian"
    assert sorted(p.name for p in folder.iterdir()) == [
        "light_00000001_to_00000003.npz",
        "step_00000000.npz",
        "step_00000004.npz",
    ]


def test_full_measurements_are_those_without_tracking(tmp_path):
    plain, tracking = (
        monitor(every_n_epochs=1),
        monitor(every_n_epochs=1, track_every_n_train_steps=1),
    )
    for watcher in (plain, tracking):
        fit(tmp_path, watcher, max_epochs=2)
    numbers = [
        [(s, r.loss, r.trace, r.trace_sem, r.lambda_max) for s, r in w.history]
        for w in (plain, tracking)
    ]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_ends_in_the_same_bits(tmp_path, optimizer):
    found = []
    for watcher in (None, monitor(track_every_n_train_steps=1)):
        logger = TensorBoardLogger(tmp_path, name="run", version=str(watcher is not None))
        trainer = fit(
            tmp_path,
            watcher,
            lambda: Stateful(optimizer),
            lambda: loader(20, shuffle=True),
            val=loader,
            logger=logger,
            max_epochs=2,
            accumulate_grad_batches=2,
        )
        found.append(outcome(trainer))
    assert len(watcher.tracked) > 2
    assert differences(*found) == []


def test_the_same_run_gives_the_same_numbers(tmp_path):
    runs = []
    for _ in range(2):
        watcher = monitor(track_every_n_train_steps=1, every_n_epochs=1)
        fit(tmp_path, watcher, max_epochs=2)
        runs.append([(s, t.trace, t.trace_sem, t.lambda_max) for s, t in watcher.tracked])
    assert runs[0] == runs[1]
    assert len(runs[0]) == 6


def test_a_gap_longer_than_the_schedule_unlinks_the_chain(tmp_path, monkeypatch):
    watcher = monitor(track_every_n_train_steps=1, every_n_epochs=9)
    linked = {}

    def note(objective, settings, state, **more):
        linked[watcher.record.last_light] = len(state.trace.values) > 0
        return track(objective, settings, state, **more)

    monkeypatch.setattr(quantity, "track", note)
    # As if a limit had left out step 3.
    watcher._has_room_for_light = lambda: len(linked) != 2 or watcher.skipped
    watcher.skipped = False

    class Skip(pl.Callback):
        def on_train_batch_start(self, trainer, *rest):
            watcher.skipped = trainer.global_step >= 3

    fit(tmp_path, watcher, max_epochs=2, callbacks=[Skip()])
    assert linked == {1: True, 2: True, 4: False, 5: True, 6: True, 7: True}


def test_an_own_limit_holds_light_measurements_up_too(tmp_path, caplog):
    free = monitor(track_every_n_train_steps=1)
    limited = monitor(track_every_n_train_steps=1, max_overhead=1e-9)
    said = []
    for watcher in (free, limited):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(tmp_path, watcher, max_epochs=2)
        said.append([r.message for r in caplog.records if "no room for a light" in r.message])
    # The default's limit is for the default schedule of full measurements alone.
    assert tracked_steps(free)[:3] == [1, 2, 3]
    assert limited.tracked == []
    # Of which there is one line, once.
    assert said[0] == []
    (line,) = said[1]
    assert line.startswith(
        "HessianMonitor: no room for a light measurement at step 1: max_overhead"
    )
    assert "Raise max_overhead, or track less often" in line


def test_a_failing_light_measurement_leaves_a_gap_and_one_warning(tmp_path):
    calls = []

    def loss(module, batch):
        calls.append(1)
        return plain_loss(module, batch) * (float("nan") if len(calls) in (3, 4) else 1.0)

    watcher = monitor(track_every_n_train_steps=1, every_n_epochs=9, loss=loss, check=False)
    with pytest.warns(UserWarning, match="a measurement failed and leaves a gap") as caught:
        fit(tmp_path, watcher)
    assert tracked_steps(watcher) == [3]
    assert len([w for w in caught if "leaves a gap" in str(w.message)]) == 1


def test_fast_dev_run_tracks_in_little(tmp_path):
    watcher = monitor(track_every_n_train_steps=1, every_n_epochs=9, track_num_probes=8)
    fit(tmp_path, watcher, fast_dev_run=2)
    assert [t.num_probes for _, t in watcher.tracked] == [2]


def test_the_tracker_s_state_is_plain(tmp_path):
    watcher = monitor(track_every_n_train_steps=1)
    kept = []
    forget = watcher._forget
    watcher._forget = lambda: (kept.append(watcher.spectrum.tracker.state_dict()), forget())
    fit(tmp_path, watcher)
    torch.save(kept[-1], tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(loaded["vector"], kept[-1]["vector"])
    assert watcher.spectrum.tracker.vector is None


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_a_schedule_that_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError, match="give a whole number of at least 1"):
        monitor(track_every_n_train_steps=value)

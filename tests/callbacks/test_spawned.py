"""What spawned and forked processes found is in the objects of their parent."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from lla_callbacks.callbacks import spawned
from lla_callbacks.callbacks.spawned import Home, Parcel

from .modules import monitor
from .two_processes import environment, run

# As a script trains, and as a notebook does.
STRATEGIES = ["ddp_spawn", "ddp_notebook"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spawned")
    (folder / "tmp").mkdir()
    variables = environment(TMPDIR=str(folder / "tmp"))
    codes, output = run(
        [folder / "output.txt"], "tests.callbacks.spawn_worker", [folder, *STRATEGIES], [variables]
    )
    assert codes == [0], output
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_parent_has_what_its_processes_found(results, strategy):
    found = results[strategy]
    for kind, steps in (("HessianMonitor", [0, 2, 4]), ("LossLandscapeMonitor", list(range(5)))):
        assert found[kind]["steps"] == steps
        assert all(map(math.isfinite, found[kind]["loss"]))
        assert found[kind]["last"] == found[kind]["loss"][-1]
        # What a checkpoint of the parent would hold.
        assert found[kind]["stored"] == len(steps)
    assert found["tracked"] == [1, 3]
    assert found["poisoned"] == 4
    assert found["members"] == 2
    assert found["warnings"] == []
    assert found["files"] == []


def test_the_curve_that_was_trained_is_there_too(results):
    assert results["ddp_notebook"]["bends"] == 1


def test_both_ways_of_starting_processes_find_the_same(results):
    one, other = (results[name]["HessianMonitor"]["loss"] for name in STRATEGIES)
    assert one == other


def test_copies_in_one_process_have_a_home_of_their_own():
    watcher = monitor()
    other = copy.deepcopy(watcher)
    assert other._home.token != watcher._home.token
    assert spawned._HOMES[other._home.token] is other
    # Of another process: nothing here is handed anything.
    far = pickle.loads(pickle.dumps(watcher))
    assert far._home.token == watcher._home.token
    assert spawned._HOMES[far._home.token] is watcher


def test_a_parcel_that_cannot_be_read_is_said(tmp_path):
    watcher = monitor()
    (tmp_path / "parcel.pt").write_text("nonsense")
    with pytest.warns(UserWarning, match=r"(?s)HessianMonitor: .*did not come back.*Read it from"):
        pickle.loads(pickle.dumps(Parcel(watcher._home.token, str(tmp_path / "parcel.pt"))))
    assert list(tmp_path.iterdir()) == []
    # Nor is anything left of one whose owner is gone.
    (tmp_path / "parcel.pt").write_text("nonsense")
    pickle.loads(pickle.dumps(Parcel("nobody's", str(tmp_path / "parcel.pt"))))
    assert list(tmp_path.iterdir()) == []
    assert not Home(watcher).is_away

"""A checkpoint of two processes holds the batches of both, for two processes or one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lla_callbacks import LossLandscapeMonitor

from .ddp_resume import SETTINGS, part
from .test_processes import _free_port

ROOT = Path(__file__).parents[2]


def in_two(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(_free_port())}
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.ddp_resume", str(folder), *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = [torch.load(folder / f"{arguments[0]}_{rank}.pt") for rank in (0, 1)]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.filterwarnings("ignore:.*trajectory failed")
def test_two_processes_go_on_as_two_or_as_one(tmp_path):
    whole = in_two(tmp_path, "whole", 2)
    first = in_two(tmp_path, "first", 1)
    second = in_two(tmp_path, "second", 2, tmp_path / "first.ckpt")
    # 32 samples, 4 a batch and process: 4 steps an epoch.
    assert (whole["steps"], first["steps"]) == ([0, 2, 4, 6, 8], [0, 2, 4])
    # Later losses differ by dropout, whose random stream Lightning does not restore.
    assert second["losses"][:3] == whole["losses"][:3] == first["losses"]
    assert second["steps"] == whole["steps"]
    assert set(whole["samples"]) == set(second["samples"]) == {16}
    watcher = LossLandscapeMonitor(**SETTINGS)
    part(tmp_path, "alone", 2, tmp_path / "first.ckpt", devices=1, watcher=watcher)
    # One process takes twice the steps an epoch; the batches stay those of both.
    alone = torch.load(tmp_path / "alone_0.pt")
    assert alone["steps"][:3] == first["steps"]
    assert alone["losses"][:3] == first["losses"]
    assert set(alone["samples"]) == {16}
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)["callbacks"][watcher.state_key]
    again = torch.load(tmp_path / "alone.ckpt", weights_only=True)["callbacks"][watcher.state_key]
    for one, other in zip(state["held"]["batches"], again["held"]["batches"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

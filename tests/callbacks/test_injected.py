"""One of two processes fails in every place there is: both have the same gaps, and go on."""

import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from .modules import differences

ROOT = Path(__file__).parents[2]


def run(folder, case):
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.ddp_injected", str(folder), case],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(folder / f"{case}_{rank}.pt", weights_only=True) for rank in (0, 1)]


# What is not there at the step where a place fails, by the names of the slices.
GAPS = {
    "the path": ["line_update"],
    "random directions": ["plane_random"],
    "moments": ["line_adam_m"],
    "components": ["plane_trajectory"],
    "copies": ["line_top1", "plane_trajectory"],
    "eigenvectors": ["line_top1"],
    "coordinates": ["plane_random"],
}
LAST = 17


def test_wherever_one_process_fails_both_have_the_same_gap_within_seconds(tmp_path):
    first, second = run(tmp_path, "injected")
    for each, plain in zip((first, second), run(tmp_path, "without"), strict=True):
        assert differences(each["weights"], plain["weights"]) == []
    assert first["missing"] == second["missing"]
    assert first["stability"].keys() == second["stability"].keys()
    where = {name: 5 + number for number, name in enumerate(first["order"])}
    assert set(GAPS) < set(where)
    # The start, of which the second process has no weights, is a gap.
    gaps = {0, where["the objective"], where["the bar"]}
    for steps in (first["missing"], first["stability"]):
        assert not gaps & set(steps)
        assert {*range(5, LAST + 1)} - gaps <= set(steps)
    for name, missing in GAPS.items():
        assert first["missing"][where[name]] == missing, name
    # Without a limit in one process there is no stability, and all else.
    stability = first["stability"]
    assert math.isnan(stability[where["the limit"]])
    # All is well afterwards.
    assert first["missing"][LAST] == []
    assert stability[LAST] > 0
    assert max(first["seconds"].values()) < 20
    # What only the second process has seen, it says itself.
    assert any("in process 1: keeping weights" in text for text in second["warnings"])
    assert any("in process 1: the stability limit" in text for text in second["warnings"])
    assert any("process 1 failed in this measurement" in text for text in first["warnings"])

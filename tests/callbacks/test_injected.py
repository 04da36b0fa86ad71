"""One of two processes fails in every place there is: both have the same gaps, and go on."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
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


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return run(tmp_path_factory.mktemp("without"), "without")


# What is not there at the step where a place fails: slices by name, or the whole measurement.
GAPS = {
    "slices": {
        "the path": ["line_update"],
        "random directions": ["plane_random"],
        "moments": ["line_adam_m"],
        "components": ["plane_trajectory"],
        "copies": ["line_top1", "plane_trajectory"],
        "eigenvectors": ["line_top1"],
        "coordinates": ["plane_random"],
    },
    "hessian": {},
}


@pytest.mark.parametrize("case", GAPS)
def test_wherever_one_process_fails_both_have_the_same_gap_within_seconds(tmp_path, without, case):
    first, second = run(tmp_path, case)
    for each, plain in zip((first, second), without, strict=True):
        assert differences(each["weights"], plain["weights"]) == []
    assert first["steps"] == second["steps"]
    assert first["missing"] == second["missing"]
    where = {name: 5 + number for number, name in enumerate(first["order"])}
    # The start, of which the second process has no weights, is a gap; what follows is not.
    assert 0 not in first["steps"]
    whole = {"the objective", "the bar"}
    for name, step in where.items():
        assert (step in first["steps"]) == (name not in whole), name
        if name in GAPS[case]:
            assert first["missing"][step] == GAPS[case][name], name
        if name == "the limit" and case == "hessian":
            known = first["stability"]
            assert math.isnan(known[step])
            assert known[max(known)] > 0
    # All is well afterwards.
    assert max(first["steps"]) == 17
    assert first["missing"].get(17, []) == []
    assert max(first["seconds"].values()) < 20
    # What only the second process has seen, it says itself.
    assert any("in process 1: keeping weights" in text for text in second["warnings"])
    assert any("in process 1: the stability limit" in text for text in second["warnings"])
    assert any("process 1 failed in this measurement" in text for text in first["warnings"])

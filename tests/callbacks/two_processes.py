"""Two real processes for the tests: one start of Python for all the cases of a file.

Python, torch and Lightning take seconds to start, twice for each pair, and a case takes a tenth
of one. Tests that share a pair belong to one ``xdist_group``, so that it runs once.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **more}


class Pair:
    """What two processes found, case by case, each in files ``CASE_RANK.pt`` of a folder."""

    def __init__(self, folder, codes, output):
        self.folder, self.codes, self.output = folder, codes, output

    def __call__(self, case):
        files = [self.folder / f"{case}_{rank}.pt" for rank in (0, 1)]
        assert all(file.exists() for file in files), f"{case} has no result.\n{self.output}"
        return [torch.load(file, weights_only=True) for file in files]


def in_two(folder, module, cases, timeout=300):
    """Run ``python -m module FOLDER CASE...`` as two processes, as torchrun would."""
    outputs = [folder / f"output_{rank}.txt" for rank in (0, 1)]
    shared = environment(NODE_RANK="0", MASTER_ADDR="127.0.0.1")
    command = [sys.executable, "-m", module, str(folder), *cases]
    processes = []
    for rank, output in enumerate(outputs):
        mine = {**shared, "LOCAL_RANK": str(rank)}
        with output.open("w") as file:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=mine, stdout=file, stderr=file)
            )
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [None, None]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return Pair(folder, codes, "\n".join(output.read_text()[-3000:] for output in outputs))

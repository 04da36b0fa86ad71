"""Processes for the tests, forked from one that has imported what all of them need.

Python, torch and Lightning take five seconds of a processor to import, a case a tenth of one. The
standard library's server of forks imports them once; as long as it has not trained, what it forks
is as good as a new process. Files that import it go to one process of pytest-xdist
(``tests/scheduling.py``), so that there is one server.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from multiprocessing import connection
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
# So long may a pair take that shares its cores with others, and a wait of gloo takes longer.
PATIENCE = 900
_FORKED = multiprocessing.get_context("forkserver")
_WORKERS = ["ddp_injected", "ddp_resume", "ddp_slices", "ddp_worker", "parallel_worker"]
_FORKED.set_forkserver_preload([f"tests.callbacks.{name}" for name in _WORKERS])


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


def run(outputs, module, arguments, environments):
    """Run ``python -m module ARGUMENTS`` once in each environment, all at a time.

    Returns:
        The exit codes, None for what had to be ended, and the last of what was printed.
    """
    processes = [
        _FORKED.Process(target=_main, args=(module, list(map(str, arguments)), variables, output))
        for variables, output in zip(environments, outputs, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        waiting, patience = {process.sentinel: process for process in processes}, PATIENCE
        while waiting and (ended := connection.wait(waiting, patience)):
            if any([waiting.pop(sentinel).exitcode for sentinel in ended]):
                patience = 60  # for one that waits for one that failed
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
    return codes, "\n".join(Path(output).read_text()[-3000:] for output in outputs)


def in_two(folder, module, cases):
    """Run ``python -m module FOLDER CASE...`` as two processes, as torchrun would."""
    shared = environment(NODE_RANK="0", MASTER_ADDR="127.0.0.1")
    environments = [{**shared, "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    outputs = [str(folder / f"output_{rank}.txt") for rank in (0, 1)]
    return Pair(folder, *run(outputs, module, [folder, *cases], environments))


def _main(module, arguments, variables, output):
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    found = importlib.import_module(module)
    sys.argv = [found.__file__, *arguments]
    found.main()
    sys.stdout.flush()

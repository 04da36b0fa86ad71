"""Tests of a file share what is dear to make: they run in one of pytest-xdist's processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("xdist")

from .scheduling import ByFile

FORKING = [f"tests/callbacks/test_{name}.py" for name in ("parallel", "spawned")]
OTHERS = [f"tests/linalg/test_{name}.py" for name in ("trace", "basis", "density")]
# Each has a test more than the one before.
TESTS = [f"{file}::test[{n}]" for k, file in enumerate(OTHERS + FORKING) for n in range(3 + k)]


class Worker:
    """One process of pytest-xdist, which notes what it is given."""

    shutting_down = False

    def __init__(self, name: str) -> None:
        self.given: list[str] = []
        self.gateway = SimpleNamespace(id=name)

    def send_runtest_some(self, numbers: list[int]) -> None:
        self.given += [TESTS[number] for number in numbers]

    def shutdown(self) -> None:
        self.shutting_down = True


def test_a_file_and_all_that_fork_stay_in_one_process_and_the_longest_come_first() -> None:
    config = SimpleNamespace(
        getvalue=lambda name: ["popen", "popen"], option=SimpleNamespace(loadscopereorder=True)
    )
    scheduling, workers = ByFile(config), [Worker("slow"), Worker("fast")]
    for worker in workers:
        scheduling.add_node(worker)
        scheduling.add_node_collection(worker, TESTS)
    scheduling.schedule()
    fast = workers[1].given
    # More comes while the list is read.
    for test in fast:
        scheduling.mark_test_complete(workers[1], TESTS.index(test))
    files = [list(dict.fromkeys(t.partition("::")[0] for t in w.given)) for w in workers]
    assert files == [FORKING, OTHERS[::-1]]
    assert sorted(workers[0].given + fast) == sorted(TESTS)

"""Which of pytest-xdist's processes runs which file of tests, and when."""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
FORKS = "files that fork"


class ByFile(LoadScopeScheduling):
    """All tests of a file in one process, so that what they share is made once.

    Files that fork processes stay together, too: what they fork has been imported once. They take
    longest and come first, then the files with most tests, so that all processes end together.
    """

    def _split_scope(self, nodeid):
        return group_of(nodeid.partition("::")[0])

    def _assign_work_unit(self, node):
        queue = self.workqueue
        queue.move_to_end(max(queue, key=lambda g: (g == FORKS, len(queue[g]))), last=False)
        super()._assign_work_unit(node)


@cache
def group_of(file):
    """Return the name of what runs in one process, given a file relative to the project."""
    text = (ROOT / file).read_text() if file.startswith("tests/callbacks/") else ""
    return FORKS if "from .two_processes import" in text else file

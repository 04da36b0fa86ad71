"""The import rules of the package, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lla_callbacks"
LAYERS = ["linalg", "landscape", "report", "callbacks"]  # low to high
# Where a library may be imported, beside the layers above it.
ONLY_IN = {
    "pytorch_lightning": ("callbacks/",),
    "lightning": ("callbacks/",),
    "matplotlib": ("report/",),
    "numpy": ("landscape/state.py", "landscape/batches.py", "report/"),
}
# Private members of Lightning that are known to be touched, each with a fallback.
PRIVATE = (
    "_logger_connector",
    "_results",
    "_compiler_ctx",
    "_active_loop",
    "_batches_that_stepped",
)

MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.glob("*/*.py"))


def imported_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module


def violations(path: Path, source: str) -> list[str]:
    layer = LAYERS.index(path.parts[0])
    found = []
    for name in imported_names(source):
        top, *rest = name.split(".")
        if top == "lla_callbacks":
            if not rest or rest[0] not in LAYERS or LAYERS.index(rest[0]) > layer:
                found.append(name)
        elif (top in ONLY_IN and not path.as_posix().startswith(ONLY_IN[top])) or (
            path.parts[0] == "linalg" and top not in ("torch", *STANDARD)
        ):
            found.append(name)
    return found


STANDARD = (
    "__future__",
    "abc",
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "hashlib",
    "math",
)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    assert violations(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("linalg/lanczos.py", "from lla_callbacks.landscape.objective import Objective"),
        ("linalg/lanczos.py", "import numpy"),
        ("landscape/measures.py", "from lla_callbacks.report.figures import density_figure"),
        ("landscape/objective.py", "import pytorch_lightning"),
        ("report/scalars.py", "def f():\n    from lightning.pytorch import Trainer"),
        ("callbacks/replay.py", "import lla_callbacks"),
    ],
)
def test_the_rule_sees_a_violation(path: str, line: str) -> None:
    assert violations(Path(path), line)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_private_members_of_lightning_are_touched_in_compat_only(path: Path) -> None:
    if path.as_posix() != "callbacks/compat.py":
        source = (PACKAGE / path).read_text()
        assert [name for name in PRIVATE if name in source] == []

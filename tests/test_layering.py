"""The import rules of the package, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lla_callbacks"
# Rooms, low to high; those of one line do not know each other.
LEVELS = [
    ["linalg"],
    ["objective"],
    ["report"],
    ["alignment"],
    ["hessian", "slices", "penalty"],
    ["curves", "minima", "page"],
    ["callbacks", "command"],
]
LAYERS = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Files of a room that draw or write; its numerics know none of them.
SHOWING = ("figures.py", "arrays.py", "scalars.py", "words.py", "report.py", "results.py",
           "fields.py", "interpolation.py", "pictures.py", "scales.py", "surface_html.py",
           "judging.py", "refinement.py", "functions.py", "quantity.py")  # fmt: skip
QUANTITIES = ("hessian", "slices", "penalty", "curves", "minima")
# Where a library may be imported, beside the layers above it.
ONLY_IN = {
    "pytorch_lightning": ("callbacks/",),
    "lightning": ("callbacks/",),
    "matplotlib": ("report/",),
    "numpy": (
        "objective/state.py",
        "objective/randomness.py",
        "objective/copies.py",
        "objective/counting.py",
        "objective/rules.py",
        "objective/switches.py",
        "report/",
        "page/",
    ),
}
# Private members of Lightning that compat.py touches; tests/callbacks/test_compat.py hides each.
OF_LIGHTNING = {
    "_batches_that_stepped",
    "_data_source",
    "_default_hp_metric",
    "_generate_state_key",
    "_log_hyperparams",
    "_on_before_batch_transfer",
    "_should_accumulate",
    "_skip_backward",
}
# Private members of other libraries, which no rule forbids.
OF_TORCH = {
    "_sequence_nr",
    "_add_batch_dim",
    "_backward_hooks",
    "_C",
    "_backward_pre_hooks",
    "_buffers",
    "_cdata",
    "_checkpoint_without_reentrant_generator",
    "_data_address",
    "_checkpoint_without_reentrant_generator_impl",
    "_foreach_add_",
    "_op",
    "_schema",
    "_storage_Use_Count",
    "_foreach_copy_",
    "_foreach_mul",
    "_foreach_lerp_",
    "_lazy_clone",
    "_foreach_mul_",
    "_all_gather_result",
    "_fsdp_param_groups",
    "_functorch",
    "_get_fsdp_state",
    "_init_mp_dtypes",
    "_input_metadata",
    "_is_root",
    "_mp_policy",
    "_parameters",
    "_params",
    "_partial_reduce_output",
    "_reduce_dtype",
    "_post_accumulate_grad_hooks",
    "_step_supports_amp_scaling",
    "_to_sync",
    "_training_state",
    "_version",
    "_weight_norm",
}
# matplotlib's axes in space, os.environ, collections.namedtuple, warnings, sys
OF_OTHERS = {"_axinfo", "_data", "_fields", "_filters_mutated", "_getframe", "_make"}

MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.glob("*/*.py"))


def imported_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module


def shows(path: str) -> bool:
    return path.endswith(SHOWING)


def violations(path: Path, source: str) -> list[str]:
    room = path.parts[0]
    numeric = room in QUANTITIES and not shows(path.name)
    found = []
    for name in imported_names(source):
        top, *rest = name.split(".")
        if name == "lla_callbacks.version":  # a string, which knows nothing
            continue
        if top == "lla_callbacks":
            if (
                not rest
                or rest[0] not in LAYERS
                or (rest[0] != room and LAYERS[rest[0]] >= LAYERS[room])
                or (numeric and (rest[0] == "report" or shows(f"{rest[-1]}.py")))
            ):
                found.append(name)
        elif (
            top in ONLY_IN
            and not (
                path.as_posix().startswith(ONLY_IN[top])
                or (room in QUANTITIES and not numeric and top in ("numpy", "matplotlib"))
            )
        ) or (room == "linalg" and top not in ("torch", *STANDARD)):
            found.append(name)
    return found


STANDARD = (
    "__future__",
    "abc",
    "collections",
    "contextlib",
    "ctypes",
    "dataclasses",
    "functools",
    "hashlib",
    "itertools",
    "math",
    "types",
    "typing",
    "zlib",
)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    assert violations(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("linalg/lanczos.py", "from lla_callbacks.objective.objective import Objective"),
        ("linalg/lanczos.py", "import numpy"),
        ("hessian/measures.py", "from lla_callbacks.hessian.figures import density_figure"),
        ("hessian/measures.py", "from lla_callbacks.report.words import with_error"),
        ("hessian/measures.py", "from lla_callbacks.slices.slices import Plane"),
        ("slices/basin.py", "import matplotlib"),
        ("report/words.py", "from lla_callbacks.hessian.measures import measure"),
        ("objective/objective.py", "import pytorch_lightning"),
        ("hessian/scalars.py", "def f():\n    from lightning.pytorch import Trainer"),
        ("callbacks/replay.py", "import lla_callbacks"),
    ],
)
def test_the_rule_sees_a_violation(path: str, line: str) -> None:
    assert violations(Path(path), line)


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def touched(source: str) -> set[str]:
    """Names of private attributes that are read or written, also by their name as a string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found.add(node.slice.value)
    return {name for name in found if is_private(name)}


def defined(source: str) -> set[str]:
    """Names of private functions, methods and attributes that a file gives to its own classes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in ast.walk(ast.Tuple(elts=list(targets))):
                if isinstance(target, ast.Name):
                    found.add(target.id)
                elif isinstance(target, ast.Attribute) and getattr(target.value, "id", "") in (
                    "self",
                    "live",
                ):
                    found.add(target.attr)
    return {name for name in found if is_private(name)}


EVERYTHING = sorted(PACKAGE.glob("**/*.py"))
OWN = set().union(*(defined(path.read_text()) for path in EVERYTHING))


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_members_of_lightning_are_touched_in_compat_only(path: Path) -> None:
    strange = touched(path.read_text()) - OWN - OF_TORCH - OF_OTHERS
    if path.relative_to(PACKAGE).as_posix() == "callbacks/compat.py":
        assert strange == OF_LIGHTNING
    else:
        assert strange == set()


@pytest.mark.parametrize(
    "line",
    [
        "trainer._results",
        "self._generate_state_key()",
        "getattr(module, '_compiler_ctx', None)",
        "hasattr(trainer.fit_loop, '_batches_that_stepped')",
        "trainer._active_loop = None",
        "trainer.__dict__['_callback_connector']",
    ],
)
def test_the_rule_sees_a_private_member(line: str) -> None:
    assert touched(line) - OWN - OF_TORCH - OF_OTHERS

"""Every remedy that a message gives is tried: what it says to do ends in a number.

Of a failed measurement here, of a monitor's in ``tests/callbacks/test_remedies.py``. A message
that nobody tries fails the last test.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lla_callbacks
from lla_callbacks import MeasurementError
from tests.remedies import Action, Case, is_number
from tests.remedy_cases import CASES

NAMES = [f"{i}: {case.name}" for i, case in enumerate(CASES)]


def said(action: Action) -> str:
    """Return what goes wrong, in words; empty if there is a number."""
    try:
        found = action()
    except Exception as error:  # noqa: BLE001 - whichever
        return f"{type(error).__name__}: {error}"
    return "" if is_number(found) else found.summary()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_what_a_message_says_to_do_ends_in_a_number(case: Case) -> None:
    text = said(case.wrong)
    assert case.remedy in text
    assert case.never not in text
    assert {way: said(action) for way, action in case.mended.items()} == dict.fromkeys(
        case.mended, ""
    )


# -- none is forgotten ----------------------------------------------------------------------------

# Where else a remedy is tried, or why it cannot be by one process.
ELSEWHERE = {
    "Use one mesh of devices that has every process": "parameters that are sharded",
    "Take matrix='hessian', or measure a checkpoint": "parameters that are sharded",
    "Keep float32 parameters, with MixedPrecisionPolicy": "parameters that fully_shard has spread",
    "or a release of torch that the tests of this package": "tests/objective/"
    "test_kinds_of_modules.py::test_a_torch_whose_checkpoints_cannot_be_switched_off_is_told_so",
    "Look for what differs between them": "processes at different points: a fault of this package",
    "Return a scalar tensor for every batch": "comes as the message of all held batches",
    "or a dataloader whose batches are not skipped": "comes as the message of all held batches",
    "look for bad samples in the held batches": "comes with the batch's number",
    "Measure a checkpoint, in a plain module": "sharded parameters: it is measure_hessian itself",
    "Write the distances out": "torch has a second derivative of it since 2.14; tests/kinds.py",
    "Give loss=callable(module, batch) that avoids it, or replace it": "as for custom functions",
    ", or refine=False.": "tests/callbacks/test_landscape_monitor.py sets it",
    "Move that to a hook that is not replayed": "tests/callbacks/test_remedies.py",
    "Use cross_entropy of labels": "tests/callbacks/test_poisoned_loss.py poisons it",
    "Use binary_cross_entropy_with_logits": "tests/callbacks/test_poisoned_loss.py poisons it",
}
KINDS_OF_ERRORS = {k.__name__ for k in (MeasurementError, *MeasurementError.__subclasses__())}
# What returns remedies, or holds them.
GIVING = {"gap_remedy", "_instead", "remedy_for", "_INSTEAD", "_CUSTOM", "JACOBIAN_REMEDY",
          "UNREPEATABLE_REMEDY", "REMEDY", "_REMEDY"}  # fmt: skip


def texts(node: ast.AST) -> Iterator[str]:
    """Yield whole strings, of those with numbers in them the longest piece."""
    if isinstance(node, ast.JoinedStr):
        pieces = [v.value for v in node.values if isinstance(v, ast.Constant)]
        yield max(map(str, pieces), key=len)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def remedies() -> set[str]:
    """Return all remedies of failed measurements, from the source."""
    found: set[str] = set()
    for path in Path(str(lla_callbacks.__file__)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and len(node.args) == 2:
                if getattr(node.func, "id", "") in KINDS_OF_ERRORS:
                    found |= set(texts(node.args[1]))
            elif isinstance(node, ast.FunctionDef) and node.name in GIVING:
                returns = [n for n in ast.walk(node) if isinstance(n, ast.Return)]
                found |= {text for n in returns for text in texts(n)}
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in GIVING:
                values = node.value.values if isinstance(node.value, ast.Dict) else [node.value]
                found |= {text for value in values for text in texts(value)}
    return {text for text in found if " " in text.strip()}


def test_every_remedy_is_tried() -> None:
    known, given = [case.remedy for case in CASES], remedies()
    untried = [
        text
        for text in given
        if not any(text.strip() in remedy or remedy in text for remedy in known)
        and not any(part in text for part in ELSEWHERE)
    ]
    assert not untried, "\n".join(untried)
    # And none is listed that is not there.
    assert all(any(part in text for text in given) for part in ELSEWHERE)

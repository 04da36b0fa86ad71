"""Names that a function's code uses: globals, attributes, modules that it imports."""

from __future__ import annotations

import dis
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType

_GLOBALS = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME"})
_ATTRIBUTES = frozenset({
    "LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "IMPORT_FROM", "LOAD_SUPER_ATTR",
})  # fmt: skip
_STORES = frozenset({
    "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "STORE_DEREF", "DELETE_DEREF",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Names:
    """What a function's code names, the functions inside of it included.

    Attributes:
        used: Globals.
        attributes: Attributes of whatever.
        imported: Modules.
        stored: What of these, and of what it closed over, is written.
    """

    used: frozenset[str]
    attributes: frozenset[str]
    imported: frozenset[str]
    stored: frozenset[str]


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> Names:
    """Return the names that a function's code uses."""
    parts = [names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)]
    named = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    return Names(
        frozenset(n for op, n in named if op in _GLOBALS).union(*(p.used for p in parts)),
        frozenset(n for op, n in named if op in _ATTRIBUTES).union(*(p.attributes for p in parts)),
        frozenset(n for op, n in named if op == "IMPORT_NAME").union(*(p.imported for p in parts)),
        frozenset(n for op, n in named if op in _STORES).union(*(p.stored for p in parts)),
    )

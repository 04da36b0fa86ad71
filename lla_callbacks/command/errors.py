"""What the command line refuses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What a shell sees: all is well; a measurement failed; what was asked cannot be.
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


class CommandError(Exception):
    """Something that was asked cannot be; the message says what was given and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean ...?"`` for what is much like a name; empty if nothing is."""
    found = difflib.get_close_matches(name, [str(k) for k in known], n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(found)}?" if found else ""

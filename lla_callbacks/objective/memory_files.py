"""Files in memory, and content that lies elsewhere and is read when it is asked for."""

from __future__ import annotations

import io
import os
from typing import Any


class Held:
    """Content of a file, wherever it is.

    Args:
        source: Bytes, a file in memory, the descriptor of one, a path, or another of these.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def read(self, opened: Any) -> bytes:
        """Return it."""
        source = self._source
        if isinstance(source, Held):
            return source.read(opened)
        if isinstance(source, Memory):
            return source.content()
        if isinstance(source, int):
            return os.pread(source, os.fstat(source).st_size, 0)
        if isinstance(source, str):
            with opened(source, "rb") as file:
                return bytes(file.read())
        return bytes(source)

    @property
    def descriptor(self) -> int | None:
        """That of the file, where it has one of its own."""
        return self._source if isinstance(self._source, int) else None

    def close(self) -> None:
        """Let a descriptor go."""
        if isinstance(self._source, int):
            os.close(self._source)
            self._source = b""


class Memory(io.BytesIO):
    """A file in memory that can be read again after it was closed."""

    name: Any
    _last = b""

    def content(self) -> bytes:
        """Return what was written so far."""
        return self._last if self.closed else self.getvalue()

    def close(self) -> None:
        """Keep the content."""
        if not self.closed:
            self._last = self.getvalue()
        super().close()


def os_error(number: int, *paths: Any) -> OSError:
    """Return the error that the system would give for a file that is not in memory."""
    first, *second = paths
    return OSError(number, os.strerror(number), first, *([None, *second] if second else []))

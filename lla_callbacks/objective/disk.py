"""A file system over the real one: what one pass writes, makes, moves and removes is forgotten."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

from lla_callbacks.objective.compilers import is_by_a_compiler
from lla_callbacks.objective.memory_files import Held, Memory, os_error
from lla_callbacks.objective.stand_ins import RefusedError

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ANONYMOUS = getattr(os, "O_TMPFILE", 0)


class Disk:
    """What one pass did to files, kept in memory.

    Files that it opens for writing are in memory; those and what it renamed, linked or removed are
    found so by what it opens, asks (``os.stat``, and with it ``os.path`` and ``pathlib``) and lists
    (``os.listdir``) later in the same pass. Directories are made, as they must be there, and
    removed at its end. Times, owners and permissions stay what they are, the working directory is
    put back. Other programs cannot be undone and are refused.

    Args:
        is_mine: Whether the calling thread belongs to the pass.

    Attributes:
        refusals: Errors of what was refused, also where the step caught them.
    """

    def __init__(self, is_mine: Callable[[], bool]) -> None:
        self.refusals: list[RefusedError] = []
        self._is_mine = is_mine
        self._held: dict[str, Held | None] = {}
        self._ever_held: list[Held] = []
        self._made: list[str] = []
        self._home: str | None = None
        self._open: Any = io.open
        self._real = {name: os.__dict__[name] for name in _STAND_INS}
        self._elsewhere = [
            (owner, name, getattr(owner, name), stand_in)
            for module, kind, name, stand_in in _ELSEWHERE
            if (owner := _owner(module, kind)) is not None
        ]
        self._elsewhere += _with_defaults(_owner("tempfile", "_TemporaryFileCloser"))

    def enter(self) -> None:
        """Stand before the real functions."""
        global _present
        _present = self
        os.__dict__.update(_STAND_INS)
        for owner, name, _, stand_in in self._elsewhere:
            setattr(owner, name, stand_in)

    def leave(self) -> None:
        """Let the real functions be there again, and nothing else be left."""
        global _present
        for owner, name, real, _ in self._elsewhere:
            setattr(owner, name, real)
        os.__dict__.update(self._real)
        _present = None
        if self._home is not None:
            with suppress(OSError):  # somebody else has removed it
                os.chdir(self._home)
        for held in self._ever_held:
            held.close()
        for path in sorted(self._made, key=len, reverse=True):  # what is inside first
            with suppress(OSError):  # not empty: other programs may write there
                os.rmdir(path)

    @property
    def is_asked(self) -> bool:
        """Whether a call is of the pass, and not by a compiler in the middle of it."""
        return self._is_mine() and not is_by_a_compiler()

    # -- files --------------------------------------------------------------------------------

    def opened(self, file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file as ``open`` does, in memory where it is written to, or was."""
        opener = kwargs.get("opener") or (args[5:] or (None,))[0]
        writes = isinstance(mode, str) and bool(set(mode) & set("wax+"))
        if isinstance(file, int) or opener is not None or not (writes or self._held):
            return self._open(file, mode, *args, **kwargs)
        key = self._key(file)
        if not writes and key not in self._held:
            return self._open(file, mode, *args, **kwargs)
        exists = self._exists(key)
        if "x" in mode and exists:
            raise os_error(errno.EEXIST, file)
        if "r" in mode and not exists:
            raise os_error(errno.ENOENT, file)
        if os.path.isdir(key):
            raise os_error(errno.EISDIR, file)
        if not os.path.isdir(os.path.dirname(key)):
            raise os_error(errno.ENOENT, file)
        content = self._content(key) if exists and "w" not in mode else b""
        if hasattr(os, "memfd_create"):
            return self._reopened(key, file, content, mode.replace("x", "w"), *args, **kwargs)
        memory = Memory(content)
        if writes:
            self._put(key, Held(memory))
        if "a" in mode:
            memory.seek(0, io.SEEK_END)
        if "b" in mode:
            memory.name = file
            return memory
        given = {**dict(zip(_TEXT, args[1:], strict=False)), **kwargs}
        return io.TextIOWrapper(memory, **{k: v for k, v in given.items() if k in _TEXT})

    def _reopened(
        self, key: str, file: Any, content: bytes, mode: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Open what is in memory as a file of the system, which has a descriptor."""
        there = self._held.get(key)
        descriptor = there.descriptor if there is not None else None
        if descriptor is None:
            descriptor = os.memfd_create("pass")
            written = memoryview(content)
            while written:
                written = written[os.write(descriptor, written) :]
            self._put(key, Held(descriptor))
        found = self._open(f"/proc/self/fd/{descriptor}", mode, *args, **kwargs)
        inner = getattr(found, "buffer", found)
        getattr(inner, "raw", inner).name = file
        return found

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: Any = None) -> int:
        """Open a file as ``os.open`` does: where it is written to, another one in memory."""
        real = self._real["open"]
        if not flags & _WRITES or (_ANONYMOUS and flags & _ANONYMOUS == _ANONYMOUS):
            return int(real(path, flags, mode, dir_fd=dir_fd))
        key = self._key(path, dir_fd)
        exists = self._exists(key)
        if exists and not stat.S_ISREG(os.stat(key).st_mode):  # a device, say
            return int(real(path, flags, mode, dir_fd=dir_fd))
        if exists and flags & os.O_EXCL:
            raise os_error(errno.EEXIST, path)
        if not (exists or flags & os.O_CREAT):
            raise os_error(errno.ENOENT, path)
        if not hasattr(os, "memfd_create"):
            raise self._refused("os.open", path)
        found = os.memfd_create("pass")
        if exists and not flags & os.O_TRUNC:
            os.write(found, self._content(key))
            if not flags & os.O_APPEND:
                os.lseek(found, 0, os.SEEK_SET)
        self._put(key, Held(os.dup(found)))
        return found

    def truncate(self, path: Any, length: int) -> None:
        """Cut a file, or fill it with zeros."""
        if isinstance(path, int):
            self._real["truncate"](path, length)
            return
        key = self._key(path)
        if not self._exists(key):
            raise os_error(errno.ENOENT, path)
        self._put(key, Held(self._content(key)[:length].ljust(length, b"\0")))

    def remove(self, path: Any, *, dir_fd: Any = None) -> None:
        """Let a file be gone."""
        key = self._key(path, dir_fd)
        if not self._exists(key):
            raise os_error(errno.ENOENT, path)
        if os.path.isdir(key) and not os.path.islink(key):
            raise os_error(errno.EISDIR, path)
        self._put(key, None)

    unlink = remove

    def rename(self, src: Any, dst: Any, *, src_dir_fd: Any = None, dst_dir_fd: Any = None) -> None:
        """Let a file have another name."""
        old, new = self._key(src, src_dir_fd), self._key(dst, dst_dir_fd)
        if not self._exists(old):
            raise os_error(errno.ENOENT, src, dst)
        if os.path.isdir(old):
            if old not in self._made or self._exists(new):
                raise self._refused("os.rename", src)
            self._real["rename"](old, new)

            def moved(path: str) -> str:
                inside = f"{path}/".startswith(f"{old}/")
                return new + path[len(old) :] if inside else path

            self._made = [moved(path) for path in self._made]
            self._held = {moved(path): held for path, held in self._held.items()}
            return
        self._put(new, Held(self._held.get(old, old)))
        if old != new:
            self._held[old] = None

    replace = rename

    def link(self, src: Any, dst: Any, *args: Any, dir_fd: Any = None, **kwargs: Any) -> None:
        """Let a file have another name beside its own."""
        new = self._key(dst, dir_fd)
        if self._exists(new):
            raise os_error(errno.EEXIST, src, dst)
        old = os.path.join(os.path.dirname(new), os.fsdecode(src))
        self._put(new, Held(self._held.get(old) or old))

    symlink = link

    # -- directories --------------------------------------------------------------------------

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: Any = None) -> None:
        """Make a directory until the end of the pass."""
        key = self._key(path, dir_fd)
        if self._held.get(key, self) is None and os.path.isdir(os.path.dirname(key)):
            del self._held[key]
            if stat.S_ISDIR(self._real["lstat"](key).st_mode):
                return
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        self._made.append(key)

    def rmdir(self, path: Any, *, dir_fd: Any = None) -> None:
        """Remove a directory that the pass made, or let one be gone."""
        key = self._key(path, dir_fd)
        if not self._exists(key):
            raise os_error(errno.ENOENT, path)
        if key in self._made:
            self._real["rmdir"](key)
            self._made.remove(key)
            # Whoever lists it by os.scandir, as shutil.rmtree does, has not seen these.
            self._held = {k: h for k, h in self._held.items() if not k.startswith(key + os.sep)}
        elif self.listdir(key):
            raise os_error(errno.ENOTEMPTY, path)
        else:
            self._held[key] = None

    def listdir(self, path: Any = ".") -> list[Any]:
        """Return the names in a directory as the pass left them."""
        names: list[Any] = self._real["listdir"](path)
        if not self._held or isinstance(path, (int, bytes)):
            return names
        folder = self._key(path)
        places = [(os.path.split(key), held) for key, held in self._held.items()]
        here = {name: held for (above, name), held in places if above == folder}
        kept = [name for name in names if here.get(name, self) is not None]
        return kept + [n for n, h in here.items() if h is not None and n not in names]

    def chdir(self, path: Any) -> None:
        """Go elsewhere until the end of the pass."""
        home = os.getcwd()
        self._real["chdir"](path)
        if self._home is None:
            self._home = home

    fchdir = chdir

    # -- what is asked ------------------------------------------------------------------------

    def stat(self, path: Any, **kwargs: Any) -> Any:
        """Return what the system knows of a file, or of one in memory."""
        return self._status("stat", path, **kwargs)

    def lstat(self, path: Any, **kwargs: Any) -> Any:
        """Do so without following links."""
        return self._status("lstat", path, **kwargs)

    def _status(self, name: str, path: Any, **kwargs: Any) -> Any:
        if not self._held or isinstance(path, int):
            return self._real[name](path, **kwargs)
        key = self._key(path, kwargs.get("dir_fd"))
        if key not in self._held:
            return self._real[name](path, **kwargs)
        if self._held[key] is None:
            raise os_error(errno.ENOENT, path)
        size = len(self._content(key))
        return os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def utime(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Leave times, owners and permissions what they are."""
        if not isinstance(path, int) and not self._exists(self._key(path, kwargs.get("dir_fd"))):
            raise os_error(errno.ENOENT, path)

    chmod = chown = lchown = setxattr = utime

    # -- what is refused ----------------------------------------------------------------------

    def system(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse another program."""
        raise self._refused("another program", args[0] if args else kwargs.get("path", ""))

    posix_spawn = posix_spawnp = kill = killpg = system

    def _spawn(self, process: Any, *args: Any, **kwargs: Any) -> Any:
        self.system(*args, **kwargs)

    def connect(self, database: Any, *args: Any, **kwargs: Any) -> Any:
        """Connect to a database of SQLite's, which can be read and not written."""
        real = self.real("connect")
        there = str(database).startswith("file:") or os.path.exists(database)
        found = real(database if there else ":memory:", *args, **kwargs)
        if there:
            found.execute("PRAGMA query_only = 1")
        return found

    def real(self, name: str) -> Any:
        """Return what is called elsewhere under a name when no pass is on."""
        return next(found for _, own, found, _ in self._elsewhere if own == name)

    def _refused(self, what: str, path: Any) -> RefusedError:
        error = RefusedError(
            f"the step calls {what} ({str(path)[:60]}), which a replay would do once more, so that "
            "training might find something else there; it was stopped before it did.",
            "Move that to a hook that is not replayed, such as on_train_batch_end, or give "
            "loss=callable(module, batch) that does without.",
        )
        self.refusals.append(error)
        return error

    # -- where things are ---------------------------------------------------------------------

    def _key(self, path: Any, dir_fd: Any = None) -> str:
        text = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        return os.path.abspath(text)

    def _exists(self, key: str) -> bool:
        return self._held[key] is not None if key in self._held else os.path.lexists(key)

    def _content(self, key: str) -> bytes:
        held = self._held.get(key)
        return Held(key).read(self._open) if held is None else held.read(self._open)

    def _put(self, key: str, held: Held | None) -> None:
        self._held[key] = held
        if held is not None:
            self._ever_held.append(held)


def _stand_in(name: str, real: Any) -> Any:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        disk = _present
        if disk is None or not disk.is_asked:
            return real(*args, **kwargs)
        return getattr(disk, name)(*args, **kwargs)

    stand_in.__name__ = name
    return stand_in


@lru_cache(maxsize=2)
def _with_defaults(kind: Any) -> list[tuple[Any, str, Any, Any]]:
    """Return a class's functions that have ``os.unlink``, say, as a default, and what stands in."""
    return [
        (f, "__defaults__", f.__defaults__, tuple(_INSTEAD.get(id(d), d) for d in f.__defaults__))
        for f in vars(kind or object).values()
        if any(id(d) in _INSTEAD for d in getattr(f, "__defaults__", None) or ())
    ]


def _owner(module: str, kind: str) -> Any:
    found = sys.modules.get(module)
    return getattr(found, kind, None) if kind else found


_present: Disk | None = None
_TEXT = ("encoding", "errors", "newline")
_STAND_INS = {
    name: _stand_in(name, getattr(os, name))
    for name in (
        "open", "truncate", "remove", "unlink", "rename", "replace", "link", "symlink", "mkdir",
        "rmdir", "listdir", "chdir", "fchdir", "stat", "lstat", "utime", "chmod", "chown",
        "lchown", "setxattr", "system", "posix_spawn", "posix_spawnp", "kill", "killpg",
    )
    if hasattr(os, name)
}  # fmt: skip
_INSTEAD = {id(getattr(os, name)): stand_in for name, stand_in in _STAND_INS.items()}


def _of_elsewhere(module: str, kind: str, name: str, instead: str) -> tuple[str, str, str, Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        disk = _present
        if disk is None:  # kept by who was imported in a pass
            call = getattr(_owner(module, kind), name)
        else:
            call = getattr(disk, instead) if disk.is_asked else disk.real(name)
        return call(*args, **kwargs)

    return module, kind, name, stand_in


# Of modules that may be there: what is called, and what stands for it.
_ELSEWHERE = (
    _of_elsewhere("subprocess", "Popen", "__init__", "_spawn"),
    _of_elsewhere("sqlite3", "", "connect", "connect"),
)

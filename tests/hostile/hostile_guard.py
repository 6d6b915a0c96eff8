"""What no input may bring about: an undocumented error, a hang, much memory, a file elsewhere, a program run."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Of computing that one input may take."""

MEMORY = 1 << 30
"""Bytes by which one input may raise the most memory that the process ever held."""

_ADDRESS_SPACE = 4 << 30  # beyond what the process has when it begins
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move", "shutil.unpack_archive"),
}
_RUNS = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"),
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "pickle.find_class"),
}


class Forbidden(BaseException):
    """An input had something done that none may; no handler of exceptions takes it."""


class _Watch:
    """The hook, which Python never takes off again, and what it compares with while an input is read."""

    def __init__(self) -> None:
        self.scratch: str | None = None
        self.outside = ""
        self.programs = os.path.realpath(os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.devnull)
        self.seen: list[str] = []
        self._hooked = False

    def hook(self) -> None:
        if not self._hooked:
            sys.addaudithook(self._look)
            self._hooked = True

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.scratch is None:
            return
        if event == "open":
            path, _, flags = arguments
            written = isinstance(flags, int) and flags & _WRITES
            if isinstance(path, str | bytes) and (written or self._below(path, self.outside)):
                self._refuse(event, path, written)
        elif event in _CHANGES:
            for path in arguments[:2]:
                if isinstance(path, str | bytes):
                    self._refuse(event, path, True)
        elif event in _RUNS:
            self._forbid(f"{event} {arguments!r}"[:300])

    def _refuse(self, event: str, path: str | bytes, written: Any) -> None:
        # JAX itself keeps compiled programs where it is told to.
        if not written or not (self._below(path, self.scratch) or self._below(path, self.programs)):
            self._forbid(f"{event} {os.fsdecode(path)}"[:300])

    def _forbid(self, what: str) -> None:
        self.seen.append(what)
        raise Forbidden(what)

    @staticmethod
    def _below(path: str | bytes, folder: str | None) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(f"{folder}{os.sep}")


_watch = _Watch()


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Limits the address space to what the process has and :data:`_ADDRESS_SPACE` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def guarded(
    call: Callable[[], Any], scratch: Path, outside: Path, patience: float
) -> tuple[BaseException | None, float]:
    """Calls, and looks at what happens.

    Args:
        call: what is to be called.
        scratch: the only folder below which files may be written.
        outside: the folder of which no file may be opened.
        patience: seconds after which the process ends with a traceback, where nothing else can end the call.

    Returns:
        What was raised, and the seconds of computing. What is forbidden counts as raised even where it was caught.
    """
    _watch.hook()
    _watch.seen.clear()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.dump_traceback_later(patience, exit=True)
    before, raised = time.process_time(), None
    _watch.scratch, _watch.outside = os.path.realpath(scratch), os.path.realpath(outside)
    try:
        call()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raised = error
    finally:
        _watch.scratch = None
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - before
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024
    if _watch.seen:
        raised = Forbidden("; ".join(_watch.seen))
    elif taken > MEMORY:
        raised = Forbidden(f"{taken:,} bytes of memory")
    elif seconds > SECONDS:
        raised = Forbidden(f"{seconds:.1f} seconds")
    return raised, seconds

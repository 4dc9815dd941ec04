"""One process at a time in a directory of state, and who it is.

The lock is the kernel's (``flock``): it ends with its holder, however that ends. What the file says about the holder is read
only while somebody holds the lock, so that it cannot be the word of a process that died.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedlora.core.codes import Code
from fedlora.core.errors import ConfigError, ResourceError, StoreError
from fedlora.formats.files import NO_SPACE

_FILE = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a directory.

    Attributes:
        pid: process id on ``host``.
        since: seconds since 1970.
        host: name of its machine; a directory may lie on a network disk.
        what: the command, ``fedlora site up`` for instance.
    """

    pid: int
    since: int
    host: str
    what: str

    def __str__(self) -> str:
        at = datetime.fromtimestamp(self.since, UTC).astimezone().isoformat(" ", "seconds")
        return f"`{self.what}`, process {self.pid} on {self.host}, since {at}"


class Held(ConfigError):
    """Another process works in this directory of state."""

    code: Code = "held"

    def __init__(self, directory: Path, by: Holder | None) -> None:
        super().__init__(
            f"{directory} is in use by {by or 'another process'}",
            hint=f"stop it first (on {by.host}: kill {by.pid}, or `systemctl stop`), or give this one a directory of its own"
            if by
            else "stop it first, or give this one a directory of its own",
        )
        self.by = by


@contextmanager
def hold(directory: Path, *, what: str, clock: Callable[[], float] = time.time, patience_s: float = 0.0) -> Iterator[None]:
    """Holds a directory while inside. To be entered before anything in it is written, changed or deleted.

    Creates the directory (0700) and ``lock`` in it, and writes nothing else.

    Args:
        what: the command that holds it.
        clock: seconds since 1970.
        patience_s: how long to wait for a process that holds it.

    Raises:
        Held: another process has it; the error says which.
        StoreError: the directory cannot be written, or its file system has no locks.
        ResourceError: no space left.
    """
    path = directory / _FILE
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        end, handle = time.monotonic() + patience_s, _take(path)
        while handle is None and time.monotonic() < end:
            handle = _take(path)
    except OSError as e:
        raise _named(directory, e) from None
    if handle is None:
        raise Held(directory, holder(directory))
    try:
        mine = Holder(os.getpid(), int(clock()), socket.gethostname(), what)
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(asdict(mine)).encode(), 0)
        except OSError as e:
            raise _named(directory, e) from None
        yield
    finally:
        os.close(handle)  # and with it the lock; the file stays: deleting it would let two in


def holder(directory: Path) -> Holder | None:
    """Who holds the directory now; None: nobody, or somebody who has not said yet."""
    try:
        with (directory / _FILE).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return Holder(**json.load(file))
    except (OSError, ValueError, TypeError):
        pass
    return None


def _take(path: Path) -> int | None:
    """A locked file handle, or None if another process has the lock. Children do not inherit it (PEP 446)."""
    for patience in (0.2, 0.2, 0.0):  # somebody who only looks holds it for a moment
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.fstat(handle).st_ino == path.stat().st_ino:  # not one that was deleted meanwhile
                return handle
        except BlockingIOError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(patience)
    return None


def _named(directory: Path, error: OSError) -> StoreError | ResourceError:
    if error.errno in NO_SPACE:
        return ResourceError(f"no space left for {directory}", hint="free some disk space")
    if error.errno in _NO_LOCKS:
        return StoreError(f"the file system of {directory} has no locks", hint="choose a directory on a local disk")
    return StoreError(f"cannot write {directory}: {error.strerror}", hint="make it a directory that this user may write to")

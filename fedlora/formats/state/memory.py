"""A few small values that survive a power cut. Each is in two files, so that the damage of one costs nothing."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedlora.core.canonical import is_digest
from fedlora.core.errors import ResourceError, StoreError
from fedlora.formats.files import COPY, Damaged, copy_of, dump_record, frame, parse_record, set_aside, unframe, write_atomic

log = logging.getLogger(__name__)

_MAGIC = b"FLM1"


@dataclass(frozen=True, slots=True)
class Kept:
    """One value of a memory, as found on the disk.

    Attributes:
        key: its name; empty if no copy is readable.
        problem: file -> what is wrong with this copy; intact copies are left out.
        lost: no copy is intact.
    """

    key: str
    problem: Mapping[Path, str]
    lost: bool


class Memory(Protocol):
    """A few values that survive a power cut. ``put`` returns after fsync; what it is given in parts is one value."""

    def get(self, key: str) -> bytes | None: ...
    def put(self, key: str, *parts: bytes | memoryview) -> None: ...
    def keys(self) -> Collection[str]:
        """Of all values that were put, damaged ones as far as they are known."""
        ...

    def where(self, key: str) -> str:
        """The place of a value, for a message to this end's operator."""
        ...


def get_record(memory: Memory, key: str, kind: str, *, hint: str = "") -> dict[str, Any] | None:
    """The record that :func:`put_record` stored last; None only if none was ever stored.

    Raises:
        StoreError: it is damaged; the error names its file.
    """
    blob = memory.get(key)
    return None if blob is None else parse_record(blob, kind, memory.where(key), hint=hint)


def put_record(memory: Memory, key: str, kind: str, facts: Mapping[str, Any]) -> None:
    """Stores a record; it is on the disk when this returns."""
    memory.put(key, dump_record(kind, facts))


@dataclass(frozen=True, slots=True)
class FileMemory:
    """:class:`Memory` in a directory: two files a key, with key and digest inside.

    The second copy is written before the first. Law: if one of the two is damaged or missing, the value is still the last one
    put; if both are, the error names them. A value that was never put is None.

    Args:
        hint: what an operator can do if both copies of a value are damaged.
    """

    directory: Path
    hint: str = ""

    def get(self, key: str) -> bytes | None:
        """The value of a key, from whichever copy is intact; None if there is none. Replaces a damaged or missing first copy.

        Raises:
            StoreError: neither copy is intact.
        """
        path, copy = self._paths(key)
        problem: dict[Path, str] = {}
        value = _whole(path, key, problem)
        if value is not None or (path not in problem and not os.path.lexists(copy)):
            return value
        value = _whole(copy, key, problem)
        if value is None:
            what = "; ".join(f"{p} {why}" for p, why in problem.items()) or f"{path} is damaged and {copy} is missing"
            raise Damaged(f"{words(key)} is lost: {what}", hint=self.hint)
        log.warning("%s is damaged or missing; its copy is whole and takes its place", path)
        with suppress(StoreError, ResourceError):  # the next put tries again
            self._replace(path, _frame(key, value))
        return value

    def put(self, key: str, *parts: bytes | memoryview) -> None:
        path, copy = self._paths(key)
        framed = _frame(key, *parts)
        for place in (copy, path):
            self._replace(place, framed, flush=place == path)  # one flush of the directory is for both

    def keys(self) -> Collection[str]:
        return {key for path in _listed(self.directory) if (key := _name_in(path))}

    def kept(self) -> list[Kept]:
        """All values, with the damage of their copies. Changes nothing."""
        names = {name for p in _listed(self.directory) if is_digest(name := p.name.removesuffix(COPY))}
        found = []
        for name in sorted(names):
            problem: dict[Path, str] = {}
            both = [self.directory / name, copy_of(self.directory / name)]
            keys = [k for k in (_key_of(p, problem) for p in both) if k]
            found.append(Kept(keys[0] if keys else "", problem, lost=not keys))
        return found

    def where(self, key: str) -> str:
        """The file of a value, for a message to this end's operator."""
        return str(self._paths(key)[0])

    def files(self, key: str) -> tuple[Path, Path]:
        """Where a value and its copy lie; they need not exist."""
        return self._paths(key)

    def _paths(self, key: str) -> tuple[Path, Path]:
        path = self.directory / hashlib.sha256(key.encode()).hexdigest()
        return path, copy_of(path)

    def _replace(self, path: Path, parts: Sequence[bytes | memoryview], *, flush: bool = True) -> None:
        if path.is_dir() and not path.is_symlink():
            log.warning("a directory stands in place of %s; it is now %s", path, set_aside(path))
        write_atomic(path, *parts, flush=flush)


def words(key: str) -> str:
    """What a key of a memory is about, for an operator: the run is shortened."""
    run, _, rest = key.partition("/")
    return f"what is kept as {rest!r} of run {run[:12]}" if rest and len(run) == 64 else f"what is kept as {key!r}"


def _frame(key: str, *value: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
    name = key.encode()
    return frame(_MAGIC, len(name).to_bytes(2, "little"), name, *value)


def _unframe(path: Path, problem: dict[Path, str]) -> tuple[str, bytes] | None:
    """Key and value; None if there is no file, or it is not whole, which ``problem`` then says."""
    try:
        reader = unframe(path.read_bytes(), _MAGIC, path)
        name = reader.take(reader.number(order="little"))
        return name.decode(errors="replace"), reader.rest()
    except FileNotFoundError:
        return None
    except OSError as e:
        problem[path] = f"cannot be read ({e.strerror})"
    except Damaged:
        problem[path] = "is damaged"
    return None


def _whole(path: Path, key: str, problem: dict[Path, str]) -> bytes | None:
    found = _unframe(path, problem)
    if found is not None and found[0] != key:
        problem[path] = "holds what belongs into another file"
        return None
    return None if found is None else found[1]


def _key_of(path: Path, problem: dict[Path, str]) -> str:
    found = _unframe(path, problem)
    if found is None:
        if path not in problem:
            problem[path] = "is missing"
        return ""
    if hashlib.sha256(found[0].encode()).hexdigest() != path.name.removesuffix(COPY):
        problem[path] = "holds what belongs into another file"
        return ""
    return found[0]


def _name_in(path: Path) -> str:
    """The key that stands at the head of a file, which may be damaged further on; empty if none does."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return ""
            return file.read(int.from_bytes(file.read(2), "little")).decode(errors="replace")
    except OSError:
        return ""


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


@dataclass(slots=True)
class DictMemory:
    """A :class:`Memory` that does not outlive the process."""

    values: dict[str, bytes] = field(default_factory=dict)

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def put(self, key: str, *parts: bytes | memoryview) -> None:
        self.values[key] = b"".join(parts)

    def keys(self) -> Collection[str]:
        return list(self.values)

    def where(self, key: str) -> str:
        return key

"""Files that survive a power cut, and that say so when the disk or a hand has damaged them.

Everything is written to a temporary name, flushed to disk and renamed, so that a reader finds the old or the new file and
never a torn one. What is read carries its own digest, so that a reader finds what was written or a named error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as dump_tensors

from fedlora.core.adapter import Adapter
from fedlora.core.canonical import canonical
from fedlora.core.errors import FedLoRAError, ResourceError, StoreError

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Damaged(StoreError):
    """The file could be read; its contents are not what was written."""


@contextmanager
def named_disk_errors(path: Path) -> Iterator[None]:
    """Turns a failure to write ``path`` into a named error.

    Raises:
        ResourceError: no space left.
        StoreError: anything else.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            hint = "free some disk; nothing is lost, the run goes on from here"
            raise ResourceError(f"no space left for {path}", hint=hint) from None
        hint = "move away what stands there" if e.errno in (errno.EISDIR, errno.ENOTDIR) else "make it writable for this user"
        raise StoreError(f"cannot write {path}: {e.strerror}", hint=hint) from None


def write_atomic(path: Path, *parts: bytes | memoryview, mode: int = 0o600, flush: bool = True) -> None:
    """Replaces a file by these bytes, flushed to disk before the rename and the directory after it.

    Args:
        flush: False leaves the directory to the next file that is written into it.

    Raises:
        ResourceError: no space left; the old file is untouched.
        StoreError: any other failure to write.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with named_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            with suppress(FileNotFoundError):
                new.unlink()
        if flush:
            _flush_directory(path.parent)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(path: Path, *, hint: str = "") -> bytes | None:
    """The whole file; None if there is none.

    Raises:
        StoreError: it cannot be read, or a directory stands in its place.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}", hint=hint) from None


def set_aside(path: Path) -> Path:
    """Renames what stands at ``path``, a directory too, to a free name ending in ``.damaged``; returns that name.

    Raises:
        StoreError: it cannot be renamed.
    """
    free = path.with_suffix(".damaged")
    number = 1
    while os.path.lexists(free):
        number += 1
        free = path.with_suffix(f".damaged-{number}")
    with named_disk_errors(path):
        os.replace(path, free)
    return free


# --- facts: small JSON that knows its own digest ------------------------------------------------------------------------

_DIGEST = "sha256"


def dump_facts(facts: Mapping[str, Any]) -> bytes:
    """Canonical JSON of ``facts`` with ``sha256``, the digest of the same without it."""
    return canonical({**facts, _DIGEST: hashlib.sha256(canonical(dict(facts))).hexdigest()})


def check_facts(found: object) -> dict[str, Any]:
    """Facts without their digest.

    Raises:
        ValueError: not what :func:`dump_facts` wrote.
    """
    if not isinstance(found, dict):
        raise ValueError("not an object")
    facts = {k: v for k, v in found.items() if k != _DIGEST}
    if found.get(_DIGEST) != hashlib.sha256(canonical(facts)).hexdigest():
        raise ValueError("another digest")
    return facts


def parse_facts(blob: bytes, path: Path, *, hint: str) -> dict[str, Any]:
    """Inverse of :func:`dump_facts`.

    Raises:
        Damaged: names ``path``.
    """
    try:
        return check_facts(json.loads(blob))
    except (ValueError, TypeError, RecursionError):
        raise Damaged(f"{path} is damaged: it is not what was written there", hint=hint) from None


# --- memory --------------------------------------------------------------------------------------------------------------

_HEAD = struct.Struct("<4sH")
_MAGIC = b"FLM1"


@dataclass(frozen=True, slots=True)
class Kept:
    """One value of a memory as it lies on the disk.

    Attributes:
        key: its name; empty if no copy says so.
        problem: what is wrong with each copy that is not whole, by file.
        lost: no copy is whole.
    """

    key: str
    problem: Mapping[Path, str]
    lost: bool


class Memory(Protocol):
    """A few small values that survive a power cut. ``put`` returns after fsync."""

    def get(self, key: str) -> bytes | None: ...
    def put(self, key: str, value: bytes) -> None: ...
    def where(self, key: str) -> str:
        """Where a value lies, for a message to this end's operator."""
        ...


@dataclass(frozen=True, slots=True)
class FileMemory:
    """:class:`fedlora.protect.Memory` in a directory: two files a key, with key and digest inside.

    The copy is written before the file itself. Law: whatever happens to one of the two, the value is the one last put; if both
    are damaged, the error names them. A value that was never put is None.

    Args:
        hint: the way on where both copies of a value are damaged.
    """

    directory: Path
    hint: str = ""

    def get(self, key: str) -> bytes | None:
        """
        Raises:
            StoreError: neither copy is whole.
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

    def put(self, key: str, value: bytes) -> None:
        path, copy = self._paths(key)
        blob = _frame(key, value)
        for place in (copy, path):
            self._replace(place, blob, flush=place == path)  # one flush of the directory is for both

    def kept(self) -> list[Kept]:
        """All values, and what is wrong with them. Changes nothing."""
        names = {p.name.removesuffix(".copy") for p in _listed(self.directory) if _is_name(p.name.removesuffix(".copy"))}
        found = []
        for name in sorted(names):
            problem: dict[Path, str] = {}
            both = [self.directory / name, self.directory / f"{name}.copy"]
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
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.directory / name, self.directory / f"{name}.copy"

    def _replace(self, path: Path, blob: bytes, *, flush: bool = True) -> None:
        if path.is_dir() and not path.is_symlink():
            log.warning("a directory stands in place of %s; it is now %s", path, set_aside(path))
        write_atomic(path, blob, flush=flush)


def words(key: str) -> str:
    """What a key of a memory is about, for an operator: the run is shortened."""
    run, _, rest = key.partition("/")
    return f"what is kept as {rest!r} of run {run[:12]}" if rest and len(run) == 64 else f"what is kept as {key!r}"


def _frame(key: str, value: bytes) -> bytes:
    name = key.encode()
    body = _HEAD.pack(_MAGIC, len(name)) + name + value
    return body + hashlib.sha256(body).digest()


def _unframe(path: Path, problem: dict[Path, str]) -> tuple[str, bytes] | None:
    """Key and value; None if there is no file, or it is not whole, which ``problem`` then says."""
    try:
        blob = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        problem[path] = f"cannot be read ({e.strerror})"
        return None
    body, digest = blob[:-32], blob[-32:]
    if len(body) < _HEAD.size or hashlib.sha256(body).digest() != digest or body[:4] != _MAGIC:
        problem[path] = "is damaged"
        return None
    end = _HEAD.size + _HEAD.unpack_from(body)[1]
    return body[_HEAD.size : end].decode(errors="replace"), body[end:]


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
    if hashlib.sha256(found[0].encode()).hexdigest() != path.name.removesuffix(".copy"):
        problem[path] = "holds what belongs into another file"
        return ""
    return found[0]


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _is_name(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


# --- adapters in files -----------------------------------------------------------------------------------------


_META = "fedlora"  # one key only: the order of several would not be stable


def save_adapter(path: Path, adapter: Adapter, facts: Mapping[str, Any], state: Mapping[str, Adapter] | None = None) -> None:
    """Writes a safetensors file with the adapter under PEFT's names, float32, and ``facts`` as its one metadata key.

    Args:
        state: named vectors that belong to it; tensor t of vector v is saved as ``v/t``, which is no tensor's name.
    """
    digests = {"digest": adapter.digest(), "layout": adapter.layout.digest()}
    if state:
        digests["state"] = canonical({k: v.digest() for k, v in state.items()}).decode()
    tensors = dict(adapter.tensors())
    for name, vector in (state or {}).items():
        tensors |= {f"{name}/{t}": value for t, value in vector.tensors().items()}
    write_atomic(path, dump_tensors(tensors, metadata={_META: dump_facts({**facts, **digests}).decode()}))


def load_adapter(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """Inverse of :func:`save_adapter`, without the state.

    Raises:
        StoreError: unreadable, not ours, or other contents than its digest says.
    """
    adapter, facts, _ = load_vectors(path)
    return adapter, facts


def load_vectors(path: Path) -> tuple[Adapter, dict[str, Any], dict[str, Adapter]]:
    """The same with the state.

    Raises:
        Damaged: its contents are not what was written.
        StoreError: unreadable.
    """
    tensors: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            facts = check_facts(json.loads((file.metadata() or {})[_META]))
            for name in list(file.keys()):
                vector, _, tensor = name.rpartition("/")
                tensors.setdefault(vector, {})[tensor] = file.get_tensor(name)
        adapter = Adapter.of(tensors.pop("", {}))
        state = {name: Adapter.of(parts) for name, parts in tensors.items()}
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}") from None
    except (SafetensorError, FedLoRAError, KeyError, TypeError, ValueError) as e:
        raise Damaged(f"{path} is not an adapter file of FedLoRA ({type(e).__name__})") from None
    stated = facts.pop("state", "") or canonical({}).decode()
    if adapter.digest() != facts.get("digest") or canonical({k: v.digest() for k, v in state.items()}).decode() != stated:
        raise Damaged(f"{path} is damaged: its contents do not have the digest that it states")
    return adapter, facts, state

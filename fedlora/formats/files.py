"""Files that survive a power cut, and that say so when the disk or a hand has damaged them.

Everything is written to a temporary name, flushed to disk and renamed, so that a reader finds the old or the new file and
never a torn one. What is read carries its own digest, so that a reader finds what was written or a named error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fedlora.core.adapter import F32, Adapter, Layout
from fedlora.core.canonical import canonical, parse_canonical
from fedlora.core.errors import ConfigError, FedLoRAError, ResourceError, StoreError
from fedlora.core.reader import Reader

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of an OSError that mean a full disk or quota."""

COPY = ".copy"
"""How the name of a file's second copy ends."""


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
        if e.errno in NO_SPACE:
            hint = "free some disk space; nothing is lost, and the run continues from here"
            raise ResourceError(f"no space left for {path}", hint=hint) from None
        hint = (
            "move away the file or directory in its place"
            if e.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
            else "make it writable for this user"
        )
        raise StoreError(f"cannot write {path}: {e.strerror}", hint=hint) from None


def unfinished(path: Path) -> Path:
    """Where a file that one process alone writes is prepared. A power cut may leave it behind."""
    return path.with_name(f".{path.name}.new")


def write_atomic(path: Path, *parts: bytes | memoryview, mode: int = 0o600, flush: bool = True, shared: bool = False) -> None:
    """Replaces a file by these bytes, flushed to disk before the rename and the directory after it.

    Args:
        flush: False leaves the directory to the next file that is written into it.
        shared: another process may write this file at the same time. Else what a power cut has left of an earlier write is
            written over: secrets in it stay no longer than those in the file.

    Raises:
        ResourceError: no space left; the old file is untouched.
        StoreError: any other failure to write.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new") if shared else unfinished(path)
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
            flush_directory(path.parent)


def private_directory(path: Path) -> None:
    """Makes a directory that its owner alone may enter; one that is there stays as it is.

    Raises:
        ResourceError, StoreError: it cannot be made.
    """
    with named_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)


def flush_directory(directory: Path) -> None:
    """Flushes to the disk which names a directory holds.

    Raises:
        OSError: it cannot be opened.
    """
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


def copy_of(path: Path) -> Path:
    """Where the second copy of a file lies: beside it."""
    return path.with_name(f"{path.name}{COPY}")


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


# --- records: the one form of all small durable state ------------------------------------------------------------------
#
# For people and other programs canonical JSON with its own digest; for bytes a frame with a digest at the end. Either is
# written by write_atomic, so that a torn write leaves the old record, and read whole or refused by name.

_DIGEST = "sha256"
_VERSION = 1
_SHA256 = 32


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


def parse_facts(blob: bytes, where: object, *, hint: str) -> dict[str, Any]:
    """Inverse of :func:`dump_facts`.

    Raises:
        Damaged: names ``where``.
    """
    try:
        return check_facts(parse_canonical(blob))
    except (ValueError, TypeError):
        raise Damaged(f"{where} is damaged: it is not what was written there", hint=hint) from None


def dump_record(kind: str, facts: Mapping[str, Any]) -> bytes:
    """Facts that also say what they are a record of, and in which version of this form."""
    return dump_facts({**facts, "record": kind, "version": _VERSION})


def parse_record(blob: bytes, kind: str, where: object, *, hint: str = "") -> dict[str, Any]:
    """Inverse of :func:`dump_record`.

    Raises:
        Damaged: names ``where``. Any truncation and any changed byte is; so is a record of something else.
    """
    facts = parse_facts(blob, where, hint=hint)
    if (facts.pop("record", None), facts.pop("version", None)) != (kind, _VERSION):
        raise Damaged(f"{where} is no record of {kind!r} in version {_VERSION}", hint=hint)
    return facts


def save_record(path: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """On the disk when this returns; a power cut before leaves the record that was there.

    Raises:
        ResourceError, StoreError: as :func:`write_atomic`.
    """
    write_atomic(path, dump_record(kind, facts))


def load_record(path: Path, kind: str, *, hint: str = "") -> dict[str, Any] | None:
    """Inverse of :func:`save_record`; None only where no file is.

    Raises:
        Damaged: as :func:`parse_record`.
        StoreError: it cannot be read.
    """
    blob = read_file(path, hint=hint)
    return None if blob is None else parse_record(blob, kind, path, hint=hint)


def frame(magic: bytes, *parts: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
    """Magic, parts and the SHA-256 of both, for :func:`write_atomic`.

    Args:
        magic: 4 bytes: of what, and in which version.
    """
    digest = hashlib.sha256(magic)
    for part in parts:
        digest.update(part)
    return magic, *parts, digest.digest()


def unframe(blob: bytes, magic: bytes, where: object) -> Reader:
    """Inverse of :func:`frame`: reads what stands between magic and digest, and says :class:`Damaged` beyond it.

    Raises:
        Damaged: names ``where``.
    """
    body = memoryview(blob)[: max(len(blob) - _SHA256, 0)]
    if hashlib.sha256(body).digest() != blob[len(body) :] or body[: len(magic)] != magic:
        raise Damaged(f"{where} is damaged")
    return Reader(body[len(magic) :], str(where), error=Damaged)


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
    write_atomic(path, *_tensors_file(tensors, dump_facts({**facts, **digests}).decode()))


def _tensors_file(tensors: Mapping[str, F32], meta: str) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: length (u64) | JSON, filled up to eight bytes | values by rising name, not copied.

    The bytes are those of the format's own writer, which holds all values twice.
    """
    head: dict[str, Any] = {"__metadata__": {_META: meta}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + tensor.nbytes
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in sorted(tensors.items()):
        yield tensor.reshape(-1).astype("<f4", copy=False).view(np.uint8).data


def load_vector(path: Path, name: str, layout: Layout, *, digest: str) -> Adapter:
    """One of a file's vectors: the adapter, named "", or one of its state.

    Raises:
        Damaged: it has not this digest.
        StoreError: unreadable.
    """
    before = f"{name}/" if name else ""
    with _named_damage(path), safe_open(path, framework="numpy") as file:
        found = _read_vector(file, before, [tensor for tensor, _ in layout.entries])
    if found.digest() != digest:
        raise Damaged(f"{path} is damaged: its contents do not have the digest that was written")
    return found


@contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}") from None
    except (SafetensorError, FedLoRAError, KeyError, TypeError, ValueError) as e:
        raise Damaged(f"{path} is not an adapter file of FedLoRA ({type(e).__name__})") from None


def _read_vector(file: Any, before: str, tensors: Sequence[str]) -> Adapter:
    """One vector, tensor by tensor: nothing else is held."""
    layout = Layout.of({t: tuple(file.get_slice(before + t).get_shape()) for t in tensors})
    vector = np.empty(layout.size, np.float32)
    for name, at, _ in layout.slices():
        vector[at] = file.get_tensor(before + name).reshape(-1)
    return Adapter(vector, layout)


def load_adapter(path: str | os.PathLike[str]) -> tuple[Adapter, dict[str, Any]]:
    """Inverse of :func:`save_adapter`, without the state.

    Raises:
        StoreError: unreadable, not ours, or other contents than its digest says.
    """
    adapter, facts, _ = load_vectors(Path(path))
    return adapter, facts


def stated_facts(path: Path) -> dict[str, Any]:
    """The facts that such a file states, ``digest`` of the adapter among them, without a look at its values.

    Raises:
        StoreError: unreadable, or not ours.
    """
    with _named_damage(path), safe_open(path, framework="numpy") as file:
        return check_facts(json.loads((file.metadata() or {})[_META]))


def load_vectors(path: Path) -> tuple[Adapter, dict[str, Any], dict[str, Adapter]]:
    """The same with the state.

    Raises:
        Damaged: its contents are not what was written.
        StoreError: unreadable.
    """
    with _named_damage(path), safe_open(path, framework="numpy") as file:
        facts = check_facts(json.loads((file.metadata() or {})[_META]))
        names: dict[str, list[str]] = {}
        for name in list(file.keys()):
            vector, _, tensor = name.rpartition("/")
            names.setdefault(vector, []).append(tensor)
        adapter = _read_vector(file, "", names.pop("", []))
        state = {name: _read_vector(file, f"{name}/", tensors) for name, tensors in names.items()}
    stated = facts.pop("state", "") or canonical({}).decode()
    if adapter.digest() != facts.get("digest") or canonical({k: v.digest() for k, v in state.items()}).decode() != stated:
        raise Damaged(f"{path} is damaged: its contents do not have the digest that it states")
    return adapter, facts, state


def refuse_existing(out: Path) -> None:
    """Confirms that a directory is yet to be made.

    Raises:
        ConfigError: it is there.
    """
    if out.exists():
        raise ConfigError(f"{out} exists and is not overwritten", hint="name another directory, or move this one away")

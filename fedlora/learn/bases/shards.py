"""Files of a model: safetensors read and written tensor by tensor, digests, directories that appear whole. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedlora.core.errors import ModelError

CHUNK_BYTES = 4 << 20
MAX_HEADER_BYTES = 100 << 20
WIDTH = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per value, by safetensors' type names."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        dtype: safetensors' name of the type, e.g. ``BF16``.
        file: the shard it lies in; ``offset`` and ``size`` say where, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int


def load_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: missing, unreadable or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(
            f"cannot read {file}: {e.strerror}", hint="a base model directory has config.json beside its weights"
        ) from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not JSON", hint="copy the base model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The shards that transformers would load from this directory.

    Raises:
        ModelError: there are none, only pickled ones, or the index names a file outside the directory.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = load_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{index} has no weight_map")
        files = sorted({str(v) for v in names.values()})
        bad = [n for n in files if Path(n).name != n or not (directory / n).is_file()]
        if bad:
            raise ModelError(f"{index} names files that are not in its directory: {', '.join(bad)}", hint="copy all shards")
        return [directory / n for n in files]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise ModelError(
            f"{directory} has pickled weights only, which can run code when loaded",
            hint="get the safetensors files of the same revision",
        )
    raise ModelError(f"no model.safetensors in {directory}", hint="give the directory that holds config.json and the weights")


def scan(files: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor of these shards, by name, in sorted order. Reads headers only.

    Raises:
        ModelError: a header is malformed, a tensor lies outside its file, or a name stands twice.
    """
    found: dict[str, Entry] = {}
    for file in files:
        for entry in _header(file):
            if entry.name in found:
                raise ModelError(f"{entry.name} stands in two shards: {found[entry.name].file.name}, {file.name}")
            found[entry.name] = entry
    return dict(sorted(found.items()))


def _header(file: Path) -> Iterator[Entry]:
    total = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else total
        if length > min(total - 8, MAX_HEADER_BYTES):
            raise ModelError(f"{file} is not a safetensors file", hint="copy it again; a download may have stopped early")
        try:
            table = json.loads(f.read(length))
            rows = [(n, str(t["dtype"]), tuple(int(x) for x in t["shape"]), *map(int, t["data_offsets"]))
                    for n, t in table.items() if n != "__metadata__"]  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ModelError(f"{file} has a malformed header") from None
    for name, dtype, shape, begin, end in rows:
        size = math.prod(shape) * WIDTH.get(dtype, 0)
        if dtype not in WIDTH or end - begin != size or begin < 0 or 8 + length + end > total:
            raise ModelError(f"{file}: {name} does not fit its file", hint="copy it again; a download may have stopped early")
        yield Entry(name, dtype, shape, file, 8 + length + begin, size)


def chunks(entry: Entry) -> Iterator[bytes]:
    """The bytes of one tensor, row-major, a few MB at a time."""
    with entry.file.open("rb") as f:
        f.seek(entry.offset)
        left = entry.size
        while left:
            block = f.read(min(left, CHUNK_BYTES))
            if not block:
                raise ModelError(f"{entry.file} ended inside {entry.name}")
            left -= len(block)
            yield block


def write(file: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], produce: Callable[[str, BinaryIO], None]) -> None:
    """Writes a safetensors file tensor by tensor, so that only one is in memory.

    Args:
        file: to be written.
        tensors: (type, shape) by name.
        produce: writes the bytes of one tensor, row-major.

    Raises:
        ModelError: a tensor's bytes are more or fewer than its shape says.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in sorted(tensors.items()):
        size = math.prod(shape) * WIDTH[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        for name in sorted(tensors):
            produce(name, f)
            if f.tell() != 8 + len(header) + table[name]["data_offsets"][1]:
                raise ModelError(f"{name}: its bytes do not match its shape")


def file_digest(file: Path) -> str:
    """SHA-256 of a file, hex.

    Raises:
        ModelError: it cannot be read.
    """
    h = hashlib.sha256()
    try:
        with file.open("rb") as f:
            while block := f.read(CHUNK_BYTES):
                h.update(block)
    except OSError as e:
        raise ModelError(f"cannot read {file}: {e.strerror}") from None
    return h.hexdigest()


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name when it is complete.

    Raises:
        FileExistsError, OSError: the name has been taken meanwhile.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield made
        made.chmod(0o755)
        os.rename(made, directory)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise

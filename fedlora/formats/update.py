"""The payload: an update or a task as one packed blob. FORMAT.md, sections 2 to 4, is the specification.

No meaning is guessed from bytes: the receiver brings the layout, so that the size of a blob is known to the byte before
anything is allocated, and a digest at the end refuses every flipped bit even where nothing is signed.

    update  "FLUP" version dtype flags n | canonical JSON: counters, weight | int8: scales | values | SHA-256[:16]
    task    "FLTK" version dtype flags n | canonical JSON: run, round, ... | plan | layout | reply key | values
            flag 1: length | layout of the answer | SHA-256[:16]
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fedlora.core.adapter import F32, Adapter, Layout, Update
from fedlora.core.canonical import canonical, is_digest, parse_object
from fedlora.core.errors import WireError, WrongContext
from fedlora.core.grids import is_bfloat16, is_int8
from fedlora.core.limits import MAX_PLAN_BYTES
from fedlora.core.messages import Kind, Task
from fedlora.core.metrics import MAX_COUNTER, bad_counters
from fedlora.core.plan import Dtype
from fedlora.core.reader import Reader
from fedlora.formats.values import (
    Bytes,
    check_finite,
    dump_bfloat16,
    dump_float32,
    dump_int8,
    fill,
    parse_bfloat16,
    parse_float32,
    parse_int8,
)

DTYPES: Final = ("float32", "bfloat16", "int8")
"""Types that values may have on their way; the position is the code in the blob."""
VERSION: Final = 1
MAX_HEADER_BYTES: Final = 8192
"""Longest header of an update."""
MAX_COUNTERS: Final = 64
MAX_LAYOUT_BYTES: Final = 8 << 20
MAX_KEY_BYTES: Final = 4096
MAX_INTEGER: Final = MAX_COUNTER
"""Largest integer in a header: exact in every JSON parser."""

_UPDATE: Final = struct.Struct("<4sBBHQI")  # magic, version, dtype, flags, n, header bytes
_TASK: Final = struct.Struct("<4sBBHQIIII")  # magic, version, dtype, flags, n, bytes of head, plan, layout, key
_SENDS: Final = 1
_DIGEST: Final = 16
_MAX_TASK_HEAD: Final = 1024
_WIDTH: Final = (4, 2, 1)
_COUNTER: Final = re.compile(r"[a-z][a-z0-9_./-]{0,63}")


# --- updates ------------------------------------------------------------------------------------------------------


def blob_size(layout: Layout, dtype: str, *, header_bytes: int) -> int:
    """Exact size in bytes of an update of this layout, dtype and header length."""
    return _UPDATE.size + header_bytes + values_size(dtype, n=layout.size, rows=layout.rows()) + _DIGEST


def max_update_bytes(layout: Layout, *, dtype: str) -> int:
    """Most bytes that an update of this layout and dtype can have."""
    return blob_size(layout, dtype, header_bytes=MAX_HEADER_BYTES)


def dump_update(update: Update, layout: Layout, *, dtype: str) -> bytes:
    """Packs an update. One allocation, in the size of the result; scratch memory of about 2 MiB.

    Args:
        update: delta (n,) float32.
        layout: of the delta; says where rows end, for int8.
        dtype: of the values on their way, one of DTYPES. ``float32`` is exact. ``bfloat16`` rounds to nearest, ties to
            even: |x - x'| <= 2^-8 |x|, or 2^-134 below the normal range. ``int8`` is symmetric, -127 .. 127, with one
            float32 scale = max|row| / 127 a row (last axis): |x - x'| <= scale / 2, up to 2^-16 of it for the rounding of
            float32; a row whose scale would be below 2^-126 becomes zero.

    Raises:
        WrongContext (wrong-layout): the delta has not ``layout.size`` values.
        NonFiniteUpdate: NaN or infinity in the delta, or a value beyond what bfloat16 can hold.
        WireError: weight, or names, number or values of counters, out of range.
    """
    _check_delta(update, layout)
    code = _code(dtype)
    header = _dump_update_header(update)
    prefix = _UPDATE.pack(b"FLUP", VERSION, code, 0, layout.size, len(header))

    def write(out: Bytes) -> None:
        at = _put(out, 0, prefix, header)
        _dump_values(update.delta, layout, out[at:-_DIGEST], dtype=dtype)
        _put(out, out.size - _DIGEST, _digest(out[:-_DIGEST]))

    return fill(blob_size(layout, dtype, header_bytes=len(header)), write)


def update_parts(update: Update, layout: Layout) -> tuple[bytes | memoryview, ...]:
    """The parts whose sum is :func:`dump_update` with ``float32``. The values are those of the update itself, not a copy.

    Raises:
        WrongContext (wrong-layout), NonFiniteUpdate, WireError: as :func:`dump_update`.
    """
    if not np.little_endian or not update.delta.flags.c_contiguous:
        return (dump_update(update, layout, dtype="float32"),)
    _check_delta(update, layout)
    check_finite(update.delta, "the vector")
    header = _dump_update_header(update)
    head = _UPDATE.pack(b"FLUP", VERSION, _code("float32"), 0, layout.size, len(header)) + header
    values = update.delta.view(np.uint8).data
    digest = hashlib.sha256(head)
    digest.update(values)
    return head, values, digest.digest()[:_DIGEST]


def parse_update(blob: bytes | memoryview, layout: Layout, *, dtype: str | None = None) -> Update:
    """Inverse of :func:`dump_update`. Lengths are compared before anything is allocated, then the digest.

    Args:
        blob: the packed update.
        layout: of the delta, as the receiver knows it; never taken from the blob.
        dtype: refuse any other; None takes all of DTYPES.

    Returns:
        The update; its delta is a new (n,) float32 array.

    Raises:
        WireError (version-unsupported): another version of the format.
        WrongContext (wrong-layout): an intact blob with another number of values.
        NonFiniteUpdate: NaN or infinity among the values.
        WireError: anything else that is not exactly what :func:`dump_update` gives.
    """
    reader = Reader(blob, "update")
    magic, version, code, flags, n, header_bytes = reader.unpack(_UPDATE)
    _check_kind(magic, version, b"FLUP")
    if code >= len(DTYPES) or (dtype is not None and DTYPES[code] != dtype):
        raise WireError(f"values of type {code}, expected {dtype or 'one of ' + ', '.join(DTYPES)}")
    size = blob_size(layout, DTYPES[code], header_bytes=header_bytes)
    if header_bytes > MAX_HEADER_BYTES or len(blob) != size:
        raise WireError(f"{len(blob)} bytes, expected {size}: the blob says {n} values, the layout {layout.size}")
    _check_digest(blob)
    if flags:
        raise WireError("unknown flags")
    if n != layout.size:
        raise WrongContext(f"expected {layout.size} values, got {n}", code="wrong-layout")
    weight, counters = _parse_update_header(reader.take(header_bytes))
    values = _values(reader, reader.left - _DIGEST)
    return Update(_parse_values(values, layout, DTYPES[code], "the update"), weight, counters)


def _check_delta(update: Update, layout: Layout) -> None:
    if update.delta.dtype != np.float32:
        raise ValueError(f"a delta is float32, not {update.delta.dtype}")
    if update.delta.shape != (layout.size,):
        raise WrongContext(f"expected {layout.size} values, got {update.delta.shape}", code="wrong-layout")


def _dump_update_header(update: Update) -> bytes:
    weight = update.weight
    if not isinstance(weight, int | np.integer) or not 0 <= weight <= MAX_INTEGER:
        raise WireError(f"a weight is an integer from 0 to {MAX_INTEGER}, not {weight!r}")
    if len(update.counters) > MAX_COUNTERS or not all(_COUNTER.fullmatch(k) for k in update.counters):
        raise WireError(f"at most {MAX_COUNTERS} counters, named with a-z, 0-9 and _./-: {sorted(update.counters)[:8]}")
    if bad := bad_counters(update.counters):
        raise WireError(f"a counter is an integer from 0 to {MAX_COUNTER}: {', '.join(bad)}")
    return canonical({"counters": dict(update.counters), "weight": int(weight)})


def _parse_update_header(text: bytes) -> tuple[int, dict[str, int]]:
    head = _parse_head(text)
    if head.keys() != {"counters", "weight"} or not _is_integer(head["weight"]) or not isinstance(head["counters"], dict):
        raise WireError("the header has not exactly the fields counters and weight")
    counters: dict[str, int] = head["counters"]
    if len(counters) > MAX_COUNTERS:
        raise WireError(f"more than {MAX_COUNTERS} counters")
    if bad_counters(counters) or not all(_COUNTER.fullmatch(name) for name in counters):
        raise WireError(f"a counter is a plain name and an integer from 0 to {MAX_COUNTER}")
    return head["weight"], counters


# --- tasks --------------------------------------------------------------------------------------------------------


def dump_task(task: Task, *, reply_key: bytes) -> bytes:
    """Packs a task. The adapter travels exactly, in the smallest of DTYPES that holds it.

    Args:
        task: what a site has to do.
        reply_key: public key to which the answer is sealed; empty where nothing is sealed.

    Raises:
        NonFiniteUpdate: NaN or infinity in the adapter.
        WireError: a field out of range, or plan, layout or key longer than its limit.
    """
    fields = {"attempt": task.attempt, "base": task.base, "kind": task.kind, "round": task.round, "run": task.run}
    _check_task_head(fields)
    parts = (canonical(fields), task.plan, task.adapter.layout.dump(), reply_key)
    lengths = _check_lengths(tuple(len(p) for p in parts))
    layout, vector = task.adapter.layout, task.adapter.vector
    n, dtype = layout.size, _smallest(vector, layout)
    rows = struct.pack("<I", layout.rows()) if dtype == "int8" else b""
    size = values_size(dtype, n=n, rows=layout.rows())
    prefix = _TASK.pack(b"FLTK", VERSION, _code(dtype), _SENDS if task.sends is not None else 0, n, *lengths)
    sends = _dump_layout(task.sends)

    def write(out: Bytes) -> None:
        at = _put(out, 0, prefix, *parts, rows)
        _dump_values(vector, layout, out[at : at + size], dtype=dtype)
        _put(out, at + size, sends)
        _put(out, out.size - _DIGEST, _digest(out[:-_DIGEST]))

    return fill(_TASK.size + sum(lengths) + len(rows) + size + len(sends) + _DIGEST, write)


def parse_task(blob: bytes | memoryview, *, max_parameters: int) -> tuple[Task, bytes]:
    """Inverse of :func:`dump_task`. Lengths are compared before anything is allocated, then the digest.

    Args:
        blob: the packed task.
        max_parameters: most values that the adapter may have.

    Returns:
        The task, and the public key for the reply.

    Raises:
        WireError (version-unsupported): another version of the format.
        WrongContext (wrong-layout): the layout is not canonical, or has another size than the vector.
        NonFiniteUpdate: NaN or infinity in the adapter.
        WireError: anything else that is not exactly what :func:`dump_task` gives.
    """
    reader = Reader(blob, "task")
    magic, version, code, flags, n, *lengths = reader.unpack(_TASK)
    _check_kind(magic, version, b"FLTK")
    _check_lengths(tuple(lengths))
    if n > max_parameters:
        raise WireError(f"{n} values, this site takes at most {max_parameters}")
    if code >= len(DTYPES) or flags & ~_SENDS:
        raise WireError(f"unknown flags, or values of another type than {', '.join(DTYPES)}")
    parts, dtype = [reader.view(length) for length in lengths], DTYPES[code]
    rows = reader.number(4, order="little") if dtype == "int8" else 0
    values = _values(reader, values_size(dtype, n=n, rows=rows))
    sends_text = _sends(reader) if flags & _SENDS else b""
    if reader.left != _DIGEST:
        raise WireError(f"{len(blob)} bytes, expected {len(blob) - reader.left + _DIGEST}")
    _check_digest(blob)
    text, plan, layout_text, reply_key = (bytes(part) for part in parts)
    head = _check_task_head(_parse_head(text))
    layout = Layout.parse(layout_text)
    if layout.size != n:
        raise WrongContext(f"the layout has {layout.size} values, the vector {n}", code="wrong-layout")
    if dtype == "int8" and layout.rows() != rows:
        raise WrongContext(f"the layout has {layout.rows()} rows, the vector {rows}", code="wrong-layout")
    vector = _parse_values(values, layout, dtype, "the adapter")
    if _smallest(vector, layout) != dtype or not _written_again(values, vector, layout, dtype):
        raise WireError("a smaller type holds these values, or other scales do: there is one spelling of a task")
    sends = Layout.parse(sends_text) if sends_text else None
    if sends == layout:
        raise WrongContext("the layout of the answer is that of its task and must be left out", code="wrong-layout")
    kind: Kind = "train" if head["kind"] == "train" else "evaluate"
    task = Task(head["run"], plan, head["base"], kind, head["round"], head["attempt"], Adapter(vector, layout), sends)
    return task, reply_key


def _dump_layout(layout: Layout | None) -> bytes:
    if layout is None:
        return b""
    text = layout.dump()
    if len(text) > MAX_LAYOUT_BYTES:
        raise WireError(f"layout of {len(text)} bytes, at most {MAX_LAYOUT_BYTES}")
    return struct.pack("<I", len(text)) + text


def _sends(reader: Reader) -> bytes:
    """The text of the layout that the flag announces. Its length is compared before anything is copied."""
    length = reader.number(4, order="little")
    if not 0 < length <= MAX_LAYOUT_BYTES:
        raise WireError(f"layout of {length} bytes, at most {MAX_LAYOUT_BYTES}")
    return reader.take(length)


def _check_task_head(head: Mapping[str, Any]) -> Mapping[str, Any]:
    if head.keys() != {"attempt", "base", "kind", "round", "run"}:
        raise WireError("a task has exactly the fields attempt, base, kind, round and run")
    if not all(isinstance(head[k], str) and is_digest(head[k]) for k in ("base", "run")):
        raise WireError("base and run are 64 hex digits each")
    if head["kind"] not in ("train", "evaluate"):
        raise WireError("kind is train or evaluate")
    if not _is_integer(head["attempt"]) or not _is_integer(head["round"]) or head["round"] < 1:
        raise WireError("round counts from 1, attempt from 0")
    return head


def _check_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    limits = (_MAX_TASK_HEAD, MAX_PLAN_BYTES, MAX_LAYOUT_BYTES, MAX_KEY_BYTES)
    for what, length, limit in zip(("head", "plan", "layout", "reply key"), lengths, limits, strict=True):
        if length > limit:
            raise WireError(f"{what} of {length} bytes, at most {limit}")
    return lengths


# --- what both share ------------------------------------------------------------------------------------------------


def _parse_head(text: bytes) -> dict[str, Any]:
    try:
        return parse_object(text)
    except ValueError:
        raise WireError("not a canonical JSON object") from None


def _code(dtype: str) -> int:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES.index(dtype)


def _is_integer(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def _check_kind(magic: bytes, version: int, expected: bytes) -> None:
    if magic != expected:
        raise WireError(f"not a {expected.decode()} blob")
    if version != VERSION:
        raise WireError(f"{expected.decode()} version {version}, this one reads {VERSION}", code="version-unsupported")


def values_size(dtype: str, *, n: int, rows: int) -> int:
    """Bytes of n values in so many rows, with the scales of int8."""
    return (4 * rows if dtype == "int8" else 0) + _WIDTH[_code(dtype)] * n


def _dump_values(vector: F32, layout: Layout, out: Bytes, *, dtype: str) -> None:
    if dtype == "int8":
        scales = 4 * layout.rows()
        dump_int8(vector, layout, out[:scales], out[scales:].view(np.int8))
    elif dtype == "bfloat16":
        dump_bfloat16(vector, out)
    else:
        dump_float32(vector, out)


def _parse_values(raw: Bytes, layout: Layout, dtype: str, what: str) -> F32:
    """The values of a vector of this layout, a new (n,) float32 array."""
    vector = np.empty(layout.size, np.float32)
    if dtype == "int8":
        scales = 4 * layout.rows()
        parse_int8(raw[:scales], raw[scales:].view(np.int8), layout, vector)
    elif dtype == "bfloat16":
        parse_bfloat16(raw, vector, what)
    else:
        parse_float32(raw, vector, what)
    return vector


def _written_again(raw: Bytes, vector: F32, layout: Layout, dtype: str) -> bool:
    """Whether these are the bytes that the vector is written as. Only int8 has others: any number under a scale of zero."""
    if dtype != "int8":
        return True
    again = np.empty(raw.size, np.uint8)
    _dump_values(vector, layout, again, dtype=dtype)
    return np.array_equal(again, raw)


def _smallest(vector: F32, layout: Layout) -> Dtype:
    """The smallest type that holds every value exactly."""
    if is_int8(vector, layout):
        return "int8"
    return "bfloat16" if is_bfloat16(vector) else "float32"


def _digest(body: Bytes) -> bytes:
    return hashlib.sha256(body.data).digest()[:_DIGEST]


def _check_digest(blob: bytes | memoryview) -> None:
    if _digest(np.frombuffer(blob, np.uint8)[:-_DIGEST]) != blob[-_DIGEST:]:
        raise WireError("the digest at the end does not fit: the bytes have changed")


def _values(reader: Reader, size: int) -> Bytes:
    """The next bytes, not copied."""
    return np.frombuffer(reader.view(size), np.uint8)


def _put(out: Bytes, at: int, *parts: bytes) -> int:
    for part in parts:
        out[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    return at

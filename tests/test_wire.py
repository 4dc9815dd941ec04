"""Updates and tasks survive their bytes within the documented bounds; everything else is refused by name, in little memory."""

import hashlib
import json
import math
import struct
import tracemalloc
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from raising import raising
from vectors.make import HERE, read_vector

from fedlora.core.adapter import Adapter, Layout, Update
from fedlora.core.canonical import canonical
from fedlora.core.errors import FedLoRAError, NonFiniteUpdate, WireError, WrongContext
from fedlora.core.messages import Task
from fedlora.formats import update as wire

SMALL = Layout.of({"m.lora_A.weight": (2, 3), "m.lora_B.weight": (4, 2)})
COUNTERS = {"eval/nats": 81920}
MAX = float(np.finfo(np.float32).max)


def update(values=None, *, weight=3, counters=COUNTERS) -> Update:
    return Update(np.asarray(range(14) if values is None else values, np.float32), weight, counters)


def task(layout=SMALL) -> Task:
    vector = np.linspace(-1, 1, layout.size, dtype=np.float32)
    return Task("1" * 64, b'{"example":true}', "2" * 64, "train", 1, 0, Adapter(vector, layout))


UPDATES = {dtype: wire.dump_update(update(), SMALL, dtype=dtype) for dtype in wire.DTYPES}
TASK = wire.dump_task(task(), reply_key=b"key")


def parse_task(blob):
    return wire.parse_task(blob, max_parameters=1 << 20)


def parse_update(blob):
    return wire.parse_update(blob, SMALL)


# --- round trips ----------------------------------------------------------------------------------------------------

shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)
layouts = shapes.map(lambda s: Layout.of({f"t{i}": shape for i, shape in enumerate(s)}))
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
counters = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_./-]{0,63}", fullmatch=True), st.integers(0, wire.MAX_INTEGER), max_size=5
)


@st.composite
def updates(draw, values=finite):
    layout = draw(layouts)
    delta = draw(hnp.arrays(np.float32, layout.size, elements=values))
    return layout, Update(delta, draw(st.integers(0, wire.MAX_INTEGER)), draw(counters))


def bits(vector) -> bytes:
    return np.asarray(vector, "<f4").tobytes()


def there_and_back(layout, sent, dtype):
    blob = wire.dump_update(sent, layout, dtype=dtype)
    got = wire.parse_update(blob, layout, dtype=dtype)
    assert (got.weight, got.counters) == (sent.weight, sent.counters)
    assert wire.dump_update(got, layout, dtype=dtype) == blob  # rounding a second time changes nothing
    assert len(blob) <= wire.max_update_bytes(layout, dtype=dtype)
    return blob, got.delta


@given(updates())
@settings(max_examples=100, deadline=None)
def test_float32_arrives_bit_for_bit(made):
    layout, sent = made
    _, delta = there_and_back(layout, sent, "float32")
    assert bits(delta) == bits(sent.delta)


@given(updates(st.floats(-(2.0**127), 2.0**127, width=32)))
@settings(max_examples=100, deadline=None)
def test_bfloat16_is_within_its_bound(made):
    layout, sent = made
    _, delta = there_and_back(layout, sent, "bfloat16")
    x = sent.delta.astype(np.float64)
    assert (np.abs(x - delta) <= np.where(np.abs(x) < 2.0**-126, 2.0**-134, 2.0**-8 * np.abs(x))).all()


def rows_of(layout):
    at = 0
    for _, shape in layout.entries:
        for _ in range(math.prod(shape[:-1])):
            yield slice(at, at + shape[-1])
            at += shape[-1]


@given(updates())
@example((Layout.of({"t": (1, 2)}), Update(np.array([MAX, -MAX], np.float32), 0, {})))
@example((Layout.of({"t": (2, 2)}), Update(np.array([1e-38, 127 * 2.0**-126, 2e-36, 1.4e-45], np.float32), 0, {})))
@settings(max_examples=150, deadline=None)
def test_int8_is_within_its_bound(made):
    layout, sent = made
    blob, delta = there_and_back(layout, sent, "int8")
    start = 20 + struct.unpack_from("<I", blob, 16)[0]
    for row, at in enumerate(rows_of(layout)):
        scale = struct.unpack_from("<f", blob, start + 4 * row)[0]
        x = sent.delta[at].astype(np.float64)
        bound = (0.5 + 2.0**-16) * scale if scale else 2.0**-119
        assert (np.abs(x - delta[at]) <= bound).all()
        assert scale == 0 or 2.0**-126 <= scale <= np.abs(x).max() / 127 * (1 + 2.0**-23)


def test_the_largest_int8_scale_is_taken_and_gives_a_finite_value():
    layout = Layout.of({"t": (1, 2)})
    blob = wire.dump_update(update([MAX, -MAX]), layout, dtype="int8")
    assert blob[-22:-18] == bytes.fromhex("0302017c")  # FORMAT.md, section 2: S
    assert np.abs(wire.parse_update(blob, layout).delta) == pytest.approx([MAX, MAX], rel=1e-6)


def test_int8_rows_longer_than_a_block_are_one_row():
    layout = Layout.of({"long": ((1 << 18) + 3,), "short": (2, 2)})
    values = np.zeros(layout.size, np.float32)
    values[[0, (1 << 18) + 2]] = 1, 127  # both ends of the long row, in two blocks
    delta = wire.parse_update(wire.dump_update(update(values), layout, dtype="int8"), layout).delta
    assert delta[[0, (1 << 18) + 2]].tolist() == [1, 127]
    assert np.count_nonzero(delta) == 2


@pytest.mark.parametrize(
    ("x", "expected"), [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (2.0**-134, 0.0), (3 * 2.0**-134, 2.0**-132)]
)
def test_bfloat16_ties_go_to_even(x, expected):
    layout = Layout.of({"t": (1,)})
    assert wire.parse_update(wire.dump_update(update([x]), layout, dtype="bfloat16"), layout).delta.tolist() == [expected]


@given(layouts, st.integers(1, 9), st.binary(max_size=50), st.sampled_from(["train", "evaluate"]), st.data())
@settings(max_examples=60, deadline=None)
def test_a_task_arrives_bit_for_bit(layout, round_, key, kind, data):
    vector = data.draw(hnp.arrays(np.float32, layout.size, elements=finite))
    sent = Task("1" * 64, data.draw(st.binary(max_size=99)), "2" * 64, kind, round_, 7, Adapter(vector, layout))
    blob = wire.dump_task(sent, reply_key=key)
    got, got_key = parse_task(blob)
    assert (got.run, got.plan, got.base, got.kind, got.round, got.attempt) == ("1" * 64, sent.plan, "2" * 64, kind, round_, 7)
    assert got.adapter.digest() == sent.adapter.digest()
    assert got_key == key
    assert wire.dump_task(got, reply_key=got_key) == blob


# --- what may not be sent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", wire.DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 13])
def test_what_is_not_finite_does_not_leave(dtype, value, at):
    values = [1.0] * 14
    values[at] = value
    with pytest.raises(NonFiniteUpdate):
        wire.dump_update(update(values), SMALL, dtype=dtype)


def test_what_bfloat16_cannot_hold_does_not_leave():
    with pytest.raises(NonFiniteUpdate, match="bfloat16"):
        wire.dump_update(update([MAX] * 14), SMALL, dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"weight": -1}, WireError),
        ({"weight": 1 << 53}, WireError),
        ({"weight": 1.0}, WireError),
        ({"counters": {"Nats": 1}}, WireError),
        ({"counters": {f"m{i}": 1 for i in range(65)}}, WireError),
        ({"counters": {"nats": 1 << 53}}, WireError),
        ({"counters": {"nats": -1}}, WireError),
        ({"counters": {"nats": 1.0}}, WireError),
        ({"counters": {"nats": True}}, WireError),
        ({"values": range(13)}, WrongContext),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(changes, error):
    with pytest.raises(error):
        wire.dump_update(update(**changes), SMALL, dtype="float32")


# --- damage -----------------------------------------------------------------------------------------------------------

SMALL_BLOBS = [*((parse_update, blob) for blob in UPDATES.values()), (parse_task, TASK)]
NAMES = [*wire.DTYPES, "task"]


@pytest.mark.parametrize(("parse", "blob"), SMALL_BLOBS, ids=NAMES)
def test_every_truncation_is_refused(parse, blob):
    parse(blob)
    for end in range(len(blob)):
        with pytest.raises(FedLoRAError):
            parse(blob[:end])


@pytest.mark.parametrize(("parse", "blob"), SMALL_BLOBS, ids=NAMES)
def test_every_flipped_bit_is_refused(parse, blob):
    for bit in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FedLoRAError):
            parse(bytes(flipped))


@pytest.mark.parametrize(("parse", "blob"), SMALL_BLOBS, ids=NAMES)
def test_a_flipped_bit_under_a_right_digest_ends_in_no_other_error(parse, blob):
    """The digest is no secret: who changes a bit can make it fit. The reader then takes the blob or names what is wrong."""
    for bit in range(8 * (len(blob) - 16)):
        body = bytearray(blob[:-16])
        body[bit // 8] ^= 1 << bit % 8
        with suppress(FedLoRAError):
            parse(rehash(bytes(body)))


def rehash(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()[:16]


# --- junk, and memory ---------------------------------------------------------------------------------------------------


@contextmanager
def at_most(size_bytes: int):
    """No more than this is allocated at any one time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size_bytes
    finally:
        tracemalloc.stop()


prefixes = {
    parse_update: [b"", b"FLUP", b"FLUP\1\0\0\0" + struct.pack("<Q", 14), UPDATES["int8"][:40]],
    parse_task: [b"", b"FLTK", b"FLTK\1\0\0\0" + struct.pack("<Q", 14), TASK[:40]],
}


@pytest.mark.parametrize("parse", prefixes, ids=["update", "task"])
@given(junk=st.binary(max_size=600), digest=st.booleans())
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused_by_name(parse, junk, digest):
    for start in prefixes[parse]:
        blob = start + junk
        with pytest.raises(FedLoRAError):
            parse(rehash(blob) if digest else blob)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["weight", "counters", "a", "round"]), inner),
    max_leaves=8,
)


@given(json_values | st.fixed_dictionaries({"weight": json_values, "counters": json_values}))
@settings(max_examples=150, deadline=None)
def test_a_header_of_anything_is_refused_by_name(value):
    old = struct.unpack_from("<I", UPDATES["float32"], 16)[0]
    text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    body = UPDATES["float32"][:16] + struct.pack("<I", len(text)) + text + UPDATES["float32"][20 + old : -16]
    with suppress(FedLoRAError):
        assert canonical({"counters": {}, "weight": parse_update(rehash(body)).weight}) == text  # a valid one by chance


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_numbers_of_the_prefix_that_lie_allocate_nothing(data):
    """Every number in a prefix, alone or with others, at any value: refused or harmless, in less than 256 KiB."""
    parse, blob, numbers = data.draw(
        st.sampled_from(
            [
                (parse_update, UPDATES["int8"], (("<Q", 8), ("<I", 16))),
                (parse_task, TASK, (("<Q", 8), *(("<I", 16 + 4 * i) for i in range(4)))),
            ]
        )
    )
    changed = bytearray(blob[:-16])
    for form, at in numbers:
        largest = (1 << 8 * struct.calcsize(form)) - 1
        if data.draw(st.booleans()):
            value = data.draw(st.integers(0, largest) | st.sampled_from([0, 13, 15, 1 << 20, largest]) | st.integers(0, 8192))
            struct.pack_into(form, changed, at, value)
    lying = rehash(bytes(changed))
    with at_most(256 << 10), suppress(FedLoRAError):
        parse(lying)


@pytest.mark.parametrize("n", [1 << 20, 1 << 31, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize(("parse", "blob"), SMALL_BLOBS, ids=NAMES)
def test_a_claim_of_many_values_allocates_nothing(parse, blob, n):
    lying = rehash(blob[:8] + struct.pack("<Q", n) + blob[16:-16])
    with at_most(1 << 20), pytest.raises(FedLoRAError):
        parse(lying)


@pytest.mark.parametrize(
    "text", [b'[["a",[2147483648]]]', b'[["a",[14,1000000000,1000000000]]]', b'[["a",[1e400]]]', b"[" * 60_000]
)
def test_a_layout_that_lies_allocates_nothing(text):
    head = struct.unpack_from("<4I", TASK, 16)
    start = 32 + head[0] + head[1]
    body = TASK[:16] + struct.pack("<4I", head[0], head[1], len(text), head[3])
    body += TASK[32:start] + text + TASK[start + head[2] : -16]
    with at_most(1 << 20), raising(WrongContext, code="wrong-layout"):
        parse_task(rehash(body))


def test_packing_and_unpacking_need_little_more_than_the_result():
    layout = Layout.of({"t": (1024, 1024)})
    sent = update(np.ones(layout.size))
    for dtype, width in zip(wire.DTYPES, (4, 2, 1), strict=True):
        with at_most(width * layout.size + (4 << 20)):
            blob = wire.dump_update(sent, layout, dtype=dtype)
        with at_most(4 * layout.size + (3 << 20)):
            wire.parse_update(blob, layout)


# --- a second reader, from FORMAT.md alone: struct, json, hashlib, and Python's own numbers --------------------------------


def f32(x: float) -> float:
    """Rounds to binary32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def independent_update(blob: bytes, layout: list) -> tuple[int, dict, list]:
    """FORMAT.md, section 2: weight, counters, values."""
    magic, version, dtype, flags, n, header_len = struct.unpack_from("<4sBBHQI", blob)
    assert (magic, version, flags) == (b"FLUP", 1, 0)
    assert hashlib.sha256(blob[:-16]).digest()[:16] == blob[-16:]
    head = json.loads(blob[20 : 20 + header_len])
    assert json.dumps(head, sort_keys=True, separators=(",", ":")).encode() == blob[20 : 20 + header_len]
    widths = [shape[-1] for _, shape in layout for _ in range(math.prod(shape[:-1]))]
    assert sum(widths) == n
    at = 20 + header_len
    if dtype == 0:
        values = list(struct.unpack_from(f"<{n}f", blob, at))
    elif dtype == 1:
        values = [struct.unpack("<f", struct.pack("<I", h << 16))[0] for h in struct.unpack_from(f"<{n}H", blob, at)]
    else:
        scales = struct.unpack_from(f"<{len(widths)}f", blob, at)
        q = struct.unpack_from(f"<{n}b", blob, at + 4 * len(widths))
        each = [s for s, width in zip(scales, widths, strict=True) for _ in range(width)]
        values = [f32(i * s) if i else 0.0 for i, s in zip(q, each, strict=True)]
    size = (0 if dtype < 2 else 4 * len(widths)) + (4, 2, 1)[dtype] * n
    assert len(blob) == at + size + 16
    return head["weight"], head["counters"], values


def independent_dump(values: list, layout: list, *, dtype: int, weight: int, counters: dict) -> bytes:
    """FORMAT.md, section 2, the other way."""
    said = {"counters": counters, "weight": weight}
    text = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    body = struct.pack("<4sBBHQI", b"FLUP", 1, dtype, 0, len(values), len(text)) + text
    if dtype == 0:
        return rehash(body + struct.pack(f"<{len(values)}f", *values))
    if dtype == 1:
        words = [struct.unpack("<I", struct.pack("<f", x))[0] for x in values]
        return rehash(body + struct.pack(f"<{len(values)}H", *((u + 0x7FFF + (u >> 16 & 1)) >> 16 for u in words)))
    largest = struct.unpack("<f", bytes.fromhex("0302017c"))[0]  # the largest binary32 below FLT_MAX / 127
    assert largest < MAX / 127
    scales, q, at = b"", b"", 0
    for _, shape in layout:
        for _ in range(math.prod(shape[:-1])):
            row = values[at : at + shape[-1]]
            at += shape[-1]
            scale = min(f32(max(abs(x) for x in row) / 127), largest)
            scale = scale if scale >= 2.0**-126 else 0.0
            scales += struct.pack("<f", scale)
            q += bytes((round(f32(x / scale)) if scale else 0) & 0xFF for x in row)
    return rehash(body + scales + q)


def independent_task(blob: bytes) -> dict:
    """FORMAT.md, section 3."""
    magic, version, dtype, flags, n, *lengths = struct.unpack_from("<4sBBHQIIII", blob)
    assert (magic, version) == (b"FLTK", 1)
    assert dtype < 3
    assert flags < 2
    assert hashlib.sha256(blob[:-16]).digest()[:16] == blob[-16:]
    parts, at = [], 32
    for length in lengths:
        parts.append(blob[at : at + length])
        at += length
    head, plan, layout, key = parts
    assert json.dumps(json.loads(layout), separators=(",", ":")).encode() == layout
    assert sum(math.prod(shape) for _, shape in json.loads(layout)) == n
    if dtype == 2:
        (rows,) = struct.unpack_from("<I", blob, at)
        widths = [shape[-1] for _, shape in json.loads(layout) for _ in range(math.prod(shape[:-1]))]
        assert rows == len(widths)
        scales, at = struct.unpack_from(f"<{rows}f", blob, at + 4), at + 4 + 4 * rows
        each = [s for s, width in zip(scales, widths, strict=True) for _ in range(width)]
        values = b"".join(struct.pack("<f", q * s) for q, s in zip(struct.unpack_from(f"<{n}b", blob, at), each, strict=True))
    elif dtype == 1:
        values = b"".join(b"\0\0" + blob[i : i + 2] for i in range(at, at + 2 * n, 2))
    else:
        values = blob[at : at + 4 * n]
    width = (4, 2, 1)[dtype]
    adapter = hashlib.sha256(hashlib.sha256(layout).digest() + values).hexdigest()
    found, end = {"sends": None}, at + width * n
    if flags & 1:
        (size,) = struct.unpack_from("<I", blob, end)
        found["sends"], end = blob[end + 4 : end + 4 + size], end + 4 + size
    assert len(blob) == end + 16
    return {
        **json.loads(head),
        **found,
        "plan": plan,
        "layout": layout,
        "key": key,
        "adapter": adapter,
        "values": struct.unpack(f"<{n}f", values),
    }


@pytest.mark.parametrize("path", sorted((HERE / "update").glob("valid_*.txt")), ids=lambda p: p.stem)
def test_a_reader_and_writer_made_from_the_specification_agree_on_updates(path):
    head, blob = read_vector(path)
    layout = json.loads(head["layout"])
    weight, numbers, values = independent_update(blob, layout)
    ours = wire.parse_update(blob, Layout.parse(head["layout"].encode()))
    assert (weight, numbers) == (ours.weight, ours.counters)
    assert struct.pack(f"<{len(values)}f", *values) == ours.delta.astype("<f4").tobytes()
    assert independent_dump(values, layout, dtype=blob[5], weight=weight, counters=numbers) == blob


@pytest.mark.parametrize("path", sorted((HERE / "task").glob("valid_*.txt")), ids=lambda p: p.stem)
def test_a_reader_made_from_the_specification_agrees_on_tasks(path):
    _, blob = read_vector(path)
    theirs, (ours, key) = independent_task(blob), parse_task(blob)
    said = (theirs["run"], theirs["base"], theirs["kind"], theirs["round"], theirs["attempt"], theirs["plan"], theirs["key"])
    assert said == (ours.run, ours.base, ours.kind, ours.round, ours.attempt, ours.plan, key)
    assert theirs["layout"] == ours.adapter.layout.dump()
    assert theirs["adapter"] == ours.adapter.digest()
    assert list(theirs["values"]) == ours.adapter.vector.tolist()
    assert theirs["sends"] == (ours.sends.dump() if ours.sends else None)


@given(updates(st.floats(-(2.0**127), 2.0**127, width=32)), st.sampled_from(wire.DTYPES))
@settings(max_examples=100, deadline=None)
def test_a_writer_made_from_the_specification_gives_the_same_bytes(made, dtype):
    layout, sent = made
    entries, code = json.loads(layout.dump()), wire.DTYPES.index(dtype)
    theirs = independent_dump(sent.delta.tolist(), entries, dtype=code, weight=sent.weight, counters=dict(sent.counters))
    assert theirs == wire.dump_update(sent, layout, dtype=dtype)

"""One reader of bytes and one canonical JSON: whatever comes, it is what a writer writes, or an error with a name."""

import json
import struct
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora.core.canonical import canonical, parse_canonical
from fedlora.core.errors import StoreError, WireError
from fedlora.core.reader import Reader

TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too: FORMAT.md 1.2 takes them as what they are
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(st.none() | st.booleans() | NUMBERS | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x), max_leaves=12)


def old_plan(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def old_header(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def old_layout(value):
    return json.dumps(value, separators=(",", ":")).encode()


@given(JSON)
def test_canonical_json_is_what_each_of_the_four_writers_before_it_wrote(value):
    assert canonical(value) == old_plan(value) == old_header(value)


@given(st.lists(st.tuples(TEXT, st.lists(st.integers()))))
def test_a_layout_is_written_as_before(rows):
    assert canonical([[n, list(s)] for n, s in rows]) == old_layout([[n, list(s)] for n, s in rows])


@given(JSON)
def test_what_was_written_is_read_again(value):
    assert canonical(parse_canonical(canonical(value))) == canonical(value)
    assert parse_canonical(canonical(value)) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), [{"a": float("nan")}]])
def test_what_json_has_no_number_for_is_not_written(value):
    with pytest.raises(ValueError):
        canonical(value)


@pytest.mark.parametrize(
    "text",
    [b"", b" {}", b"{} ", b'{"a":1,"a":1}', b'{"a":1,"a":2}', b'{"b":1,"a":1}', b"NaN", b"Infinity", b"[1,NaN]", b"1e999", b"-0",
     b"01", b"+1", b"1.0e0", b"1E5", b'"\\u0041"', b'"\\/"', "\"é\"".encode(), b'"\\u00E9"', b'"\\ud83d', b"[" * 100_000,
     b"1" * 5000, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"'a'", b"[1,]", b"{}{}"],
    ids=lambda t: repr(t[:20]),
)  # fmt: skip
def test_another_spelling_is_refused(text):
    with pytest.raises(ValueError, match="not canonical JSON"):
        parse_canonical(text)


@given(st.binary(max_size=64) | JSON.map(lambda v: json.dumps(v).encode()))
@example(b'"\\ud800"')
@example(b"1.5")
def test_whatever_is_read_is_written_as_the_same_bytes(text):
    with suppress(ValueError):
        assert canonical(parse_canonical(text)) == text


FORM = struct.Struct(">HQ")
STEPS = st.one_of(
    st.tuples(st.just("take"), st.integers(-3, 80)),
    st.tuples(st.just("view"), st.integers(-3, 80)),
    st.tuples(st.just("number"), st.integers(1, 9)),
    st.tuples(st.just("unpack"), st.just(10)),
    st.tuples(st.just("take"), st.integers(1 << 31, 1 << 70)),  # an announced length, nothing of which is allocated
)


def one(reader, step, size):
    if step == "number":
        return reader.number(size).to_bytes(size, "big")
    if step == "unpack":
        return FORM.pack(*reader.unpack(FORM))
    found = getattr(reader, step)(size)
    assert len(found) == size
    return bytes(found)


@example(b"abc", [("take", 1), ("take", -1)], WireError)
@example(b"abc", [("take", 4)], StoreError)
@example(b"abc", [("take", 1 << 70)], WireError)
@given(st.binary(max_size=64), st.lists(STEPS, max_size=8), st.sampled_from([WireError, StoreError]))
def test_a_reader_gives_the_bytes_in_their_order_or_the_named_error(blob, steps, error):
    """Never an IndexError, a struct.error or a MemoryError; what was given are the first bytes; ``end`` says what is left."""
    reader, given_out = Reader(blob, "test", error=error), b""
    for step, size in steps:
        if size < 0 or size > len(blob) - len(given_out):
            with pytest.raises(error, match="test: cut short"):
                one(reader, step, size)
        else:
            given_out += one(reader, step, size)
    assert blob.startswith(given_out)
    assert reader.left == len(blob) - len(given_out)
    if reader.left:
        with pytest.raises(error, match="bytes too many"):
            reader.end()
    assert reader.rest() == blob[len(given_out) :]
    reader.end()


def test_a_view_shares_the_memory_and_numbers_have_an_order():
    blob = bytearray(b"\1\0abc")
    reader = Reader(memoryview(blob), "test")
    assert Reader(blob, "test").number() == 256
    assert reader.number(order="little") == 1
    view = reader.view(3)
    blob[2:] = b"xyz"
    assert view == b"xyz"

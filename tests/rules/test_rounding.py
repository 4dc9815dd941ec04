"""Adapters travel in one or two bytes a value, and nothing of any update is lost by it."""

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Layout, Update
from fedlora.core.errors import NonFiniteUpdate
from fedlora.core.grids import is_bfloat16, is_int8, to_bfloat16, to_int8
from fedlora.formats.update import dump_update, parse_update
from fedlora.rules import add, rounded
from fedlora.rules.first import first_adapter

LAYOUT = Layout.of({"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2)})
numbers = st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=40)


@given(numbers)
@settings(max_examples=200)
def test_rounding_is_that_of_bfloat16_and_goes_no_further(values):
    vector = np.array(values, np.float32)
    found = to_bfloat16(vector)
    bits = struct.unpack(f"<{vector.size}I", vector.tobytes())  # FORMAT.md, section 2
    assert found.tobytes() == struct.pack(f"<{vector.size}I", *((u + 0x7FFF + ((u >> 16) & 1)) >> 16 << 16 for u in bits))
    assert is_bfloat16(found)
    assert to_bfloat16(found).tobytes() == found.tobytes()
    assert is_bfloat16(vector) == (found.tobytes() == vector.tobytes())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_bfloat16_cannot_hold_is_refused(value):
    with pytest.raises(NonFiniteUpdate):
        to_bfloat16(np.array([1, value], np.float32))


@given(st.lists(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=5, max_size=5), min_size=1, max_size=6))
@settings(max_examples=200)
def test_a_row_becomes_whole_multiples_of_its_largest_value_through_127_and_stays_so(rows):
    layout, vector = Layout.of({"m": (len(rows), 5)}), np.array(rows, np.float32).reshape(-1)
    found = to_int8(vector, layout)
    assert is_int8(found, layout)
    assert to_int8(found, layout).tobytes() == found.tobytes()
    assert is_int8(vector, layout) == (wire_of(vector, layout).tobytes() == vector.tobytes())
    wide = vector.reshape(-1, 5).astype(np.float64)
    scale = np.abs(wide).max(axis=1, keepdims=True) / 127
    assert (np.abs(found.reshape(-1, 5) - wide) <= np.where(scale < 2.0**-126, 127 * scale, 0.5001 * scale)).all()


def test_of_a_hundred_thousand_rows_none_changes_when_it_is_rounded_again():
    layout = Layout.of({"m": (100_000, 3)})
    found = to_int8(np.random.default_rng(0).normal(size=layout.size).astype(np.float32), layout)
    assert is_int8(found, layout)
    assert to_int8(found, layout).tobytes() == found.tobytes()


def wire_of(vector, layout):
    """As an update would carry it."""
    return parse_update(dump_update(Update(vector, 1, {}), layout, dtype="int8"), layout).delta


both = pytest.mark.parametrize("dtype", ["bfloat16", "int8"])


@both
@given(st.integers(0, 2**32), st.floats(-12, -4), st.integers(1, 60))
@example(142060, -4.0, 21)  # a value far below its row's unit
@settings(max_examples=60)
def test_no_update_is_lost_however_small_and_however_many(dtype, seed, size, rounds):
    """The adapter is always within one rounding of the sum of all updates, and what is left is the exact difference."""
    rng, now, state = np.random.default_rng(seed), first_adapter(LAYOUT, seed=seed), {}
    exact, ahead = now.vector.astype(np.float64), rng.normal(size=LAYOUT.size)  # all updates point the same way
    apart = np.zeros(LAYOUT.size)  # at most, by the float32 additions so far: two a round, each of values of about this size
    for _ in range(rounds):
        step = Adapter((10**size * (ahead + 0.1 * rng.normal(size=LAYOUT.size))).astype(np.float32), LAYOUT)
        now, state = rounded(add(now, step), state, sent=LAYOUT, dtype=dtype)
        exact += step.vector
        assert is_bfloat16(now.vector) if dtype == "bfloat16" else is_int8(now.vector, LAYOUT)
        unit = 2.0**-8 * np.abs(exact) if dtype == "bfloat16" else np.abs(exact).max() / 253
        apart += 2 * 2.0**-24 * (np.abs(exact) + np.abs(step.vector) + unit) + 1e-14
        assert (np.abs(now.vector + state["rounding"].vector.astype(np.float64) - exact) <= apart).all()
        assert (np.abs(now.vector - exact) <= unit + apart).all()


@both
@given(st.integers(0, 2**32))
@settings(max_examples=40)
def test_a_tensor_that_rests_keeps_its_bits(dtype, seed):
    rng, state = np.random.default_rng(seed), {}
    now, state = rounded(first_adapter(LAYOUT, seed=seed), state, sent=LAYOUT, dtype=dtype)
    for factor in "ABABA":
        part = LAYOUT.only(factor)
        step = Adapter(rng.normal(scale=1e-3, size=part.size).astype(np.float32), part)
        rests = LAYOUT.only("B" if factor == "A" else "A")
        before = now.part(rests).vector.tobytes()
        now, state = rounded(add(now, step), state, sent=LAYOUT, dtype=dtype)
        assert now.part(rests).vector.tobytes() == before


@both
def test_what_does_not_travel_is_not_rounded(dtype):
    """Sites have that factor from the seed: another one at the server would be another adapter than theirs."""
    start, sent = first_adapter(LAYOUT, seed=1), LAYOUT.only("B")
    step = Adapter(np.full(sent.size, 0.1, np.float32), sent)
    now, state = rounded(add(start, step), {}, sent=sent, dtype=dtype)
    assert now.part(LAYOUT.only("A")).vector.tobytes() == start.part(LAYOUT.only("A")).vector.tobytes()
    assert state["rounding"].layout == sent


def test_what_travels_exactly_is_not_rounded():
    start = Adapter(np.full(LAYOUT.size, 0.1, np.float32), LAYOUT)
    now, state = rounded(start, {}, sent=LAYOUT, dtype="float32")
    assert (now.vector.tobytes(), state) == (start.vector.tobytes(), {})


def test_the_first_adapter_is_one_that_travels_in_two_bytes():
    assert all(is_bfloat16(first_adapter(LAYOUT, seed=seed).vector) for seed in range(20))

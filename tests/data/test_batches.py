"""Packing and its cursor: laws over random example lengths, and batches one can check by hand."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.data import IGNORE, Cursor, Stream, Tokens, by_rows, in_order, regroup, shard


def example(length, number=0):
    """Ids number * 100, number * 100 + 1, ...; the last one is trained."""
    ids = np.arange(number * 100, number * 100 + length, dtype=np.int32)
    labels = np.full(length, IGNORE, np.int32)
    labels[-1] = ids[-1]
    return Tokens(ids, labels, number)


def stream(lengths, *, rows=2, max_length=10, packing=True, seed=3, site="north"):
    examples = [example(n, i) for i, n in enumerate(lengths)]
    return Stream(examples, seed=seed, site=site, rows=rows, max_length=max_length, packing=packing, pad_token_id=9)


def walk(made, count, cursor=Cursor()):  # noqa: B008 - frozen
    batches = []
    for _ in range(count):
        batch, cursor = made.next(cursor)
        batches.append(batch)
    return batches, cursor


lengths = st.lists(st.integers(2, 10), min_size=1, max_size=12)


def test_a_packed_batch_by_hand():
    (batch,) = in_order([example(4, 1), example(3, 2), example(5, 3)], rows=2, max_length=8, packing=True, pad_token_id=9)
    assert batch.input_ids.tolist() == [[100, 101, 102, 103, 200, 201, 202], [300, 301, 302, 303, 304, 9, 9]]
    assert batch.labels.tolist() == [[-100, -100, -100, 103, -100, -100, 202], [-100, -100, -100, -100, 304, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, -1, -1]]
    assert (batch.sources, batch.supervised, batch.examples, batch.tokens) == ((0, 1, 2), 3, 3, 12)


def test_without_packing_a_row_holds_one_example():
    first, second = in_order([example(4), example(3), example(5)], rows=2, max_length=8, packing=False, pad_token_id=9)
    assert [first.input_ids.shape, second.input_ids.shape] == [(2, 4), (1, 5)]


@given(lengths, st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 5))
def test_in_so_many_passes_every_example_comes_so_often(sizes, rows, passes, packing, seed):
    made = stream(sizes, rows=rows, packing=packing, seed=seed)
    seen, cursor = Counter(), Cursor()
    while cursor.epoch < passes:
        batch, after = made.next(cursor)
        if after.epoch >= passes:
            keep = passes * len(sizes) - cursor.examples
            seen.update(batch.sources[:keep])
        else:
            seen.update(batch.sources)
        assert after.examples == after.epoch * len(sizes) + after.position
        cursor = after
    assert seen == dict.fromkeys(range(len(sizes)), passes)


@given(lengths, st.integers(1, 3), st.booleans(), st.integers(0, 5), st.integers(1, 6))
def test_a_cursor_resumes_exactly(sizes, rows, packing, seed, cut):
    whole, _ = walk(stream(sizes, rows=rows, packing=packing, seed=seed), cut + 4)
    _, cursor = walk(stream(sizes, rows=rows, packing=packing, seed=seed), cut)
    rest, _ = walk(stream(sizes, rows=rows, packing=packing, seed=seed), 4, cursor)
    for a, b in zip(whole[cut:], rest, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert a.sources == b.sources


@given(lengths, st.integers(1, 3), st.booleans(), st.integers(0, 5))
def test_every_batch_is_well_formed(sizes, rows, packing, seed):
    made = stream(sizes, rows=rows, packing=packing, seed=seed)
    for batch in walk(made, 5)[0]:
        assert batch.input_ids.shape[0] <= rows
        assert batch.input_ids.shape[1] <= 10
        assert batch.supervised == batch.examples  # one label an example, none lost, none at padding
        for number, source in enumerate(batch.sources):
            here = batch.documents == number
            assert np.array_equal(batch.input_ids[here], made.examples[source].input_ids)  # whole and in order
            assert np.array_equal(batch.labels[here], made.examples[source].labels)
            assert batch.position_ids[here].tolist() == list(range(len(made.examples[source])))
            assert len(set(np.nonzero(here)[0])) == 1  # in one row
        padding = batch.documents < 0
        assert (batch.input_ids[padding] == 9).all()
        assert (batch.labels[padding] == IGNORE).all()


@given(lengths, st.integers(1, 3), st.booleans())
def test_evaluation_takes_each_example_once_in_order(sizes, rows, packing):
    examples = [example(n, i) for i, n in enumerate(sizes)]
    batches = in_order(examples, rows=rows, max_length=10, packing=packing, pad_token_id=9)
    assert [s for b in batches for s in b.sources] == list(range(len(sizes)))


def test_passes_sites_and_seeds_have_their_own_order():
    def order(**changed):
        return [s for b in walk(stream([10] * 30, rows=1, **changed), 60)[0] for s in b.sources]

    mine = order()
    assert mine[:30] != mine[30:]
    assert mine != order(site="south")
    assert mine != order(seed=4)
    assert mine == order()


def test_the_order_of_a_site_is_this_for_ever():
    """Bits of a run must not depend on a library's version: these numbers never change."""
    made = stream([10] * 8, rows=1)
    assert [b.sources[0] for b in walk(made, 16)[0]] == [3, 2, 4, 0, 1, 6, 7, 5, 6, 0, 7, 4, 3, 5, 1, 2]


def test_a_batch_never_holds_an_example_twice():
    (batch,), cursor = walk(stream([2, 2], rows=2, max_length=10), 1)
    assert sorted(batch.sources) == [0, 1]
    assert cursor == Cursor(epoch=1, position=0, examples=2, tokens=4)


def test_steps_of_a_pass_are_counted_by_packing_it():
    assert stream([5, 5, 5, 5], rows=1).steps_per_epoch() == 2
    assert stream([6, 6, 6], rows=1).steps_per_epoch() == 3
    assert stream([6, 6, 6], rows=2, packing=False).steps_per_epoch() == 2


def test_a_cursor_of_longer_data_is_refused():
    with pytest.raises(DataError, match="changed"):
        stream([5, 5]).next(Cursor(position=2))


def test_nothing_to_train_on_and_impossible_rows_are_refused():
    with pytest.raises(DataError, match="no examples"):
        stream([])
    with pytest.raises(ValueError, match="more than max_length"):
        stream([11])
    with pytest.raises(ValueError, match="rows"):
        stream([5], rows=0)


# --- the same step in other pieces ----------------------------------------------------------------------------------


def documents(batches):
    """(source, ids, labels, positions) of each example in order."""
    found = []
    for b in batches:
        for number, source in enumerate(b.sources):
            at = b.documents == number
            found.append((source, *(tuple(part[at].tolist()) for part in (b.input_ids, b.labels, b.position_ids))))
    return found


def test_regrouping_by_hand():
    batches = list(in_order([example(4, 1), example(3, 2), example(5, 3)], rows=2, max_length=8, packing=True, pad_token_id=9))
    one, two = regroup(batches, tokens=7, pad_token_id=8, multiple=4)
    assert one.input_ids.tolist() == [[100, 101, 102, 103, 200, 201, 202, 8]]
    assert one.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1]]
    assert one.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert one.sources == (0, 1)
    assert two.input_ids.tolist() == [[300, 301, 302, 303, 304, 8, 8, 8]]
    assert two.labels.tolist() == [[IGNORE] * 4 + [304] + [IGNORE] * 3]
    assert two.sources == (2,)


@given(lengths, st.integers(1, 3), st.booleans(), st.integers(1, 60), st.sampled_from([1, 4, 64]), st.integers(1, 4))
def test_regrouping_and_sharing_keep_every_example_in_order(sizes, rows, packing, tokens, multiple, count):
    made = stream(sizes, rows=rows, packing=packing)
    batches, _ = walk(made, count)
    right = documents(batches)
    found = regroup(batches, tokens=tokens, pad_token_id=9, multiple=multiple)
    assert documents(found) == right
    assert sum(b.supervised for b in found) == sum(b.supervised for b in batches)
    for b in found:
        assert b.labels.shape == (1, -(-b.tokens // multiple) * multiple)
        assert b.tokens <= tokens or b.examples == 1
    for parts in (1, 2, 3, 7):
        shards = [shard(batches, part=k, parts=parts, pad_token_id=9) for k in range(parts)]
        assert documents([b for s in shards for b in s]) == right
        held = [sum(b.tokens for b in s) for s in shards]
        assert max(held) - min(held) <= 2 * max(sizes)


@given(lengths, st.integers(1, 4), st.booleans(), st.integers(1, 60), st.integers(1, 3))
def test_fewer_rows_at_once_are_the_same_rows(sizes, rows, packing, tokens, count):
    batches, _ = walk(stream(sizes, rows=rows, packing=packing), count)
    found = by_rows(batches, tokens=tokens)
    assert documents(found) == documents(batches)
    for b in found:
        assert b.labels.size <= tokens or len(b.labels) == 1
        assert sorted(set(b.documents[b.documents >= 0].tolist())) == list(range(b.examples))


def test_a_step_is_cut_into_equal_parts_and_not_into_full_ones_and_a_rest():
    batches = list(in_order([example(10, i) for i in range(12)], rows=12, max_length=10, packing=False, pad_token_id=9))
    assert [b.tokens for b in regroup(batches, tokens=100, pad_token_id=9)] == [60, 60]
    assert [b.tokens for b in regroup(batches, tokens=50, pad_token_id=9)] == [40, 40, 40]

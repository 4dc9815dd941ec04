"""Tokens become packed batches, in an order that a cursor resumes exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.data.examples import IGNORE, Tokens

I64: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of examples that do not see each other.

    Attributes:
        input_ids: (rows, length) int64; pad_token_id behind the last example of a row.
        labels: (rows, length) int64; IGNORE where there is no loss: at padding and at each example's first token, so that
            nothing is predicted across a border.
        position_ids: (rows, length) int64; from 0 in each example, 0 at padding.
        documents: (rows, length) int64; number of the example in this batch, from 0, in order; -1 at padding.
        sources: for each number in ``documents``, the example's index in the list the batch was made from.
    """

    input_ids: I64
    labels: I64
    position_ids: I64
    documents: I64
    sources: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Number of positions with a loss."""
        return int(np.count_nonzero(self.labels != IGNORE))

    @property
    def packed(self) -> bool:
        """Whether some row holds more than one example."""
        return bool(((self.position_ids == 0) & (self.documents >= 0)).sum(axis=1).max() > 1)

    @property
    def examples(self) -> int:
        """Number of examples, repeated ones counted each time."""
        return len(self.sources)

    @property
    def tokens(self) -> int:
        """Number of positions that are not padding."""
        return int(np.count_nonzero(self.documents >= 0))


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a stream, and what was consumed on the way there.

    Attributes:
        epoch: passes completed.
        position: examples consumed of this pass, less than there are.
        examples: examples consumed since the start.
        tokens: tokens consumed since the start, without padding, with or without a loss.
    """

    epoch: int = 0
    position: int = 0
    examples: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Examples without end, each pass in another order.

    Laws: a batch depends on the cursor and the fields only; in k passes every example comes exactly k times; no order
    depends on the version of a library.

    Args:
        examples: none longer than max_length.
        seed: of the run.
        site: name; sites with the same examples get different orders.
        rows: rows of a batch.
        max_length: tokens of a row.
        packing: True: rows are filled with examples, as long as the next one fits; an example is never split. A batch then
            holds at most as many examples as there are: repeating one in a batch would cost time and teach nothing, so a
            short list gives fewer rows. False: one example a row.
        pad_token_id: fills rows up to the longest row of the batch.

    Raises:
        DataError: there are no examples.
        ValueError: rows is below 1, or an example is longer than max_length.
    """

    examples: Sequence[Tokens]
    _: KW_ONLY
    seed: int
    site: str
    rows: int
    max_length: int
    packing: bool
    pad_token_id: int

    def __post_init__(self) -> None:
        if not self.examples:
            raise DataError("there are no examples to train on", hint="check data.path and data.held_out_fraction")
        _check(self.examples, rows=self.rows, max_length=self.max_length)

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch at ``cursor`` and the place behind it. A batch may run over the end of a pass.

        Raises:
            DataError: the cursor points behind the last example, so the list is not the one it was made from.
        """
        filled, epoch, position = self._fill(cursor)
        batch = _batch(self.examples, filled, pad_token_id=self.pad_token_id)
        return batch, Cursor(epoch, position, cursor.examples + batch.examples, cursor.tokens + batch.tokens)

    def after(self, cursor: Cursor) -> Cursor:
        """The place behind the batch at ``cursor``, without making the batch. Raises as :meth:`next`."""
        filled, epoch, position = self._fill(cursor)
        used = [len(self.examples[i]) for row in filled for i in row]
        return Cursor(epoch, position, cursor.examples + len(used), cursor.tokens + sum(used))

    def steps_per_epoch(self) -> int:
        """Batches that consume the first pass, the last of which may run over its end. Later passes may need one more or less."""
        steps, cursor = 0, Cursor()
        while cursor.epoch == 0:
            _, epoch, position = self._fill(cursor)
            steps, cursor = steps + 1, Cursor(epoch, position)
        return steps

    def _fill(self, cursor: Cursor) -> tuple[list[list[int]], int, int]:
        """(indexes row by row, epoch, position) of the next batch."""
        count = len(self.examples)
        if cursor.position >= count:
            raise DataError(
                f"the data position is {cursor.position}, but there are only {count} examples: the data has changed since",
                hint="put the data file back as it was when the run began",
            )
        upcoming = self._upcoming(cursor)
        filled = _fill(
            islice(upcoming, count) if self.packing else upcoming,
            self.examples,
            rows=self.rows,
            max_length=self.max_length,
            packing=self.packing,
        )
        epochs, position = divmod(cursor.position + sum(map(len, filled)), count)
        return filled, cursor.epoch + epochs, position

    def _upcoming(self, cursor: Cursor) -> Iterator[int]:
        epoch, position = cursor.epoch, cursor.position
        while True:
            yield from _order(self.seed, self.site, epoch, len(self.examples))[position:].tolist()
            epoch, position = epoch + 1, 0


def in_order(
    examples: Sequence[Tokens],
    *,
    rows: int,
    max_length: int,
    packing: bool,
    pad_token_id: int,
) -> Iterator[Batch]:
    """Each example once, in order: for evaluation. ``Batch.sources`` says which example a document is.

    Raises:
        ValueError: rows is below 1, or an example is longer than max_length.
    """
    _check(examples, rows=rows, max_length=max_length)
    done = 0
    while done < len(examples):
        filled = _fill(range(done, len(examples)), examples, rows=rows, max_length=max_length, packing=packing)
        done += sum(map(len, filled))
        yield _batch(examples, filled, pad_token_id=pad_token_id)


def regroup(batches: Sequence[Batch], *, tokens: int, pad_token_id: int, multiple: int = 1) -> list[Batch]:
    """The same examples in the same order, in batches of one row each that hold about equally much and no padding between.

    What a step consists of stays; only how much of it is computed at once changes. A row is at most ``tokens`` long, unless a
    single example is longer.

    Args:
        tokens: most tokens of a row, before it is rounded up.
        multiple: rows are padded behind the last example to a multiple of this: equal shapes are fast shapes.
    """
    flat, sizes, sources = _flat(batches)
    ends = np.cumsum(sizes)
    found, first, at = [], 0, 0
    while first < len(sizes):
        left = int(ends[-1]) - at
        goal = at + -(-left // -(-left // tokens))  # an equal share of what is left
        last = int(np.searchsorted(ends, goal))  # the example that reaches it
        if last > first and ends[last] - at > tokens:
            last -= 1
        last = min(last, len(sizes) - 1)
        end = int(ends[last])
        found.append(_one_row([part[at:end] for part in flat], sizes[first : last + 1], sources[first : last + 1],
                              pad_token_id=pad_token_id, length=-(-(end - at) // multiple) * multiple))  # fmt: skip
        first, at = last + 1, end
    return found


def by_rows(batches: Sequence[Batch], *, tokens: int) -> list[Batch]:
    """The same rows in batches of fewer of them, padding included at most ``tokens`` long in all, a row at least."""
    found = []
    for batch in batches:
        rows, length = batch.labels.shape
        at_once = max(1, tokens // length)
        for row in range(0, rows, at_once):
            parts = [part[row : row + at_once] for part in (batch.input_ids, batch.labels, batch.position_ids)]
            documents = batch.documents[row : row + at_once]
            first, last = int(documents[documents >= 0].min()), int(documents.max())
            documents = np.where(documents >= 0, documents - first, -1)
            found.append(Batch(parts[0], parts[1], parts[2], documents, batch.sources[first : last + 1]))
    return found


def one_a_row(batch: Batch, *, pad_token_id: int) -> Batch:
    """The same examples in the same order, each in a row of its own."""
    flat, sizes, sources = _flat([batch])
    return _one_a_row(flat, sizes, sources, pad_token_id=pad_token_id)


def shard(batches: Sequence[Batch], *, part: int, parts: int, pad_token_id: int) -> list[Batch]:
    """One shard of a step's examples, in rows no longer than the batches'; empty if there are too few examples.

    The shards have about equally many tokens. Law: shards 0 to parts - 1, one after another, are all examples in order; where no
    row holds two examples, no row of a shard does.
    """
    flat, sizes, sources = _flat(batches)
    ends = np.cumsum(sizes)
    owner = (2 * ends - sizes) * parts // (2 * int(ends[-1]))  # by the middle of each example
    chosen = np.flatnonzero(owner == part)
    if not len(chosen):
        return []
    first, last = int(chosen[0]), int(chosen[-1])
    at, end = int(ends[first] - sizes[first]), int(ends[last])
    if not any(b.packed for b in batches):
        return [_one_a_row([p[at:end] for p in flat], sizes[first : last + 1], sources[first : last + 1],
                           pad_token_id=pad_token_id)]  # fmt: skip
    row = _one_row([p[at:end] for p in flat], sizes[first : last + 1], sources[first : last + 1],
                   pad_token_id=pad_token_id, length=end - at)  # fmt: skip
    return regroup([row], tokens=max(b.labels.shape[1] for b in batches), pad_token_id=pad_token_id)


def _flat(batches: Sequence[Batch]) -> tuple[list[I64], I64, list[int]]:
    """Ids, labels and positions of all examples one behind another; the tokens of each; where each comes from."""
    kept = [(b, b.documents >= 0) for b in batches]
    flat = [np.concatenate([getattr(b, name)[mask] for b, mask in kept]) for name in ("input_ids", "labels", "position_ids")]
    sizes = np.concatenate([np.bincount(b.documents[mask], minlength=b.examples) for b, mask in kept])
    return flat, sizes, [source for b in batches for source in b.sources]


def _one_row(flat: list[I64], sizes: I64, sources: list[int], *, pad_token_id: int, length: int) -> Batch:
    def row(part: I64, filler: int) -> I64:
        whole = np.full((1, length), filler, np.int64)
        whole[0, : len(part)] = part
        return whole

    ids, labels, positions = flat
    documents = row(np.repeat(np.arange(len(sizes)), sizes), -1)
    return Batch(row(ids, pad_token_id), row(labels, IGNORE), row(positions, 0), documents, tuple(sources))


def _one_a_row(flat: list[I64], sizes: I64, sources: list[int], *, pad_token_id: int) -> Batch:
    """Each example in a row of its own, in one batch."""
    ids, labels, positions = (np.split(part, np.cumsum(sizes)[:-1]) for part in flat)

    def rows(parts: list[I64], filler: int) -> I64:
        whole = np.full((len(sizes), int(sizes.max())), filler, np.int64)
        for row, part in zip(whole, parts, strict=True):
            row[: len(part)] = part
        return whole

    documents = rows([np.full(n, number) for number, n in enumerate(sizes)], -1)
    return Batch(rows(ids, pad_token_id), rows(labels, IGNORE), rows(positions, 0), documents, tuple(sources))


def _check(examples: Sequence[Tokens], *, rows: int, max_length: int) -> None:
    if rows < 1:
        raise ValueError(f"{rows} rows")
    longest = max(map(len, examples), default=0)
    if longest > max_length:
        raise ValueError(f"an example has {longest} tokens, more than max_length {max_length}")


@lru_cache(maxsize=16)
def _order(seed: int, site: str, epoch: int, count: int) -> I64:
    """A permutation of range(count), (count,) int64, read-only.

    The sort order of raw Philox words: numpy promises these for ever, but not the results of Generator.permutation.
    """
    digest = hashlib.sha256(json.dumps(["fedlora data order", seed, site, epoch]).encode()).digest()
    order: I64 = np.argsort(np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(count), kind="stable")
    order.setflags(write=False)
    return order


def _fill(upcoming: Iterable[int], examples: Sequence[Tokens], *, rows: int, max_length: int, packing: bool) -> list[list[int]]:
    """Fills rows greedily with the indexes that come, until the next one would open a row too many."""
    filled: list[list[int]] = []
    room = 0
    for index in upcoming:
        size = len(examples[index])
        if not packing or size > room:
            if len(filled) == rows:
                break
            filled.append([])
            room = max_length
        filled[-1].append(index)
        room -= size
    return filled


def _batch(examples: Sequence[Tokens], filled: list[list[int]], *, pad_token_id: int) -> Batch:
    shape = len(filled), max(sum(len(examples[index]) for index in row) for row in filled)
    input_ids, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORE, np.int64)
    position_ids, documents = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    sources: list[int] = []
    for number, row in enumerate(filled):
        at = 0
        for index in row:
            example = examples[index]
            here = np.s_[number, at : at + len(example)]
            input_ids[here] = example.input_ids
            labels[here] = example.labels
            position_ids[here] = np.arange(len(example))
            documents[here] = len(sources)
            sources.append(index)
            at += len(example)
    return Batch(input_ids, labels, position_ids, documents, tuple(sources))

"""Rows that are longer than max_length: what is cut, and what never is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from fedlora.data.conversations import Conversation
from fedlora.data.examples import Example
from fedlora.data.turns import BadRow

TooLong = Literal["keep-answer", "cut", "drop"]
OVERLAP = 8
"""A part of a long text begins with the last 1/8 of max_length of the part before: read, not trained on again."""
_KEPT = 8
"""Tokens that a cut text keeps where it can, half of them at each end."""

Build = Callable[[Conversation], list[Example]]
"""A row's examples. Raises BadRow."""


def pieces(whole: Example, *, max_length: int) -> Iterator[Example]:
    """A long text in parts that overlap. Each begins with what the tokenizer puts before any text.

    Law: every trained token of the whole is trained in exactly one part, with the tokens before it in sight.
    """
    lead, room = whole.lead, max_length - whole.lead
    overlap = min(max(max_length // OVERLAP, 1), room - 1)
    at = lead
    while at < len(whole):
        seen = at - overlap if at > lead else at
        end = min(seen + room, len(whole))
        ids = np.concatenate([whole.ids[:lead], whole.ids[seen:end]])
        trained = np.concatenate([whole.trained[:lead], np.zeros(at - seen, np.bool_), whole.trained[at:end]])
        yield replace(whole, ids=ids, trained=trained, notes=whole.notes | {"split"})
        at = end


def shortened(whole: Example, *, max_length: int) -> Example:
    """The example without the middle of what is not trained, texts of the row first, the longest first.

    Law: no trained token is lost while they are fewer than max_length. Beyond that the end is cut off.
    """
    excess = len(whole) - max_length
    kept = np.ones(len(whole), np.bool_)
    for start, end in sorted(whole.bodies, key=lambda body: body[0] - body[1]):
        excess -= _cut(kept, np.arange(start, end), min(excess, end - start - _KEPT))
    rest = np.flatnonzero(kept & ~whole.trained)
    _cut(kept, rest[whole.lead :], min(excess, len(rest) - max(whole.lead, 1)))
    ids, trained = whole.ids[kept][:max_length], whole.trained[kept][:max_length]
    return replace(whole, ids=ids, trained=trained, bodies=(), notes=whole.notes | {"middle"})


def _cut(kept: np.ndarray[tuple[int], np.dtype[np.bool_]], places: np.ndarray[tuple[int], np.dtype[np.int64]], count: int) -> int:
    """Takes the middle ``count`` of these places out; the end keeps what is odd."""
    if count <= 0:
        return 0
    head = (len(places) - count) // 2
    kept[places[head : head + count]] = False
    return count


def windows(c: Conversation, build: Build, *, max_length: int) -> Iterator[Example]:
    """A chat that is too long, as examples that fit: the oldest turns go first, and no trained answer is lost.

    Each example ends in the last answer that is in none yet, and holds as many whole turns before it as fit, the system turn
    always. An answer that does not fit with its own question has the middle of that cut.
    """
    head = 1 if c.turns[0].role in ("system", "developer") else 0
    left = [number for number, turn in enumerate(c.turns) if turn.trained]
    while left:
        last = left[-1]
        starts = [n for n in range(head, last) if c.turns[n].role == "user"]
        low, high = 0, len(starts) - 1
        while low < high:  # the first start that fits
            middle = (low + high) // 2
            if _fits(_window(c, head, starts[middle], last, set(left)), build, max_length):
                high = middle
            else:
                low = middle + 1
        wanted = {n for n in left if n >= starts[low]}
        (example,) = build(_window(c, head, starts[low], last, wanted))
        if int(np.count_nonzero(example.trained)) >= max_length and len(wanted) > 1:
            wanted = {last}  # a call and its answer, one at a time
            (example,) = build(_window(c, head, starts[low], last, wanted))
        notes = example.notes | ({"turns"} if starts[low] > head else set())
        example = replace(example, notes=notes)
        yield shortened(example, max_length=max_length) if len(example) > max_length else example
        left = [n for n in left if n not in wanted]


def _fits(c: Conversation, build: Build, max_length: int) -> bool:
    try:
        return all(len(example) <= max_length for example in build(c))
    except BadRow:
        return False


def _window(c: Conversation, head: int, start: int, last: int, trained: set[int]) -> Conversation:
    """The system turn and the turns from ``start`` to ``last``, of which some are trained."""
    chosen = [*range(head), *range(start, last + 1)]
    return replace(c, turns=tuple(replace(c.turns[n], trained=n in trained) for n in chosen))


def one_by_one(c: Conversation) -> Iterator[Conversation]:
    """For each trained answer the row that ends in it and trains nothing else."""
    for last, turn in enumerate(c.turns):
        if turn.trained:
            yield _window(c, 0, 0, last, {last})


NOTES = {
    "split": "texts longer than max_length are split; each part begins with the end of the one before",
    "middle": "longer than max_length: the middle of what is not trained on is cut out",
    "turns": "longer than max_length: more than one example, the oldest turns left out",
}
"""What a report says of rows, by the key that the code uses."""

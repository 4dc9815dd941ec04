"""A text with its spans becomes ids and labels, and every mask is proved against the text that it stands for."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.data.template import Rendered
from fedlora.data.turns import BadRow
from fedlora.data.vocabulary import I32, Encoded, Vocabulary

IGNORE = -100
"""Label of a position without loss (PyTorch's ``ignore_index``)."""
WRONG_MASK = "the trained tokens do not stand for the answer"


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One example. The label at position i is predicted from the positions before it.

    Args:
        input_ids: (n,) int32, n >= 1. Made read-only.
        labels: (n,) int32, IGNORE or equal to input_ids; IGNORE at position 0, which nothing predicts. Made read-only.
        line: line or row of the file.
        group: patient or customer; ``""``: not known.
        file: the file's name, if several were read; else ``""``.

    Raises:
        ValueError: shapes, types or the first label are wrong.
    """

    input_ids: I32
    labels: I32
    line: int
    group: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.size == 0 or self.input_ids.shape != self.labels.shape:
            raise ValueError(f"shapes {self.input_ids.shape} and {self.labels.shape} are not (n,) and (n,)")
        if self.input_ids.dtype != np.int32 or self.labels.dtype != np.int32:
            raise ValueError(f"types {self.input_ids.dtype} and {self.labels.dtype} are not int32")
        if self.labels[0] != IGNORE:
            raise ValueError("position 0 has a label, but nothing predicts it")
        self.input_ids.setflags(write=False)
        self.labels.setflags(write=False)

    def __len__(self) -> int:
        return int(self.input_ids.size)

    @property
    def supervised(self) -> int:
        """Number of positions with a loss."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Ids and mask of a text, of any length.

    Attributes:
        ids: (n,) int32.
        trained: (n,) bool.
        bodies: (start, end) in tokens: what may be cut, in order.
        lead: tokens at the start that a tokenizer puts before any text.
        notes: as of the text.
    """

    ids: I32
    trained: NDArray[np.bool_]
    bodies: tuple[tuple[int, int], ...]
    lead: int
    notes: frozenset[str]

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, line: int, *, group: str = "", file: str = "") -> Tokens:
        labels = np.where(self.trained, self.ids, np.int32(IGNORE))
        labels[0] = IGNORE
        return Tokens(self.ids, labels, line, group, file)


def examples_of(
    texts: Sequence[Rendered], vocabulary: Vocabulary, *, start: tuple[int, ...], end: int | None
) -> list[Example | BadRow]:
    """Texts as ids with masks.

    Args:
        texts: rendered.
        vocabulary: of the base.
        start: ids before a text that has not begun.
        end: id behind a text that has not ended; None: nothing is put there.
    """
    encoded = vocabulary.encode([t.text for t in texts], [t.quoted for t in texts])
    found: list[Example | BadRow] = []
    for text, tokens in zip(texts, encoded, strict=True):
        try:
            if isinstance(tokens, BadRow):
                raise tokens
            found.append(_example(text, tokens, vocabulary, start=start, end=end))
        except BadRow as why:
            found.append(why)
    return found


def _example(text: Rendered, tokens: Encoded, vocabulary: Vocabulary, *, start: tuple[int, ...], end: int | None) -> Example:
    trained = np.zeros(len(tokens.ids), np.bool_)
    covered = []
    for start_at, end_at in text.spans:
        here = tokens.inside(start_at, end_at)
        _without_prompt(here, text, tokens, start_at, vocabulary)
        if here.any():  # a token may hold the end of the prompt and the beginning of the answer
            covered.append((min(start_at, int(tokens.starts[here][0])), max(end_at, int(tokens.ends[here][-1]))))
        trained |= here
    _prove(text, tokens, trained, covered, vocabulary)
    count = int(np.flatnonzero(trained)[-1]) + 1
    lead = () if text.begun else start
    tail = () if text.ended or end is None else (end,)
    ids = np.concatenate([np.array(lead, np.int32), tokens.ids[:count], np.array(tail, np.int32)])
    mask = np.concatenate([np.zeros(len(lead), np.bool_), trained[:count], np.ones(len(tail), np.bool_)])
    bodies = []
    for first, last in text.bodies:
        inner = np.flatnonzero((tokens.starts >= first) & (tokens.ends <= last) & ~trained)
        if len(inner):
            bodies.append((len(lead) + int(inner[0]), len(lead) + int(inner[-1]) + 1))
    return Example(ids, mask, tuple(bodies), len(lead), text.notes)


def _without_prompt(here: NDArray[np.bool_], text: Rendered, tokens: Encoded, start: int, vocabulary: Vocabulary) -> None:
    """A special token before an answer that swallows the answer's first white space is still the prompt's."""
    first = int(np.argmax(here))
    if here[first] and tokens.starts[first] < start and (name := vocabulary.controls.get(int(tokens.ids[first]))):
        if text.text.startswith(name, start):
            return
        here[first] = False


def _prove(
    text: Rendered, tokens: Encoded, trained: NDArray[np.bool_], covered: list[tuple[int, int]], vocabulary: Vocabulary
) -> None:
    """The trained tokens decode to the trained text.

    A tokenizer that does not give back the whole text either (it knows no capitals, or not all characters) proves nothing;
    the places of its tokens do.

    Raises:
        BadRow: they do not, or nothing is trained.
    """
    if len(covered) < len(text.spans):
        raise BadRow(WRONG_MASK)
    decode = vocabulary.tokenizer.decode
    wanted = "".join(text.text[a:b] for a, b in covered)
    given = decode(tokens.ids[trained].tolist())
    if given == wanted or "".join(given.split()) == "".join(wanted.split()):
        return
    if _squash(given) == _squash(wanted):
        return
    if _squash(decode(tokens.ids.tolist())) == _squash(text.text):
        raise BadRow(WRONG_MASK)


def _squash(text: str) -> str:
    """Text as far as tokenizers keep it: compatibility forms (NFKC), no white space, no control characters."""
    known = unicodedata.normalize("NFKC", text).replace("\u2581", "")  # SentencePiece's sign for a space
    return "".join(char for char in known if char.isprintable() and not char.isspace())

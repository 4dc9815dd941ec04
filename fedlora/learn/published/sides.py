"""The two sides that are compared, the base and the base with the adapter, on the same examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.core.events import Report
from fedlora.core.measures.labels import MOST_LABELS, Labeled, index_of
from fedlora.core.measures.texts import rouge_l, rouge_n, token_f1
from fedlora.core.plan import Plan, Training
from fedlora.core.tables.data import SiteData
from fedlora.data import IGNORE, Conversation, Tokens
from fedlora.learn.published.ask import answers
from fedlora.learn.published.loaded import Loaded
from fedlora.learn.rows import to_tokens

_AT_ONCE: Final = 2048
"""Tokens of a batch, most: with a vocabulary of 150,000 their logits take 1.2 GB."""
_WRITTEN_AT_ONCE: Final = 8
_MOST_TOKENS: Final = 256
"""Longest answer that is written out."""


@dataclass(frozen=True, slots=True)
class Side:
    """One model on n examples.

    Attributes:
        nats: (n,) float64, loss of each over its supervised tokens.
        right: (n,) bool, whether greedy decoding would give exactly the answer.
        written: the first answers, as greedy decoding gives them.
        labeled: what it says if it may say nothing but a label; None: no labels were given.
    """

    nats: NDArray[np.float64]
    right: NDArray[np.bool_]
    written: tuple[str, ...]
    labeled: Labeled | None


@dataclass(frozen=True, slots=True)
class Writing:
    """How near written answers are to those that were expected: means of F1 over m examples."""

    examples: int
    token_f1: float
    rouge_1: float
    rouge_2: float
    rouge_l: float

    @classmethod
    def of(cls, expected: Sequence[str], written: Sequence[str]) -> Writing:
        pairs = list(zip(expected, written, strict=True))

        def mean(values: Iterator[float]) -> float:
            return math.fsum(values) / len(pairs)

        return cls(
            len(pairs), mean(token_f1(a, b) for a, b in pairs), mean(rouge_n(a, b, 1) for a, b in pairs),
            mean(rouge_n(a, b, 2) for a, b in pairs), mean(rouge_l(a, b) for a, b in pairs),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Examples:
    """What is asked: rows as tokens, and for a list of labels each row once with each of them.

    Attributes:
        tokens: n examples.
        labels: k names; empty: none.
        truth: (n,) which label each has.
        labeled: n * k examples, those of one row together.
    """

    tokens: list[Tokens]
    labels: tuple[str, ...] = ()
    truth: NDArray[np.int64] | None = None
    labeled: tuple[Tokens, ...] = ()

    def lengths(self) -> NDArray[np.int64]:
        """(n,) supervised tokens of each."""
        return np.array([int((e.labels != IGNORE).sum()) for e in self.tokens])


def examples_of(
    loaded: Loaded, rows: Sequence[Conversation], *, data: SiteData, labels: Sequence[str], report: Report
) -> Examples:
    """Turns rows into what is asked, as the adapter was trained.

    Raises:
        DataError: no row has an answer; or, with labels, one that is none of them.
    """
    training = Training(prompt=loaded.prompt.kind, max_length=loaded.prompt.max_length)

    def tokens(some: Sequence[Conversation], said: Report) -> list[Tokens]:
        return to_tokens(loaded.tokenizer, some, data, plan=Plan(training=training), report=said)

    if not labels:
        return Examples(_some(tokens(rows, report)))
    if len(set(labels)) < len(labels) or not 2 <= len(labels) <= MOST_LABELS:
        raise DataError(f"{len(labels)} labels: 2 to {MOST_LABELS} different ones are needed", hint="name each once, by commas")
    wrong = [row.line for row in rows if _label(row, labels) is None]
    if wrong:
        lines = ", ".join(map(str, wrong[:20])) + f" and {len(wrong) - 20} more" * (len(wrong) > 20)
        raise DataError(
            f"the answer is none of the {len(labels)} labels in lines {lines}",
            hint="name every label as the rows spell it; a row with several answers has no label",
        )
    each = [_with_answer(row, label) for row in rows for label in labels]
    asked = tokens(each, lambda event, facts: None)
    found = _some(tokens(rows, report))
    if len(asked) != len(each) or len(found) != len(rows):
        raise DataError("some rows cannot be asked with each label", hint="see the lines above: rows that are left out or split")
    return Examples(found, tuple(labels), np.array([_label(row, labels) for row in rows]), tuple(asked))


def _some(found: list[Tokens]) -> list[Tokens]:
    if not found:
        raise DataError("no row has an answer to score", hint="the lines above say what was left out, and why")
    return found


def _label(row: Conversation, labels: Sequence[str]) -> int | None:
    spoken = [turn for turn in row.turns if turn.trained]
    return index_of(labels, spoken[0].text) if len(spoken) == 1 and spoken[0] is row.turns[-1] else None


def _with_answer(row: Conversation, label: str) -> Conversation:
    """The same row with another answer, after the same white space."""
    last = row.turns[-1]
    space = last.text[: len(last.text) - len(last.text.lstrip())]
    return replace(row, turns=(*row.turns[:-1], replace(last, text=space + label)))


def side(loaded: Loaded, asked: Examples, *, with_adapter: bool, write: int) -> Side:
    """What one of the two says.

    Args:
        write: so many answers are written out.
    """
    with _side(loaded, with_adapter=with_adapter):
        nats, right = forced(loaded, asked.tokens)
        labeled = None
        if asked.truth is not None:
            labeled = Labeled(asked.truth, forced(loaded, asked.labeled)[0].reshape(-1, len(asked.labels)))
        return Side(nats, right, tuple(written(loaded, asked.tokens[:write])), labeled)


@contextmanager
def _side(loaded: Loaded, *, with_adapter: bool) -> Iterator[None]:
    if with_adapter:
        yield
    else:
        with loaded.model.disable_adapter():
            yield


def forced(loaded: Loaded, examples: Sequence[Tokens]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Loss of each example, and whether its every supervised token is the likeliest one.

    Returns:
        (n,) float64 nats, (n,) bool.
    """
    nats, right = np.zeros(len(examples)), np.zeros(len(examples), bool)
    device = loaded.model.device
    for numbers in _batches([len(e.input_ids) for e in examples]):
        length = max(len(examples[i].input_ids) for i in numbers)
        ids = np.full((len(numbers), length), loaded.pad or 0, np.int64)
        mask = np.zeros_like(ids)
        for row, i in enumerate(numbers):
            ids[row, : len(examples[i].input_ids)], mask[row, : len(examples[i].input_ids)] = examples[i].input_ids, 1
        with torch.inference_mode():
            logits = loaded.model(
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device)
            ).logits
            for row, i in enumerate(numbers):
                at = np.flatnonzero(examples[i].labels != IGNORE)
                wanted, own = torch.tensor(ids[row, at], device=device), logits[row, torch.tensor(at - 1, device=device)].float()
                each = torch.nn.functional.cross_entropy(own, wanted, reduction="none").double().cpu().numpy()
                nats[i], right[i] = math.fsum(each), bool((own.argmax(-1) == wanted).all())
    return nats, right


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Examples of like length together, no more than _AT_ONCE tokens with what fills them up, one at least."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > _AT_ONCE:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def written(loaded: Loaded, examples: Sequence[Tokens]) -> list[str]:
    """Greedy answers to the prompt of each example, which is what stands before its first supervised token."""
    found = [""] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for at in range(0, len(order), _WRITTEN_AT_ONCE):
        some = order[at : at + _WRITTEN_AT_ONCE]
        most = max(int((examples[i].labels != IGNORE).sum()) for i in some)
        said = answers(loaded, [prompt(examples[i]) for i in some], max_tokens=min(2 * most + 8, _MOST_TOKENS))
        for i, ids in zip(some, said, strict=True):
            found[i] = text(loaded, ids)
    return found


def prompt(example: Tokens) -> list[int]:
    """The ids before the first supervised token."""
    found: list[int] = example.input_ids[: int(np.flatnonzero(example.labels != IGNORE)[0])].tolist()
    return found


def expected(loaded: Loaded, example: Tokens) -> str:
    """The answer that stands in the row: its first supervised stretch."""
    first = len(prompt(example))
    after = np.flatnonzero(example.labels[first:] == IGNORE)
    return text(loaded, example.labels[first : first + int(after[0]) if len(after) else None].tolist())


def text(loaded: Loaded, ids: Sequence[int]) -> str:
    """Tokens as a text, without special ones."""
    found: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return found

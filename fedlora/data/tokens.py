"""Conversations become token ids and labels: those of the chat template, and a mask of what the assistant says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, TypeAlias

import numpy as np

from fedlora.core.errors import DataError
from fedlora.data import lengths, template
from fedlora.data.conversations import Conversation
from fedlora.data.examples import Example, Tokens, examples_of
from fedlora.data.lengths import TooLong
from fedlora.data.plain import Plain
from fedlora.data.report import numbered
from fedlora.data.template import Rendered, Template
from fedlora.data.turns import BadRow
from fedlora.data.vocabulary import Tokenizer, Vocabulary

SpecialTokens: TypeAlias = Literal["text", "keep"]
Asked: TypeAlias = Literal["any", "chat", "plain"]
NOT_ASKED = {"chat": "plain text, where the plan has chats", "plain": "a chat, where the plan has plain text"}
"""What is wrong with a row of the other kind, by what the plan has."""
DATE = "2026-01-01"
"""What a template sees as today unless the plan says another date."""
QUANTILES = (0.0, 0.5, 0.95, 1.0)
_NOTES = {**template.NOTES, **lengths.NOTES}
_AT_ONCE = 256
"""Rows that are tokenized in one call."""


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What tokenizing found; for the operator's eyes.

    Attributes:
        rows: conversations that came in.
        used: examples that came out.
        truncated: rows that were too long for max_length, dropped ones included.
        dropped: lines of rows of which nothing is left to train on, or which are too long and to be dropped.
        tokens: tokens of the examples.
        supervised: tokens of the examples with a loss.
        lengths: tokens of a row before anything is cut: shortest, median, 95th percentile, longest.
        max_length: the limit.
        bad: (line, reason) of rows that the template or the mask rules out. Reasons are fixed texts.
        notes: (what was done, lines) for rows that were not simply taken as they are.
        date: what the template saw as today; ``""``: it did not ask.
    """

    rows: int
    used: int
    truncated: int
    dropped: tuple[int, ...]
    tokens: int
    supervised: int
    lengths: tuple[int, int, int, int]
    max_length: int
    bad: tuple[tuple[int, str], ...] = ()
    notes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    date: str = ""

    def lines(self) -> list[str]:
        """The report as text."""
        low, median, high, top = self.lengths
        lines = [
            f"{self.used:,} examples of {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.supervised:,} ({self.supervised / max(self.tokens, 1):.0%}) of them trained on",
            f"tokens a row: {low:,} to {top:,}, median {median:,}, 95 % up to {high:,}",
        ]
        if self.truncated:
            lines.append(
                f"{self.truncated:,} rows ({self.truncated / self.rows:.1%}) are longer than max_length {self.max_length:,}"
            )
        lines += [f"{reason}: {numbered(at)}" for reason, at in _by_reason(self.bad)]
        if self.dropped:
            lines.append(f"nothing is left to train on within max_length: {numbered(list(self.dropped))}")
        lines += [f"{what}: {len(at):,} rows, {numbered(list(at))}" for what, at in self.notes]
        if self.date:
            lines.append(f"the chat template writes the date: it sees {self.date} (training.template_date of the plan)")
        return lines


def _by_reason(bad: Sequence[tuple[int, str]]) -> list[tuple[str, list[int]]]:
    found: dict[str, list[int]] = defaultdict(list)
    for line, reason in bad:
        found[reason].append(line)
    return sorted(found.items())


def tokenize(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    append_eos: bool = True,
    special_tokens: SpecialTokens = "text",
    too_long: TooLong = "keep-answer",
    template_date: str = DATE,
    prompt: Asked = "any",
) -> tuple[list[Tokens], TokenReport]:
    """Turns each conversation into ids and labels.

    Laws: the ids of a chat are those of ``apply_chat_template(tokenize=True)`` up to the last trained token; those of plain rows
    are the tokenizer's for the whole text, prompt and completion in one piece. Trained is what an assistant's turn consists of
    from where the generation prompt leaves off, up to and including the token that ends it, and nothing else. Turns after the
    last trained answer are left out. Where a template shows earlier answers differently, a row gives an example for each answer.

    Args:
        conversations: as read.
        tokenizer: of the base model.
        max_length: tokens of an example, at most.
        append_eos: train an EOS token after plain text, and after a chat whose template puts nothing behind the last answer.
        special_tokens: strings of special tokens inside rows: ``text``: ordinary characters; ``keep``: special tokens.
        too_long: see :mod:`fedlora.data.lengths`; long plain texts are split under ``keep-answer``.
        template_date: YYYY-MM-DD; the only clock that a template sees.
        prompt: ``chat`` or ``plain``: rows of the other kind cannot be used.

    Returns:
        Examples in order of the rows, without rows that cannot be used; and the report.

    Raises:
        DataError: no conversations, no EOS token, chats on a base without a template, or nothing to train on. Never quotes a row.
        ValueError: max_length < 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length {max_length} leaves nothing to predict")
    if not conversations:
        raise DataError("there are no rows to tokenize", hint="check data.path")
    if append_eos and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token: the model would never learn to stop", hint="set eos_token in the base")
    if prompt != "plain" and any(c.chat for c in conversations) and not tokenizer.chat_template:
        raise DataError(
            "these rows are chats, but the base has no chat template",
            hint="an instruction-tuned base, or rows with prompt and completion",
        )
    maker = _Maker(
        tokenizer,
        max_length=max_length,
        append_eos=append_eos,
        keep=special_tokens == "keep",
        too_long=too_long,
        date=template_date,
        prompt=prompt,
    )
    rows = iter(conversations)
    while chunk := list(islice(rows, _AT_ONCE)):
        maker.take(chunk)
    return maker.used, maker.summary(len(conversations))


@dataclass
class _Maker:
    """All rows of a file on their way to tokens."""

    tokenizer: Tokenizer
    max_length: int
    append_eos: bool
    keep: bool
    too_long: TooLong
    date: str
    prompt: Asked
    used: list[Tokens] = field(default_factory=list)
    _bad: list[tuple[int, str]] = field(default_factory=list)
    _dropped: list[int] = field(default_factory=list)
    _notes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = Template(self.tokenizer, date=self.date) if self.tokenizer.chat_template else None
        self._vocabulary = self._template.vocabulary if self._template else Vocabulary(self.tokenizer)
        self._plain = Plain(self._vocabulary, self._template)
        self._asked_date = False

    def take(self, conversations: Sequence[Conversation]) -> None:
        """Tokenizes some rows in one call."""
        texts: list[list[Rendered] | BadRow] = []
        for c in conversations:
            try:
                texts.append(self._rendered(c))
            except BadRow as why:
                texts.append(why)
        made = iter(self._made([text for row in texts if not isinstance(row, BadRow) for text in row]))
        for c, row in zip(conversations, texts, strict=True):
            try:
                if isinstance(row, BadRow):
                    raise row
                self._keep(c, list(_good(islice(made, len(row)))))
            except BadRow as why:
                self._bad.append((c.line, str(why)))

    def _rendered(self, c: Conversation) -> list[Rendered]:
        if self.prompt != "any" and c.chat != (self.prompt == "chat"):
            raise BadRow(NOT_ASKED[self.prompt])
        if not c.chat or self._template is None:
            return [self._plain.rendered(c, keep=self.keep)]
        found = self._template.rendered(c)
        self._asked_date |= self._template.dated
        return [_kept(text) for text in found] if self.keep else found

    def _made(self, texts: Sequence[Rendered]) -> list[Example | BadRow]:
        end = self.tokenizer.eos_token_id if self.append_eos else None
        return examples_of(texts, self._vocabulary, start=self._plain.start, end=end)

    def _build(self, c: Conversation) -> list[Example]:
        return list(_good(self._made(self._rendered(c))))

    def _keep(self, c: Conversation, examples: list[Example]) -> None:
        """The examples of a row, cut to length, are used and noted."""
        longest = max(map(len, examples))
        self._lengths.append(longest)
        if longest > self.max_length:
            examples = list(self._fitted(c, examples))
        tokens = [example.tokens(c.line, group=c.group, file=c.file) for example in examples]
        if not any(t.supervised for t in tokens):
            self._dropped.append(c.line)
            return
        self.used += [t for t in tokens if t.supervised]
        for note in sorted({note for example in examples for note in example.notes}):
            self._notes[note].append(c.line)

    def _fitted(self, c: Conversation, examples: list[Example]) -> Iterator[Example]:
        if self.too_long == "drop":
            yield from (example for example in examples if len(example) <= self.max_length)
        elif self.too_long == "cut":
            yield from (_first(example, self.max_length) for example in examples)
        elif not c.chat:
            (whole,) = examples
            alone = len(c.turns) == 1
            yield from (
                lengths.pieces(whole, max_length=self.max_length)
                if alone
                else [lengths.shortened(whole, max_length=self.max_length)]
            )
        elif len(examples) == 1:
            yield from lengths.windows(c, self._build, max_length=self.max_length)
        else:
            for row, example in zip(lengths.one_by_one(c), examples, strict=True):
                fits = len(example) <= self.max_length
                yield from [example] if fits else lengths.windows(row, self._build, max_length=self.max_length)

    def summary(self, rows: int) -> TokenReport:
        """Of all rows.

        Raises:
            DataError: nothing can be used.
        """
        report = TokenReport(
            rows=rows,
            used=len(self.used),
            truncated=sum(length > self.max_length for length in self._lengths),
            dropped=tuple(self._dropped),
            tokens=sum(map(len, self.used)),
            supervised=sum(t.supervised for t in self.used),
            lengths=_quantiles(self._lengths),
            max_length=self.max_length,
            bad=tuple(self._bad),
            notes=tuple((_NOTES[key], tuple(lines)) for key, lines in sorted(self._notes.items())),
            date=self.date if self._asked_date else "",
        )
        if self.used:
            return report
        if self._bad and not self._dropped:
            reasons = "; ".join(f"{reason}: {numbered(lines)}" for reason, lines in _by_reason(self._bad))
            raise DataError(
                f"none of the {rows:,} rows can be used: {reasons}",
                hint="a plan with another training.prompt, or rows as it says"
                if {why for _, why in self._bad} <= {*NOT_ASKED.values()}
                else "rows that the chat template of this base takes",
            )
        raise DataError(
            f"none of the {rows:,} rows has anything to train on within max_length {self.max_length}",
            hint=f"a larger training.max_length (the longest row has {report.lengths[-1]:,} tokens), or shorter answers",
        )


def _good(examples: Iterator[Example | BadRow] | Sequence[Example | BadRow]) -> Iterator[Example]:
    for example in list(examples):
        if isinstance(example, BadRow):
            raise example
        yield example


def _kept(text: Rendered) -> Rendered:
    """The same text, the row's special-token strings being special tokens."""
    notes = text.notes - {"quoted"} | ({"kept"} if text.quoted else set())
    return replace(text, quoted=frozenset(), notes=notes)


def _first(example: Example, count: int) -> Example:
    return replace(example, ids=example.ids[:count], trained=example.trained[:count], bodies=())


def _quantiles(lengths: list[int]) -> tuple[int, int, int, int]:
    a, b, c, d = np.quantile(lengths or [0], QUANTILES, method="higher").tolist()
    return int(a), int(b), int(c), int(d)

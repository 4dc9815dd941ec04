"""Conversations become token ids and labels, and every mask is checked against the text it stands for."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.data.conversations import Conversation
from fedlora.data.report import numbered

I32: TypeAlias = NDArray[np.int32]

IGNORE = -100
"""Label of a position without loss (PyTorch's ``ignore_index``)."""

QUANTILES = (0.0, 0.5, 0.95, 1.0)


class Tokenizer(Protocol):
    """What we need of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, token_ids: list[int], /) -> str: ...

    def apply_chat_template(self, messages: list[dict[str, str]], /, *, tokenize: bool, add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One example. The label at position i is predicted from the positions before it.

    Args:
        input_ids: (n,) int32, n >= 1. Made read-only.
        labels: (n,) int32, IGNORE or equal to input_ids; IGNORE at position 0, which nothing predicts. Made read-only.
        line: line or row of the file.

    Raises:
        ValueError: shapes, types or the first label are wrong.
    """

    input_ids: I32
    labels: I32
    line: int

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


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What tokenising found; for the operator's eyes.

    Attributes:
        rows: conversations that came in.
        used: examples that came out.
        truncated: rows cut at max_length, dropped ones included.
        dropped: lines of rows of which the cut left nothing to train on.
        tokens: tokens of the examples.
        supervised: tokens of the examples with a loss.
        lengths: tokens of a row before the cut: shortest, median, 95th percentile, longest.
        max_length: the cut.
        bad: (line, reason) of rows that the template or the mask rules out. Reasons are fixed texts.
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

    def lines(self) -> list[str]:
        """The report as text."""
        low, median, high, top = self.lengths
        lines = [
            f"{self.used:,} examples of {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.supervised:,} ({self.supervised / max(self.tokens, 1):.0%}) of them trained on",
            f"tokens a row: {low:,} to {top:,}, median {median:,}, 95 % up to {high:,}",
        ]
        if self.truncated:
            lines.append(f"{self.truncated:,} rows ({self.truncated / self.rows:.1%}) are cut at max_length {self.max_length:,}")
        if self.dropped:
            lines.append(f"the cut leaves nothing to train on: {numbered(list(self.dropped))}")
        return lines


def tokenise(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    append_eos: bool = True,
) -> tuple[list[Tokens], TokenReport]:
    """Turns each conversation into ids and labels.

    Segments are tokenised one by one and joined: that is what generation sees, where the prompt is tokenised alone. Plain text
    starts with what the tokenizer itself puts before a prompt (BOS, for tokenizers that have it). A chat is rendered step by
    step with the chat template; the answers are what the template adds to the rendering with the generation prompt, up to
    and including the end-of-turn token. Turns after the last answer are left out.

    Args:
        conversations: as read.
        tokenizer: of the base model.
        max_length: tokens of an example; longer rows are cut on the right.
        append_eos: train an EOS token after plain text, and after a chat whose template puts nothing behind the last answer.

    Returns:
        Examples in order, without rows of which the cut leaves nothing to train on; and the report.

    Raises:
        DataError: no conversations, no EOS token, a template that renders turns differently once others follow, a mask that
            does not stand for the answers, or nothing left to train on. Names lines, never contents.
        ValueError: max_length < 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length {max_length} leaves nothing to predict")
    if not conversations:
        raise DataError("there are no rows to tokenise", hint="check data.path")
    if append_eos and tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no EOS token, so the model would never learn to stop", hint="set eos_token in the base"
        )
    start, eos = _start(tokenizer), _eos(tokenizer)
    whole = [_example(c, tokenizer, start=start, eos=eos, append_eos=append_eos) for c in conversations]
    cut = [Tokens(t.input_ids[:max_length], t.labels[:max_length], t.line) for t in whole]
    used = [t for t in cut if t.supervised]
    report = TokenReport(
        rows=len(whole),
        used=len(used),
        truncated=sum(len(t) > max_length for t in whole),
        dropped=tuple(t.line for t in cut if not t.supervised),
        tokens=sum(map(len, used)),
        supervised=sum(t.supervised for t in used),
        lengths=_quantiles([len(t) for t in whole]),
        max_length=max_length,
    )
    if not used:
        raise DataError(
            f"none of the {len(whole):,} rows has anything to train on within max_length {max_length}",
            hint=f"a larger training.max_length (the longest row has {report.lengths[-1]:,} tokens), or shorter prompts",
        )
    return used, report


def _quantiles(lengths: list[int]) -> tuple[int, int, int, int]:
    a, b, c, d = np.quantile(lengths, QUANTILES, method="higher").tolist()
    return int(a), int(b), int(c), int(d)


# --- segments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Segment:
    """Text that is tokenised in one piece. ``says`` is what a trained segment must hold: the answer itself."""

    text: str
    trained: bool
    says: str = ""


def _example(c: Conversation, tokenizer: Tokenizer, *, start: list[int], eos: str, append_eos: bool) -> Tokens:
    """The whole example, not yet cut, its mask checked."""
    segments = _rendered(c, tokenizer, eos) if c.chat else [_Segment(t.text, t.trained, t.text) for t in c.turns]
    ids = [] if c.chat else list(start)
    labels = [IGNORE] * len(ids)
    for segment in segments:
        piece = tokenizer.encode(segment.text, add_special_tokens=False)
        ids += piece
        labels += piece if segment.trained else [IGNORE] * len(piece)
    expected = "".join(s.text for s in segments if s.trained)
    says_it = all(_squash(s.says) in _squash(s.text) for s in segments if s.trained)
    if append_eos and tokenizer.eos_token_id is not None and _open_end(c, segments):
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
        expected += eos
    trained = [label for label in labels if label != IGNORE]
    if not ids or not says_it or _squash(tokenizer.decode(trained)) != _squash(expected):
        raise DataError(
            f"mask check failed at line {c.line}: the trained tokens do not decode to the answer",
            hint="the tokenizer or the chat template changes this text; see tokenizer.json and chat_template.jinja of the base",
        )
    labels[0] = IGNORE
    return Tokens(np.array(ids, np.int32), np.array(labels, np.int32), c.line)


def _open_end(c: Conversation, segments: list[_Segment]) -> bool:
    """Nothing behind the last answer tells the model to stop."""
    last = next(s for s in reversed(segments) if s.trained)
    return not c.chat or last.text.rstrip().endswith(last.says.rstrip())


def _rendered(c: Conversation, tokenizer: Tokenizer, eos: str) -> list[_Segment]:
    """A chat as the template renders it, in pieces that start and end where an answer does."""
    segments: list[_Segment] = []
    done = ""
    for number, turn in enumerate(c.turns):
        if not turn.trained:
            continue
        asked = _render(c, tokenizer, number, ask=True)
        answered = _render(c, tokenizer, number + 1, ask=False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise DataError(
                f"the chat template renders line {c.line} differently once more turns follow, so no mask would be right",
                hint="a template that keeps earlier turns as they are, or one row for each answer, the answer last",
            )
        segments.append(_Segment(asked[len(done) :], trained=False))
        answer = answered[len(asked) :]
        stop = answer.rfind(eos) + len(eos) if eos and eos in answer else len(answer)
        segments.append(_Segment(answer[:stop], trained=True, says=turn.text))
        done = asked + answer[:stop]
    return segments


def _render(c: Conversation, tokenizer: Tokenizer, count: int, *, ask: bool) -> str:
    """The first ``count`` turns through the template, with the generation prompt if ``ask``."""
    messages = [{"role": turn.role, "content": turn.text} for turn in c.turns[:count]]
    with suppress(Exception):  # templates raise whatever they like, and their errors may quote the row
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    raise DataError(
        f"the chat template of the base refuses line {c.line}",
        hint="not every template knows system turns; a base without a template needs prompt and completion",
    )


# --- texts --------------------------------------------------------------------------------------------------------


def _start(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer puts before a prompt by itself: BOS, or nothing."""
    bare, dressed = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    for at in range(len(dressed) - len(bare) + 1):
        if dressed[at : at + len(bare)] == bare:
            return dressed[:at]
    return []


def _eos(tokenizer: Tokenizer) -> str:
    return "" if tokenizer.eos_token_id is None else tokenizer.decode([tokenizer.eos_token_id])


def _squash(text: str) -> str:
    """Text as far as tokenizers keep it: compatibility forms (NFKC), no white space, no control characters."""
    return "".join(char for char in unicodedata.normalize("NFKC", text) if char.isprintable() and not char.isspace())

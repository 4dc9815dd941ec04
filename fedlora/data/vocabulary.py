"""What a base's tokenizer makes of a text: ids, where each stands, and which special tokens are the row's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.data.turns import BadRow

I32: TypeAlias = NDArray[np.int32]

UNTELLABLE = "special-token strings of this row cannot be told from its text"
_PRIVATE = 0x100000
"""First character of Unicode's private plane 16: names of special tokens in the tokenizer for rows that quote them."""


class Tokenizer(Protocol):
    """What we need of a transformers tokenizer; all of it public."""

    chat_template: Any

    @property
    def bos_token(self) -> str | None: ...

    @property
    def eos_token(self) -> str | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def unk_token_id(self) -> int | None: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    @property
    def all_special_tokens(self) -> Sequence[str]: ...

    @property
    def backend_tokenizer(self) -> Any: ...

    def __call__(self, text: list[str], /, **options: Any) -> Any: ...

    def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, token_ids: list[int], /) -> str: ...

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], /, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A text as tokens.

    Attributes:
        ids: (n,) int32.
        starts: (n,) int32; first character of each token.
        ends: (n,) int32; the character behind the last.
    """

    ids: I32
    starts: I32
    ends: I32

    def inside(self, start: int, end: int) -> NDArray[np.bool_]:
        """(n,): the token holds at least one character of the text from ``start`` to ``end``."""
        return (self.starts < end) & (self.ends > start)


class Vocabulary:
    """A tokenizer, and which of its tokens steer a model.

    Args:
        tokenizer: of the base.
        written: what the chat template writes itself around turns: added tokens in it steer, whether they are called special
            or not.
    """

    def __init__(self, tokenizer: Tokenizer, written: str = "") -> None:
        self.tokenizer = tokenizer
        added = {number: (str(token.content), bool(token.special)) for number, token in tokenizer.added_tokens_decoder.items()}
        names = {name for name, _ in added.values()}
        steers = {name for name, special in added.values() if special or (name in written and not _is_pair(name, names))}
        steers |= names & set(tokenizer.all_special_tokens)
        self.controls = {number: name for number, (name, _) in added.items() if name in steers and name.strip()}
        self.control = _any_of(self.controls.values())
        self.added = _any_of(name for name in names if name.strip())
        self._numbers = {name: number for number, name in self.controls.items()}

    def encode(self, texts: Sequence[str], quoted: Sequence[frozenset[int]]) -> list[Encoded | BadRow]:
        """Each text in one piece, no special token put before or behind it.

        Law: without quoted strings the ids are ``tokenizer(text, add_special_tokens=False)``; with them, those of a tokenizer
        that does not know the special tokens at these places.

        Args:
            texts: to encode.
            quoted: for each, where special-token strings stand that are text.

        Returns:
            For each text its tokens, or why there are none.

        Raises:
            DataError: the tokenizer does not say where its tokens stand.
        """
        found: list[Encoded | BadRow] = []
        usual = [n for n, where in enumerate(quoted) if not where]
        encoded = dict(zip(usual, self._usual([texts[n] for n in usual]), strict=True))
        for n, (text, where) in enumerate(zip(texts, quoted, strict=True)):
            if n in encoded:
                found.append(encoded[n])
                continue
            try:
                found.append(self._quoting(text, where))
            except BadRow as why:
                found.append(why)
        return found

    def first(self, text: str, at: int, quoted: frozenset[int]) -> list[re.Match[str]]:
        """Tokens that steer, from a place in a text on; without the row's own words."""
        return [match for match in self.control.finditer(text, at) if match.start() not in quoted]

    def _usual(self, texts: list[str]) -> list[Encoded]:
        if not texts:
            return []
        try:
            found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                                   return_token_type_ids=False, verbose=False)  # fmt: skip
        except NotImplementedError:  # transformers' word for a tokenizer without offsets
            raise DataError(
                "the tokenizer of this base does not say where its tokens stand in a text, so no mask could be proved",
                hint="a base with a tokenizer.json: load it once with transformers and call save_pretrained",
            ) from None
        return [_encoded(i, o) for i, o in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    # --- special-token strings that are text ------------------------------------------------------------------------

    def _quoting(self, text: str, quoted: frozenset[int]) -> Encoded:
        """Tokens of a text some of whose special-token strings are text.

        A second tokenizer has the same special tokens under other names of the same length; the names of those that the
        template wrote are put into the text, and what the row says meets no special token.
        """
        if self._second is None or any(ord(char) >= _PRIVATE for char in text):
            raise BadRow(UNTELLABLE)
        second, names = self._second
        real = self.first(text, 0, quoted)
        pieces, at = [], 0
        for match in real:
            pieces += [text[at : match.start()], names[match[0]]]
            at = match.end()
        found = second.encode("".join([*pieces, text[at:]]), add_special_tokens=False)
        steering = [number for number in found.ids if number in self.controls and number != self.tokenizer.unk_token_id]
        if steering != [n for match in real if (n := self._numbers[match[0]]) != self.tokenizer.unk_token_id]:
            raise BadRow(UNTELLABLE)
        return _encoded(found.ids, found.offsets)

    @cached_property
    def _second(self) -> tuple[Any, dict[str, str]] | None:
        """The tokenizer whose special tokens have other names, and the names; None if it cannot be made."""
        names = _other_names(self.controls.values())
        try:
            backend = self.tokenizer.backend_tokenizer
            second = type(backend).from_str(json.dumps(_renamed(json.loads(backend.to_str()), names)))
            second.no_truncation()
            second.no_padding()
        except Exception:  # the library raises plain Exception
            return None
        return second, names


def _is_pair(name: str, names: set[str]) -> bool:
    """``<think>`` and ``</think>`` are blocks inside a turn: what an assistant writes, not what ends it."""
    inner = name.strip("<>").removeprefix("/")
    return {f"<{inner}>", f"</{inner}>"} <= names


def _any_of(names: Any) -> re.Pattern[str]:
    """Matches any of the names, the longest where several begin: as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _encoded(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
    """Tokens with the places where they stand. Byte-level tokenizers may leave white space out of a token's place; one that holds
    nothing else stands behind the token before."""
    where = np.array(offsets, np.int32).reshape(-1, 2)
    starts, ends = where[:, 0], where[:, 1]
    if len(ends) and (empty := starts == ends).any():
        before = np.concatenate([np.zeros(1, np.int32), np.maximum.accumulate(ends)[:-1]])
        starts = np.where(empty, np.minimum(starts, before), starts)
    return Encoded(np.array(ids, np.int32), starts, ends)


def _other_names(controls: Any) -> dict[str, str]:
    """Names of private characters, each as long as the name that it stands for, so that places stay what they are."""
    found, at = {}, _PRIVATE
    for name in sorted(set(controls)):
        found[name] = chr(at) + chr(_PRIVATE + 0xFFFD) * (len(name) - 1)
        at += 1
    return found


def _renamed(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A ``tokenizer.json`` whose special tokens have other names."""
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if merges := model.get("merges"):
        pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    return state

"""Marks around the texts of a row while a template renders them.

Texts are given to the template between marks, characters of a private plane of Unicode. Where the marks come out is where
the texts stand. A second rendering without marks must be the same text, so that marks change nothing unseen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.data.turns import BadRow
from fedlora.data.vocabulary import Vocabulary

TOO_MANY = "too many texts in one row, one in another too deeply, or characters of both private planes of Unicode"

Level = Literal["all", "answers", "ends"]
LEVELS: tuple[Level, ...] = ("all", "answers", "ends")
"""How much is marked: everything, what assistants say, only its ends. A template may look at the first characters of a text."""


PLANES = {first: re.compile(f"[{chr(first)}-{chr(first + 0xFFFD)}]") for first in (0xF0000, 0x100000)}
"""Unicode's private planes 15 and 16: first character -> what matches all of it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A text of a row: whose, and what it is."""

    turn: int
    kind: Literal["text", "reasoning", "call", "argument", "name", "tools"]
    lead: str
    trail: str


class Marks:
    """Marks of one rendering."""

    def __init__(self, vocabulary: Vocabulary, first: int, level: Level) -> None:
        self.known: list[Mark] = []
        self.first, self.level, self._control = first, level, vocabulary.control

    def quote(self, text: str) -> str:
        """The text with a mark behind the first character of each special-token string."""
        return self._control.sub(lambda m: m[0][0] + chr(self.first + 0xFFFD) + m[0][1:], text)

    def put(self, text: str, turn: int, kind: Any, *, answer: bool) -> str:
        """The text between marks, inside of its white space, and a mark in each special-token string."""
        if not (core := text.strip()):
            return text
        begin = text.index(core)
        lead, core, trail = text[:begin], self.quote(core), text[begin + len(core) :]
        if self.level != "all" and not (answer and kind in ("text", "reasoning")):
            return lead + core + trail
        number = self.first + 2 * len(self.known)
        if number + 1 >= self.first + 0xFFFD:
            raise BadRow(TOO_MANY)
        self.known.append(Mark(turn, kind, lead, trail))
        return f"{lead}{'' if self.level == 'ends' else chr(number)}{core}{chr(number + 1)}{trail}"


@dataclass(frozen=True, slots=True)
class Marked:
    """A rendering with its marks taken out: for each mark where the text begins and ends (the last time it is shown)."""

    text: str
    level: Level
    known: tuple[Mark, ...]
    begins: dict[int, int]
    ends: dict[int, int]
    quoted: frozenset[int]

    @classmethod
    def read(cls, text: str, marks: Marks) -> Marked:
        pieces: list[str] = []
        at, length = 0, 0
        places: tuple[dict[int, int], dict[int, int]] = {}, {}
        quoted = set()
        for match in PLANES[marks.first].finditer(text):
            pieces.append(text[at : match.start()])
            length += match.start() - at
            at = match.end()
            number, end = divmod(ord(match[0]) - marks.first, 2)
            if number < len(marks.known):
                places[end][number] = length
            else:
                quoted.add(length - 1)
        pieces.append(text[at:])
        return cls("".join(pieces), marks.level, tuple(marks.known), *places, frozenset(quoted))

    @property
    def complete(self) -> bool:
        """All texts of the row are marked."""
        return self.level == "all"

    def of(self, turn: int, *kinds: str) -> list[int]:
        """Numbers of the marks of a turn."""
        return [n for n, m in enumerate(self.known) if m.turn == turn and (not kinds or m.kind in kinds)]


def marked_json(value: Any, marks: Marks | None, turn: int, kind: str) -> Any:
    """The same JSON value with every text between marks."""
    if isinstance(value, str):
        return value if marks is None else marks.put(value, turn, kind, answer=turn >= 0)
    if isinstance(value, list):
        return [marked_json(item, marks, turn, kind) for item in value]
    if not isinstance(value, dict):
        return value
    return {k if marks is None else marks.quote(k): marked_json(v, marks, turn, kind) for k, v in value.items()}

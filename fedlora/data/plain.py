"""Rows of plain text, with or without a prompt: what is put before and behind them, and which were rendered already."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlora.data.conversations import Conversation
from fedlora.data.template import Rendered, Template
from fedlora.data.turns import Turn
from fedlora.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Plain:
    """Plain rows on one base.

    Args:
        vocabulary: of the base.
        template: of the base, if it has one.
    """

    vocabulary: Vocabulary
    template: Template | None
    start: tuple[int, ...] = field(init=False)
    """ids that the tokenizer puts before a prompt by itself: BOS, or nothing"""
    openers: frozenset[str] = field(init=False)
    """tokens with which a text begins that somebody has rendered with a template"""
    enders: frozenset[str] = field(init=False)
    """tokens that end a turn or a text"""

    def __post_init__(self) -> None:
        tokenizer = self.vocabulary.tokenizer
        shown = (self.template.shown([Turn("user", "x", False)]) if self.template else None) or ""
        first = self.vocabulary.control.match(shown)
        openers = {tokenizer.bos_token, first[0] if first else None}
        enders = {tokenizer.eos_token, *(self.template.enders if self.template else ())}
        known = frozenset(self.vocabulary.controls.values())
        object.__setattr__(self, "start", _start(self.vocabulary))
        object.__setattr__(self, "openers", known & openers)
        object.__setattr__(self, "enders", known & enders)

    def rendered(self, c: Conversation, *, keep: bool) -> Rendered:
        """The text of a row.

        Args:
            keep: special-token strings of the row are special tokens.
        """
        prompt = "".join(turn.text for turn in c.turns if not turn.trained)
        text = prompt + "".join(turn.text for turn in c.turns if turn.trained)
        found = list(self.vocabulary.control.finditer(text))
        begun = text.lstrip().startswith(self.vocabulary.tokenizer.bos_token or "\0")
        last = found[-1] if found and found[-1][0] in self.enders and not text[found[-1].end() :].strip() else None
        ended = last is not None and last.start() >= len(prompt)
        steering = {match[0] for match in found[:-1]} & (self.openers | self.enders)
        whole = keep or self._is_rendered(text)
        notes = set()
        if whole:
            notes = {"kept" if keep else "rendered"} if found else set()
            quoted: frozenset[int] = frozenset()
        else:
            begun, ended = False, ended and not steering
            quoted = frozenset(match.start() for match in found if not (ended and match is last))
            notes = {name for name, there in (("ended", ended), ("quoted", quoted)) if there}
        end = last.end() if ended and last is not None else len(text)
        bodies = ((0, len(prompt)),) if prompt else ()
        return Rendered(text, ((len(prompt), end),), bodies, quoted, begun or not self.start, ended, frozenset(notes))

    def _is_rendered(self, text: str) -> bool:
        """It begins as a rendered text does, and nothing but white space and special tokens follows where a turn ends."""
        if not text.lstrip().startswith(tuple(self.openers)):
            return False
        ends = [match.end() for match in self.vocabulary.control.finditer(text) if match[0] in self.enders]
        return all(not (rest := text[end:].lstrip()) or self.vocabulary.control.match(rest) for end in ends)


def _start(vocabulary: Vocabulary) -> tuple[int, ...]:
    bare, dressed = (vocabulary.tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    for at in range(len(dressed) - len(bare) + 1):
        if dressed[at : at + len(bare)] == bare:
            return tuple(dressed[:at])
    return ()

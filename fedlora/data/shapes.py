"""Rows become turns: one converter a shape. A row that does not fit gets a fixed reason; the row itself is never quoted."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from fedlora.data.rows import NOT_TEXT

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Turn:
    """One speaker's text.

    Attributes:
        role: ``system``, ``user`` or ``assistant``; in plain conversations ``prompt``, ``completion`` or ``text``.
        text: as in the file, not stripped.
        trained: the loss counts this text.
    """

    role: str
    text: str
    trained: bool


Turns: TypeAlias = tuple[tuple[Turn, ...], bool]
"""The turns, and whether they need the chat template."""


class BadRow(Exception):
    """Why a row cannot be used: a fixed text. Stays inside this package."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A layout of rows.

    Attributes:
        keys: columns that a row of this shape has.
        convert: row without empty (None) columns -> turns. Raises BadRow.
    """

    keys: frozenset[str]
    convert: Callable[[Mapping[str, object]], Turns]


# --- values -----------------------------------------------------------------------------------------------------


def plain_text(value: object, name: str) -> str:
    """``value`` if it is a string that can be written as UTF-8.

    Raises:
        BadRow: it is not; ``name`` says what it should have been.
    """
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text")
    if not value.isascii() and _SURROGATE.search(value):
        raise BadRow(NOT_TEXT)
    return value


def _get(row: Mapping[str, object], key: str) -> str:
    if key not in row:
        raise BadRow(f"{key} is missing")
    return plain_text(row[key], key)


def _full(text: str, name: str) -> str:
    if not text.strip():
        raise BadRow(f"{name} is empty")
    return text


# --- chat -------------------------------------------------------------------------------------------------------

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {
    **_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


def _turns(
    value: object, name: str, *, role: str = "role", text: str = "content", roles: Mapping[str, str] = _ROLES
) -> list[Turn]:
    """A list of {role, content} objects, in whatever words the shape has for them."""
    if not isinstance(value, list):
        raise BadRow(f"{name} is not a list of turns")
    turns = []
    for item in value:
        if not isinstance(item, dict):
            raise BadRow(f"{name} is not a list of turns")
        if item.get("tool_calls") or item.get("function_call"):
            raise BadRow("tool calls are not supported")
        speaker = item.get(role)
        if not isinstance(speaker, str) or speaker not in roles:
            raise BadRow("unknown role")
        turns.append(_said(roles[speaker], plain_text(item.get(text), text)))
    return turns


def _said(role: str, text: str) -> Turn:
    return Turn(role, text, trained=role == "assistant")


def _chat(turns: list[Turn]) -> Turns:
    """Checks the order that chat templates take for granted: one system turn or none, then user and assistant in turn."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if any(turn.role == "system" for turn in spoken):
        raise BadRow("a system turn is not the first turn")
    if not any(turn.trained for turn in spoken):
        raise BadRow("no assistant answer")
    if spoken[0].role == "assistant":
        raise BadRow("the assistant speaks first")
    if any(a.role == b.role for a, b in pairwise(spoken)):
        raise BadRow("user and assistant do not alternate")
    for turn in spoken:
        _full(turn.text, f"a turn of the {turn.role}")
    return tuple(turns), True


def _messages(row: Mapping[str, object]) -> Turns:
    if "messages" not in row:
        raise BadRow("messages is missing")
    if row.get("tools"):
        raise BadRow("tool calls are not supported")
    return _chat(_turns(row["messages"], "messages"))


def _sharegpt(row: Mapping[str, object]) -> Turns:
    if "conversations" not in row:
        raise BadRow("conversations is missing")
    return _chat(_system(row) + _turns(row["conversations"], "conversations", role="from", text="value", roles=_SHAREGPT_ROLES))


def _alpaca(row: Mapping[str, object]) -> Turns:
    """``input`` follows ``instruction`` on a new line, as in LLaMA-Factory; ``history`` holds [question, answer] pairs."""
    turns = _system(row)
    for pair in _history(row.get("history")):
        turns += [_said("user", plain_text(pair[0], "history")), _said("assistant", plain_text(pair[1], "history"))]
    question = _full(_get(row, "instruction"), "instruction")
    more = plain_text(row.get("input", ""), "input")
    answer = _full(_get(row, "output"), "output")
    return _chat([*turns, _said("user", f"{question}\n{more}" if more.strip() else question), _said("assistant", answer)])


def _history(value: object) -> list[list[object]]:
    if value is None or value == "":
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRow("history is not a list of pairs")
    return value


def _system(row: Mapping[str, object]) -> list[Turn]:
    text = plain_text(row.get("system", ""), "system")
    return [_said("system", text)] if text.strip() else []


# --- plain ------------------------------------------------------------------------------------------------------


def _prompt_completion(row: Mapping[str, object]) -> Turns:
    """Strings are plain text; two lists of messages are one chat."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(_turns(prompt, "prompt") + _turns(completion, "completion"))
    return (
        Turn("prompt", _full(_get(row, "prompt"), "prompt"), trained=False),
        Turn("completion", _full(_get(row, "completion"), "completion"), trained=True),
    ), False


def _text(row: Mapping[str, object]) -> Turns:
    return (Turn("text", _full(_get(row, "text"), "text"), trained=True),), False


# --- registry -----------------------------------------------------------------------------------------------------

SHAPES: dict[str, Shape] = {
    "messages": Shape(frozenset({"messages"}), _messages),
    "sharegpt": Shape(frozenset({"conversations"}), _sharegpt),
    "prompt-completion": Shape(frozenset({"prompt", "completion"}), _prompt_completion),
    "alpaca": Shape(frozenset({"instruction", "output"}), _alpaca),
    "text": Shape(frozenset({"text"}), _text),
}
"""Shapes by the name that a site file uses, the most telling first: a row with ``messages`` and ``text`` is ``messages``."""

COLUMNS = frozenset(
    {"messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "history", "text"}
)
"""Our names for columns: what a site file may map."""

PREFERENCE = "preference"


def shape_of(row: Mapping[str, object]) -> str | None:
    """The first shape all of whose columns this row has; ``PREFERENCE`` for preference pairs, None if there is none."""
    if {"chosen", "rejected"} <= row.keys():
        return PREFERENCE
    return next((name for name, shape in SHAPES.items() if shape.keys <= row.keys()), None)

"""Rows become turns: one converter a shape. A row that does not fit gets a fixed reason; the row itself is never quoted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fedlora.core.tables.data import SHAPES as NAMES
from fedlora.data.turns import BadRow, Turn, Unread, checked, full, functions_of, plain_text, said, tools_of, turns_of

Row: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Converted:
    """What a row says.

    Attributes:
        turns: in order, at least one of them trained.
        chat: they need the chat template.
        tools: that the assistant may call, a JSON list; ``""``: none.
    """

    turns: tuple[Turn, ...]
    chat: bool
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """A layout of rows.

    Attributes:
        keys: columns that a row of this shape has.
        convert: row without empty (None) columns -> what it says; tells of keys of turns that nothing reads. Raises BadRow.
        more: columns that it may have.
    """

    keys: frozenset[str]
    convert: Callable[[Row, Unread], Converted]
    more: frozenset[str] = frozenset()


def _get(row: Row, key: str) -> str:
    if key not in row:
        raise BadRow(f"{key} is missing")
    return plain_text(row[key], key)


# --- chat -------------------------------------------------------------------------------------------------------

_TOOLS = frozenset({"tools", "functions"})


def _chat(row: Row, turns: list[Turn]) -> Converted:
    return Converted(checked(turns), True, tools_of(row.get("tools")) or functions_of(row.get("functions")))


def _messages(row: Row, unread: Unread) -> Converted:
    if "messages" not in row:
        raise BadRow("messages is missing")
    return _chat(row, turns_of(row["messages"], "messages", unread))


def _sharegpt(row: Row, unread: Unread) -> Converted:
    if "conversations" not in row:
        raise BadRow("conversations is missing")
    return _chat(row, _system(row) + turns_of(row["conversations"], "conversations", unread))


def _alpaca(row: Row, unread: Unread) -> Converted:
    """``input`` follows ``instruction`` on a new line, as in LLaMA-Factory; ``history`` holds [question, answer] pairs."""
    turns = _system(row)
    for pair in _history(row.get("history")):
        turns += [said("user", plain_text(pair[0], "history")), said("assistant", plain_text(pair[1], "history"))]
    question = full(_get(row, "instruction"), "instruction")
    more = plain_text(row.get("input", ""), "input")
    answer = full(_get(row, "output"), "output")
    return _chat(row, [*turns, said("user", f"{question}\n{more}" if more.strip() else question), said("assistant", answer)])


def _history(value: object) -> list[list[object]]:
    if value is None or value == "":
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRow("history is not a list of pairs")
    return value


def _system(row: Row) -> list[Turn]:
    text = plain_text(row.get("system", ""), "system")
    return [said("system", text)] if text.strip() else []


# --- plain ------------------------------------------------------------------------------------------------------


def _prompt_completion(row: Row, unread: Unread) -> Converted:
    """Strings are plain text; two lists of messages are one chat."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(row, turns_of(prompt, "prompt", unread) + turns_of(completion, "completion", unread))
    if row.get("tools") or row.get("functions"):
        raise BadRow("tools need a prompt and a completion of messages")
    return Converted((
        Turn("prompt", full(_get(row, "prompt"), "prompt"), trained=False),
        Turn("completion", full(_get(row, "completion"), "completion"), trained=True),
    ), False)  # fmt: skip


def _text(row: Row, unread: Unread) -> Converted:
    return Converted((Turn("text", full(_get(row, "text"), "text"), trained=True),), False)


# --- registry -----------------------------------------------------------------------------------------------------

_KINDS = (
    Shape(frozenset({"messages"}), _messages, _TOOLS),
    Shape(frozenset({"conversations"}), _sharegpt, _TOOLS | {"system"}),
    Shape(frozenset({"prompt", "completion"}), _prompt_completion, _TOOLS),
    Shape(frozenset({"instruction", "output"}), _alpaca, _TOOLS | {"input", "system", "history"}),
    Shape(frozenset({"text"}), _text),
)
SHAPES: dict[str, Shape] = dict(zip(NAMES, _KINDS, strict=True))
"""Shapes by the name that a site file uses, the most telling first: a row with ``messages`` and ``text`` is ``messages``."""

COLUMNS = frozenset().union(*(shape.keys | shape.more for shape in SHAPES.values()))
"""Our names for columns: what a site file may map."""

PREFERENCE = "preference"


def shape_of(row: Row) -> str | None:
    """The first shape all of whose columns this row has; ``PREFERENCE`` for preference pairs, None if there is none."""
    if {"chosen", "rejected"} <= row.keys():
        return PREFERENCE
    return next((name for name, shape in SHAPES.items() if shape.keys <= row.keys()), None)

"""What one speaker says: messages of a row become turns. Nothing that a message holds is dropped unseen."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedlora.data.files.rows import NOT_TEXT

_SURROGATE = re.compile("[\ud800-\udfff]")
NO_CALLS = "a tool call has no name, or arguments that are no JSON object"
NO_TOOLS = "tools are not a JSON list of objects"

Unread: TypeAlias = Callable[[str], None]
"""Called with the name of each key of a turn that nothing reads."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One speaker's turn.

    Attributes:
        role: ``system``, ``developer``, ``user``, ``assistant`` or ``tool``; in plain conversations ``prompt``,
            ``completion`` or ``text``.
        text: as in the file, not stripped; ``""`` for an assistant's turn that only calls tools.
        trained: the loss counts this turn.
        reasoning: what an assistant thought before it spoke.
        calls: tool calls of an assistant, a JSON list of ``{"id", "type": "function", "function": {"name", "arguments"}}``;
            ``""``: none. Arguments are a JSON object, or text that holds one, as in the file.
        name: of the speaker or of the tool that answers.
        call_id: the call that a tool answers.
    """

    role: str
    text: str
    trained: bool
    reasoning: str = ""
    calls: str = ""
    name: str = ""
    call_id: str = ""


class BadRow(Exception):
    """Why a row cannot be used: a fixed text. Stays inside this package."""


# --- values -----------------------------------------------------------------------------------------------------


def plain_text(value: object, name: str) -> str:
    """``value`` if it is a string that can be written as UTF-8.

    Raises:
        BadRow: it is not; ``name`` says what it should have been.
    """
    if not isinstance(value, str):
        raise BadRow(f"{name} is empty (null)" if value is None else f"{name} is not text")
    if not value.isascii() and _SURROGATE.search(value):
        raise BadRow(NOT_TEXT)
    return value


def full(text: str, name: str) -> str:
    """``text`` if it holds more than white space.

    Raises:
        BadRow: it does not.
    """
    if not text.strip():
        raise BadRow(f"{name} is empty")
    return text


def as_json(value: Any, bad: str) -> str:
    """``value`` as JSON text, none of it changed.

    Raises:
        BadRow: with ``bad``, if it is no JSON value, or not UTF-8.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        text = ""
    if not text:
        raise BadRow(bad)
    return plain_text(text, bad)


def parsed(value: object, bad: str) -> Any:
    """``value``, read as JSON if it is text.

    Raises:
        BadRow: with ``bad``, if the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    raise BadRow(bad)


# --- a turn -----------------------------------------------------------------------------------------------------

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = {
    **ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
SWITCHES = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")
"""Keys of a turn that say whether the loss counts it: OpenAI's, axolotl's, ms-swift's, verl's."""
REASONING = ("reasoning_content", "reasoning", "thinking")
_ON, _OFF = ("1", "true", "yes"), ("0", "false", "no")


def turns_of(value: object, name: str, unread: Unread) -> list[Turn]:
    """A list of messages, each {role, content} (OpenAI) or {from, value} (ShareGPT), as turns.

    Args:
        value: of the row.
        name: of the column, for reasons.
        unread: is told of keys that nothing reads.

    Raises:
        BadRow: it is no such list, or a message cannot be a turn.
    """
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(f"{name} is not a list of turns")
    return [_turn({k: v for k, v in item.items() if v is not None}, unread) for item in value]


def _turn(item: dict[str, object], unread: Unread) -> Turn:
    sharegpt = "from" in item and "role" not in item
    said, roles = item.pop("from" if sharegpt else "role", None), SHAREGPT_ROLES if sharegpt else ROLES
    if not isinstance(said, str) or said not in roles:
        raise BadRow("unknown role")
    role, content = roles[said], item.pop("value" if sharegpt else "content", None)
    calls = _calls(item)
    if said == "function_call":
        calls, content = [*calls, _call(parsed(content, NO_CALLS))], None
    thoughts = [plain_text(item.pop(key), "reasoning") for key in REASONING if key in item]
    text = "" if content is None and calls else _content(content, thoughts, unread)
    thoughts = list(dict.fromkeys(thought for thought in thoughts if thought.strip()))
    if thoughts and role != "assistant":
        raise BadRow("only the assistant can have reasoning")
    if calls and role != "assistant":
        raise BadRow("only the assistant can call tools")
    trained = _trained(item, role, unread)
    named = {key: plain_text(item.pop(key, ""), key) for key in ("name", "tool_call_id")}
    for key in item:
        unread(key)
    written = as_json(calls, NO_CALLS) if calls else ""
    return Turn(role, text, trained, "\n".join(thoughts), written, named["name"], named["tool_call_id"])


def _content(content: object, thoughts: list[str], unread: Unread) -> str:
    """Text, or the joined text of a list of parts; parts with reasoning are added to ``thoughts``."""
    if not isinstance(content, list):
        return plain_text(content, "content")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(plain_text(part, "content"))
            continue
        held = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        kind = held.pop("type", None)
        if kind in ("text", "input_text", "output_text"):
            texts.append(plain_text(held.pop("text", None), "content"))
        elif kind in ("thinking", "reasoning"):
            thought = next((held.pop(key) for key in ("thinking", "reasoning", "text") if key in held), None)
            thoughts.append(_content(thought, [], unread))
        else:
            raise BadRow("a part of content is neither text nor reasoning")
        for key in held:
            unread(f"{key} of a part")
    return "".join(texts)


def _trained(item: dict[str, object], role: str, unread: Unread) -> bool:
    """Whether the loss counts this turn: the assistant's, unless a switch says no."""
    answer = trained = role == "assistant"
    for key in SWITCHES:
        if key not in item:
            continue
        on = _switch(item.pop(key))
        if on and not answer:
            unread(f"{key} of a turn of the {role}")  # other roles are never trained on
        trained = trained and on
    if "training_detail" in item or "train_detail" in item:
        raise BadRow("parts of a turn cannot be trained on by themselves")
    return trained


def _switch(value: object) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow("a weight of a turn is neither 0 nor 1")
    text = str(int(value) if isinstance(value, int | float) and value == int(value) else value).strip().lower()
    if text not in (*_ON, *_OFF):
        raise BadRow("a weight of a turn is neither 0 nor 1")
    return text in _ON


# --- tools --------------------------------------------------------------------------------------------------------


def _calls(item: dict[str, object]) -> list[dict[str, object]]:
    """The calls of a message, in OpenAI's form."""
    found = parsed(item.pop("tool_calls", None) or [], NO_CALLS)
    if not isinstance(found, list):
        raise BadRow(NO_CALLS)
    old = parsed(item.pop("function_call", None), NO_CALLS)
    return [_call(call) for call in [*found, *([old] if old else [])]]


def _call(call: object) -> dict[str, object]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name.strip():
        raise BadRow(NO_CALLS)
    given = function.get("arguments", function.get("parameters"))
    if not isinstance(parsed({} if given is None or given == "" else given, NO_CALLS), dict):
        raise BadRow(NO_CALLS)
    made = {"type": "function", "function": {"name": name, "arguments": given or {}}}
    number = call.get("id")
    return {"id": number, **made} if isinstance(number, str) and number else dict(made)


def tools_of(value: object) -> str:
    """The tools that a row offers as a JSON list; ``""``: none.

    Raises:
        BadRow: neither a list of objects nor JSON text of one.
    """
    found = parsed(value, NO_TOOLS) if value is not None and value != "" else []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRow(NO_TOOLS)
    return as_json(found, NO_TOOLS) if found else ""


def functions_of(value: object) -> str:
    """The same for OpenAI's earlier ``functions``."""
    found = tools_of(value)
    return as_json([{"type": "function", "function": one} for one in json.loads(found)], NO_TOOLS) if found else ""


# --- order --------------------------------------------------------------------------------------------------------


def checked(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """The turns, if chat templates can take them: one system turn or none, then speakers in turn, tools after calls.

    Raises:
        BadRow: they cannot, or no answer is trained on.
    """
    turns = tuple(turns)
    spoken = turns[1:] if turns and turns[0].role in ("system", "developer") else turns
    if any(turn.role in ("system", "developer") for turn in spoken):
        raise BadRow("a system turn is not the first turn")
    if not any(turn.role == "assistant" for turn in spoken):
        raise BadRow("no assistant answer")
    if spoken[0].role == "assistant":
        raise BadRow("the assistant speaks first")
    before = ""
    for turn in spoken:
        if turn.role == "tool" and before not in ("assistant", "tool"):
            raise BadRow("a tool answers that nobody called")
        if turn.role == before != "tool":
            raise BadRow("user and assistant do not alternate")
        if not turn.calls and turn.role != "tool":
            full(turn.text, f"a turn of the {turn.role}")
        before = turn.role
    if not any(turn.trained for turn in spoken):
        raise BadRow("no answer of this row is to be trained on")
    return turns


def said(role: str, text: str) -> Turn:
    """A turn of nothing but text."""
    return Turn(role, text, trained=role == "assistant")

"""JSON in the forms that people have: an object a line, objects over many lines, a list, a list inside an object."""

from __future__ import annotations

import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from fedlora.core.errors import DataError
from fedlora.data.files.rows import NOT_JSON, NOT_OBJECT, TOO_DEEP, TOO_LONG, Row
from fedlora.data.files.sources import MAX_ROW, Source

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_COLON = re.compile(r"[ \t\r\n]*:")
_END = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*\Z")


class _NoValue(Exception):
    """Why a text is no JSON value: a fixed text. Stays inside this module."""


# --- values -----------------------------------------------------------------------------------------------------------


def parsed(text: str) -> object:
    """The value that a text in some cell stands for, or None if it is no JSON."""
    found, _ = _tried(lambda: _loads(text))
    return found


def _tried(attempt: Callable[[], Any]) -> tuple[Any, str]:
    """What an attempt gives, or None and the reason. Leaves no exception behind: those of json hold the text."""
    try:
        return attempt(), ""
    except _NoValue as why:
        return None, str(why)


def _loads(text: str, decode: Callable[..., Any] = json.loads) -> Any:
    """Any JSON, numbers of any length included."""
    why = ""
    try:
        return decode(text)
    except json.JSONDecodeError:
        why = NOT_JSON
    except RecursionError:
        why = TOO_DEEP
    except ValueError:  # a whole number beyond Python's limit of 4,300 digits
        pass
    if why:
        raise _NoValue(why)
    if decode is json.loads:
        return _loads(text, _loads_long)
    raise _NoValue(NOT_JSON)


def _loads_long(text: str) -> Any:
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else digits)


def _object(text: str, source: Source) -> Row:
    """The object that a text is, as a whole; else why it is none."""
    value, why = _tried(lambda: _loads(text))
    if why == TOO_DEEP:
        value, why = _tried(lambda: _shallow(text, source.wanted))
    if why:
        return why
    return value if isinstance(value, dict) else NOT_OBJECT


def _shallow(text: str, wanted: frozenset[str] | None) -> dict[str, object]:
    """An object of which only the wanted columns are decoded; how deep the others nest does not matter."""
    row: dict[str, object] = {}
    at = _SPACE.match(text, 0).end()  # type: ignore[union-attr]
    end, why = _extent(text, at)
    if why or not _END.match(text, end):
        raise _NoValue(why or NOT_JSON)
    if text[at] != "{":
        raise _NoValue(NOT_OBJECT)
    at += 1
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if at >= end - 1:
            return row
        key, at = _key(text, at)
        begin = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        at = _value_end(text, begin, end - 1)
        if wanted is None or key in wanted:
            row[key] = _loads(text[begin:at])


def _key(text: str, at: int) -> tuple[str, int]:
    """The key of a pair, and where its value may begin."""
    if text[at : at + 1] == '"':
        end, why = _extent(text, at)
        colon = _COLON.match(text, end)
        if colon and not why:
            return str(_loads(text[at:end])), colon.end()
    raise _NoValue(NOT_JSON)


def _value_end(text: str, at: int, stop: int) -> int:
    """Where the value that begins at ``at`` ends."""
    if text[at : at + 1] in '{["':
        end, why = _extent(text, at)
        if why:
            raise _NoValue(why)
        return end
    comma = text.find(",", at, stop)
    return comma if comma >= 0 else stop


def _extent(text: str, at: int) -> tuple[int, str]:
    """Where the string, list or object at ``at`` ends, found without recursion; and why there is no end."""
    depth = 0
    for token in _TOKEN.finditer(text, at):
        mark = token.group()
        if mark in "{[":
            depth += 1
        elif mark in "}]":
            depth -= 1
        elif len(mark) < 2 or mark[-1] != '"':
            return len(text), NOT_JSON
        if depth <= 0:
            return token.end(), ""
    return len(text), NOT_JSON


def _depth(text: str) -> int:
    """Objects and lists that a text opens and does not close; 0 if it ends inside a string, which no JSON text does."""
    depth = 0
    for token in _TOKEN.finditer(text):
        mark = token.group()
        depth += (mark in "{[") - (mark in "}]")
        if mark[0] == '"' and (len(mark) < 2 or mark[-1] != '"'):
            return 0
    return depth


# --- lines ------------------------------------------------------------------------------------------------------------


def read_jsonl(source: Source) -> Iterator[tuple[int, Row]]:
    """One JSON object a line, or over several lines; blank lines do not count. Numbers are those of the lines where they begin.

    A file that is a list is read as one, whatever its name says.
    """
    if _starts(source) == "[" and _is_document(source):
        yield from read_json(source)
        return
    yield from _unwrapped_if_alone(_json_lines(source.lines(), source), source)


def _json_lines(lines: Iterator[tuple[int, str]], source: Source) -> Iterator[tuple[int, Row]]:
    back: deque[tuple[int, str]] = deque()
    while True:
        number, line = back.popleft() if back else next(lines, (0, ""))
        if not number:
            return
        if len(line) >= MAX_ROW and not line.endswith("\n"):
            line = _rest(lines)
            yield number, TOO_LONG
            continue
        if line.isspace():
            continue
        row = _object(line, source)
        if row is NOT_JSON and line[0] == "\ufeff":  # of a file that was put behind another one
            line = line[1:]
            row = _object(line, source)
        if row is NOT_JSON:
            yield from ((number, r) for r in _mended(_gathered(line, lines, back), source))
        else:
            yield number, row


def _rest(lines: Iterator[tuple[int, str]]) -> str:
    """Reads to the end of a line that is too long."""
    return next((piece for _, piece in lines if piece.endswith("\n")), "")


def _gathered(line: str, lines: Iterator[tuple[int, str]], back: deque[tuple[int, str]]) -> str:
    """An object that goes on after its line: up to where it ends, or to the next line that begins one as far left as this."""
    indent = len(line) - len(line.lstrip())
    if line[indent : indent + 1] != "{":
        return line
    found, depth, size = [line], _depth(line), len(line)
    while depth > 0 and size < MAX_ROW:
        item = next(lines, None)
        if item is None:
            break
        more = item[1]
        left = more.lstrip()
        if left.startswith("{") and len(more) - len(left) <= indent:
            back.append(item)
            break
        found.append(more)
        size += len(more)
        depth += _depth(more)
    return "".join(found)


def _mended(text: str, source: Source) -> list[Row]:
    """The objects of a text that is not one object: several in a row, or one with a comma behind it."""
    rows: list[Row] = []
    at = _BETWEEN.match(text, 0).end()  # type: ignore[union-attr]
    while at < len(text):
        end, why = _extent(text, at) if text[at] == "{" else (len(text), NOT_JSON)
        row = why or _object(text[at:end], source)
        if isinstance(row, str):
            return [*rows, row]
        rows.append(row)
        at = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]
    return rows or [NOT_JSON]


# --- documents ----------------------------------------------------------------------------------------------------------


def read_json(source: Source) -> Iterator[tuple[int, Row]]:
    """A list of objects, alone or inside an object; or objects one after the other. Numbers are positions, from 1, or lines."""
    if _starts(source) == "{" and not _is_document(source):
        yield from _unwrapped_if_alone(_json_lines(source.lines(), source), source)
        return
    with source.text(newline="\n") as file:
        text = file.read()
    value, why = _tried(lambda: _loads(text))
    if not why:
        yield from _of_document(value, source)
    elif text.lstrip().startswith("{"):
        pieces = enumerate(io.StringIO(text, newline="\n"), 1)
        yield from _unwrapped_if_alone(_json_lines(pieces, source), source)
    elif text.lstrip().startswith("["):
        yield from enumerate(_elements(text, source), 1)
    else:
        raise DataError(
            f"{source.name}: {'the file is empty' if not text.strip() else 'neither a list nor an object of JSON'}",
            hint="write one JSON object a line (JSONL)",
        )


def _starts(source: Source) -> str:
    """The first character that is no white space, among the first."""
    with source.text(newline="\n") as file:
        return file.read(4096).lstrip()[:1]


def _is_document(source: Source) -> bool:
    """The first line is not a value of its own, with others behind it."""
    full = (line for _, line in source.lines() if not line.isspace())
    first, second = next(full, ""), next(full, "")
    return not second or len(first) >= MAX_ROW or _tried(lambda: _loads(first))[1] == NOT_JSON


def _elements(text: str, source: Source) -> Iterator[Row]:
    """The objects of a list that is not JSON as a whole: each for itself, so that one bad one costs no other."""
    at = text.index("[") + 1
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
            if at >= len(text):
                return
            if text[at] == "[":  # lists one after the other
                at += 1
                continue
        if text[at : at + 1] in ("", "]", "}"):  # the list does not end, or more than it ends
            yield NOT_JSON
            return
        row, at = _element(text, at, source)
        yield row
        if at >= len(text) and isinstance(row, str):  # nothing begins behind a bad one
            return


def _element(text: str, at: int, source: Source) -> tuple[Row, int]:
    """The element that begins at ``at``, and where the next one may begin."""
    if text[at] != "{":
        end, why = _tried(lambda: _value_end(text, at, text.find("]", at) if "]" in text[at:] else len(text)))
        return (why, _next_object(text, at)) if why else (NOT_OBJECT, max(end, at + 1))
    end, why = _extent(text, at)
    row = why or _object(text[at:end], source)
    following = text[_SPACE.match(text, end).end() :][:1]  # type: ignore[union-attr]
    if isinstance(row, str) and (why or following not in (",", "]")):  # where it seems to end is wrong
        end = _next_object(text, at)
    return row, end


def _next_object(text: str, at: int) -> int:
    """Where an object begins that stands as far left as the one at ``at``, or behind a closing brace on the same line."""
    left = text.rfind("\n", 0, at) + 1
    indent = text[left:at]
    if indent.strip():
        following = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*(?=\{)").search(text, at)
        return following.end() if following else len(text)
    following = re.compile(r"\n" + re.escape(indent) + r"(?=\{)").search(text, at)
    return following.end() if following else len(text)


def _unwrapped_if_alone(rows: Iterator[tuple[int, Row]], source: Source) -> Iterator[tuple[int, Row]]:
    """The rows; or, if there is a single object, those of the list inside it."""
    first, second = next(rows, None), next(rows, None)
    if first is None:
        return
    if second is None and not isinstance(first[1], str):
        yield from _of_document(first[1], source, number=first[0])
        return
    yield first
    if second is not None:
        yield from chain([second], rows)


def _of_document(value: object, source: Source, *, number: int = 1) -> Iterator[tuple[int, Row]]:
    """The rows of a whole document: a list, an object with a list of objects in it, or an object that is a row."""
    if isinstance(value, dict):
        rows = _list_inside(value, source)
        if rows is None:
            yield number, value
            return
        value = rows
    if not isinstance(value, list):
        raise DataError(f"{source.name}: neither a list nor an object of JSON", hint="write one JSON object a line (JSONL)")
    for position, row in enumerate(value, 1):
        yield position, row if isinstance(row, dict) else NOT_OBJECT


def _list_inside(value: dict[str, Any], source: Source) -> list[Any] | None:
    """The list of rows that an object holds, None if the object is a row itself."""
    if any(shape <= value.keys() for shape in source.shapes) and not _by_columns(value):
        return None
    inside = [item for item in value.values() if isinstance(item, dict | list)]
    if len(inside) == 1 and isinstance(inside[0], dict) and not _by_columns(value):  # {"data": {"rows": [...]}}
        value = inside[0]
    lists = [key for key, item in value.items() if isinstance(item, list) and any(isinstance(x, dict) for x in item)]
    if "data" in lists or len(lists) == 1:
        source.note("the rows are a list inside one object, whose other entries are not used")
        found: list[Any] = value["data" if "data" in lists else lists[0]]
        return found
    if len(lists) > 1:
        raise DataError(f"{source.name}: one object with {len(lists)} lists of objects", hint="one file for each, or JSONL")
    if _by_columns(value):
        raise DataError(
            f"{source.name}: a table by columns, not by rows",
            hint="write an object for each row; in pandas: to_json(path, orient='records', lines=True)",
        )
    return None


def _by_columns(value: dict[str, Any]) -> bool:
    """As pandas writes a table by itself: a column is an object from row numbers to values; or it is a plain list of values."""
    parts = list(value.values())
    rows = [p.keys() if isinstance(p, dict) else range(len(p)) for p in parts if isinstance(p, dict | list)]
    plain = all(isinstance(p, dict) and all(k.isdigit() for k in p) for p in parts) or all(
        isinstance(p, list) and not any(isinstance(x, dict) for x in p) for p in parts
    )
    return len(rows) == len(parts) > 0 and plain and len({len(r) for r in rows}) == 1 and bool(rows[0])

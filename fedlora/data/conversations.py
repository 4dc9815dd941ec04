"""A file becomes conversations and a report. Bad rows are counted and named by line; nothing here ever quotes a row."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.core.errors import DataError
from fedlora.data.readers import READERS, Row, format_of
from fedlora.data.shapes import COLUMNS, PREFERENCE, SHAPES, shape_of
from fedlora.data.turns import BadRow, Turn, plain_text

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example before it becomes tokens.

    Attributes:
        turns: in order, at least one of them trained.
        chat: True: the chat template makes text of it; False: the turns are plain text, one after the other.
        line: 1-based line (JSONL, CSV) or row (JSON, Parquet) of the file.
        group: patient or customer; ``""``: a group of its own.
        tools: that the assistant may call, a JSON list; ``""``: none.
    """

    turns: tuple[Turn, ...]
    chat: bool
    line: int
    group: str
    tools: str = ""


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What reading a file found; for the operator's eyes.

    Attributes:
        path: the file's name without its directory.
        format: key of READERS.
        shape: key of SHAPES.
        rows: rows in the file, without blank lines.
        used: rows that became conversations; ``rows - len(bad)``.
        bad: (line, reason) of every other row. Reasons are fixed texts.
        unread: (name, count) of columns, and of keys of turns, that hold something and that nothing reads; by name.
    """

    path: str
    format: str
    shape: str
    rows: int
    used: int
    bad: tuple[tuple[int, str], ...]
    unread: tuple[tuple[str, int], ...] = ()

    def lines(self) -> list[str]:
        """The report as text: a headline, one line a reason with at most 20 line numbers, and what nothing reads."""
        head = f"{self.path}: {self.used:,} of {self.rows:,} rows used ({self.format}, {self.shape})"
        by_reason: dict[str, list[int]] = {}
        for line, reason in self.bad:
            by_reason.setdefault(reason, []).append(line)
        left = [f"not read: {listed(self.unread)}"] if self.unread else []
        return [head, *(f"{reason}: {numbered(lines)}" for reason, lines in sorted(by_reason.items())), *left]


def numbered(lines: list[int]) -> str:
    """``lines 3, 8 and 310 more``: at most 20 numbers, then a count."""
    shown = ", ".join(str(line) for line in lines[:_SHOWN])
    more = f" and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    return f"{'line' if len(lines) == 1 else 'lines'} {shown}{more}"


def listed(counts: Sequence[tuple[str, int]]) -> str:
    """``a (3), b (1) and 7 more``: at most 20 names, each with its count."""
    shown = ", ".join(f"{_name(name)} ({count:,})" for name, count in counts[:_SHOWN])
    return shown + (f" and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else "")


def _name(name: str) -> str:
    """A name out of a file, fit to be shown on one line."""
    return "".join(char if char.isprintable() else "?" for char in name[:40]) + ("..." if len(name) > 40 else "")


def read(
    path: Path,
    *,
    format: str = "auto",
    shape: str = "auto",
    columns: Mapping[str, str] = {},
    group_key: str = "",
) -> tuple[list[Conversation], ReadReport]:
    """Reads a data file.

    Args:
        path: a local file.
        format: key of READERS, or ``auto``: by suffix.
        shape: key of SHAPES, or ``auto``: by the columns, which must agree on one shape.
        columns: our name -> the file's column, e.g. ``{"prompt": "Question"}``.
        group_key: the file's column that names the patient or customer; ``""``: every row is a group of its own.

    Returns:
        The conversations in file order, and the report. Rows that cannot be used are in the report only.

    Raises:
        DataError: the file cannot be read, a setting fits no row, the rows have several shapes or hold preference pairs,
            or no row can be used. No error quotes a row, a column name of the file, or chains an error that does.
    """
    _check_settings(format, shape, columns)
    format, rows = _rows(path, format)
    _check_columns(path, rows, {**{f"columns.{ours}": theirs for ours, theirs in columns.items()}, "group_key": group_key})
    if shape == "auto":
        shape = _agreed(path, [_renamed(row, columns) for _, row in rows if not isinstance(row, str)])
    conversations, bad = [], []
    columns_left: Counter[str] = Counter()
    keys_left: Counter[str] = Counter()
    for line, row in rows:
        try:
            conversations.append(_conversation(line, row, keys_left, shape=shape, columns=columns, group_key=group_key))
        except BadRow as why:
            bad.append((line, str(why)))
            continue
        columns_left.update(_columns_left(row, shape=shape, columns=columns, group_key=group_key))
    unread = [
        *(("column " + n, k) for n, k in sorted(columns_left.items())),
        *(("key " + n, k) for n, k in sorted(keys_left.items())),
    ]
    report = ReadReport(path.name, format, shape, len(rows), len(conversations), tuple(bad), tuple(unread))
    if not conversations:
        raise _nothing(report)
    return conversations, report


def _nothing(report: ReadReport) -> DataError:
    reasons = "; ".join(report.lines()[1:])
    return DataError(
        f"{report.path}: none of the {report.rows:,} rows can be used ({report.format}, {report.shape}): {reasons}",
        hint="files must be UTF-8; set data.format, data.shape and data.columns to what the file holds",
    )


def _check_settings(format: str, shape: str, columns: Mapping[str, str]) -> None:
    for setting, value, registry in (("format", format, READERS), ("shape", shape, SHAPES)):
        if value != "auto" and value not in registry:
            raise DataError(f"{setting} {value!r} is unknown", hint=f"auto, {', '.join(registry)}")
    for ours in columns:
        if ours not in COLUMNS:
            close = difflib.get_close_matches(ours, COLUMNS, n=1)
            raise DataError(
                f"columns maps {ours!r}, which is not a name of ours",
                hint=f"did you mean {close[0]!r}?" if close else f"one of {', '.join(sorted(COLUMNS))}",
            )


def _check_columns(path: Path, rows: list[tuple[int, Row]], wanted: Mapping[str, str]) -> None:
    """Some row has each column that a setting names. The names are the operator's, so they may be shown."""
    for setting, theirs in wanted.items():
        if theirs and not any(row.get(theirs) is not None for _, row in rows if not isinstance(row, str)):
            raise DataError(f"{path.name}: no row has the column {theirs!r} that {setting} names", hint=f"correct data.{setting}")


def _rows(path: Path, format: str) -> tuple[str, list[tuple[int, Row]]]:
    """The format and all rows of a file, in memory."""
    why = ""
    try:
        name = format_of(path) if format == "auto" else format
        rows = list(READERS[name](path))
    except OSError as err:
        why = err.strerror or "input/output error"
    if why:
        raise DataError(f"{path}: {why}", hint="check data.path and who may read the file")
    if not rows:
        raise DataError(f"{path.name}: the file holds no rows", hint="check data.path")
    bad = tuple((line, row) for line, row in rows if isinstance(row, str))
    if len(bad) == len(rows):
        raise _nothing(ReadReport(path.name, name, "no shape", len(rows), 0, bad))
    return name, rows


def _renamed(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """The row under our names, without empty (None) columns."""
    taken = set(columns) | set(columns.values())
    named = {key: value for key, value in row.items() if key not in taken}
    named.update({ours: row.get(theirs) for ours, theirs in columns.items()})
    return {key: value for key, value in named.items() if value is not None}


def _agreed(path: Path, rows: list[dict[str, object]]) -> str:
    """The one shape of all rows that have one."""
    counts = Counter(name for name in map(shape_of, rows) if name is not None)
    if PREFERENCE in counts:
        raise DataError(
            f"{path.name}: {counts[PREFERENCE]:,} rows hold preference pairs (chosen, rejected), which cannot be trained on",
            hint="FedLoRA does supervised fine-tuning: keep the chosen answer as completion, or set data.shape",
        )
    if len(counts) > 1:
        found = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common())
        raise DataError(f"{path.name}: the rows have more than one shape: {found}", hint="split the file, or set data.shape")
    if not counts:
        raise DataError(
            f"{path.name}: the columns of none of the {len(rows):,} readable rows make a known shape",
            hint=f"known: {', '.join(SHAPES)}; or data.columns, e.g. {{ prompt = 'question', completion = 'answer' }}",
        )
    return next(iter(counts))


def _conversation(
    line: int, row: Row, keys_left: Counter[str], *, shape: str, columns: Mapping[str, str], group_key: str
) -> Conversation:
    if isinstance(row, str):
        raise BadRow(row)
    names: list[str] = []
    found = SHAPES[shape].convert(_renamed(row, columns), names.append)
    group = _group(row.get(group_key)) if group_key else ""
    keys_left.update(names)
    return Conversation(found.turns, found.chat, line, group, found.tools)


def _columns_left(row: Row, *, shape: str, columns: Mapping[str, str], group_key: str) -> list[str]:
    """The row's own names of columns that hold something and that this shape does not read."""
    known = SHAPES[shape].keys | SHAPES[shape].more
    read = {columns.get(ours, ours) for ours in known} | {group_key}
    return (
        [key for key, value in row.items() if key not in read and value is not None and value != ""]
        if isinstance(row, Mapping)
        else []
    )


def _group(value: object) -> str:
    """A group's name as text. Identifiers come as text or numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("the group is missing")
    name = plain_text(str(value), "the group")
    if not name.strip() or name in ("nan", "inf", "-inf"):
        raise BadRow("the group is missing")
    return name

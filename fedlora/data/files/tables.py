"""CSV and TSV as spreadsheets, databases and R write them."""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper

from fedlora.core.errors import DataError
from fedlora.data.files.rows import NOT_CLOSED, Row, not_fields
from fedlora.data.files.sources import MAX_ROW, Source

_MOST_FIELD = 1 << 24
"""Characters of a field: 16 Mi. A quotation mark that nothing closes swallows no more."""
_MOST_AGAIN = 1 << 29
"""Characters that are read once more after rows that are wrong, at most."""
_TRIED = 10_000
"""Records that decide how quotation marks are escaped."""
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_SEPARATOR = re.compile(r"sep=([,;|\t])\s*", re.IGNORECASE)
"""Excel's own line for itself."""
_ROW_NAME = re.compile(r'"[0-9]+"')
_NULL = re.compile(r"(?:^|\t)\\N(?=\t|\r?\n|\Z)")
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|(.))", re.DOTALL)
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}

HEADER_HINT = "the first line must name the columns, each differently; or set data.header = false: they are called 1, 2, 3 ..."


def read_csv(source: Source) -> Iterator[tuple[int, Row]]:
    """A header and rows, delimited by whichever of comma, semicolon, tab and bar the header holds most often."""
    with source.text(newline="") as file:
        first = next((line for line in iter(partial(file.readline, MAX_ROW), "") if line.strip()), "")
    said = _SEPARATOR.fullmatch(first)
    yield from _table(source, said[1] if said else max(",;\t|", key=_QUOTED.sub("", first).count))


def read_tsv(source: Source) -> Iterator[tuple[int, Row]]:
    """A header and rows with tabs between the fields, quoted as Excel does, or escaped as Postgres does if it holds a ``\\N``."""
    if _has_null(source):
        source.note(r"read as Postgres' COPY writes it, because a field is \N: \t, \n and \\ stand for tab, line feed and \ ")
        yield from read_postgres(source)
    else:
        yield from _table(source, "\t")


def read_postgres(source: Source) -> Iterator[tuple[int, Row]]:
    """Postgres' COPY in text format: tabs between the fields, backslash escapes, no quotation marks, ``\\N`` for NULL."""
    columns: _Columns | None = None
    for number, line in source.lines():
        line = line.rstrip("\r\n")
        if line == "\\.":
            return
        fields = [None if f == r"\N" else _ESCAPE.sub(_unescaped, f) if "\\" in f else f for f in line.split("\t")]
        if columns is None:
            columns = _Columns([f or "" for f in fields], source)
            if source.header:
                continue
        if line:
            yield number, columns.row(fields) if len(fields) == columns.width else not_fields(len(fields), columns.width)


def _unescaped(found: re.Match[str]) -> str:
    octal, hexadecimal, letter = found.groups()
    if octal or hexadecimal:
        return chr(int(octal, 8) & 0xFF if octal else int(hexadecimal, 16))
    return _ESCAPED.get(letter, letter)


def _has_null(source: Source) -> bool:
    return any("\\N" in line and _NULL.search(line) for _, line in source.lines())


class _Columns:
    """What the first line names: which fields of a record are wanted, and under which name."""

    def __init__(self, header: list[str], source: Source) -> None:
        names = [name.strip() for name in header] if source.header else [str(n) for n in range(1, len(header) + 1)]
        self.width = len(names)
        self.named = max((n for n, name in enumerate(names, 1) if name), default=0)
        counts = Counter(names)
        wanted = source.wanted
        twice = [n for n, count in counts.items() if n and count > 1 and (wanted is None or n in wanted)]
        if twice and wanted is not None:  # these names are ours or the operator's, so they may be shown
            raise DataError(
                f"{source.name}: the first line names the column {min(twice)!r} twice", hint="rename one of them, or remove it"
            )
        self.used = [
            (name, at) for at, name in enumerate(names) if name and counts[name] == 1 and (wanted is None or name in wanted)
        ]
        self.others = [name for name in counts if name and wanted is not None and name not in wanted]
        self.source = source

    def row(self, fields: list[str] | list[str | None]) -> dict[str, object]:
        """The used columns of a record; a column whose field is NULL has None."""
        return {name: fields[at] for name, at in self.used}

    def count(self, rows: int) -> None:
        """So many rows had columns that were left out."""
        self.source.unread.update({name: rows for name in self.others})

    def fitting(self, fields: list[str]) -> list[str] | None:
        """The record in the width of the header: empty fields too many are cut, those of columns without a name are filled in."""
        extra = len(fields) - self.width
        if extra == 0:
            return fields
        if extra > 0 and not any(fields[self.width :]):
            return fields[: self.width]
        if extra < 0 and len(fields) >= self.named > 0:
            return fields + [""] * -extra
        return None


@dataclass(frozen=True, slots=True)
class _Way:
    """How a record is read.

    Attributes:
        change: made to each line before.
        skip_spaces: spaces behind a delimiter do not count.
        literal: quotation marks are characters like others.
    """

    change: Callable[[str], str] | None = None
    skip_spaces: bool = False
    literal: bool = False


_USUAL = _Way()
_ESCAPED_QUOTES = _Way(change=lambda line: line.replace('\\"', '""'))
"""As R's write.table and MySQL write a quotation mark inside a field."""


class _Records:
    """Records of a file, any number of lines of which can be taken back.

    Attributes:
        number: of the last line that was taken.
        lines: of the record that was read last.
    """

    def __init__(self, file: TextIOWrapper, delimiter: str, name: str, way: _Way | None = None) -> None:
        self._file, self.delimiter, self._name = file, delimiter, name
        self._back: deque[str] = deque()
        self._again = 0
        self._way = way or _USUAL
        self.number = 0
        self.lines: list[str] = []
        self._table = self._reader(self._way)

    def _feed(self, change: Callable[[str], str] | None) -> Iterator[str]:
        lines, back = self.lines, self._back
        while back:
            lines.append(back.popleft())
            yield change(lines[-1]) if change else lines[-1]
        for line in iter(partial(self._file.readline, MAX_ROW), ""):
            lines.append(line)
            yield change(line) if change else line

    def _reader(self, way: _Way) -> Iterator[list[str]]:
        csv.field_size_limit(_MOST_FIELD)
        return csv.reader(
            self._feed(way.change),
            strict=True,
            delimiter=self.delimiter,
            skipinitialspace=way.skip_spaces,
            quoting=csv.QUOTE_NONE if way.literal else csv.QUOTE_MINIMAL,
        )

    def next(self) -> list[str] | None:
        """The fields of the next record, empty if it is no record; None at the end."""
        return self._next(self._table)

    def _next(self, table: Iterator[list[str]]) -> list[str] | None:
        self.number += len(self.lines)
        self.lines.clear()
        try:
            return next(table, None)
        except csv.Error:
            return []

    def back(self) -> None:
        """Takes back the lines of the last record."""
        self._back.extendleft(reversed(self.lines))
        self.lines.clear()
        self._table = self._reader(self._way)

    def otherwise(self, way: _Way, *, stay: bool = False) -> list[str] | None:
        """The last record once more, from its first line on, read in another way; ``stay``: and all others after it."""
        self._way = way if stay else self._way
        self.back()
        return self._next(self._reader(way))

    def again(self, count: int) -> None:
        """The last record once more, as its first ``count`` lines."""
        self.back()
        self._again += sum(map(len, self._back))
        if self._again > _MOST_AGAIN:
            raise DataError(
                f"{self._name}: quotation marks are wrong over and over, up to line {self.number + 1}",
                hint="write the file again with a tool that quotes, or use JSONL",
            )
        self.lines.extend(self._back.popleft() for _ in range(count))


def _table(source: Source, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Numbers are the lines on which the records start."""
    with source.text(newline="") as file:
        records = _Records(file, delimiter, source.name)
        columns = _header(records, source)
        if columns is None:
            return
        quoted = records.lines[0].lstrip().startswith('"') if source.header else False
        if not source.header:
            records.back()
        rows, decided = 0, False
        while (fields := records.next()) is not None:
            number = records.number + 1
            if not decided and any('\\"' in line for line in records.lines):
                decided = True
                if _misfits(source, delimiter, _ESCAPED_QUOTES, columns) < _misfits(source, delimiter, _USUAL, columns):
                    fields = records.otherwise(_ESCAPED_QUOTES, stay=True) or []
            if len(fields) != columns.width:
                row = _odd(fields, records, columns, delimiter)
                if row is None:
                    continue
                if isinstance(row, str):
                    yield number, row
                    continue
                fields = row
            if "NA" in fields and quoted and '"NA"' not in "".join(records.lines):  # R's NA, which no quotation marks surround
                fields = [None if f == "NA" else f for f in fields]  # type: ignore[misc]
            if r"\N" in fields:
                fields = [None if f == r"\N" else f for f in fields]  # type: ignore[misc]
            if any(fields):
                rows += 1
                yield number, columns.row(fields)
        columns.count(rows)


def _misfits(source: Source, delimiter: str, way: _Way, columns: _Columns) -> int:
    """How many of the first records do not look right if they are read in this way."""
    wrong = 0
    with source.text(newline="") as file:
        records = _Records(file, delimiter, source.name, way)
        if source.header:
            _header(records, source)
        for _ in range(_TRIED):
            fields = records.next()
            if fields is None:
                break
            text = "".join(records.lines)
            fits = len(fields) == columns.width or (len(fields) == columns.width + 1 and _ROW_NAME.match(text))
            marked = any('"' in field for field in fields) and '""' not in text and '\\"' not in text
            wrong += not fits or marked  # a mark that nothing made part of a field, where the others are quoted
            if not fields and text.strip():
                records.again(1)
    return wrong


def _header(records: _Records, source: Source) -> _Columns | None:
    """The columns; None if there is no line."""
    while (fields := records.next()) is not None:
        text = "".join(records.lines)
        if _SEPARATOR.fullmatch(text):
            continue
        if not fields and text.strip():
            raise DataError(f"{source.name}: the first line is not a line of column names: {NOT_CLOSED}", hint=HEADER_HINT)
        if any(f.strip() for f in fields):
            return _Columns(fields, source)
    return None


def _odd(fields: list[str], records: _Records, columns: _Columns, delimiter: str) -> list[str] | str | None:
    """A record that does not have the header's number of fields: what it is after all, why it is none, None if it is blank."""
    lines = list(records.lines)
    text = "".join(lines)
    if not text.strip(delimiter + " \r\n\t"):
        return None
    if fields:
        fitting = columns.fitting(fields)
        if fitting is not None:
            return fitting
        if len(fields) == columns.width + 1 and _ROW_NAME.match(text):  # R's row names, which have no column name
            return fields[1:]
    for fits, way in (
        ('\\"' in text, _ESCAPED_QUOTES),
        (f'{delimiter} "' in text, _Way(skip_spaces=True)),
        (delimiter == "\t" and '"' in text, _Way(literal=True)),
    ):
        if fits:
            found = records.otherwise(way) or []
            if len(found) == columns.width + 1 and _ROW_NAME.match(records.lines[0]):
                found = found[1:]
            if len(found) == columns.width:
                return found
    if fields:
        if records.lines != lines:
            records.again(len(lines))
        return not_fields(len(fields), columns.width)
    records.again(1)
    return NOT_CLOSED

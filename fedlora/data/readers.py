"""Files become rows: one reader a format. A row is a mapping, or the fixed reason why it is none; never a quotation."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from fedlora.core.errors import DataError
from fedlora.core.registry import Registry

Row: TypeAlias = Mapping[str, object] | str
"""Column -> value, or the reason why this row cannot be read."""
Reader: TypeAlias = Callable[[Path], Iterator[tuple[int, Row]]]
"""Yields (1-based line or row number, row). Raises OSError, or DataError if the file as a whole cannot be read."""

NOT_TEXT = "not UTF-8 text"
NOT_JSON = "not JSON"
NOT_OBJECT = "not a JSON object"
NOT_FIELDS = "wrong number of fields"

READERS: Registry[Reader] = Registry("file format", "fedlora.data.readers")
"""``data.format`` of a site file."""

_BOM = b"\xef\xbb\xbf"
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


def format_of(path: Path) -> str:
    """The format that the name of a file promises. A ``.json`` file that starts with ``{`` is taken as JSONL.

    Returns:
        A key of :data:`READERS`.

    Raises:
        DataError: the suffix is none of ours.
        OSError: the file cannot be opened.
    """
    name = _SUFFIXES.get(path.suffix.lower())
    if name is None:
        raise DataError(
            f"{path}: the suffix says no known format",
            hint=f"rename it to one of {', '.join(_SUFFIXES)}, or set format to one of {', '.join(READERS)}",
        )
    if name != "json":
        return name
    with path.open("rb") as file:
        return "jsonl" if file.read(4096).removeprefix(_BOM).lstrip().startswith(b"{") else "json"


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """One JSON object a line; blank lines do not count as rows."""
    with path.open("rb") as file:  # bytes: str lines would also break at U+2028
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, _object(line)


def _object(line: bytes) -> Row:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return NOT_TEXT
    except (ValueError, RecursionError):
        return NOT_JSON
    return value if isinstance(value, dict) else NOT_OBJECT


def _json(path: Path) -> Iterator[tuple[int, Row]]:
    """A JSON list of objects; numbers are positions in the list, from 1."""
    why, rows = "", None
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        why = NOT_TEXT
    except json.JSONDecodeError as err:
        why = f"{NOT_JSON} from line {err.lineno} on"
    except (ValueError, RecursionError):
        why = NOT_JSON
    if not isinstance(rows, list):  # raised out here: the errors above carry the document
        raise DataError(f"{path.name}: {why or 'not a list of objects'}", hint="write one JSON object a line (JSONL)")
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, dict) else NOT_OBJECT


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    """A header and rows, delimited by whichever of comma, semicolon and tab the header holds most often."""
    with path.open("rb") as file:
        header = file.readline()
    return _delimited(path, max(",;\t", key=lambda mark: header.count(mark.encode())))


def _tsv(path: Path) -> Iterator[tuple[int, Row]]:
    return _delimited(path, "\t")


def _delimited(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Numbers are the lines on which the rows start. Bytes that are no UTF-8 arrive as lone surrogates, which shapes refuse."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.reader(file, delimiter=delimiter, strict=True)
        header = _record(table, path) or []
        if len(set(header)) < len(header):
            raise DataError(f"{path.name}: the first line names a column twice", hint="the first line must name the columns")
        while True:
            number = table.line_num + 1
            fields = _record(table, path)
            if fields is None:
                return
            if fields:
                yield number, dict(zip(header, fields, strict=True)) if len(fields) == len(header) else NOT_FIELDS


def _record(table: Any, path: Path) -> list[str] | None:
    """The next record, None at the end."""
    number = table.line_num + 1
    try:
        fields: list[str] | None = next(table, None)
    except csv.Error:
        pass
    else:
        return fields
    raise DataError(
        f"{path.name}: the record that starts on line {number} does not end",
        hint="a quotation mark is missing, or a field is longer than 131,072 characters: use JSONL",
    )


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    """Numbers are rows, from 1. Needs pyarrow."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            f"{path.name}: Parquet files need pyarrow, which is not installed",
            hint="pip install pyarrow, or convert the file to JSONL",
        ) from None
    try:
        batches = parquet.ParquetFile(path).iter_batches()
    except ValueError:
        batches = None
    if batches is None:
        raise DataError(f"{path.name}: not a Parquet file", hint="set format to what the file is")
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


BUILT_IN: dict[str, Reader] = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _tsv, "parquet": _parquet}
"""Formats by the name that a site file uses. Closed: a name in a file never becomes code."""

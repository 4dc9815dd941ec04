"""Files become rows: one reader a format. A row is a mapping, or the fixed reason why it is none; never a quotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from fedlora.core.tables.data import FORMATS
from fedlora.data.files.json_files import read_json, read_jsonl
from fedlora.data.files.parquet import read_parquet
from fedlora.data.files.rows import Row
from fedlora.data.files.sources import Source
from fedlora.data.files.tables import read_csv, read_postgres, read_tsv

Reader: TypeAlias = Callable[[Source], Iterator[tuple[int, Row]]]
"""Yields (1-based line or row number, row). Raises OSError, or DataError if the file as a whole cannot be read."""

BUILT_IN: dict[str, Reader] = dict(
    zip(FORMATS, (read_jsonl, read_json, read_csv, read_tsv, read_postgres, read_parquet), strict=True)
)
"""Formats by the name that a site file uses. Closed: a name in a file never becomes code."""

"""Files on the disk: which ones a path means, what compresses them, in which encoding their text is.

Bounded: a file is read piece by piece, and nothing is allocated because a file says so.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fedlora.core.errors import DataError

MAX_ROW = 1 << 26
"""Bytes or characters of a line, a field or an object, at most: 64 Mi."""
FLOOR = 1 << 31
"""Decompressed bytes that every file may have: 2 GiB."""
RATIO = 250
"""Decompressed bytes for each byte on the disk, beyond FLOOR. Text of people reaches about 30."""

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
_SNIFFED = 4096

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".zstd")
_GZIP, _ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"

_AS_CSV = "open it and save the table as CSV UTF-8"
_SHEETS = {".xlsx": "Excel", ".xls": "Excel", ".xlsm": "Excel", ".xlsb": "Excel", ".ods": "LibreOffice", ".numbers": "Numbers"}
"""Ends of names of workbooks, which nothing here reads, by the program that made them."""
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook", f"{_AS_CSV}, or unpack it"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook (.xls)", _AS_CSV),
    (b"BZh", "compressed by bzip2", "compress it by gzip or zstd, or not at all"),
    (b"\xfd7zXZ\x00", "compressed by xz", "compress it by gzip or zstd, or not at all"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "compress it by gzip or zstd, or not at all"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"ARROW1", "an Arrow (Feather) file", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet or JSONL"),
    (b"ORC", "an ORC file", "write it as Parquet or JSONL"),
    (b"SQLite format 3\x00", "an SQLite database", "write the table as CSV"),
    (b"%PDF", "a PDF document", "write its rows as JSONL"),
    (b"RDX", "an R workspace", "write.csv(..., row.names = FALSE) in R"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "git lfs pull"),
    (b"<!DOCTYPE html", "a web page", "download the file itself; perhaps a login page was saved"),
    (b"<html", "a web page", "download the file itself; perhaps a login page was saved"),
)
"""How files begin that people take for ours: the first bytes, what it is, what to do. None of them can begin a table of ours."""


def _lone_surrogate(error: UnicodeError) -> tuple[str, int]:
    """Bytes that the encoding does not have become half a character, which no row may hold."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udcff", error.end


BAD_BYTES = "fedlora.bad-bytes"
"""Name of the codec error handler that makes a lone surrogate of bytes that are no text."""
codecs.register_error(BAD_BYTES, _lone_surrogate)


@dataclass(slots=True, eq=False)
class Source:
    """One file, as readers see it.

    Attributes:
        path: the file.
        encoding: one of :data:`fedlora.core.tables.data.ENCODINGS`, or ``auto``.
        header: the first line of a table names its columns; False: they are called 1, 2, 3 ...
        wanted: the only columns that will be used, in the file's own words; None: all of them.
        shapes: sets of columns; an object that has all of one of them is a row.
        notes: what a reader found worth telling, in fixed texts; it adds to them.
        unread: columns that a reader left out, with the number of rows; it adds to them.
    """

    path: Path
    _: KW_ONLY
    encoding: str = "auto"
    header: bool = True
    wanted: frozenset[str] | None = None
    shapes: tuple[frozenset[str], ...] = ()
    notes: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    _spent: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        """The file's name without its directory."""
        return self.path.name

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def open(self) -> BinaryIO:
        """The file's bytes, decompressed where it is gzip or zstd, whatever its name says.

        Raises:
            OSError: it cannot be opened.
            DataError: not a regular file, or zstd without pyarrow. While reading: damaged, cut off, or larger than the
                compressed file can account for.
        """
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise DataError(f"{self.name}: not a regular file", hint="data.path names files, a directory or a pattern")
        with self.path.open("rb") as file:
            first = file.read(4)
        if first.startswith(_GZIP):
            return self._bounded(gzip.GzipFile(self.path, "rb"))
        if first == _ZSTD:
            arrow = _pyarrow(self.name, "files compressed by zstd need")
            return self._bounded(arrow.input_stream(str(self.path), compression="zstd"))
        return self.path.open("rb")

    def _bounded(self, inner: Any) -> BinaryIO:
        return io.BufferedReader(_Inflated(inner, self), 1 << 16)

    def spend(self, size_bytes: int) -> None:
        """Counts bytes that were made from the file.

        Raises:
            DataError: more than it can hold in earnest.
        """
        self._spent += size_bytes
        if self._spent > FLOOR and self._spent > RATIO * os.stat(self.path).st_size:
            raise DataError(
                f"{self.name}: holds more than {RATIO} times its size on the disk: a decompression bomb, or equal rows",
                hint="if its rows are meant, split the file: each may hold 2 GiB",
            )

    def head(self) -> bytes:
        """The first bytes after decompression.

        Raises:
            DataError: it is a file of another kind.
        """
        with self.open() as file:
            first = file.read(_SNIFFED)
        for magic, what, cure in _OTHERS:
            if first[: len(magic)].lower() == magic.lower():
                raise DataError(f"{self.name}: this is {what}", hint=cure)
        if first[257:262] == b"ustar":
            raise DataError(f"{self.name}: this is a tar archive", hint="unpack it, and name its files or their directory")
        if first[:2] == _GZIP or first[:4] == _ZSTD:
            raise DataError(f"{self.name}: compressed twice", hint="decompress it once")
        return first

    def text_encoding(self) -> str:
        """The codec of the file's text: a byte order mark wins over what the site file says.

        Raises:
            DataError: it is a file of another kind, or text whose encoding must be said.
        """
        first = self.head()
        if first.startswith(PARQUET):
            raise DataError(f"{self.name}: this is a Parquet file", hint="set data.format = 'parquet', or name it .parquet")
        for mark, name in _MARKS:
            if first.startswith(mark):
                return "utf-8-sig" if name == "utf-8" else name
        if self.encoding == "auto" and (found := _wide(first)):
            raise DataError(
                f"{self.name}: every second byte is zero, as in UTF-16, and no byte order mark says so",
                hint=f"set data.encoding = '{found}', or save the file as UTF-8",
            )
        if self.encoding in ("auto", "utf-8"):
            return "utf-8"
        if not first.isascii() and not self.encoding.startswith("utf") and _is_utf8(first):
            self.note(f"its first bytes are valid UTF-8, read as {self.encoding}: is data.encoding right?")
        return self.encoding

    def lines(self) -> Iterator[tuple[int, str]]:
        """Lines and their numbers, from 1; a line ends at a line feed alone, which it keeps. Beyond MAX_ROW it comes in pieces.

        Raises:
            OSError, DataError: as :meth:`open`; or it is a file of another kind.
        """
        with self.text(newline="\n") as file:
            yield from enumerate(iter(partial(file.readline, MAX_ROW), ""), 1)

    def text(self, *, newline: str) -> io.TextIOWrapper:
        """The file as characters; bytes that are no text become lone surrogates."""
        encoding = self.text_encoding()
        return io.TextIOWrapper(self.open(), encoding=encoding, errors=BAD_BYTES, newline=newline)


class _Inflated(io.RawIOBase):
    """Decompressed bytes, counted."""

    def __init__(self, inner: Any, source: Source) -> None:
        self._inner, self._source = inner, source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found, failed = b"", True
        try:
            found = self._inner.read(len(buffer))
            failed = False
        except (OSError, EOFError, zlib.error):
            pass
        if failed:  # raised out here: what the libraries raise holds bytes of the file
            raise DataError(
                f"{self._source.name}: the compressed file is damaged or cut off", hint="copy it again from where it was made"
            )
        self._source.spend(len(found))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._inner.close()
        super().close()


def _wide(first: bytes) -> str:
    """UTF-16 without a mark: Western text has a zero in every second byte."""
    pairs = len(first) // 2
    for at, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if pairs >= 4 and first[at : 2 * pairs : 2].count(0) > 0.6 * pairs > 12 * first[1 - at : 2 * pairs : 2].count(0):
            return name
    return ""


def _is_utf8(first: bytes) -> bool:
    return "\udcff" not in codecs.getincrementaldecoder("utf-8")(BAD_BYTES).decode(first)


def _pyarrow(name: str, what: str) -> Any:
    """pyarrow.

    Raises:
        DataError: it is not installed.
    """
    return module("pyarrow", name, what)


def module(wanted: str, name: str, what: str) -> Any:
    """A module of pyarrow.

    Args:
        name: of the data file.
        what: of the files that need it.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(wanted)
    except ImportError:
        found = None
    if found is None:
        raise DataError(
            f"{name}: {what} pyarrow, which is not installed", hint="pip install pyarrow, or convert the file to JSONL"
        )
    return found


# --- which files ----------------------------------------------------------------------------------------------------


def format_of(path: Path) -> str:
    """The format that the name of a file promises, whether it is compressed or not.

    Returns:
        A key of :data:`fedlora.core.tables.data.READERS`.

    Raises:
        DataError: the suffix is none of ours.
    """
    name = promised_format(path)
    if name is None:
        check_sheets([path])
        if path.suffix.lower() == ".toml":
            raise DataError(f"{path}: this is a plan or a site file, and holds no rows", hint="data.path names the file of rows")
        raise DataError(
            f"{path}: the suffix says no known format",
            hint=f"name it {', '.join(_SUFFIXES)} (each also with {' or '.join(_COMPRESSED)}), or set data.format",
        )
    return name


def check_sheets(paths: Iterable[Path]) -> None:
    """For files that are not taken: people have tables in workbooks first of all.

    Raises:
        DataError: there is a workbook among them.
    """
    found = sorted(path for path in paths if path.suffix.lower() in _SHEETS)
    if found:
        what = f"{'a workbook' if len(found) == 1 else 'workbooks'} of {_SHEETS[found[0].suffix.lower()]}"
        raise DataError(f"{found[0].name}{f' and {len(found) - 1:,} more are' if found[1:] else ' is'} {what}", hint=_AS_CSV)


def promised_format(path: Path) -> str | None:
    """The same, None where the suffix is none of ours."""
    bare = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return _SUFFIXES.get(bare.suffix.lower())


def find(path: Path, *, any_suffix: bool = False) -> tuple[list[Path], list[str]]:
    """The files that a path means: itself; all data files of a directory (not below it); or what a pattern matches.

    In a directory, names that begin with a dot or an underscore do not count, nor do suffixes that are none of ours.

    Args:
        any_suffix: in a directory every suffix counts.

    Returns:
        The files, sorted by name, each once; and what was left out, in words.

    Raises:
        OSError: there is nothing under that name.
        DataError: nothing matches, or a match is a link out of the directory that the pattern searches.
    """
    if path.is_dir():
        return _chosen(path, [p for p in path.iterdir() if p.name[0] not in "._"], suffixes=not any_suffix)
    parts = path.parts
    wild = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if wild is None or os.path.lexists(path):
        os.stat(path)  # raises what there is to say
        return [path], []
    base = Path(*parts[:wild]) if wild else Path()
    found = _quietly(lambda: [p for p in base.glob("/".join(parts[wild:])) if not p.name.startswith(".")])
    if found is None:
        raise DataError(f"{path}: not a pattern", hint="* and ? inside a name, ** alone for any depth of directories")
    return _chosen(base, [p for p in found if not p.is_dir()], suffixes=False)


def _quietly(search: Callable[[], list[Path]]) -> list[Path] | None:
    try:
        return search()
    except (ValueError, NotImplementedError):  # pathlib's words for a pattern that is none
        return None


def _chosen(base: Path, candidates: list[Path], *, suffixes: bool) -> tuple[list[Path], list[str]]:
    """Those among the candidates that are data files, each once."""
    inside, seen, chosen, others = base.resolve(), set(), [], 0
    for path in sorted(candidates):
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path}: a link to nothing", hint="remove the link, or put the file in its place")
        if not path.is_file() or (suffixes and promised_format(path) is None):
            others += 1
            continue
        real = path.resolve()
        if not real.is_relative_to(inside):
            raise DataError(
                f"{path}: a link to a file outside of {base}",
                hint="a directory or pattern takes only files inside it: name this file itself in data.path, or copy it",
            )
        if real not in seen:
            seen.add(real)
            chosen.append(path)
    if not chosen:
        check_sheets(candidates)
        hint = f"data.path takes files, a directory of {', '.join(_SUFFIXES)}, or a pattern such as '{base}/**/*.jsonl'"
        raise DataError(f"{base}: the directory holds no data file that is meant", hint=hint)
    return chosen, [f"{others:,} of the names in {base.name or base} are no data files and are left out"] if others else []

"""The table ``[data]``: rows, and how they are read. A site file has one, and so has a simulation."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fedlora.core.registry import Registry
from fedlora.core.section import Section

FORMATS = ("jsonl", "json", "csv", "tsv", "postgres", "parquet")
"""File formats by the names that ``format`` takes; ``data/files/readers.py`` has the reader of each."""
SHAPES = ("messages", "sharegpt", "prompt-completion", "alpaca", "text")
"""Layouts of a row by the names that ``shape`` takes; ``data/shapes.py`` has what each means. The most telling is first."""
READERS: Registry[Callable[[Any], Iterator[tuple[int, Any]]]] = Registry("file format", "fedlora.data.files.readers")
"""``data.format``. A script may add one of its own."""

ENCODINGS = (
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp437", "cp850",
    "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258",
    "iso-8859-2", "iso-8859-5", "iso-8859-7", "iso-8859-9", "iso-8859-15", "koi8-r", "mac-roman",
    "big5", "euc-jp", "euc-kr", "gb18030", "shift_jis",
)  # fmt: skip
"""Encodings by the names that a site file may use, beside ``auto``: a byte order mark, else UTF-8. Nothing is guessed."""


def _format(name: str) -> str:
    if name != "auto" and name not in READERS:
        said = READERS.unknown(name)
        raise PydanticCustomError("format", "{text}", {"text": said if said.endswith("?") else f"{said}, or auto"})
    return name


def _shape(name: str) -> str:
    if name != "auto" and name not in SHAPES:
        raise PydanticCustomError(
            "shape", "{text}", {"text": f"no shape is called {name[:80]!r}; known: auto, {', '.join(SHAPES)}"}
        )
    return name


_CODECS = {codecs.lookup(name).name: name for name in ENCODINGS}


def _encoding(name: str) -> str:
    """By any of Python's names for it: ``utf8``, ``latin1``, ``ISO-8859-1``."""
    if name != "auto" and name not in ENCODINGS:
        with suppress(LookupError, ValueError):
            if (known := _CODECS.get(codecs.lookup(name).name)) is not None:
                return known
        near = difflib.get_close_matches(name, ENCODINGS, n=1)
        more = f"did you mean {near[0]!r}?" if near else f"known: auto, {', '.join(ENCODINGS)}"
        raise PydanticCustomError("encoding", "{text}", {"text": f"no encoding is called {name[:80]!r}; {more}"})
    return name


class Directory(Protocol):
    """A path, as far as this module asks: it touches no disk."""

    def __truediv__(self, name: str, /) -> Self: ...


R = TypeVar("R", bound=Directory)


class SiteData(Section):
    """Rows of a site, and how they are read. Nothing in this table is ever sent."""

    path: str | tuple[str, ...] = "data/train.jsonl"
    """training rows: file (JSONL, JSON, CSV, TSV, Parquet; .gz, .zst), directory, pattern or list; relative to this file"""
    held_out_path: str | tuple[str, ...] = ""
    """the same for rows that are evaluated on; empty: a fraction of path is held out by group"""
    format: Annotated[
        str, AfterValidator(_format), Field(description=f"file format: {', '.join(FORMATS)}; auto: what the suffix says")
    ] = "auto"
    shape: Annotated[
        str, AfterValidator(_shape), Field(description=f"how a row is laid out: {', '.join(SHAPES)}; auto: by its columns")
    ] = "auto"
    encoding: Annotated[
        str,
        AfterValidator(_encoding),
        Field(description="encoding of text files, e.g. cp1252; auto: a byte order mark, else UTF-8"),
    ] = "auto"
    header: bool = True
    """the first line of a CSV or TSV file names its columns; false: they are called 1, 2, 3 ... in columns and group_key"""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """largest share of bad rows that are left out, named by line number; with more the data is refused. 0: none may be bad"""
    columns: dict[str, str] = Field(default_factory=dict)
    """our column name = the file's column name, e.g. { prompt = "question", completion = "answer" }"""
    group_key: str = ""
    """column that identifies the patient or customer; all rows of one group stay on the same side of the split"""
    special_tokens: Literal["text", "keep"] = "text"
    """strings such as <|im_end|> inside rows; text: ordinary characters; keep: special tokens, also where a user wrote them"""
    too_long: Literal["keep-answer", "cut", "drop"] = "keep-answer"
    """rows above max_length; keep-answer: cut the prompt, split long texts; cut: truncate on the right; drop: leave them out"""
    held_out_fraction: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    """fraction of groups held out for evaluation"""
    held_out_public: bool = False
    """the rows of held_out_path are public: counts over them may leave under a plan with [privacy], without noise"""

    def paths(self, root: R) -> list[R]:
        """Files, directories and patterns of the training rows."""
        return _paths(root, self.path)

    def held_out_paths(self, root: R) -> list[R]:
        """Files, directories and patterns of the rows for evaluation; empty: they are held out of the training rows."""
        return _paths(root, self.held_out_path)


def _paths(root: R, said: str | tuple[str, ...]) -> list[R]:
    return [root / path for path in ([said] if isinstance(said, str) else said) if path]

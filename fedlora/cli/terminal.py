"""A terminal's lines, cut to its width; and stdout and stderr guarded while a command runs, so that what others write is
no line of ours."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO, cast

from fedlora.core.columns import columns as width
from fedlora.core.columns import fitting
from fedlora.core.errors import plain


def on_terminal(text: str, *, indent: str = "  ") -> str:
    """Text whose characters move nothing on a terminal but to the next line, which begins with ``indent``."""
    return f"\n{indent}".join(plain(line) for line in text.split("\n"))


def wrapped(line: str, columns: int, *, at: int = 0) -> str:
    """A line cut to a terminal's width, between words where it can be. A terminal that cuts it itself goes on at its left edge,
    where a value from elsewhere would look like a line of ours.

    Laws: no line is wider than ``columns``; all but the first are indented, by four more than ``line`` is, at most half the
    width; all characters but spaces stay, in order.

    Args:
        line: printable characters, as wide as :func:`fedlora.core.columns.columns` says.
        columns: width, 20 at least.
        at: columns that are taken already in the line's first row.
    """
    lines, indent = [], " " * min(len(line) - len(line.lstrip(" ")) + 4, columns // 2)
    while (end := fitting(line, columns - at)) < len(line):
        cut = line.rfind(" ", 0, end + 1)
        cut = cut if line[: max(cut, 0)].strip() else end
        lines.append(line[:cut])
        line, at = indent + line[cut:].lstrip(" "), 0
    return "\n".join([*lines, line])


def fitted(text: str, stream: TextIO, *, at: int = 0) -> str:
    """The lines as this stream takes them: a terminal those of its width, all else whole ones."""
    if not stream.isatty():
        return text
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        columns = 0
    columns = max(columns or shutil.get_terminal_size().columns, 20)
    return "\n".join(wrapped(line, columns, at=at) for line in text.split("\n"))


READER_GONE: list[bool] = []
"""Something, once who read stdout has closed the pipe: that is no error, `head` does it."""


def show(text: str, stream: TextIO) -> None:
    """Prints lines; if the reader of stdout has closed the pipe, ends as by Ctrl-C."""
    if not put(f"{fitted(text, own(stream))}\n", stream) and stream is sys.stdout:
        raise KeyboardInterrupt


def put(text: str, stream: TextIO) -> bool:
    """Writes text at once, so that a reader of a pipe waits for no more of it; False if there is no reader any more."""
    ours = own(stream)
    try:
        ours.write(text)  # in one call: other threads report, too
        ours.flush()
    except BrokenPipeError:
        if stream is sys.stdout:
            READER_GONE.append(True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), ours.fileno())
        return False
    return True


class Guarded:
    """A stream for what others write while a command runs: libraries, warnings, logs. It is shown as :func:`on_terminal` does,
    every line indented.

    Args:
        behind: where the command itself writes.
        aside: where what others write is shown instead.
    """

    def __init__(self, behind: TextIO, aside: Guarded | None = None) -> None:
        self.behind, self._at, self._aside = behind, 0, aside

    def write(self, text: str) -> int:
        if self._aside is not None:
            return self._aside.write(text)
        _end_lines(but=self)
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            part = plain(line.removesuffix("\n"))
            said = fitted(part if self._at else f"  {part}", self.behind, at=self._at)
            self.behind.write(said + "\n" * line.endswith("\n"))
            last = said.rpartition("\n")[2]
            self._at = 0 if line.endswith("\n") else width(last) + (self._at if last == said else 0)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def end_line(self) -> None:
        """Ends on a terminal what was begun and not ended, so that what comes next begins at its left edge."""
        if self._at and self.behind.isatty():
            self.behind.write("\n")
            self._at = 0

    def close(self) -> None:
        """Leaves the stream behind it open: what closes this one at the end (absl's log does) has not opened it."""
        self.end_line()

    @property
    def buffer(self) -> _Bytes:
        return _Bytes(self)

    def __getattr__(self, name: str) -> Any:
        if name not in _ASKED:  # nothing else by which one could write
            raise AttributeError(name)
        return getattr(self.behind if self._aside is None else self._aside, name)


_ASKED = frozenset(
    ["closed", "encoding", "errors", "fileno", "flush", "isatty", "mode", "name", "newlines", "readable", "writable"]
)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """What writes bytes to a guarded stream."""

    text: Guarded

    def write(self, data: bytes) -> int:
        self.text.write(bytes(data).decode("utf-8", "backslashreplace"))
        return len(data)

    def flush(self) -> None:
        self.text.flush()


def own(stream: TextIO) -> TextIO:
    """The stream on which a command itself writes, at the left edge of a terminal."""
    _end_lines()
    return stream.behind if isinstance(stream, Guarded) else stream


def _end_lines(*, but: Guarded | None = None) -> None:
    """On both streams, which may be one terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Guarded) and stream is not but:
            stream.end_line()


@contextmanager
def guarded(*, as_json: bool = False) -> Iterator[None]:
    """Guards stdout and stderr.

    Args:
        as_json: a program reads stdout: what others write there is shown on stderr.
    """
    before = sys.stdout, sys.stderr
    errors = Guarded(own(sys.stderr))
    answers = Guarded(own(sys.stdout), errors if as_json else None)
    sys.stdout, sys.stderr = cast("TextIO", answers), cast("TextIO", errors)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

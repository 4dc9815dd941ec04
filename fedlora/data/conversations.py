"""Files become conversations and a report. Bad rows are counted and named by line; nothing here ever quotes a row."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora.core.errors import DataError
from fedlora.data.json_files import parsed
from fedlora.data.readers import READERS
from fedlora.data.rows import NOT_CLOSED, NOT_FIELDS, NOT_JSON, NOT_OBJECT, NOT_TEXT, Row
from fedlora.data.shapes import COLUMNS, PREFERENCE, SHAPES, BadRow, Turn, plain_text, shape_of
from fedlora.data.sources import ENCODINGS, Source, find, format_of
from fedlora.data.tables import HEADER_HINT

_SHOWN = 20
_FEW = 0.01
"""Rows of another shape are slips as long as they are no larger a share than this; more are two files in one."""
_NAME = re.compile(r"(?:column |key )?[^\W\d][\w.-]{0,31}(?: [\w.-]{1,20}){0,2}")
"""What may be shown as a name of a column: up to three words of letters, digits, points and dashes."""
_MOST_ROWS = 50_000_000
OTHER_SHAPE = "another shape than the other rows"
PYTHON_LIST = "a list as Python writes it, not JSON"

_CURES = {
    NOT_JSON: "each row must be one whole JSON object",
    NOT_OBJECT: "each row must be one whole JSON object",
    NOT_FIELDS: "fields that hold the delimiter or a line break need quotation marks",
    NOT_CLOSED: "quotation marks inside a quoted field must be doubled",
    PYTHON_LIST: "write the column with json.dumps",
    OTHER_SHAPE: "put rows of another shape into a file of their own, or set data.shape",
    "the group is missing": "data.group_key names a column that each row must fill",
}
"""What helps against a reason, beside correcting the rows."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example before it becomes tokens.

    Attributes:
        turns: in order, at least one of them trained.
        chat: True: the chat template makes text of it; False: the turns are plain text, one after the other.
        line: 1-based line (JSONL, CSV) or row (JSON, Parquet) of the file.
        group: patient or customer; ``""``: a group of its own.
        file: the file's name without its directory, if several were read; else ``""``.
    """

    turns: tuple[Turn, ...]
    chat: bool
    line: int
    group: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What reading found; for the operator's eyes.

    Attributes:
        path: the file's name without its directory; of several files the last name of the pattern or directory.
        format: key of READERS.
        shape: key of SHAPES.
        rows: rows in the file, without blank lines.
        used: rows that became conversations; ``rows - len(bad)``.
        bad: (line, reason) of every other row. Reasons are fixed texts.
        notes: what else is worth telling, in fixed texts.
        unread: (name, count) of columns that hold something and that nothing reads; by name.
        files: a report for each file, if there are several.
    """

    path: str
    format: str
    shape: str
    rows: int
    used: int
    bad: tuple[tuple[int, str], ...]
    notes: tuple[str, ...] = ()
    unread: tuple[tuple[str, int], ...] = ()
    files: tuple[ReadReport, ...] = ()

    def lines(self) -> list[str]:
        """The report as text: a headline, then one line a reason with at most 20 line numbers, then what else was found."""
        parts = f", {len(self.files):,} files" if self.files else ""
        head = f"{self.path}: {self.used:,} of {self.rows:,} rows used ({self.format}, {self.shape}{parts})"
        return [head, *self.reasons(), *self.notes, *self._unread()]

    def reasons(self) -> list[str]:
        """Why rows were not used, one line a reason and file."""
        if self.files:
            told = [f"{part.path}: {line}" for part in self.files if part.bad for line in part.reasons()]
            more = [f"and {len(told) - _SHOWN:,} more reasons in other files"] if len(told) > _SHOWN else []
            return told[:_SHOWN] + more
        by_reason: dict[str, list[int]] = {}
        for line, reason in self.bad:
            by_reason.setdefault(reason, []).append(line)
        return [f"{reason}: {numbered(lines)}" for reason, lines in sorted(by_reason.items())]

    def _unread(self) -> list[str]:
        """Names that most rows have and that look like names: others may be values, of a file whose first line is missing."""
        names = [(name, count) for name, count in self.unread if 2 * count >= self.rows and _NAME.fullmatch(name)]
        others = len(self.unread) - len(names)
        told = [*([listed(names)] if names else []), *([f"{others:,} that few rows have or that are no names"] if others else [])]
        return [f"not read: {' and '.join(told)}"] if told else []


def numbered(lines: list[int]) -> str:
    """``lines 3, 8 and 310 more``: at most 20 numbers, then a count."""
    shown = ", ".join(str(line) for line in lines[:_SHOWN])
    more = f" and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    return f"{'line' if len(lines) == 1 else 'lines'} {shown}{more}"


def listed(counts: Sequence[tuple[str, int]]) -> str:
    """``a (3), b (1) and 7 more``: at most 20 names, each with its count."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in counts[:_SHOWN])
    return shown + (f" and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else "")


def read(
    path: Path | Sequence[Path],
    *,
    format: str = "auto",
    shape: str = "auto",
    columns: Mapping[str, str] = {},
    group_key: str = "",
    encoding: str = "auto",
    header: bool = True,
    max_bad_share: float = 1.0,
) -> tuple[list[Conversation], ReadReport]:
    """Reads data files.

    Args:
        path: a local file, a directory of files or a pattern (``data/*.jsonl``); or several of these.
        format: key of READERS, or ``auto``: by suffix.
        shape: key of SHAPES, or ``auto``: by the columns, which must agree on one shape.
        columns: our name -> the file's column, e.g. ``{"prompt": "Question"}``.
        group_key: the file's column that names the patient or customer; ``""``: every row is a group of its own.
        encoding: one of ENCODINGS, or ``auto``: a byte order mark, else UTF-8.
        header: the first line of a table names its columns; False: they are called 1, 2, 3 ...
        max_bad_share: share of rows that may be bad, over all files together.

    Returns:
        The conversations in file order, and the report. Rows that cannot be used are in the report only.

    Raises:
        DataError: a file cannot be read, a setting fits no row, the rows have several shapes or hold preference pairs, more
            rows are bad than may be, or no row of a file can be used. No error quotes a row, a column name of the file, or
            chains an error that does.
    """
    _check_settings(format, shape, columns, encoding)
    paths = [path] if isinstance(path, Path) else list(path)
    files, notes = _found(paths, format)
    reading = _Reading(shape, dict(columns), group_key, several=len(files) > 1)
    for file in files:
        reading.file(file, format, encoding=encoding, header=header)
    name = files[0].name if len(files) == 1 else (paths[0].name or str(paths[0]))
    conversations, report = reading.finish(name, notes)
    check_bad(report, max_bad_share)
    return conversations, report


def first_rows(path: Path, *, format: str = "auto", encoding: str = "auto", files: int = 20) -> None:
    """Each of the first files that a path means has a row, good or bad. Cheap, but for JSON files that are one document.

    Raises:
        DataError: one has none, or cannot be read.
    """
    for file in _found([path], format)[0][:files]:
        if next(_rows(Source(file, encoding=encoding), format_of(file) if format == "auto" else format), None) is None:
            raise DataError(f"{file} has no rows", hint="correct data.path in the site file")


def check_bad(report: ReadReport, max_bad_share: float) -> None:
    """Bad rows are few enough to go on without them, and no file is all bad.

    Raises:
        DataError: they are not.
    """
    if not report.used:
        raise _nothing(report)
    for part in report.files:
        if part.rows > 1 and not part.used:
            raise _nothing(part)
    share = len(report.bad) / report.rows
    if share <= max_bad_share:
        return
    raise DataError(
        f"{report.path}: {len(report.bad):,} of {report.rows:,} rows ({share:.1%}) cannot be used, "
        f"more than data.max_bad_share = {max_bad_share:g}: {'; '.join(report.reasons())}",
        hint=_cure(report) + f"; or go on without them: data.max_bad_share = {min(1.0, _above(share)):g}",
    )


def also_bad(report: ReadReport, bad: Sequence[tuple[int, str]]) -> ReadReport:
    """The report, once more rows were found bad: by the chat template, by their masks."""
    if not bad:
        return report
    files = report.files
    if files:
        files = (*files, ReadReport("of all files", report.format, report.shape, len(bad), 1, tuple(bad)))
    return replace(report, used=report.used - len(bad), bad=(*report.bad, *bad), files=files)


def _above(share: float) -> float:
    """The share, rounded up so that a site file that says it lets the file pass."""
    return -(-round(share * 1e6) // 1e3) / 1e3 + 0.001


def _nothing(report: ReadReport) -> DataError:
    reasons = "; ".join(report.reasons())
    return DataError(
        f"{report.path}: none of the {report.rows:,} rows can be used ({report.format}, {report.shape}): {reasons}",
        hint=_cure(report),
    )


def _cure(report: ReadReport) -> str:
    """What helps against the most frequent reason."""
    reason = Counter(reason for _, reason in report.bad).most_common(1)[0][0]
    if reason.startswith("not ") and reason.endswith(" text"):
        return "save the file as UTF-8, or set data.encoding to what it is, e.g. 'cp1252' for Western Windows"
    cure = _CURES.get(reason, "")
    return f"correct the rows: {cure}" if cure else "correct the rows; or data.shape and data.columns say what the file holds"


def _check_settings(format: str, shape: str, columns: Mapping[str, str], encoding: str) -> None:
    for setting, value, registry in (("format", format, READERS), ("shape", shape, SHAPES), ("encoding", encoding, ENCODINGS)):
        if value != "auto" and value not in registry:
            raise DataError(f"{setting} {value!r} is unknown", hint=f"auto, {', '.join(registry)}")
    for ours in columns:
        if ours not in COLUMNS:
            close = difflib.get_close_matches(ours, COLUMNS, n=1)
            raise DataError(
                f"columns maps {ours!r}, which is not a name of ours",
                hint=f"did you mean {close[0]!r}?" if close else f"one of {', '.join(sorted(COLUMNS))}",
            )


def _found(paths: Sequence[Path], format: str) -> tuple[list[Path], list[str]]:
    """All files that are meant, each once, and notes on what was left out."""
    files: list[Path] = []
    notes: list[str] = []
    for path in paths:
        why = ""
        try:
            found, told = find(path, any_suffix=format != "auto")
        except OSError as err:
            why = err.strerror or "input/output error"
        if why:
            raise _unreadable(path, why)
        files += [f for f in found if f not in files]
        notes += told
    if not files:
        raise DataError("no data file is named", hint="check data.path")
    return files, notes


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(f"{path} cannot be read: {why}", hint="check data.path and who may read the file")


def _columns(counts: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((f"column {name}", count) for name, count in sorted(counts.items()))


@dataclass(slots=True)
class _Part:
    """What one file gave so far."""

    name: str
    format: str
    rows: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    def report(self, shape: str) -> ReadReport:
        used = self.rows - len(self.bad)
        bad = tuple(sorted(self.bad, key=lambda found: found[0]))
        return ReadReport(self.name, self.format, shape, self.rows, used, bad, tuple(self.notes), _columns(self.unread))


@dataclass(slots=True)
class _Reading:
    """Rows of any number of files on their way to conversations."""

    shape: str
    columns: dict[str, str]
    group_key: str
    several: bool
    parts: list[_Part] = field(default_factory=list)
    found: list[tuple[str, int, Conversation]] = field(default_factory=list)  # shape, part, conversation
    shapeless: list[tuple[int, int, dict[str, object]]] = field(default_factory=list)  # part, line, row
    shapes: Counter[str] = field(default_factory=Counter)
    missing: dict[str, str] = field(default_factory=dict)  # columns that no row has had yet -> the setting that names them

    def __post_init__(self) -> None:
        named = {theirs: f"columns.{ours}" for ours, theirs in self.columns.items()}
        self.missing = named | ({self.group_key: "group_key"} if self.group_key else {})

    def wanted(self) -> frozenset[str]:
        """The file's columns that can matter."""
        ours = COLUMNS | {"chosen", "rejected", "tools"} - self.columns.keys()
        return frozenset({*ours, *self.columns.values(), *({self.group_key} if self.group_key else ())})

    def file(self, path: Path, format: str, *, encoding: str, header: bool) -> None:
        """Reads one file."""
        name = format_of(path) if format == "auto" else format
        theirs = tuple(frozenset(self.columns.get(key, key) for key in shape.keys) for shape in SHAPES.values())
        source = Source(path, encoding=encoding, header=header, wanted=self.wanted(), shapes=theirs)
        part = _Part(path.name, name)
        self.parts.append(part)
        known = self.wanted()
        for line, row in _rows(source, name):
            part.rows += 1
            if isinstance(row, str):
                part.bad.append((line, row))
                continue
            if self.missing:
                self.missing = {theirs: setting for theirs, setting in self.missing.items() if row.get(theirs) is None}
            for key in row.keys() - known:
                if row[key] is not None and row[key] != "":
                    part.unread[key] += 1
            self._row(part, line, row)
        part.unread.update(source.unread)
        part.notes = source.notes
        if encoding not in ("auto", "utf-8"):
            part.bad = [(line, f"not {encoding} text" if why == NOT_TEXT else why) for line, why in part.bad]
        if not part.rows:
            raise DataError(f"{path.name}: the file holds no rows", hint="check data.path")
        if sum(p.rows for p in self.parts) > _MOST_ROWS:
            raise DataError(f"{path.name}: more than {_MOST_ROWS:,} rows", hint="split the data over several sites, or sample it")

    def _row(self, part: _Part, line: int, row: Mapping[str, object]) -> None:
        named = _renamed(row, self.columns)
        shape = shape_of(named) if self.shape == "auto" else self.shape
        at = len(self.parts) - 1
        if shape is None:
            self.shapeless.append((at, line, named))
            return
        self.shapes[shape] += 1
        if shape == PREFERENCE:
            part.bad.append((line, "a preference pair"))
            return
        try:
            turns, chat = SHAPES[shape].convert(_opened(named))
            group = _group(row.get(self.group_key)) if self.group_key else ""
        except BadRow as why:
            part.bad.append((line, str(why)))
            return
        self.found.append((shape, at, Conversation(turns, chat, line, group, part.name if self.several else "")))

    def finish(self, name: str, notes: Sequence[str]) -> tuple[list[Conversation], ReadReport]:
        """All conversations of the one shape that the rows agree on."""
        self._check_columns(name)
        shape = self._agreed(name) if self.shape == "auto" else self.shape
        for at, line, row in self.shapeless:
            self.parts[at].bad.append((line, _why_not(row, shape)))
        conversations = []
        for of, at, conversation in self.found:
            if of == shape:
                conversations.append(conversation)
            else:
                self.parts[at].bad.append((conversation.line, OTHER_SHAPE))
        reports = [part.report(shape) for part in self.parts]
        if len(reports) == 1:
            return conversations, replace(reports[0], notes=(*notes, *reports[0].notes))
        bad = tuple(row for report in reports for row in report.bad)
        unread: Counter[str] = Counter()
        for part in self.parts:
            unread.update(part.unread)
        told = tuple(f"{report.path}: {note}" for report in reports for note in report.notes)[:_SHOWN]
        formats = " and ".join(sorted({report.format for report in reports}))
        rows = sum(report.rows for report in reports)
        return conversations, ReadReport(
            name, formats, shape, rows, len(conversations), bad, (*notes, *told), _columns(unread), tuple(reports)
        )

    def _check_columns(self, name: str) -> None:
        """Some row has each column that a setting names. The names are the operator's, so they may be shown."""
        readable = sum(part.rows for part in self.parts) > sum(len(part.bad) for part in self.parts) or self.shapes
        for theirs, setting in self.missing.items():
            if readable:
                raise DataError(f"{name}: no row has the column {theirs!r} that {setting} names", hint=f"correct data.{setting}")

    def _agreed(self, name: str) -> str:
        """The one shape of all rows that have one, a few slips aside."""
        (shape, most), *others = self.shapes.most_common() or [("", 0)]
        slips = sum(count for _, count in others)
        if (pairs := self.shapes[PREFERENCE]) and (shape == PREFERENCE or pairs > _FEW * (most + slips)):
            raise DataError(
                f"{name}: {pairs:,} rows hold preference pairs (chosen, rejected), which cannot be trained on",
                hint="FedLoRA does supervised fine-tuning: keep the chosen answer as completion, or set data.shape",
            )
        if slips > _FEW * (most + slips):
            found = ", ".join(f"{name} ({count:,})" for name, count in self.shapes.most_common())
            raise DataError(f"{name}: the rows have more than one shape: {found}", hint="split the file, or set data.shape")
        if shape:
            return shape
        if not self.shapeless:  # no row could be read
            return "no shape"
        return self._unknown(name)

    def _unknown(self, name: str) -> str:
        """No row has the columns of a shape.

        Raises:
            DataError: always.
        """
        ours = sorted({key for _, _, row in self.shapeless for key in row} & COLUMNS)
        tables = any(part.format in ("csv", "tsv", "postgres") for part in self.parts)
        has = f"they have {' and '.join(ours)} alone" if ours else "none of our column names is there"
        example = "{ prompt = 'question', completion = 'answer' }"
        raise DataError(
            f"{name}: the columns of none of the {len(self.shapeless):,} readable rows make a known shape: {has}",
            hint=f"known: {', '.join(SHAPES)}; or data.columns, e.g. {example}"
            + (f"; {HEADER_HINT}" if tables and not ours else ""),
        )


def _rows(source: Source, format: str) -> Iterator[tuple[int, Row]]:
    """The rows of one file, and errors that quote nothing, whatever a reader raises."""
    rows = READERS[format](source)
    while True:
        why, failed, item = "", "", None
        try:
            item = next(rows, None)
        except (DataError, MemoryError):
            raise
        except OSError as err:
            why = err.strerror or "input/output error"
        except Exception as err:  # its text may quote the row
            failed = type(err).__name__
        if why:
            raise _unreadable(source.path, why)
        if failed:
            raise DataError(
                f"{source.name}: the reader of {format} fails at it ({failed})", hint="write the file in another format"
            )
        if item is None:
            return
        yield item


def _why_not(row: dict[str, object], shape: str) -> str:
    """Why a row that lacks columns of a shape is none."""
    try:
        SHAPES[shape].convert(_opened(row))
    except BadRow as why:
        return str(why)
    return OTHER_SHAPE


def _renamed(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """The row under our names, without empty (None) columns."""
    if not columns:
        return {key: value for key, value in row.items() if value is not None}
    taken = set(columns) | set(columns.values())
    named = {key: value for key, value in row.items() if key not in taken}
    named.update({ours: row.get(theirs) for ours, theirs in columns.items()})
    return {key: value for key, value in named.items() if value is not None}


_LISTS = ("messages", "conversations", "history", "tools")


def _opened(row: dict[str, object]) -> dict[str, object]:
    """The row with the lists that stand in it as JSON text, as a table has to write them."""
    for key in _LISTS:
        text = row.get(key)
        if isinstance(text, str) and text.lstrip()[:1] == "[":
            value = parsed(text)
            if value is None and "': " in text:
                raise BadRow(PYTHON_LIST)
            row = {**row, key: text if value is None else value}
    return row


def _group(value: object) -> str:
    """A group's name as text. Identifiers come as text or numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("the group is missing")
    name = plain_text(str(value), "the group")
    if not name.strip() or name in ("nan", "inf", "-inf"):
        raise BadRow("the group is missing")
    return name

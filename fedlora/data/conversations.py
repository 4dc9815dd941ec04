"""Files become conversations and a report. Bad rows are counted and named by line; nothing here ever quotes a row."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora.core.errors import DataError
from fedlora.core.tables.data import ENCODINGS, READERS
from fedlora.data.files.json_files import parsed
from fedlora.data.files.names import has_instead
from fedlora.data.files.rows import NOT_TEXT, OTHER_SHAPE, PYTHON_LIST, Row
from fedlora.data.files.sources import Source, find, format_of
from fedlora.data.files.tables import HEADER_HINT
from fedlora.data.report import SHOWN, ReadReport, check_bad
from fedlora.data.shapes import COLUMNS, PREFERENCE, SHAPES, shape_of
from fedlora.data.turns import BadRow, Turn, plain_text

_FEW = 0.01
"""Up to this fraction, rows of another shape are treated as errors in the file; more of them mean two files in one."""
_MOST_ROWS = 50_000_000


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example before it becomes tokens.

    Attributes:
        turns: in order, at least one of them trained.
        chat: True: the chat template makes text of it; False: the turns are plain text, one after the other.
        line: 1-based line (JSONL, CSV) or row (JSON, Parquet) of the file.
        group: patient or customer; ``""``: a group of its own.
        tools: that the assistant may call, a JSON list; ``""``: none.
        file: the file's name without its directory, if several were read; else ``""``.
        label: what ``label_key`` says of the row; ``""`` without one.
    """

    turns: tuple[Turn, ...]
    chat: bool
    line: int
    group: str
    tools: str = ""
    file: str = ""
    label: str = ""


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
    label_key: str = "",
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
        label_key: the file's column by which a simulation deals rows to sites; a row without it is bad.

    Returns:
        The conversations in file order, and the report. Rows that cannot be used are in the report only.

    Raises:
        DataError: a file cannot be read, a setting fits no row, the rows have several shapes or hold preference pairs, more
            rows are bad than may be, or no row of a file can be used. No error quotes a row, or chains an error that does; of
            the file's columns it says what :func:`fedlora.data.files.names.is_name` lets stand.
    """
    _check_settings(format, shape, columns, encoding)
    paths = [path] if isinstance(path, Path) else list(path)
    files, notes = _found(paths, format)
    reading = _Reading(shape, dict(columns), group_key, label_key, several=len(files) > 1)
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
    return tuple(sorted(counts.items()))


@dataclass(slots=True)
class _Part:
    """What one file gave so far."""

    name: str
    format: str
    rows: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    def summary(self, shape: str) -> ReadReport:
        used = self.rows - len(self.bad)
        bad = tuple(sorted(self.bad, key=lambda found: found[0]))
        return ReadReport(self.name, self.format, shape, self.rows, used, bad, tuple(self.notes), _columns(self.unread))


@dataclass(slots=True)
class _Reading:
    """Rows of any number of files on their way to conversations."""

    shape: str
    columns: dict[str, str]
    group_key: str
    label_key: str
    several: bool
    parts: list[_Part] = field(default_factory=list)
    found: list[tuple[str, int, Conversation]] = field(default_factory=list)  # shape, part, conversation
    shapeless: list[tuple[int, int, dict[str, object]]] = field(default_factory=list)  # part, line, row
    shapes: Counter[str] = field(default_factory=Counter)
    reads: dict[str, frozenset[str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # columns that no row has had yet -> the setting that names them
    there: Counter[str] = field(default_factory=Counter)  # columns -> rows that have them, while some are missing

    def __post_init__(self) -> None:
        named = {theirs: f"data.columns.{ours}" for ours, theirs in self.columns.items()}
        self.missing = named | {k: v for k, v in ((self.label_key, "simulation.split"), (self.group_key, "data.group_key")) if k}

    def wanted(self) -> frozenset[str]:
        """The file's columns that can matter."""
        ours = COLUMNS | {"chosen", "rejected", "tools"} - self.columns.keys()
        return frozenset({*ours, *self.columns.values(), self.group_key, self.label_key} - {""})

    def file(self, path: Path, format: str, *, encoding: str, header: bool) -> None:
        """Reads one file."""
        name = format_of(path) if format == "auto" else format
        theirs = tuple(frozenset(self.columns.get(key, key) for key in shape.keys) for shape in SHAPES.values())
        source = Source(path, encoding=encoding, header=header, wanted=self.wanted(), shapes=theirs)
        part = _Part(path.name, name)
        self.parts.append(part)
        for line, row in _rows(source, name):
            part.rows += 1
            if isinstance(row, str):
                part.bad.append((line, row))
                continue
            if self.missing:
                self.there.update(key for key, value in row.items() if value is not None)
                self.missing = {theirs: setting for theirs, setting in self.missing.items() if row.get(theirs) is None}
            self._row(part, line, row)
        part.unread.update({f"column {key}": count for key, count in source.unread.items()})
        self.there.update(source.unread)
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
            keys: list[str] = []
            said = SHAPES[shape].convert(_opened(named), keys.append)
            group = _name(row.get(self.group_key), "the group") if self.group_key else ""
            label = _name(row.get(self.label_key), "the label") if self.label_key else ""
        except BadRow as why:
            part.bad.append((line, str(why)))
            return
        file = part.name if self.several else ""
        self.found.append((shape, at, Conversation(said.turns, said.chat, line, group, said.tools, file, label)))
        part.unread.update(f"key {key}" for key in keys)
        reads = self._reads(shape)
        part.unread.update(
            f"column {key}" for key, value in row.items() if key not in reads and value is not None and value != ""
        )

    def _reads(self, shape: str) -> frozenset[str]:
        """The file's own names of the columns that a shape reads."""
        if shape not in self.reads:
            known = SHAPES[shape].keys | SHAPES[shape].more
            self.reads[shape] = frozenset({self.columns.get(ours, ours) for ours in known} | {self.group_key, self.label_key})
        return self.reads[shape]

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
        reports = [part.summary(shape) for part in self.parts]
        if len(reports) == 1:
            return conversations, replace(reports[0], notes=(*notes, *reports[0].notes))
        bad = tuple(row for report in reports for row in report.bad)
        unread: Counter[str] = Counter()
        for part in self.parts:
            unread.update(part.unread)
        told = tuple(f"{report.path}: {note}" for report in reports for note in report.notes)[:SHOWN]
        formats = " and ".join(sorted({report.format for report in reports}))
        rows = sum(report.rows for report in reports)
        return conversations, ReadReport(
            name, formats, shape, rows, len(conversations), bad, (*notes, *told), _columns(unread), tuple(reports)
        )

    def _check_columns(self, name: str) -> None:
        """Some row has each column that a setting names. The names are the operator's, so they may be shown."""
        readable = sum(part.rows for part in self.parts) > sum(len(part.bad) for part in self.parts) or self.shapes
        rows = sum(part.rows for part in self.parts)
        for theirs, setting in self.missing.items():
            if readable:
                has = has_instead(theirs, self.there, known=self.wanted(), rows=rows)
                raise DataError(
                    f"{name}: no row has the column {theirs!r} that {setting.removeprefix('data.')} names",
                    hint=f"correct {setting}: as the file spells it, capital letters and spaces too" + f"; {has}" * bool(has),
                )

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
        SHAPES[shape].convert(_opened(row), lambda key: None)
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


_LISTS = ("messages", "conversations", "history")


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


def _name(value: object, of: str) -> str:
    """A group's or label's name as text. Identifiers come as text or numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"{of} is missing")
    name = plain_text(str(value), of)
    if not name.strip() or name in ("nan", "inf", "-inf"):
        raise BadRow(f"{of} is missing")
    return name

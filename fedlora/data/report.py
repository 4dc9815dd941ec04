"""What reading found, for the operator's eyes: counts, line numbers and fixed reasons; and when that is too bad to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora.core.errors import DataError
from fedlora.data.files.names import is_name
from fedlora.data.files.rows import NOT_CLOSED, NOT_FIELDS, NOT_JSON, NOT_OBJECT, OTHER_SHAPE, PYTHON_LIST

SHOWN = 20
"""Lines, names or files that are told, at most."""

_CURES = {
    NOT_JSON: "each row must be one whole JSON object",
    NOT_OBJECT: "each row must be one whole JSON object",
    NOT_FIELDS: "the first line must name every column, and fields that hold the delimiter or a line break need quotation marks",
    NOT_CLOSED: "quotation marks inside a quoted field must be doubled",
    PYTHON_LIST: "write the column with json.dumps",
    OTHER_SHAPE: "put rows of another shape into a file of their own, or set data.shape",
    "the group is missing": "data.group_key names a column that each row must fill",
}
"""What helps against a reason, beside correcting the rows."""


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
            more = [f"and {len(told) - SHOWN:,} more reasons in other files"] if len(told) > SHOWN else []
            return told[:SHOWN] + more
        by_reason: dict[str, list[int]] = {}
        for line, reason in self.bad:
            by_reason.setdefault(reason, []).append(line)
        told = [f"{reason}: {numbered(lines)}" for reason, lines in sorted(by_reason.items())]
        more = [f"and {len(told) - SHOWN:,} more reasons"] if len(told) > SHOWN else []
        return told[:SHOWN] + more

    def _unread(self) -> list[str]:
        """Names that most rows have and that look like names: others may be values, of a file whose first line is missing."""
        names = [(name, count) for name, count in self.unread if is_name(name, count, rows=self.rows)]
        others = len(self.unread) - len(names)
        told = [*([listed(names)] if names else []), *([f"{others:,} that few rows have or that are no names"] if others else [])]
        return [f"not read: {' and '.join(told)}"] if told else []


def numbered(lines: list[int]) -> str:
    """``lines 3, 8 and 310 more``: at most 20 numbers, then a count."""
    shown = ", ".join(str(line) for line in lines[:SHOWN])
    more = f" and {len(lines) - SHOWN:,} more" if len(lines) > SHOWN else ""
    return f"{'line' if len(lines) == 1 else 'lines'} {shown}{more}"


def listed(counts: Sequence[tuple[str, int]]) -> str:
    """``a (3), b (1) and 7 more``: at most 20 names, each with its count."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in counts[:SHOWN])
    return shown + (f" and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else "")


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
    cure = next((cure for of, cure in _CURES.items() if reason == of or reason.startswith(f"{of}, ")), "")
    return f"correct the rows: {cure}" if cure else "correct the rows; or data.shape and data.columns say what the file holds"

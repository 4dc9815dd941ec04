"""The tables of attacks and faults in server/SECURITY.md and server/FAULTS.md, made from the tests that show them.

A test says what it shows by a mark, in one of its decorators (also inside a ``pytest.param``)::

    @pytest.mark.attack("C4", "the server swaps ingredients", stops="the dealer's signature over what it sealed")
    @pytest.mark.fault("E16", "a second `site up`", says="another `site up` (process N) uses this directory")

The numbers are those of the review that found it; new ones go on from there. ``pytest --tables`` runs the tests it is given and
writes the tables, with what did not pass as such; ``tests/test_house.py`` holds the pages to the marks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = {"attack": ROOT / "server" / "SECURITY.md", "fault": ROOT / "server" / "FAULTS.md"}
HEADS: Final = {
    "attack": "| no. | attack | what stops it, or what it costs | test |\n|---|---|---|---|",
    "fault": "| no. | fault | what is said or done | test |\n|---|---|---|---|",
}


@dataclass(frozen=True)
class Row:
    """What one test shows.

    Attributes:
        kind: ``attack`` or ``fault``.
        test: file below ``tests/`` and function.
    """

    kind: str
    number: str
    what: str
    outcome: str
    test: str

    def line(self, passed: Mapping[str, bool] | None = None) -> str:
        failed = passed is not None and not passed.get(self.test, False)
        outcome = "**not shown: its test did not pass**" if failed else self.outcome
        return f"| {self.number} | {self.what} | {outcome} | `{self.test}` |"


def rows(kind: str) -> list[Row]:
    """Every mark of this kind in the tests, by number."""
    found = [row for path in sorted((ROOT / "tests").rglob("test_*.py")) for row in _rows_of(path) if row.kind == kind]
    return sorted(found, key=lambda r: (*_natural(r.number), r.test, r.what))


def _natural(number: str) -> tuple[str, int, str]:
    letters, digits, rest = re.fullmatch(r"([A-Za-z]*)(\d*)(.*)", number).groups()  # type: ignore[union-attr]
    return letters, int(digits or 0), rest


def _rows_of(path: Path) -> Iterator[Row]:
    source = path.read_text(encoding="utf-8")
    if "mark.attack" not in source and "mark.fault" not in source:
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        for call in (c for d in node.decorator_list for c in ast.walk(d) if isinstance(c, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr in PAGES:
                said = [ast.literal_eval(a) for a in (*call.args, *(k.value for k in call.keywords))]
                yield Row(call.func.attr, *said, f"{path.relative_to(ROOT / 'tests').as_posix()}::{node.name}")


def table(kind: str, passed: Mapping[str, bool] | None = None) -> str:
    """The table; ``passed`` by test, None: taken as given."""
    return "\n".join([HEADS[kind], *(row.line(passed) for row in rows(kind))])


def in_page(kind: str) -> str:
    """The table as the page has it."""
    return _parts(kind)[1].strip()


def write(kind: str, passed: Mapping[str, bool]) -> None:
    before, _, after = _parts(kind)
    PAGES[kind].write_text(f"{before}\n{table(kind, passed)}\n{after}", encoding="utf-8")


def _parts(kind: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {kind}s: made by pytest --tables -->", f"<!-- end of {kind}s -->"
    text = PAGES[kind].read_text(encoding="utf-8")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after

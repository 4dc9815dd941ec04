"""What a terminal shows: no text from elsewhere stands at its left edge, however long the line is that it came in."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path

import pytest
from cli.test_approve import SEALED, home  # noqa: F401  # a fixture
from hypothesis import example, given
from hypothesis import strategies as st

import fedlora
from fedlora.cli.output import Screen, emit, fail
from fedlora.cli.terminal import Guarded, guarded, wrapped
from fedlora.core.deployment.digests import grouped
from fedlora.core.events import Event
from fedlora.core.toml import dump_toml

FORGED = ("error (data): FALSE", "plan 93f1 is approved", "YOU AGREE")
PROGRAM = "import sys; from fedlora.cli import main; sys.exit(main())"


def shown(*words, columns, keys=b""):
    """The rows of a terminal on which a command has run, without the blanks at their ends."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = os.environ | {"PYTHONPATH": str(Path(fedlora.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 1 << 16):
            said += part
            if keys and b"[y/N]" in said:  # typed when it is asked for: its echo ends the row
                os.write(ours, keys)
                keys = b""
    except OSError:  # nobody writes to it any more
        pass
    process.wait(60)
    os.close(ours)
    return rows(said.decode(), columns or 80)


def rows(text, columns):
    """A terminal's rows: it goes on in the next row, at its left edge, where a line is too long."""
    out = []
    for line in text.replace("\r\n", "\n").split("\n"):
        row, used = "", 0
        for c in line:
            if used + width_of(c) > columns:
                out.append(row)
                row, used = "", 0
            row, used = row + c, used + width_of(c)
        out.append(row)
    return [row.rstrip() for row in out]


def width_of(c):
    return 0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1


@pytest.mark.attack(
    "D30",
    "a plan whose revision fills a terminal's rows, so that the next one, at its left edge, reads as a line of the command's own",
    stops="on a terminal of 20 columns or more the command itself cuts each line to the width, and what goes on is indented "
    "further than the line",
)
@pytest.mark.parametrize("columns", [80, 44, 0])
def test_a_plan_s_revision_fills_no_row_of_a_terminal(home, columns):  # noqa: F811
    first = len(f"  {'':28}  {SEALED.model.model_name_or_path} at main")  # 28: the longest topic
    row = columns or 80
    revision = ("main".ljust(4 - first % -row) + "".join(line.ljust(row) for line in FORGED))[:200].rstrip()
    plan = SEALED.model_copy(update={"model": SEALED.model.model_copy(update={"revision": revision})})
    (home / "plan.toml").write_text(dump_toml(plan))
    seen = shown("site", "approve", "plan.toml", columns=columns, keys=b"n\n")
    assert all(line in "\n".join(seen) for line in ("  base model", *FORGED[:2]))
    seen = [r for r in seen if r not in ("", "plan") and not r.startswith(f"plan {grouped(plan.digest())[:30]}")]
    ours = (" ", "no earlier", "approve?", "n", "error (declined):")
    assert not [r for r in seen if not r.startswith(ours)]


@pytest.mark.attack(
    "C1c",
    "the same in a key that an error quotes, so long that a terminal goes on with it at its left edge",
    stops="the same door cuts the lines of errors too",
)
@pytest.mark.parametrize("words", [["check"], ["site", "approve"]], ids=" ".join)
@pytest.mark.parametrize("fill", ["x", "\u6f22", "e\u0301", "\u00e4"])
def test_an_error_on_a_terminal_fills_no_row(home, words, fill):  # noqa: F811
    (home / "plan.toml").write_text(f'"{fill * 99} {" ".join(line.ljust(79) for line in FORGED)}" = 1\n')
    seen = shown(*words, "plan.toml", columns=80)
    assert "FALSE" in "".join(seen)
    assert not [row for row in seen[1:] if row and not row.startswith((" ", "hint: "))], seen


TEXT = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")) | st.sampled_from(" aä漢\u0301")) | st.lists(
    st.text("ab漢", min_size=1, max_size=99)
).map(" ".join)


@given(TEXT, st.integers(20, 90))
@example("x" * 200, 20)
@example(" " * 200 + "x", 20)
@example(" " * 19 + "漢" * 40, 20)
@example("two words", 20)
def test_a_line_is_cut_to_the_width_and_goes_on_indented(text, columns):
    lines = wrapped(text, columns).split("\n")
    assert all(sum(map(width_of, line)) <= columns for line in lines)
    assert all(line.startswith(" " * 4) for line in lines[1:])
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    if sum(2 if width_of(c) != 1 or not c.isascii() else 1 for c in text) <= columns:
        assert lines == [text]


def test_words_stay_whole_where_they_fit():
    assert wrapped("  topic  one two three four", 20) == "  topic  one two\n      three four"
    assert wrapped("error: " + "x" * 20, 20).split("\n") == ["error:", "    " + "x" * 16, "    xxxx"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


LONG = "x" * 75 + " " * 80 + "y" * 300


def test_no_way_to_a_terminal_is_left_out(monkeypatch):
    """Answers, errors, what libraries write in any pieces, and progress above bars."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")  # what a terminal that does not know its width is taken for
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with guarded():
        emit({}, [f"plan {LONG}"], as_json=False)
        fail(LONG, hint=f"{LONG}\n{LONG}", code="config", status=3)
        for part in (LONG, "\n", *LONG, "z\n", "unfinished"):
            sys.stderr.write(part)
        sys.stdout.write(f"on the other stream {LONG}")
        emit({}, [f"plan {LONG}"], as_json=False)
    with Screen() as screen:
        screen(Event.FAILED, {"code": LONG})
    lines = terminal.getvalue().split("\n")
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line and not line.startswith((" ", "plan ", "error (", "hint:"))] == []
    assert terminal.getvalue().count("y") == 300 * 9


def test_what_is_no_terminal_gets_whole_lines(capsys):
    emit({}, [f"plan {LONG}"], as_json=False)
    fail(LONG, hint="", code="config", status=3)
    Guarded(sys.stdout).write(LONG)
    said = capsys.readouterr()
    assert said.out == f"plan {LONG}\n  {LONG}"
    assert said.err == f"error (config): {LONG}\n"

"""The runner of mutants says what no test notices, and does not take a broken list for a good one."""

from __future__ import annotations

import mutants
import pytest

pytestmark = pytest.mark.slow
CODE = "def allowed(n: int) -> bool:\n    if n < 0:\n        return False\n    return True\n"
TEST = "from code_under import allowed\n\n\ndef test_it():\n    assert allowed(1)\n    assert not allowed(-1)\n"
WORDS = {"file": "code_under.py", "old": "if n < 0:", "new": "if False:", "tests": ["test_it.py"]}


@pytest.fixture
def say(tmp_path, capsys, monkeypatch):
    """Runs a list of mutants, each its name and what is unlike :data:`WORDS`; the status, and what was printed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a small tree needs none

    def say(**entries):
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "code_under.py").write_text(CODE)
        (tmp_path / "tree" / "test_it.py").write_text(TEST)
        tables = [{"name": name, **WORDS, **changes} for name, changes in entries.items()]
        lines = ["[[mutant]]\n" + "\n".join(f"{k} = {v!r}" for k, v in table.items()) for table in tables]
        (tmp_path / "list.toml").write_text("\n".join(lines) + "\n")
        status = mutants.main(["--jobs", "1"], root=tmp_path / "tree", path=tmp_path / "list.toml")
        assert (tmp_path / "tree" / "code_under.py").read_text() == CODE
        return status, capsys.readouterr().out

    return say


def test_what_survives_or_is_no_mutant_is_said(say):
    status, said = say(
        everything={},
        fails_otherwise={"new": "if n < None:"},
        nearly_nothing={"new": "if n <= -1:"},
        unreadable={"new": "if (:"},
        twice={"old": "return", "new": "yield"},
        nowhere={"old": "if n > 7:"},
        excused={"new": "if n < -0:", "survives": "minus zero is zero"},
        wrongly_excused={"survives": "nobody looks"},
    )
    assert status == 1
    assert [line for line in said.splitlines() if line.isupper() or line[:4].isupper()] == [
        "SURVIVES: nearly_nothing",
        "BROKEN: unreadable",  # nothing was collected, so no test has said anything
        "BROKEN: twice",
        "BROKEN: nowhere",
        "EXCUSED: excused",
        "BROKEN: wrongly_excused",
    ]
    assert "stands 2 times" in said
    assert "stands 0 times" in said
    assert "2 killed" in said


def test_with_nothing_but_killed_and_excused_all_is_well(say):
    assert say(everything={}, excused={"new": "if n < -0:", "survives": "minus zero is zero"})[0] == 0


def test_tests_that_fail_without_any_mutant_prove_nothing(say):
    status, said = say(everything={"tests": ["test_that.py"]})
    assert status == 1
    assert "do not pass without" in said


@pytest.mark.parametrize("more", ['name = "one"', "extra = 1", ""])
def test_a_list_that_is_none_is_refused(tmp_path, more):
    """A name twice, a key that is none, one that is missing."""
    entry = "[[mutant]]\n" + "\n".join(f"{k} = {v!r}" for k, v in WORDS.items()) + "\n"
    (tmp_path / "list.toml").write_text(2 * (entry + more + "\n"))
    with pytest.raises(ValueError, match=r"list\.toml"):
        mutants.load(tmp_path / "list.toml")

"""`make test` runs the types beside the tests, and fails where either does."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.mark.parametrize("types", [0, 1])
@pytest.mark.parametrize("tests", [0, 1, 5])
@pytest.mark.parametrize("style", [0, 1])
def test_make_test_fails_where_style_types_or_tests_do_and_says_which(tmp_path, style, types, tests):
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("ruff", f"exit {style}"),
        ("mypy", f"sleep 0.1; echo mypy was here; exit {types}"),
        ("python", f"echo pytest was here; exit {tests}"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ready").touch()
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", f"VENV={tmp_path}", "test"], cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert (done.returncode == 0) == (style == types == tests == 0)
    if style == 0:
        assert done.stdout.index("pytest was here") < done.stdout.index("mypy was here")
        assert ("FAILED: mypy" in done.stdout, "FAILED: tests" in done.stdout) == (types != 0, tests != 0)

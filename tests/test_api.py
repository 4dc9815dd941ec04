"""What `import fedlora` gives to scripts: a dozen names, loaded when they are used, documented, and an example that runs."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora

ROOT = Path(fedlora.__file__).parent
LIGHT = [n for n in fedlora.__all__ if not fedlora._HOMES[n].startswith("fedlora.learn")]


def test_import_loads_nothing():
    code = (
        "import sys; before = {*sys.modules}; import fedlora; print(sorted({m.split('.')[0] for m in {*sys.modules} - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(ast.literal_eval(loaded)) <= {"fedlora", *sys.stdlib_module_names}


def test_no_name_but_those_of_training_loads_torch():
    code = f"import sys, fedlora; [getattr(fedlora, n) for n in {LIGHT}]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_type_checkers_see_is_what_is_loaded():
    block = next(n for n in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(n, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == fedlora._HOMES
    assert set(fedlora.__all__) == set(seen) <= set(dir(fedlora))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.torch] * (n not in LIGHT)) for n in fedlora.__all__])
def test_every_name_is_there_and_says_what_it_is(name):
    found = getattr(fedlora, name)
    assert found is getattr(importlib.import_module(fedlora._HOMES[name]), name)
    assert found.__doc__ or name == "RULES"


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="'nothing'"):
        fedlora.nothing  # noqa: B018


@pytest.mark.torch
@pytest.mark.slow
def test_the_example_runs_and_gives_what_it_says():
    try:
        result = doctest.testfile(str(ROOT / "EXAMPLE.md"), module_relative=False)
    finally:
        fedlora.RULES.forget("agreed")
    assert result.attempted > 10
    assert not result.failed


@pytest.mark.torch
@pytest.mark.slow
def test_the_documentation_has_every_name_and_the_example(tmp_path):
    command = [sys.executable, "-m", "pdoc", "-o", str(tmp_path), "fedlora", "!fedlora."]
    subprocess.run(command, check=True, capture_output=True, text=True)
    page = (tmp_path / "fedlora.html").read_text()
    assert "A rule of your own, in a script" in page
    assert [name for name in fedlora.__all__ if f'id="{name}"' not in page] == []

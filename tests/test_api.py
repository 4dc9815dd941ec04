"""What `import fedlora` gives to scripts: a dozen names, loaded when they are used, documented, and an example that runs."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_sweep import PLAN

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


PATHS = {
    "load_plan": ["path"],
    "load_adapter": ["path"],
    "run": ["plan"],
    "simulate": ["plan", "out", "root"],
    "results_frame": ["results"],
    "attach": ["study", "site", "base"],
    "export_adapter": ["out"],
}


@pytest.mark.torch
def test_every_path_of_a_public_function_may_be_text():
    """Whatever a public function calls a Path, in its signature, takes ``str`` and ``os.PathLike`` as well."""
    found = {}
    for name in fedlora.__all__:
        function = getattr(fedlora, name)
        if inspect.isfunction(function):
            said = {n: str(p.annotation) for n, p in inspect.signature(function).parameters.items()}
            assert not [n for n, kind in said.items() if "Path" in kind and "str | os.PathLike[str]" not in kind], name
            if paths := [n for n, kind in said.items() if "PathLike" in kind]:
                found[name] = paths
    assert found == PATHS


def takes_plan():
    """Public functions with an argument ``plan``, each with nothing else that would be used before it."""
    functions = {name: getattr(fedlora, name) for name in fedlora.__all__}
    found = {n: inspect.signature(f).parameters for n, f in functions.items() if inspect.isfunction(f)}
    return {n: [p.name for p in of.values() if p.default is p.empty] for n, of in found.items() if "plan" in of}


@pytest.mark.torch
def test_whatever_takes_a_plan_takes_its_file_and_names_what_is_neither(tmp_path):
    """The law over the public functions: a wrong thing in place of a plan is a named error before anything else is looked at."""
    assert takes_plan().keys() == {"run", "simulate"}
    (tmp_path / "wrong.toml").write_text("[lora]\nrank = 4")
    for name, arguments in takes_plan().items():
        others = {key: None for key in arguments if key != "plan"} | ({"out": tmp_path / "out"} if name == "simulate" else {})
        for kind in (str, Named, Path):
            with pytest.raises(fedlora.FedLoRAError, match=r"use lora\.r"):  # it was read
                getattr(fedlora, name)(kind(tmp_path / "wrong.toml"), **others)
            with pytest.raises(fedlora.FedLoRAError, match="cannot read"):
                getattr(fedlora, name)(kind(tmp_path / "none.toml"), **others)
        for wrong in (None, {}, 3, b"plan.toml"):
            with pytest.raises(fedlora.FedLoRAError, match="a plan is expected") as refused:
                getattr(fedlora, name)(wrong, **others)
            assert "fedlora.load_plan" in refused.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_the_paths_of_a_plan_are_seen_from_its_file_unless_a_root_is_said(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    file = tmp_path / "study" / "plan.toml"
    file.write_text(PLAN + 'split = "iid"\n[simulation.data]\npath = "pool.csv"\n')
    lines = [f"question {n},answer {n % 3}" for n in range(60)]
    (tmp_path / "study" / "pool.csv").write_text("\n".join(["prompt,completion", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    for seeds, found in ((np.arange(2, 3), [2]), (None, [0]), ([], [0])):
        done = fedlora.simulate(str(file), out=tmp_path / f"out-{seeds}", quiet=True, seeds=seeds)
        assert [one.seed for one in done] == found
    with pytest.raises(fedlora.FedLoRAError, match=r"pool\.csv"):
        fedlora.simulate(str(file), out=tmp_path / "other", root=tmp_path, quiet=True)


@pytest.mark.parametrize("seeds", [["0"], 1, "0", "0,1", [0.0], [None], [-1], [0, 0], [[0]], 1.5])
def test_seeds_that_are_none_are_a_named_error_at_once(tmp_path, seeds):
    (tmp_path / "exp.toml").write_text(PLAN)
    with pytest.raises(fedlora.FedLoRAError, match=r"a list of seeds|a seed stands twice"):
        fedlora.simulate(tmp_path / "exp.toml", out=tmp_path / "out", seeds=seeds)
    assert not (tmp_path / "out").exists()


class Named:
    """A path of another library."""

    def __init__(self, path):
        self.path = str(path)

    def __fspath__(self):
        return self.path


@pytest.mark.torch
@pytest.mark.parametrize("kind", [str, Named])
def test_text_is_a_path_in_a_notebook(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp.toml").write_text(PLAN)
    plan = fedlora.load_plan(kind("exp.toml"))
    results = fedlora.simulate(plan, out=kind("runs/nb"), root=kind(tmp_path))
    assert len(fedlora.results_frame(kind("runs/nb"))) == len(fedlora.results_frame(results)) > 0
    assert fedlora.load_adapter(kind("runs/nb/seed-0/adapter.safetensors"))[0].layout.size
    with pytest.raises(ValueError, match="attach takes study"):
        fedlora.attach(None, study=kind("a"), site=kind("b"))
    with pytest.raises(fedlora.FedLoRAError, match="runs"):
        fedlora.export_adapter(None, kind("runs"), lora=plan.lora, base_model="fedlora/toy", revision="", run=None)

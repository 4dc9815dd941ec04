"""The shape of the house: layers, homes of heavy libraries, what is shipped, samples that cannot go stale."""

import ast
import functools
import importlib
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mutants
import pytest
import tables

import fedlora
from fedlora.core.plan import Plan, SiteFile, sample

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    "core",  # pure
    "formats",
    "processes",
    "rules",
    "protect",
    "data",
    "rounds",
    "site",
    "learn",
    "learn/fast",
    "gateway",
    "assemble",
    "flower",
    "library",
    "lab",
    "cli",
    "__main__",
)
"""From the bottom up: each imports only from itself and from what stands before it."""
HOMES = {
    "torch": {"learn"},
    "transformers": {"learn"},
    "peft": {"learn"},
    "bitsandbytes": {"learn"},
    "accelerate": {"learn"},
    "gguf": {"learn"},
    "tokenizers": {"learn"},
    "flwr": {"flower"},
    "httpx": {"flower", "gateway"},
    "starlette": {"gateway"},
    "uvicorn": {"gateway"},
    "cryptography": {"formats", "protect", "gateway"},  # gateway: TLS certificates, and the node keys that Flower wants
    "typer": {"cli"},
    "rich": {"cli"},
    "pyarrow": {"data"},
    "pickle": set(),
    "random": {"learn"},  # the toy data only
}
FILES = sorted((ROOT / "fedlora").rglob("*.py"))


def part(path: Path) -> str:
    inside = path.relative_to(ROOT / "fedlora")
    return "learn/fast" if inside.parts[:2] == ("learn", "fast") else inside.parts[0].removesuffix(".py")


def part_of(name: str) -> str:
    """The same for a dotted name below fedlora."""
    parts = name.split(".")
    return "learn/fast" if parts[:2] == ["learn", "fast"] else parts[0]


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> set[str]:
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", [p for p in FILES if part(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only_and_heavy_things_have_one_home(path):
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "fedlora":
            assert ORDER.index(part_of(rest)) <= ORDER.index(part(path)), name
        assert part(path).partition("/")[0] in HOMES.get(top, {part(path).partition("/")[0]}), name


def test_no_module_imports_itself_by_a_detour():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    uses = {m: {n if n in modules else n.rpartition(".")[0] for n in imports(p)} & modules.keys() for m, p in modules.items()}
    done: set[str] = set()
    while free := {m for m in modules if m not in done and not (uses[m] - done - {m})}:
        done |= free
    assert not modules.keys() - done


def test_nothing_prints_but_the_command():
    for path in FILES:
        calls = [n for n in nodes(path) if isinstance(n, ast.Call)]
        prints = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id in ("print", "eval", "exec")]
        assert not prints or part(path) == "cli", path


MODULES = sorted({m.name for m in pkgutil.walk_packages(fedlora.__path__, "fedlora.")} - {"fedlora.__main__"})


def _imports(module: str) -> list[pytest.MarkDecorator]:
    heavy = {"fedlora.learn": pytest.mark.torch, "fedlora.flower": pytest.mark.slow}
    return [mark for folder, mark in heavy.items() if module.startswith(folder)]


@pytest.mark.parametrize("name", [pytest.param(m, marks=_imports(m)) for m in MODULES])
def test_every_name_in_all_exists(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public), public


def test_the_wheel_holds_only_fedlora(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"fedlora"}
    assert "fedlora/py.typed" in names
    assert "fedlora/FORMAT.md" in names


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fedlora.cli import main; main(['--help']); loaded = {m.partition('.')[0] for m in sys.modules};"
        "print(sorted(loaded & {'torch', 'numpy', 'flwr', 'transformers', 'pydantic', 'cryptography'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.rstrip().endswith("[]")


@pytest.mark.parametrize(("file", "section"), [("server/plan.toml", Plan), ("client/site.toml", SiteFile)])
def test_the_sample_files_are_what_the_models_say(file, section):
    assert (ROOT / file).read_text() == sample(section)


@pytest.mark.parametrize("kit", ["server", "client", "simulations"])
def test_kits_are_not_packages(kit):
    assert not (ROOT / kit / "__init__.py").exists()
    out = subprocess.run([sys.executable, str(ROOT / kit / "run.py"), "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in out.stdout


def test_every_mutant_changes_a_line_that_stands_and_names_tests_that_do():
    assert [f"{m.name}: {said}" for m in mutants.load() if (said := m.problem(ROOT))] == []


@pytest.mark.parametrize("kind", tables.PAGES)
def test_the_tables_of_attacks_and_faults_are_what_the_tests_say(kind):
    assert tables.in_page(kind) == tables.table(kind), (
        f"run: pytest --tables {' '.join(sorted({r.test for r in tables.rows(kind)}))}"
    )

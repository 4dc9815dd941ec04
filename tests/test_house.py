"""The shape of the house: layers, homes of heavy libraries, what is shipped, samples that cannot go stale."""

import ast
import functools
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import mutants
import pytest
import tables

import fedlora
from fedlora.cli.guides import GUIDES
from fedlora.core.plan import Plan
from fedlora.core.toml import sample
from fedlora.site.site_file import SiteFile

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    "core",  # pure
    "answers",  # pure
    "formats",
    "processes",
    "rules",
    "privacy",
    "protect/secagg/protocol",
    "protect",
    "data/files",
    "data",
    "rounds",
    "site",
    "learn/bases",
    "learn/export",
    "learn",
    "learn/fast",
    "gateway",
    "assemble",
    "doctor",
    "worker",  # a process of its own at a site with several GPUs
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
    "cryptography": {
        "formats",
        "privacy",
        "protect",
        "gateway",
    },  # gateway: TLS certificates, and the node keys that Flower wants
    "typer": {"cli"},
    "rich": {"cli"},
    "pyarrow": {"data"},
    "jinja2": {"lab"},
    "vl_convert": {"lab"},
    "tensorboardX": {"lab"},
    "mlflow": {"lab"},
    "wandb": {"lab"},
    "dp_accounting": {"privacy"},
    "pickle": set(),
    "random": {"learn"},  # the toy data only
}
FILES = sorted((ROOT / "fedlora").rglob("*.py"))


def part(path: Path) -> str:
    """The row of the order that a file belongs to: the longest that it lies in."""
    inside = path.relative_to(ROOT / "fedlora").with_suffix("").as_posix()
    return max((row for row in ORDER if f"{inside}/".startswith(f"{row}/")), key=len, default=inside)


def part_of(name: str) -> str:
    """The same for a dotted name below fedlora."""
    return part(ROOT / "fedlora" / name.replace(".", "/"))


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


PRIVATE = {"TENSOR_PROCESSORS", "GGUF_PRE_TOKENIZER_SPLITS", "support_avx512bf16_for_cpu", "init_state",
           "H11Protocol", "their_state", "response_complete", "lifespan", "NodeAuthHttpInterceptor", "TaskIdentity"}  # fmt: skip
"""Names that libraries spell as public ones and promise to nobody."""
DOCUMENTED = {"_exit"}
"""os._exit, which is public in spite of its name."""


def internals(path: Path) -> bool:
    return "_internals" in path.stem or "_internals" in path.parent.name


def private_names(path: Path) -> list[str]:
    """What a file takes by a name with an underscore from an object that is not its own, and ours only by their ``_fedlora``.

    Its own are ``self`` and ``cls``, and the names that the file itself gives: functions, classes, fields, attributes it sets.
    """
    tree = ast.parse(path.read_text())
    own = set(DOCUMENTED)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            own.add(node.attr)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_self(node.value):
            found.append(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr"):
            found += [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "__dict__":
            found += [node.slice.value] if isinstance(node.slice, ast.Constant) else []
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in ("__future__", "fedlora"):
            found += [*node.module.split("."), *(a.name for a in node.names)]
        elif isinstance(node, ast.Import):
            found += [part for a in node.names for part in a.name.split(".")]
    return [n for n in found if n.startswith("_") and not n.startswith(("__", "_fedlora")) and n not in own]


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@pytest.mark.parametrize("path", [p for p in FILES if not internals(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_of_others_are_used_in_internals_only(path):
    assert not private_names(path)
    tree = ast.parse(path.read_text())
    spelled = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
    }
    spelled |= {part for name in imports(path) for part in name.split(".") if not name.startswith("fedlora.")}
    assert not spelled & PRIVATE
    if part(path).partition("/")[0] not in ("learn", "gateway", "flower"):
        assert not [n for n in imports(path) if "_internals" in n]


def test_a_module_imports_no_private_name_of_another_one():
    taken = {
        f"{path.relative_to(ROOT)}: {alias.name}"
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedlora")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "_internals"
    }
    assert not taken


def test_of_flower_only_its_public_parts_are_imported_elsewhere():
    public = ("flwr.app.", "flwr.serverapp.", "flwr.clientapp.")
    for path in FILES:
        if not internals(path):
            assert not [n for n in imports(path) if n.partition(".")[0] == "flwr" and not n.startswith(public)], path


def test_learn_looks_for_what_is_fast_in_one_place():
    for path in FILES:
        if part(path) == "learn":
            named = [
                n
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Constant) and n.value == "fedlora.learn.fast"
            ]
            assert not named or path.name == "hooks.py", path


UNUSED = {
    "wait_closed": "asyncio calls it on a server",
    "do_GET": "http.server calls it on a handler",
    "handleError": "logging calls it on a handler",
    "log_message": "http.server calls it on a handler",
    "readinto": "io.BufferedReader calls it on a raw stream",
    "writelines": "of a stream, for libraries",
    "site_link": "a part of lab/testing.py, by which others test a rule or a mode of their own",
    "tokenise": "an earlier name of tokenize, for scripts of others",
}
"""What nothing of ours uses by its name, and why it stands."""
CALLED_BY_LIBRARIES = ("command", "callback", "model_validator", "field_validator", "model_serializer", "field_serializer")
"""Decorators by which typer and pydantic take a function."""


def used_names(path: Path) -> set[str]:
    """What a file calls or reads by name, beside what it only imports or defines."""
    loads = (n for n in nodes(path) if isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Load))
    return {n.id if isinstance(n, ast.Name) else n.attr for n in loads}


def test_nothing_is_there_that_nobody_uses():
    """A function, class or constant that is only defined, or only tested, goes; an exception says why."""
    kits = [p for kit in ("server", "client", "simulations") for p in (ROOT / kit).rglob("*.py")]
    used = set(fedlora.__all__).union(*(used_names(p) for p in [*FILES, *kits]))
    for page in (ROOT / "fedlora").rglob("*.j2"):
        used |= {name for said in re.findall(r"{[{%](.*?)[}%]}", page.read_text()) for name in re.findall(r"\w+", said)}
    dead = set()
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                by_library = any(d in ast.unparse(deco) for deco in node.decorator_list for d in CALLED_BY_LIBRARIES)
                dead |= {node.name} - used if not by_library and not node.name.startswith("__") else set()
        for node in ast.iter_child_nodes(nodes(path)[0]):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            dead |= {t.id for t in targets if isinstance(t, ast.Name) and not t.id.startswith("__")} - used
    assert dead - UNUSED.keys() == set()
    assert UNUSED.keys() <= dead, "used by now: take it out of UNUSED"


IMPURE = {"os", "io", "time", "random", "secrets", "pathlib", "shutil", "tempfile", "socket", "subprocess", "threading", "uuid",
          "datetime", "asyncio", "urllib", "http", "logging", "sys", "platform", "locale", "getpass", "glob"}  # fmt: skip
"""Modules by which a program would read the disk, the net, a clock, chance or its surroundings."""
TOUCHES = {"open", "input", "print", "read_text", "read_bytes", "write_text", "write_bytes", "exists", "is_file", "mkdir",
           "urandom", "default_rng", "now", "today", "monotonic", "perf_counter", "time_ns", "getenv", "fromfile", "tofile",
           "memmap", "save", "savez", "loadtxt", "Generator", "seed", "uniform"}  # fmt: skip


def impure(source: str) -> set[str]:
    """What a module imports or calls that makes its result depend on more than its arguments."""
    tree = ast.parse(source)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.partition(".")[0] in IMPURE}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module.partition(".")[0] in IMPURE else set()
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            found |= {name} & TOUCHES
        elif isinstance(node, ast.Attribute) and node.attr == "random":
            found.add("random")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "fedlora" / "core").rglob("*.py")), ids=lambda p: p.name)
def test_core_does_no_input_or_output_and_reads_no_clock_and_no_randomness(path):
    assert not impure(path.read_text())


@pytest.mark.parametrize(
    "line",
    ["import time", "from os import urandom", "import os.path", "from pathlib import Path", "open('x')", "x.read_text()",
     "np.random.default_rng()", "import numpy.random as r; r.default_rng()", "from datetime import datetime"],
)  # fmt: skip
def test_what_is_impure_is_seen(line):
    assert impure(line)


def test_core_imports_a_home_by_a_constant_name_alone():
    """The registry's late import: its names stand in the source, never in a file."""
    for path in sorted((ROOT / "fedlora" / "core").rglob("*.py")):
        tree = ast.parse(path.read_text())
        late = [
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith(("import_module", "__import__"))
        ]
        assert not late or (path.name == "registry.py" and [ast.unparse(n.args[0]) for n in late] == ["self._home"]), path
    for path in FILES:
        made = [
            n for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "Registry"
        ]  # fmt: skip
        assert all(isinstance(n.args[1], ast.Constant) and n.args[1].value.startswith("fedlora.") for n in made), path


def repeated(source: str) -> list[str]:
    """Classes that hold three keys or more of one of a plan's sections."""
    sections = [
        set(field.annotation.model_fields) for field in Plan.model_fields.values() if hasattr(field.annotation, "model_fields")
    ]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            held = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            found += [node.name for keys in sections if len(held & keys) >= 3]
    return found


def test_nothing_repeats_the_keys_of_a_plans_section():
    """Sections are the options: what takes them has no names, types, defaults and bounds of its own for them."""
    for path in FILES:
        if path.name != "plan.py":
            assert not repeated(path.read_text()), path
    assert repeated(
        "class TrainOptions:\n    optim: str = 'adamw_torch'\n    packing: bool = True\n    max_length: int = 1024"
    ) == ["TrainOptions"]


def test_files_become_objects_in_three_functions():
    tree = ast.parse((ROOT / "fedlora" / "assemble.py").read_text())
    assert [n.name for n in tree.body if isinstance(n, ast.FunctionDef)] == ["server", "site", "lab"]


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
def test_every_module_is_imported_alone_and_only_a_package_that_exports_has_all(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert bool(names) <= module.__file__.endswith("__init__.py")
    assert len(set(names)) == len(names)
    for public in names:
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
    assert {f"fedlora/{page}.md" for page in ("ARCHITECTURE", "DECISIONS", "EXAMPLE", "FORMAT")} <= set(names)
    assert "fedlora/lab/page/page.html.j2" in names
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    read_from_the_wheel(tmp_path / "installed", tmp_path / "elsewhere")


def read_from_the_wheel(installed, cwd):
    """Far from a checkout: the guides, the sample files and the commands that the README begins with."""
    cwd.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    commands = [["docs", "--out", "."], ["check", "simulations/plans/toy.toml"], ["check", "server/plan.toml"], ["docs", "site"]]
    code = (
        "import json, sys\nfrom fedlora.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n    print('-' * 9)\n    if main(words): sys.exit(f'{words} failed')"
    )
    argv = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rpartition("-" * 9)[2].startswith("\n# ")
    for where, _ in GUIDES.values():
        assert (cwd / where).read_bytes() == (ROOT / where).read_bytes()


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fedlora.cli import main; main(['--help']); loaded = {m.partition('.')[0] for m in sys.modules};"
        "print(sorted(loaded & {'torch', 'numpy', 'flwr', 'transformers', 'pydantic', 'cryptography', 'jinja2', 'vl_convert'}))"
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


def test_no_folder_is_too_large_to_know():
    sizes = {folder: sum(len(p.read_text().splitlines()) for p in folder.glob("*.py")) for folder in {p.parent for p in FILES}}
    assert {str(folder.relative_to(ROOT)): lines for folder, lines in sizes.items() if lines > 3200} == {}


def test_no_file_is_too_long_to_read():
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert {name: lines for name, lines in sizes.items() if lines > 400} == {}

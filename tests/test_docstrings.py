"""What docstrings and comments point to is there: errors, classes and functions, sections of FORMAT.md."""

import ast
import builtins
import functools
import importlib
import re
from pathlib import Path

import pytest

from fedlora.core.codes import CODES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fedlora"
FILES = sorted(PACKAGE.rglob("*.py"))
OTHERS = sorted(p for folder in ("tests", "server", "client", "simulations") for p in (ROOT / folder).rglob("*.py"))
HOLDERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def texts(path: Path) -> list[str]:
    """All docstrings of a file, and the strings that stand below an attribute or a constant."""
    return [
        node.value.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


# --- Raises ---------------------------------------------------------------------------------------------------------------


@functools.cache
def errors() -> frozenset[str]:
    """Classes whose instances can be raised: Python's own, and those of the library that derive from one."""
    found = {n for n in dir(builtins) if isinstance(getattr(builtins, n), type) and issubclass(getattr(builtins, n), Exception)}
    classes = [n for p in FILES for n in ast.walk(tree(p)) if isinstance(n, ast.ClassDef)]
    while more := {c.name for c in classes if {ast.unparse(b) for b in c.bases} & found} - found:
        found |= more
    return frozenset(found)


def is_exception(name: str) -> bool:
    """Whether a dotted name is one of an exception of Python's library."""
    module, _, last = name.rpartition(".")
    return module in ("http.client",) and issubclass(getattr(importlib.import_module(module), last), Exception)


def heads(text: str) -> list[str]:
    """What stands before the colon in each entry of a docstring's section "Raises:"."""
    _, here, section = text.partition("Raises:")
    if not here:
        return []
    first, *lines = section.splitlines()
    if first.strip():
        entries = [first.strip()]
    else:
        indent = len(lines[0]) - len(lines[0].lstrip())
        entries = []
        for line in lines:
            if (line.strip() and len(line) - len(line.lstrip()) < indent) or not line.strip():
                break
            if line[indent] == " ":
                entries[-1] += " " + line.strip()
            else:
                entries.append(line.strip())
    return [re.split(r"[:;]|\.(?!\w)", entry, maxsplit=1)[0] for entry in entries]


def wrong_raises(text: str) -> list[str]:
    """Entries that name no error, or a code that is none."""
    found = []
    for head in heads(text):
        codes = [code for inside in re.findall(r"\(([^)]*)\)", head) for code in re.split(r",\s*", inside)]
        names = re.split(r",\s*|\s+or\s+", re.sub(r"\s*\([^)]*\)", "", head).strip())
        ours = {name for name in names if not is_exception(name)}
        if not ours <= errors() or not set(codes) <= CODES:
            found.append(head)
    return found


@each_file
def test_a_docstring_names_errors_and_codes_that_exist(path):
    assert [wrong for text in texts(path) for wrong in wrong_raises(text)] == []


@pytest.mark.parametrize(
    "section", ["QuorumNotReached: x", "RunFailed (quorun): x", "StoreError, Nothing: x", "StoreError: x\n        Nothing: y"]
)
def test_an_error_that_does_not_exist_is_found(section):
    assert wrong_raises(f"Does.\n\n    Raises:\n        {section}\n    ")
    assert not wrong_raises(
        "Does.\n\n    Raises:\n        StoreError, RunFailed (quorum, stopped): Nothing:\n            goes on\n"
    )


# --- references -----------------------------------------------------------------------------------------------------------


def names(node: ast.AST) -> set[str]:
    """What is defined or imported directly in a module or class."""
    found = set()
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(child.name)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found.add(child.target.id)
        elif isinstance(child, ast.Assign):
            found |= {t.id for t in child.targets if isinstance(t, ast.Name)}
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).partition(".")[0] for a in child.names}
        elif isinstance(child, ast.If):  # TYPE_CHECKING
            found |= names(child)
    return found


def resolves(target: str, path: Path) -> bool:
    """Whether a reference in a file leads to something: a dotted name from the top, or a name of this file."""
    if target.startswith("fedlora"):
        parts, file = target.split(".")[1:], PACKAGE
        while parts and (file / parts[0]).is_dir():
            file, parts = file / parts[0], parts[1:]
        if parts and (file / f"{parts[0]}.py").is_file():
            file, parts = file / f"{parts[0]}.py", parts[1:]
        elif (file / "__init__.py").is_file():
            file = file / "__init__.py"
        return _member(tree(file), parts)
    module, parts = tree(path), target.split(".")
    classes = [n for n in ast.walk(module) if isinstance(n, ast.ClassDef)]
    imported = next(
        (f"{n.module}.{a.name}" for n in ast.walk(module) if isinstance(n, ast.ImportFrom) and n.module
         for a in n.names if (a.asname or a.name) == parts[0]), ""
    )  # fmt: skip
    if imported.startswith("fedlora."):
        return resolves(".".join([imported, *parts[1:]]), path)
    return _member(module, parts) or any(_member(c, parts) for c in classes)


def _member(holder: ast.AST, parts: list[str]) -> bool:
    if not parts:
        return True
    if len(parts) == 1:
        return parts[0] in names(holder)
    inner = [n for n in getattr(holder, "body", []) if isinstance(n, HOLDERS) and getattr(n, "name", "") == parts[0]]
    return any(_member(n, parts[1:]) for n in inner)


@each_file
def test_references_in_docstrings_lead_to_something(path):
    said = [m[1] for text in texts(path) for m in re.finditer(r":[a-z]+:`([^`]+)`", text)]
    assert [target for target in said if not resolves(target, path)] == []


def test_a_reference_to_nothing_is_found():
    path = PACKAGE / "rounds" / "store.py"
    assert all(resolves(target, path) for target in ("fedlora.formats.state.memory.Memory", "RunStore.load", "load"))
    for target in ("fedlora.protect.Memory", "fedlora.nothing.at.all", "RunStore.nothing", "nothing"):
        assert not resolves(target, path), target


# --- sections of FORMAT.md ------------------------------------------------------------------------------------------------

FORMAT = (PACKAGE / "FORMAT.md").read_text("utf-8")
SECTIONS = set(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", FORMAT, re.MULTILINE))


def cited(text: str) -> list[str]:
    """Numbers of sections that a text cites of FORMAT.md."""
    return re.findall(r"FORMAT\.md`?,? (?:sections? )?(\d+(?:\.\d+)*)", text)


@pytest.mark.parametrize("path", [*FILES, *OTHERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_sections_of_the_format_that_are_cited_exist(path):
    assert set(cited(path.read_text("utf-8"))) <= SECTIONS


def test_the_code_of_secure_aggregation_cites_the_section_on_it():
    """Section 7 of FORMAT.md stood where 10.7 was meant: both exist."""
    for path in (PACKAGE / "protect" / "secagg").rglob("*.py"):
        assert all(number.partition(".")[0] == "10" for number in cited(path.read_text("utf-8"))), path


def test_a_citation_is_seen_in_each_way_of_writing_it():
    for text in ("FORMAT.md, section 10.7.", "FORMAT.md, 10.7.", "FORMAT.md 10.7", "`FORMAT.md`, section 10.7"):
        assert cited(text) == ["10.7"]
    assert {"7", "10.7"} <= SECTIONS


# --- what a docstring says first ------------------------------------------------------------------------------------------


@each_file
def test_a_docstring_says_what_is_done_before_it_says_what_is_raised(path):
    found = [
        n.name for n in ast.walk(tree(path)) if isinstance(n, HOLDERS[1:]) and (ast.get_docstring(n) or "").startswith("Raises:")
    ]
    assert found == []

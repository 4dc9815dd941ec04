"""The documents say what is there: files, tests, targets, layers, promises; in lines that a diff shows, in one spelling."""

import ast
import re
from pathlib import Path

import pytest
from test_house import ORDER

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p
    for p in [
        *ROOT.glob("*.md"),
        *(p for d in ("fedlora", "server", "client", "simulations", "tests") for p in (ROOT / d).rglob("*.md")),
    ]
)
QUOTES = {"simulations/corpora/NOTICE.md"}
"""Holds a text that is not ours."""
READMES = ("README.md", "CONTRIBUTING.md", "server/README.md", "client/README.md", "simulations/README.md")
BRITISH = re.compile(
    r"\b\w*(?:optimis|quantis|summaris|normalis|initialis|organis|recognis|minimis|maximis|serialis|randomis|factoris|generalis)\w*"
    r"|\b\w*(?:behaviour|colour|favour|neighbour|honour|licence|centre|artefact|catalogue|judgement|defence)s?\b"
    r"|\b\w*(?:modell|labell|travell|cancell|signall)(?:ed|ing)\b|\benrol(?:s|ment)?\b|\banalyse[sd]?\b",
    re.IGNORECASE,
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """Without code: blocks between fences, and words between backticks, which are names."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def long_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]


each_page = pytest.mark.parametrize("page", PAGES, ids=name)


def test_all_documents_are_looked_at():
    expected = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", *READMES, "fedlora/ARCHITECTURE.md", "fedlora/DECISIONS.md"}
    assert expected | QUOTES <= {name(p) for p in PAGES}


@each_page
def test_lines_have_at_most_120_characters_except_rows_of_tables(page):
    assert not long_lines(page.read_text("utf-8"))


def test_a_long_line_is_found_and_a_long_row_is_none():
    assert long_lines(f"{'x' * 120}\n{'y' * 121}\n| {'z' * 200} |") == ["y" * 121]


@each_page
def test_spelling_is_american(page):
    assert name(page) in QUOTES or not [m.group() for m in BRITISH.finditer(prose(page.read_text("utf-8")))]


@pytest.mark.parametrize("word", ["optimiser", "Quantisation", "neighbours", "enrol", "enrolment", "modelling", "licence"])
def test_british_spelling_is_found_and_names_in_code_are_left_alone(word):
    assert BRITISH.search(f"the {word} is")
    assert not BRITISH.search(prose(f"the `{word}` is"))


@pytest.mark.parametrize(
    "word", ["optimizer", "enroll", "enrolled", "modeling", "noise", "precise", "four", "labeled", "analysis"]
)
def test_american_spelling_passes(word):
    assert not BRITISH.search(word)


# --- ARCHITECTURE.md ----------------------------------------------------------------------------------------------------

ARCHITECTURE = (ROOT / "fedlora" / "ARCHITECTURE.md").read_text("utf-8")


def test_the_architecture_is_one_page():
    assert len(ARCHITECTURE.splitlines()) <= 110
    assert "2026-" not in ARCHITECTURE  # what has a date stands in DECISIONS.md


def test_the_architecture_lists_the_layers_in_the_order_that_the_imports_keep():
    layers = ARCHITECTURE.partition("## Layers")[2].partition("## ")[0]
    assert tuple(re.findall(r"^\| `([^`]+)` \|", layers, re.MULTILINE)) == ORDER


def test_every_invariant_names_a_test():
    rows = re.findall(r"^\| (.+) \| (.+) \|$", ARCHITECTURE.partition("## Invariants")[2], re.MULTILINE)[2:]
    assert len(rows) > 20
    for what, tests in rows:
        assert re.fullmatch(r"`tests/[\w/]+\.py(::\w+)?`(, `tests/[\w/]+\.py(::\w+)?`)*", tests), what


# --- every page ---------------------------------------------------------------------------------------------------------


def functions(path: Path) -> set[str]:
    return {n.name for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)}


@each_page
def test_tests_and_modules_that_a_document_names_exist(page):
    text = page.read_text("utf-8")
    for file, function in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / file).is_file(), file
        assert not function or function in functions(ROOT / file), f"{file}::{function}"
    if name(page) in READMES:
        for file in re.findall(r"`((?:fedlora|simulations)/[\w/]+\.py)`", text):
            assert (ROOT / file).is_file(), file


@each_page
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        file, _, heading = target.partition("#")
        if file.startswith("http"):
            continue
        where = (page.parent / file).resolve() if file else page
        assert where.exists(), target
        heads = re.findall(r"^#+ (.+)$", where.read_text("utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads}, target


@pytest.mark.parametrize("page", READMES)
def test_targets_of_make_that_a_readme_names_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", (ROOT / page).read_text("utf-8")))
    assert named <= targets


def test_the_readme_shows_its_two_commands_and_the_limits_before_anything_else():
    text = (ROOT / "README.md").read_text("utf-8")
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert heads[:4] == ["I am a site operator", "I am a coordinator", "I am a researcher", "Numbers"]
    assert "**Limits, before you trust it.**" in text.partition("## ")[0].partition("```")[0]
    assert {"make test", "make demo"} <= set(re.findall(r"(?:`|\$ )(make [a-z-]+)", text))


def test_the_readme_promises_word_for_word_what_the_page_on_security_does():
    def said(page):
        return " ".join((ROOT / page).read_text("utf-8").split())

    promises = re.findall(r'\| promise \| "([^"]+)" \| "([^"]+)" \|', (ROOT / "server" / "SECURITY.md").read_text("utf-8"))
    assert len(promises) == 1
    for promise in promises[0]:
        assert f'"{promise}"' in said("README.md")


@pytest.mark.parametrize("page", ["server/README.md"])
def test_the_coordinators_page_knows_every_option_on_groups(page):
    text = (ROOT / page).read_text("utf-8")
    assert {"--regroup", "--group-size", "--uncovers"} <= set(re.findall(r"--[a-z-]+", text))

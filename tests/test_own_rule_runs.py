"""A rule of one's own in a run: what it raises is said with its place, and a run is of one text of it, for good."""

import json
import sys

import pytest
from test_sweep import PLAN

import fedlora
from fedlora.cli import main
from fedlora.core.registry import RULES
from fedlora.lab.own_rules import source_of, use_rules

TEXT = """import fedlora

@fedlora.RULES.register("mine")
class Mine(fedlora.Rule):
    needs = "sum"

    def finish(self, sums, adapter, *, scale, round, state):
        return fedlora.Aggregated({}, delta=fedlora.Adapter(sums.mean(), sums.layout))
"""
ENDS = "return fedlora.Aggregated({}, delta=fedlora.Adapter(sums.mean(), sums.layout))"
BELOW = {
    "trains": "def trains(self, round):",
    "down": "def down(self):",
    "reply": "def reply(self, layout, round):",
    "encode": "def encode(self, before, after, *, round):",
    "start": "def start(self, adapter, *, cohort, round):",
    "of": "@classmethod\n    def of(cls, plan, max_weight):",
    "conflicts": "@classmethod\n    def conflicts(cls, plan):",
}
RAISES = {
    "NameError": "nothing",
    "ValueError": "raise ValueError('no')",
    "FedLoRAError": "raise fedlora.FedLoRAError('no')",
    "SystemExit": "raise SystemExit(0)",
    "KeyError": "{}['x']",
    "TypeError": "len(3)",
    "AssertionError": "assert False",
    "StopIteration": "next(iter(()))",
    "RecursionError": "(f := lambda: f())()",
}


@pytest.fixture(autouse=True)
def forgotten():
    yield
    forget()


def forget():
    RULES.forget("mine")
    for name in [n for n in sys.modules if n.startswith("fedlora_rule_mine")]:
        del sys.modules[name]


@pytest.fixture
def plan(tmp_path):
    text = PLAN.replace('[aggregate.fedavg]\nshare = "AB"', 'aggregate.name = "mine"').replace('"base", ', "")
    (tmp_path / "plan.toml").write_text(text)
    return tmp_path / "plan.toml"


def simulated(plan, text, *words, out="out"):
    """A run of the command with this text of the rule, as a new process would have it."""
    forget()
    (plan.parent / "mine.py").write_text(text)
    where = ["--out", str(plan.parent / out)]
    return main(["simulate", str(plan), "--rule", str(plan.parent / "mine.py"), *where, "-q", *words])


def line_of(text, what):
    return next(n for n, line in enumerate(text.splitlines(), 1) if what in line)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("method", "raises"), [*(("finish", r) for r in RAISES), *((m, r) for m in BELOW for r in ("NameError", "FedLoRAError"))]
)
def test_what_a_rule_raises_is_said_with_its_place_and_is_no_bug(plan, method, raises, capsys):
    wrong = RAISES[raises]
    text = TEXT.replace(ENDS, wrong) if method == "finish" else f"{TEXT}\n    {BELOW[method]}\n        {wrong}\n"
    assert simulated(plan, text) == 1
    told = capsys.readouterr().err
    assert f"the rule of your own fails: {raises}" in told
    assert f"({plan.parent / 'mine.py'}, line {line_of(text, wrong)})" in told
    assert "hint: " in told
    assert "Traceback" not in told


@pytest.mark.torch
@pytest.mark.parametrize("returned", ["None", "sums.mean()", "(adapter, state)", "adapter"])
def test_what_it_returns_is_said_with_its_place_and_is_no_bug(plan, returned, capsys):
    text = TEXT.replace(ENDS, f"return {returned}")
    assert simulated(plan, text) == 1
    told = capsys.readouterr().err
    assert f"finish ({plan.parent / 'mine.py'}, line {line_of(text, 'def finish')}) has returned" in told
    assert "rather than an Aggregated" in told


@pytest.mark.torch
@pytest.mark.parametrize("returned", ["None", "after", "after.vector[:3]", "after.vector.astype(float)"])
def test_what_encode_returns_is_said_before_a_site_would_answer_with_a_code_alone(plan, returned, capsys):
    assert simulated(plan, f"{TEXT}\n    {BELOW['encode']}\n        return {returned}\n") == 1
    assert "rather than (" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["1 / 0", "def (", "raise SystemExit(0)", "import nothing_of_this_name", "fedlora.nothing"])
def test_a_file_that_cannot_be_imported_is_said_with_its_own_line(plan, wrong, capsys):
    assert simulated(plan, f"import fedlora\n\n{wrong}\n{TEXT}") == 3
    told = capsys.readouterr().err
    assert "mine.py cannot be imported: " in told
    assert f"({plan.parent / 'mine.py'}, line 3)" in told


CHANGED = {
    "formula": TEXT.replace("sums.mean()", "sums.mean() * 0"),
    "a comment": TEXT + "# another\n",
    "a helper": TEXT.replace("\n@", "\nHALF = 0.5\n\n@", 1),
}


@pytest.mark.torch
def test_a_run_is_of_one_text_of_its_rule(plan, tmp_path, capsys):
    assert simulated(plan, TEXT, "--seeds", "0") == 0
    said = capsys.readouterr().out
    digest = json.loads((tmp_path / "out" / "plan.json").read_text())["rule"]["sha256"]
    assert f"rule: mine, mine.py, sha256 {digest[:12]}\n" in said
    results = json.loads((tmp_path / "out" / "seed-0" / "results.json").read_text())
    assert results["environment"]["rule"] == f"mine, mine.py, sha256 {digest}"
    for changed in CHANGED.values():
        for jobs in ("1", "2"):
            assert simulated(plan, changed, "--seeds", "0,1", "--resume", "--jobs", jobs) == 3
            told = capsys.readouterr().err
            assert f"was made with another text of the rule 'mine': mine.py, sha256 {digest[:12]} then, mine.py, sha256 " in told
            assert "choose another --out; or put back the text" in told
    assert not (tmp_path / "out" / "seed-1").exists()
    assert simulated(plan, TEXT, "--seeds", "0,1", "--resume") == 0


@pytest.mark.torch
def test_a_rule_that_has_failed_in_its_first_round_is_corrected_and_gone_on_with(plan, tmp_path, capsys):
    plan.write_text(plan.read_text().replace('["federated"]', '["base", "local", "federated"]'))
    assert simulated(plan, TEXT.replace(ENDS, "nothing")) == 1
    local = tmp_path / "out" / "seed-0" / "arms" / "local-site-1.json"
    before = local.stat().st_mtime_ns
    assert simulated(plan, TEXT, "--resume") == 0
    assert local.stat().st_mtime_ns == before
    digest = json.loads((tmp_path / "out" / "plan.json").read_text())["rule"]["sha256"]
    assert digest[:12] in capsys.readouterr().out


def test_a_file_and_a_package_and_a_notebook_say_which_text_they_are(tmp_path):
    (tmp_path / "mine.py").write_text(TEXT)
    use_rules([str(tmp_path / "mine.py")])
    before = source_of("mine")
    (tmp_path / "mine.py").write_text(CHANGED["formula"])
    assert source_of("mine") == before  # what was loaded, not what lies there by now
    assert before["file"] == "mine.py"
    assert source_of("fedavg") is None
    texts = {}
    for name, text in {"first": TEXT, "again": f"\n\n{TEXT}", **CHANGED}.items():
        forget()
        exec(compile(text, f"<cell {name}>", "exec"), {"__name__": "__main__"})
        texts[name] = source_of("mine")["sha256"]
    assert texts["first"] == texts["again"]
    assert texts["formula"] != texts["first"]
    assert set(source_of("mine")) == {"sha256"}
    assert fedlora.RULES["mine"].needs == "sum"

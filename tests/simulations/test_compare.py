"""The comparison of rules: fair splits, resumable runs, a table that says what was run."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "simulations" / "compare_aggregators.py"
SITES = ("site-1", "site-2", "site-3")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import compare_aggregators

        yield compare_aggregators
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    from fedlora.learn.toy import toy_base, toy_data

    home = tmp_path_factory.mktemp("toy")
    toy_base(home / "base")
    toy_data(home / "data", SITES)
    text = (ROOT / "simulations" / "plans" / "toy.toml").read_text()
    text = text.replace('data = "toy"', 'data = "data"').replace('base = "toy"', 'base = "base"')
    (home / "toy.toml").write_text(text.replace("num_rounds = 4", "num_rounds = 2"))
    return home / "toy.toml"


def rows(directory, part):
    return {f.name.split(".")[0]: f.read_text().splitlines() for f in sorted(directory.glob(f"*.{part}.jsonl"))}


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "all-rows"])
def test_a_split_deals_every_row_once_and_keeps_groups_together(compare, plan, tmp_path, kind):
    made = compare.make_split(kind, plan.parent / "data", SITES, tmp_path / kind)
    again = compare.make_split(kind, plan.parent / "data", SITES, tmp_path / "again" / kind)
    where = {}
    for part in ("train", "validation", "test"):
        dealt, source = rows(made, part), rows(plan.parent / "data", part)
        assert set(dealt) == ({"all-rows"} if kind == "all-rows" else set(SITES))
        assert Counter(r for own in dealt.values() for r in own) == Counter(r for own in source.values() for r in own)
        assert dealt == rows(again, part)
        for site, own in dealt.items():
            for line in own:
                assert where.setdefault((part, json.loads(line)["group"]), site) == site
    stated = json.loads((made / "partition.json").read_text())["sha256"]
    assert len(stated) == 3 * (1 if kind == "all-rows" else 3)


def test_the_domain_split_is_the_plans_own(compare, plan, tmp_path):
    assert compare.make_split("domain", plan.parent / "data", SITES, tmp_path / "x") == plan.parent / "data"


def run(plan, out, *words):
    command = [sys.executable, str(SCRIPT), str(plan), "--out", str(out), "--rates", "1e-2", "--variants", "fedavg,ffa,one-site"]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=240)


def test_runs_are_kept_one_file_each_and_gone_on_with(plan, tmp_path):
    out, words = tmp_path / "out", ["--splits", "domain", "--seeds", "0,1"]
    first = run(plan, out, *words, "--minutes", "0")
    assert first.returncode == 75, first.stderr
    assert not list((out / "results").glob("*")) if (out / "results").exists() else True
    whole = run(plan, out, *words)
    assert whole.returncode == 0, whole.stderr
    files = {f.name: f.stat().st_mtime_ns for f in (out / "results").glob("*.json")}
    assert len(files) == 6 * 3  # three baselines, three variants; one seed to tune, two to compare
    table = (out / "table.md").read_text()
    assert "domain, 3 local steps" not in table  # the script's own number of steps, not the plan's
    assert "### domain, 1 local step a round, 2 seeds" in table
    assert all(f"| {name} |" in table for name in ("local", "pooled-tokens", "fedavg", "ffa", "one-site"))
    assert "http" not in (out / "report.html").read_text().replace("http-equiv", "").replace("http://www.w3.org", "")
    again = run(plan, out, *words)
    assert again.returncode == 0
    assert files == {f.name: f.stat().st_mtime_ns for f in (out / "results").glob("*.json")}
    one = json.loads((out / "results" / "domain_1_fedavg_0.01_test_0.json").read_text())
    pooled = json.loads((out / "results" / "domain_1_pooled-tokens_0.01_test_0.json").read_text())
    assert abs(one["tokens"] - pooled["tokens"]) < 0.1 * pooled["tokens"]  # rows are packed to a budget
    assert one["up"] > 0
    assert one["job"]["seed"] == 0


@pytest.mark.parametrize(
    "words", [["--variants", "fedbest"], ["--seeds", "1000"], ["--steps", "4", "--splits", "domain"]], ids=" ".join
)
def test_what_cannot_be_compared_is_said(plan, tmp_path, words):
    said = run(plan, tmp_path, *words)
    assert said.returncode == 2
    assert "error: " in said.stderr

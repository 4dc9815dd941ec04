"""The comparison of rules: fair splits, resumable runs, a table that says what was run."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

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
    toy_data(home / "rows", SITES).rename(home / "data")
    text = (ROOT / "simulations" / "plans" / "toy.toml").read_text()
    text = text.replace('data = "toy"', 'data = "data"').replace('base = "toy"', 'base = "base"')
    few = "examples_per_site = 4\n"
    (home / "toy.toml").write_text(
        text.replace("num_rounds = 4", "num_rounds = 1").replace("local_steps = 3", "local_steps = 2") + few
    )
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


def test_a_process_may_meet_the_splits_in_any_order(compare, plan, tmp_path):
    worker = compare.Worker(plan, tmp_path / "out", 1, 0.0)
    assert [set(worker.lab(split).rows) for split in ("all-rows", "iid", "domain")] == [{"all-rows"}, set(SITES), set(SITES)]


@pytest.fixture
def run(compare, capsys):
    """The script, in this process: torch is imported once."""

    def run(plan, out, *words):
        given = [
            str(plan),
            "--out",
            str(out),
            "--rates",
            "1e-2",
            "--variants",
            "fedavg,ffa,one-site",
            "--tune-seeds",
            "1000",
            "--threads",
            "1",
        ]
        try:
            status = compare.main([*given, *words])
        except SystemExit as e:
            status = e.code
        said = capsys.readouterr()
        words = status if isinstance(status, str) else ""
        return SimpleNamespace(returncode=1 if words else status, stdout=said.out, stderr=said.err + words)

    return run


def test_every_run_is_a_line_and_gone_on_with(run, plan, tmp_path):
    out, words = tmp_path / "out", ["--splits", "domain", "--seeds", "0,1"]
    first = run(plan, out, *words, "--minutes", "0")
    assert first.returncode == 75, first.stderr
    file = out / "results.jsonl"
    assert len(file.read_bytes().splitlines()) == 1
    whole = run(plan, out, *words)
    assert whole.returncode == 0, whole.stderr
    kept = file.read_bytes()
    runs = [json.loads(line) for line in kept.splitlines()[1:]]
    assert len(runs) == 6 * 3  # three baselines, three variants; one seed to tune, two to compare
    table = (out / "table.md").read_text()
    assert "domain, 2 local steps" not in table  # the script's own number of steps, not the plan's
    assert "### domain, 1 local step a round\n" in table
    assert all(f"| {name} | 0.01 | 2 |" in table for name in ("local", "pooled-tokens", "fedavg", "ffa", "one-site"))
    assert "http" not in (out / "report.html").read_text().replace("http-equiv", "").replace("http://www.w3.org", "")
    of = {r["job"]["name"]: r for r in runs if r["job"]["part"] == "test"}
    assert abs(of["fedavg"]["tokens"] - of["pooled-tokens"]["tokens"]) < 0.1 * of["pooled-tokens"]["tokens"]  # packed rows
    assert of["fedavg"]["up"] > of["ffa"]["up"] > 0
    assert {r["job"]["seed"] for r in runs} == {0, 1, 1000}
    one = run(plan, out, "--splits", "domain", "--seeds", "1")
    assert one.returncode == 0, one.stderr
    assert "| fedavg | 0.01 | 1 |" in one.stdout
    assert file.read_bytes() == kept
    lines = kept.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-2]) + lines[-2][:40])  # a power cut
    again = run(plan, out, *words)
    assert again.returncode == 0, again.stderr
    assert sorted(map(without_time, file.read_bytes().splitlines())) == sorted(map(without_time, kept.splitlines()))
    other = plan.with_name("other.toml")
    other.write_text(plan.read_text().replace("num_rounds = 1", "num_rounds = 3"))
    refused = run(other, out, *words)
    assert refused.returncode == 1
    assert "another plan" in refused.stderr


def without_time(line):
    return json.dumps({k: v for k, v in json.loads(line).items() if k != "seconds"}, sort_keys=True)


def test_the_first_seed_runs_the_whole_grid_and_the_others_its_two_best(compare, tmp_path, monkeypatch):
    losses = {1e-3: (0.5, 0.9, 0.9), 1e-2: (0.6, 0.3, 0.3), 1e-1: (0.7, 0.0, 0.0), 1.0: ()}
    seeds, ran = (7, 8, 9), []

    def run_all(wanted, pool, book):
        for job in [j for j in wanted if j not in book.runs]:
            ran.append((job.rate, job.seed))
            of = losses[job.rate]
            book.add(job, {"nll": of[seeds.index(job.seed)]} if of else {"failed": "not-finite"})
        return True

    monkeypatch.setattr(compare, "run_all", run_all)
    book, arm = compare.Book.open(tmp_path / "results.jsonl", {}), ("iid", 1, "fedavg")
    chosen, whole = compare.tuned([arm], list(losses), seeds, None, book)
    assert whole
    assert chosen == {arm: 1e-2}
    assert ran == [(1e-3, 7), (1e-2, 7), (1e-1, 7), (1.0, 7), (1e-3, 8), (1e-3, 9), (1e-2, 8), (1e-2, 9)]
    assert compare.Book.open(tmp_path / "results.jsonl", {}).runs == book.runs
    assert compare.tuned([arm], [1e-3, 1.0], seeds, None, book)[0] == {arm: 1e-3}  # what was run on another grid is not looked at


def test_baselines_run_once_however_many_steps_a_round_has(compare):
    arms = [compare.arm_of("iid", steps, name) for steps in (1, 4) for name in ("local", "ffa")]
    assert arms == [("iid", 1, "local"), ("iid", 1, "ffa"), ("iid", 1, "local"), ("iid", 4, "ffa")]
    of = {
        compare.Job(*at, 0.1, seed, part): {"nll": 1.0 + at[1], "exact": 0.5}
        for at in arms
        for seed, part in ((0, "test"), (9, "tune"))
    }
    found = {(split, steps): [r["name"] for r in rows] for split, steps, rows in compare.tables(of, dict.fromkeys(arms, 0.1))}
    assert found == {("iid", 1): ["local", "ffa"], ("iid", 4): ["local", "ffa"]}


def test_a_run_that_failed_is_counted(compare):
    at = ("iid", 1, "ffa")
    runs = {compare.Job(*at, 0.1, seed, "test"): {"nll": 1.0, "exact": 0.5} for seed in range(3)}
    runs[compare.Job(*at, 0.1, 3, "test")] = {"failed": "not-finite"}
    ((_, _, (row,)),) = compare.tables(runs, {at: 0.1})
    assert compare.cells(row)[:3] == ["ffa", "0.1", "3 of 4"]


@pytest.mark.parametrize(
    "words", [["--variants", "fedbest"], ["--seeds", "1000"], ["--steps", "4", "--splits", "domain"]], ids=" ".join
)
def test_what_cannot_be_compared_is_said(run, plan, tmp_path, words):
    said = run(plan, tmp_path, *words)
    assert said.returncode == 2
    assert "error: " in said.stderr

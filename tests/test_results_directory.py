"""A directory of results is of one kind, for good: a simulation, a sweep or a comparison of rules; and nobody else's."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from test_sweep import PLAN

from fedlora.cli import main

KINDS = {
    "simulation": ["simulate"],
    "sweep": ["simulate", "--set", "training.learning_rate=1e-3,1e-2"],
    "comparison of rules": ["compare-rules", "--rules", "fedavg,ffa", "--rates", "1e-3", "--tune-seeds", "9"],
}


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.replace('["base", "federated"]', '["base"]'))
    return tmp_path / "plan.toml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One directory of each kind, made by the command."""
    home = tmp_path_factory.mktemp("made")
    (home / "plan.toml").write_text(PLAN.replace('"base", ', ""))
    for kind, words in KINDS.items():
        assert main([*words[:1], str(home / "plan.toml"), *words[1:], "--seeds", "0", "--out", str(home / kind), "-q"]) == 0
    return home


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.torch
@pytest.mark.parametrize(("holds", "wanted"), [pair for pair in itertools.product(KINDS, KINDS) if pair[0] != pair[1]])
def test_no_kind_is_written_into_a_directory_of_another_kind(made, plan, tmp_path, holds, wanted, capsys):
    out = tmp_path / "out"
    shutil.copytree(made / holds, out)
    before = contents(out)
    for more in ([], ["--resume"], ["--jobs", "2", "--seeds", "0,1"], ["--jobs", "2", "--seeds", "0,1", "--resume"]):
        words = [*KINDS[wanted][:1], str(plan), *KINDS[wanted][1:], "--out", str(out), "-q", *more]
        assert main(words) == 3, more
        assert f"{out} holds a {holds} already; choose another --out" in capsys.readouterr().err.replace("\nhint: ", "; ")
        assert contents(out) == before


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_of_its_own_kind_is_gone_on_with_and_may_hold_notes_by_then(made, tmp_path, kind, capsys):
    out = tmp_path / "out"
    shutil.copytree(made / kind, out)
    (out / "notes.txt").write_text("mine")
    shutil.copy(made / "plan.toml", tmp_path)
    words = [*KINDS[kind][:1], str(tmp_path / "plan.toml"), *KINDS[kind][1:], "--seeds", "0", "--out", str(out), "-q"]
    assert main(words) == 3
    assert f"{out} holds a {kind} already; continue it with --resume" in capsys.readouterr().err.replace("\nhint: ", "; ")
    assert main([*words, "--resume"]) == 0
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [[], ["--resume"], ["--jobs", "2"]])
@pytest.mark.parametrize("name", ["notes.txt", "plan.toml", "seed-0/x", "data/north.csv", ".git/HEAD", "runs.txt"])
def test_a_directory_with_files_of_somebody_else_is_refused_by_name(plan, tmp_path, kind, more, name, capsys):
    out = tmp_path / "theirs"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("theirs")
    assert main([*KINDS[kind][:1], str(plan), *KINDS[kind][1:], "--out", str(out), "-q", *more]) == 3
    told = capsys.readouterr().err
    assert f"{out} holds something else: {name.partition('/')[0]}" in told
    assert "choose another --out" in told
    assert contents(out) == {name: b"theirs"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_no_directory_of_results(plan, tmp_path, kind, capsys):
    (tmp_path / "out").write_text("theirs")
    assert main([*KINDS[kind][:1], str(plan), *KINDS[kind][1:], "--out", str(tmp_path / "out"), "-q"]) == 3
    assert "is a file; choose another --out" in capsys.readouterr().err.replace("\nhint: ", "; ")


@pytest.mark.torch
@pytest.mark.parametrize("name", ["", ".gitkeep", ".gitignore", "toy/data/x"])
def test_an_empty_directory_and_what_nobody_calls_a_file_are_taken(plan, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    if name:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")
    assert main(["simulate", str(plan), "--out", str(out), "-q"]) == 0


@pytest.mark.torch
@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("kind", ["simulation", "sweep"])
def test_what_is_done_is_said_to_be_done_and_no_base_is_loaded_for_it(made, tmp_path, kind, jobs, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(made / kind, out)
    shutil.copy(made / "plan.toml", tmp_path)
    before = json.loads(next(iter(out.rglob("results.json"))).read_text())
    monkeypatch.setattr("fedlora.assemble.lab", None)
    monkeypatch.setattr("fedlora.lab.jobs.Jobs.run", None)
    words = [str(tmp_path / "plan.toml"), *KINDS[kind][1:], "--seeds", "0", "--out", str(out), "--resume", "--jobs", jobs]
    assert main(["simulate", *words]) == 0
    assert "is already done" in capsys.readouterr().err
    assert json.loads(next(iter(out.rglob("results.json"))).read_text()) == before


ROWS_OF_README = {
    cells[0]: re.findall(r"`([^`]+)`", cells[2])
    for line in (Path(__file__).parents[1] / "simulations/README.md")
    .read_text("utf-8")
    .partition("## Kinds of directories")[2]
    .partition("## Where")[0]
    .splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split("|")]) and line.startswith("| a")
}


@pytest.mark.torch
def test_each_kind_of_directory_holds_what_the_readme_says(made, tmp_path, capsys):
    toy = made / "toy" / "base"
    assert main(["export", str(made / "simulation" / "seed-0"), str(tmp_path / "adapter")]) == 0
    assert main(["server", "init", str(tmp_path / "study"), "--host", "localhost"]) == 0
    assert main(["pin", str(made / "plan.toml"), "--model", str(toy), "--out", str(tmp_path / "pinned")]) == 0
    where = {
        "a simulation": made / "simulation",
        "a seed of it": made / "simulation" / "seed-0",
        "a sweep": made / "sweep",
        "a comparison of rules": made / "comparison of rules",
        "an adapter": tmp_path / "adapter",
        "a pinned plan": tmp_path / "pinned",
        "a study, the server's": tmp_path / "study",
        "a run of a server": made / "simulation" / "seed-0" / "federated",
    }
    assert where.keys() == ROWS_OF_README.keys()
    for kind, names in ROWS_OF_README.items():
        assert names
        assert [name for name in names if not (where[kind] / name).exists()] == [], kind


@pytest.mark.torch
def test_a_directory_of_another_kind_is_called_what_it_is(made, tmp_path, capsys):
    """Where a simulation's results or an adapter are wanted."""
    assert main(["export", str(made / "simulation" / "seed-0"), str(tmp_path / "adapter")]) == 0
    assert main(["server", "init", str(tmp_path / "study"), "--host", "localhost"]) == 0
    assert (
        main(["pin", str(made / "plan.toml"), "--model", str(made / "toy" / "base"), "--out", str(tmp_path / "study/plan")]) == 0
    )
    for wrong, said in (
        ("adapter", "is a published PEFT adapter"),
        ("study", "is a server's directory\nhint: name one of its runs: there is none yet"),
        ("study/plan", "holds no"),
    ):
        for words in (["report"], ["compare"], ["export"]):
            capsys.readouterr()
            assert main([*words, str(tmp_path / wrong), *[str(tmp_path / "new")] * (words == ["export"])]) == 3
            told = capsys.readouterr().err
            assert said in told or (wrong, words) == ("study/plan", ["export"])
            assert "simulations" not in told
    for directory in (made / "simulation", made / "simulation" / "seed-0"):
        assert main(["try", str(directory), "--base", str(made / "toy" / "base"), "--prompt", "x"]) == 3
        assert f"hint: make one: `fedlora export {made / 'simulation' / 'seed-0'} adapter/`" in capsys.readouterr().err

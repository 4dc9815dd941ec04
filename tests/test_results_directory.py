"""A directory of results is of one kind, for good: a simulation, a sweep or a comparison of rules; and nobody else's."""

import itertools
import json
import shutil

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

"""The best adapter of a run is kept, whatever comes after it; a chosen round is that round or a named error."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from test_rounds import Federation, interrupted, plan

from fedlora.cli import main
from fedlora.core.errors import ConfigError, StoreError
from fedlora.flower.enrol import make_server_home
from fedlora.lab.testing import ToyLearner
from fedlora.rounds.best import best_round, chosen, kept
from fedlora.rounds.store import RunStore


@dataclass(slots=True)
class Overfits(ToyLearner):
    """Held-out rows want 3; training goes to 4: through 2, 3, 3.5, 3.75, ... Two rounds are best."""

    target: float = 4.0

    def evaluate(self, adapter):
        held_out = ToyLearner(target=3.0)
        return held_out.evaluate(adapter)


def overfitted(path, rounds=8):
    return Federation(path, plan(rounds=rounds), learners={n: Overfits() for n in "abc"})


def value(adapter):
    return float(np.unique(adapter.vector)[0])


def test_the_best_adapter_outlives_the_last_three_under_a_name_of_its_own(tmp_path):
    fed = overfitted(tmp_path)
    fed.run()
    store = RunStore.open(tmp_path / "run")
    assert kept(store.directory) == [2, 6, 7, 8]
    assert [p.name for p in store.directory.glob("best-*")] == ["best-000002.safetensors"]
    number, adapter = chosen(store, "best")
    assert (number, value(adapter)) == (2, 3.0)
    assert value(chosen(store, 7)[1]) == value(store.adapter(7))
    with pytest.raises(StoreError, match="after round 4 is not kept") as error:
        chosen(store, 4)
    assert "2, 6, 7, 8" in error.value.hint


def test_a_run_that_is_resumed_never_goes_back_to_the_best_one(tmp_path):
    interrupted(overfitted(tmp_path), after=6)
    directory = tmp_path / "run"
    assert kept(directory) == [2, 4, 5, 6]
    assert not (directory / "round-000002.safetensors").exists()
    for number in (4, 5, 6):
        (directory / f"round-{number:06d}.safetensors").write_bytes(b"damaged")
    with pytest.raises(StoreError):
        RunStore.open(directory).resume()
    assert value(chosen(RunStore.open(directory), "best")[1]) == 3.0


def test_the_best_of_another_run_is_none(tmp_path):
    overfitted(tmp_path / "one").run()
    overfitted(tmp_path / "two", rounds=7).run()
    shutil.copyfile(tmp_path / "two" / "run" / "best-000002.safetensors", tmp_path / "one" / "run" / "best-000002.safetensors")
    with pytest.raises(StoreError, match="belongs to another run"):
        chosen(RunStore.open(tmp_path / "one" / "run"), 2)


def test_without_a_shared_loss_no_round_is_the_best(tmp_path):
    fed = Federation(tmp_path, plan(rounds=4, evaluation={"share": ()}))
    fed.run()
    store = RunStore.open(tmp_path / "run")
    assert best_round(store.records()) is None
    with pytest.raises(ConfigError, match="no round is the best"):
        chosen(store, "best")


@pytest.mark.torch
def test_what_is_pulled_says_after_how_many_rounds_it_was(tmp_path, capsys):
    make_server_home(tmp_path / "study", hosts=["127.0.0.1"])
    overfitted(tmp_path / "fed").run()
    shutil.copytree(tmp_path / "fed" / "run", tmp_path / "study" / "runs" / "toy")
    for words, rounds in ((["--best"], 2), (["--round", "7"], 7), ([], 8)):
        capsys.readouterr()
        out = tmp_path / f"adapter-{rounds}"
        assert main(["server", "pull", str(tmp_path / "study"), "toy", str(out), *words]) == 0
        said = capsys.readouterr().out
        assert f"after round {rounds}" in said
        assert ("NOT THE LAST" in said) == (rounds < 8)
        facts = json.loads((out / "fedlora_run.json").read_text())
        assert (facts["rounds"], facts["complete"]) == (rounds, rounds == 8)
    assert main(["export", str(tmp_path / "study" / "runs" / "toy"), str(tmp_path / "x"), "--best", "--round", "7"]) == 3

"""A script is told what goes on, on stderr alone, and no work of a simulation is silent for long."""

import re
import threading
import time

import pytest
from test_sweep import PLAN

import fedlora
from fedlora.cli import main
from fedlora.cli.output import Screen
from fedlora.core.events import Event
from fedlora.lab.progress import pulse as beat
from fedlora.lab.progress.pulse import Pulse

ROUND = {"round": 2, "rounds": 5, "site": "north"}
STEP = {"site": "north", "step": 3, "steps": 9, "loss": 1.25}


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.replace("num_rounds = 1", "num_rounds = 3"))
    return fedlora.load_plan(tmp_path / "plan.toml")


@pytest.mark.torch
def test_a_script_is_told_a_line_a_round_on_stderr_and_nothing_on_stdout(plan, tmp_path, capsys):
    fedlora.simulate(plan, out=tmp_path / "run")
    said = capsys.readouterr()
    lines = [line.split("s  ", 1)[1] for line in said.err.splitlines() if re.match(r" *[0-9.]+ s  ", line)]
    assert said.out == ""
    assert [n for line in lines for n in re.findall(r"^round (\d) done", line)] == ["1", "2", "3"]
    assert [line for line in lines if line.startswith("seed 0, arm")] == ["seed 0, arm base", "seed 0, arm federated"]
    assert lines[0] == "reading the rows of toy"
    assert not [line for line in lines if "asking" in line or ("held-out NLL" in line and "all together" not in line)]


@pytest.mark.torch
def test_a_script_says_that_it_wants_nothing_or_takes_the_events_itself(plan, tmp_path, capfd):
    fedlora.simulate(plan, out=tmp_path / "quiet", quiet=True)
    heard = []
    fedlora.simulate(plan, out=tmp_path / "own", report=lambda event, facts: heard.append(event))
    assert not re.search(r"^ *[0-9.]+ s  ", capfd.readouterr().err, re.MULTILINE)
    assert [event for event in heard if event == Event.ROUND] == [Event.ROUND] * 3
    assert Event.OWN not in heard


def test_in_a_simulation_every_silence_is_broken_by_what_goes_on(monkeypatch):
    monkeypatch.setattr(beat, "SILENCE_S", 0.01)
    said, more = [], threading.Event()
    pulse = Pulse(lambda text: (said.append(text), more.set()))
    for event, facts, wanted in (
        (Event.READING, {"what": "rows.csv"}, "still reading the rows of rows.csv"),
        (Event.DATA, {"file": "rows.csv", "lines": []}, "still preparing: "),
        (Event.LOAD, {"model": "m"}, "still loading m: "),
        (Event.MICRO_BATCHES, {}, "still preparing: "),
        (Event.ARM, {"name": "pooled-tokens", "seed": 0}, "arm pooled-tokens goes on: it is prepared or scored"),
        (Event.TRAIN, ROUND, "arm pooled-tokens goes on: round 2 of 5"),
        (Event.STEP, STEP, "arm pooled-tokens goes on: round 2 of 5, north, step 3 of 9, loss 1.250"),
        (Event.STEP, STEP | {"site": "pooled-tokens"}, "arm pooled-tokens goes on: round 2 of 5, step 3 of 9"),
        (Event.ARM, {"name": "local:a", "seed": 0}, "arm local:a goes on: it is prepared or scored"),
        (Event.SWEEP, {"jobs": 2}, "runs at once begin: "),
        (Event.LOAD, {"model": "m"}, "still loading m: "),
        (Event.DATA, {"file": "rows.csv", "lines": []}, "still preparing: "),
    ):
        pulse.heard(event, facts, shown=event != Event.STEP)
        said.clear()
        for _ in range(2):  # again and again
            more.clear()
            assert more.wait(20)
        assert any(line.startswith(wanted) for line in said), (event, said)
    pulse.close()


def test_who_is_told_something_is_told_nothing_else_for_twenty_seconds(monkeypatch):
    assert beat.SILENCE_S == 20
    monkeypatch.setattr(beat, "SILENCE_S", 0.5)
    said = []
    pulse = Pulse(said.append)
    for _ in range(8):
        pulse.heard(Event.ARM, {"name": "base", "seed": 0}, shown=True)
        time.sleep(0.1)
    assert said == []
    for _ in range(8):
        pulse.heard(Event.STEP, STEP, shown=False)  # what is not shown breaks no silence
        time.sleep(0.1)
    assert said
    pulse.close()


def test_a_server_and_a_site_may_be_silent_for_days(monkeypatch):
    monkeypatch.setattr(beat, "SILENCE_S", 0.01)
    said = []
    pulse = Pulse(said.append)
    for event in (Event.ROUND, Event.TRAIN, Event.STEP, Event.SITE_ONLINE):
        pulse.heard(event, ROUND | STEP, shown=True)
        time.sleep(0.05)
    assert said == []


def test_a_bar_that_moves_is_not_talked_over(monkeypatch, capsys):
    monkeypatch.setattr(beat, "SILENCE_S", 0.01)
    with Screen() as screen:
        screen._bars = type("Bars", (), {"tasks": [1], "stop": lambda self: None})()
        screen._pulse.heard(Event.ARM, {"name": "base", "seed": 0}, shown=True)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.torch
@pytest.mark.slow
def test_each_run_of_a_sweep_says_that_it_begins_and_what_it_does(tmp_path, capsys):
    (tmp_path / "plan.toml").write_text(PLAN)
    words = ["simulate", str(tmp_path / "plan.toml"), "--set", "lora.r=2,4", "--jobs", "2", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert said.index("reading the rows of toy") < said.index("sweep, seeds 0")
    for number, run in ((1, "r=2"), (2, "r=4")):
        states = re.findall(rf"run {number} of 2: {run} seed 0 (begins|reading|loading|arm base|done)", said)
        assert states == ["begins", "reading", "loading", "arm base", "done"]

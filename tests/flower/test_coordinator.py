"""What a coordinator sees of a running server and can ask of it: real processes, with a toy in place of the rounds."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import urllib.request

import pytest
from cli.test_schema import answered
from flower.harness import ROOT, until
from flower.test_stops import Follower, serving

from fedlora.cli import main
from fedlora.core.errors import ConfigError, FedLoRAError
from fedlora.core.plan import Plan
from fedlora.core.toml import dump_toml
from fedlora.flower.coordinator.backup import backup, restore
from fedlora.flower.coordinator.follow import attach
from fedlora.flower.coordinator.look import look
from fedlora.flower.jobs import jobs, load_outcome
from fedlora.formats.state import audit

pytestmark = [pytest.mark.slow, pytest.mark.flower]


def fedlora(*words, status=0):
    """A command as a coordinator gives it: what it prints, and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main(list(map(str, words)))
    assert found == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def elsewhere(*words):
    """The same in another terminal: what it prints."""
    argv = [sys.executable, "-m", "fedlora", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout


def answer(*words, status=0):
    """What the command answers to a program, checked against its schema."""
    out = fedlora(*words, "--json", status=status)[0]
    return answered(out, " ".join(words[:2]), ok=not status)


def run_of(home, name):
    return next(run for run in look(home)["runs"] if run["name"] == name)


def test_a_coordinator_sees_joins_pauses_and_stops_a_run_and_the_server_says_how_each_ended(tmp_path):
    """One walk: status from another terminal, a second start, attach, a run in the queue, pause, resume, stop, quorum."""
    out, _ = fedlora("server", "status", (tmp_path / "home"), status=3)
    with serving(tmp_path, sites=True) as f:
        home = f.home
        assert look(home)["up"]
        assert look(home)["runs"] == []

        first = Follower(f, "steps")
        until(lambda: first.said("round"))
        out = elsewhere("server", "status", home)
        assert f"up, sites are let in at {f.listen}" in out
        assert "run steps: round" in out
        assert "of 900: 1 of 2 sites have answered; not yet: alpha" in out or "between two rounds" in out
        assert "not counted: beta: data" in out
        found = answer("server", "status", home)
        assert found["runs"][0]["place"] == 1
        assert 0 < found["runs"][0]["eta_s"] <= 0.25 * 901

        assert {s["site"]: s["standing"] for s in found["sites"]}["alpha"] in ("training", "ready")
        begun = next(facts["said"] for e, facts in f.server.events if e == "run" and facts["name"] == "steps")
        assert "begins, plan" in begun

        # monitoring on loopback
        state = next(facts["state"] for e, facts in f.server.events if e == "process" and facts["name"] == "monitor")
        address = re.search(r"http://127\.0\.0\.1:\d+/", state)[0]
        assert urllib.request.urlopen(f"{address}readyz").status == 200
        numbers = urllib.request.urlopen(f"{address}metrics").read().decode()
        assert 'fedlora_run_state{run="steps",state="running"} 1' in numbers
        assert "fedlora_up 1" in numbers

        # a second start of the same run follows it: there is still one job
        second = Follower(f, "steps")
        until(lambda: second.said("run"))
        assert "it goes on already" in next(facts["said"] for e, facts in second.events if e == "run")
        assert len(jobs(home)) == 1

        # another plan under the same name is refused, with the way out
        changed = tmp_path / "changed.toml"
        changed.write_text(dump_toml(Plan(run={"name": "steps"}, federation={"num_rounds": 31})))
        error = answer("server", "start", home, changed, status=3)
        assert "goes on with another plan" in error["message"]
        assert f"fedlora server stop {home} steps" in error["hint"]

        # what queues says so, with its place
        third = Follower(f, "quick")
        until(lambda: third.said("another-run"))
        assert dict(third.events)["another-run"] == {"name": "steps", "place": 2}
        assert [(r["name"], r["state"], r["place"]) for r in look(home)["runs"]][1] == ("quick", "queued", 2)

        with pytest.raises(ConfigError, match=r"run steps goes on \(round") as error:
            backup(home, tmp_path / "b.tar")
        assert f"fedlora server pause {home} steps" in error.value.hint

        # pause, resume
        assert "pauses when its present round is done" in fedlora("server", "pause", home)[0]
        until(lambda: run_of(home, "steps")["state"] == "paused")
        until(lambda: any("paused after round" in facts.get("said", "") for e, facts in f.server.events if e == "run"))
        backup(home, tmp_path / "b.tar")
        back = restore(tmp_path / "b.tar", tmp_path / "back")
        assert back["digest"] == audit.read(home)[0][-1].facts["digest"]
        assert [load_outcome(tmp_path / "back", job).code for job in jobs(tmp_path / "back")] == ["stopped", "stopped"]
        assert not list((tmp_path / "back" / "flower").glob("*.*"))  # no address, no database
        fedlora("server", "resume", home, "steps")
        until(lambda: run_of(home, "steps")["state"] == "running")

        # attach in a third terminal, then stop after the round: all three followers end, and the server says so
        attached = []

        def follow():
            try:
                attach(home, "", report=lambda e, facts: None)
            except FedLoRAError as e:
                attached.append(e.code)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        out, _ = fedlora("server", "stop", home, "steps", "--after-round")
        assert "stops when its present round is done" in out
        assert [first.ended().code, second.ended().code] == ["stopped", "stopped"]
        thread.join(30)
        assert attached == ["stopped"]
        f.server.wait_for(lambda e, facts: e == "run" and facts["name"] == "steps" and facts["state"] == "stopped")
        assert third.ended() is None  # the queue goes on
        f.server.wait_for(lambda e, facts: e == "run" and (facts["name"], facts["state"]) == ("quick", "done"))

        # a run that fails: `server up` says why, although nobody follows it
        assert Follower(f, "quorum").ended().code == "quorum"
        until(lambda: any(e == "run" and facts["code"] == "quorum" for e, facts in f.server.events))
        assert "failed" in run_of(home, "quorum")["said"]
        error = answer("server", "stop", home, status=3)
        assert "no run goes on" in error["message"]
    deeds = [line for line in audit.read(home)[0] if line.what not in ("init", "site-file")]
    steps = [(line.what, line.facts.get("state", "")) for line in deeds if line.facts.get("run") == "steps"]
    assert steps == [("start", ""), ("pause", ""), ("resume", ""), ("stop", ""), ("ended", "stopped")]
    assert [line.what for line in deeds if line.what == "backup"] == ["backup"]
    ends = {line.facts["run"]: (line.facts["state"], line.facts["code"]) for line in deeds if line.what == "ended"}
    assert ends == {"steps": ("stopped", "stopped"), "quick": ("done", ""), "quorum": ("failed", "quorum")}
    assert [deeds[0].what, deeds[-1].what] == ["up", "down"]
    assert audit.read(home)[1] == []
    out, _ = fedlora("server", "status", home)
    assert "no server runs in" in out
    assert "fedlora server up" in out
    answer("server", "stop", home, status=4)


def test_a_run_that_waits_in_the_queue_can_be_taken_out_and_one_whose_process_died_is_not_live(tmp_path):
    with serving(tmp_path) as f:
        first = Follower(f, "wait")
        until(lambda: first.said("start"))
        queued = Follower(f, "quick")
        until(lambda: queued.said("another-run"))
        out, _ = fedlora("server", "stop", f.home, "quick")
        assert "run quick is stopped, it had not begun" in out
        assert queued.ended().code == "stopped"
        assert "run wait is stopped" in fedlora("server", "stop", f.home)[0]
        assert first.ended().code == "stopped"
        assert all(load_outcome(f.home, job).code == "stopped" for job in jobs(f.home))
        f.server.wait_for(lambda e, facts: e == "run" and facts["name"] == "wait" and facts["state"] == "stopped")

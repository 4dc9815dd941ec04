"""A site that takes no tasks for a while, or leaves, without a restart: over real processes."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from flower.harness import Federation, descendants, toys, until
from flower.test_stops import Follower

from fedlora.cli import main
from fedlora.flower.coordinator.look import look
from fedlora.site.progress import load_state

pytestmark = pytest.mark.flower


def standing(federation, word):
    """How the server says that alpha stands, once it says that word."""

    def found():
        return next(s for s in look(federation.home)["sites"] if s["site"] == "alpha")

    until(lambda: found()["standing"] == word)
    return found()


def test_a_pause_waits_until_the_answer_of_the_task_has_reached_the_server(federation: Federation):
    root, site = federation.home.parent / "beta", federation.sites["beta"]
    file, since, seen = str(root / "site.toml"), len(site.events), len(federation.server.events)
    (gateway,) = (p for p, argv in descendants(federation.server.process.pid).items() if "fedlora.gateway.app" in argv)
    run = Follower(federation, "held")
    site.wait_for(lambda e, f: e == "toy-works", since=since)
    os.kill(gateway, signal.SIGSTOP)  # no answer comes through
    try:
        assert main(["site", "pause", file]) == 0
        federation.plan("held").with_suffix(".go").touch()
        until(lambda: load_state(root / "state")["standing"] == "uploading")
        time.sleep(2.5)  # a pause is looked for once a second
        assert load_state(root / "state")["standing"] == "uploading"
        assert not [f for e, f in site.events[since:] if e == "paused"]
    finally:
        os.kill(gateway, signal.SIGCONT)
    assert run.ended() is None
    assert [(f["site"], f["error"]) for f in toys(run.events, "reply")] == [("beta", "")]
    seen = federation.server.wait_for(lambda e, f: e == "site-offline" and f["site"] == "beta", since=seen)
    assert main(["site", "resume", file]) == 0
    federation.server.wait_for(lambda e, f: e == "site-online" and f["site"] == "beta", since=seen)


def test_a_pause_takes_a_site_off_the_server_and_back_and_leaving_is_for_good(federation: Federation, capsys):
    root = federation.home.parent / "alpha"
    file, site, server = str(root / "site.toml"), federation.sites["alpha"], federation.server
    since, seen = len(site.events), len(server.events)
    assert main(["site", "pause", file]) == 0
    site.wait_for(lambda e, f: e == "paused" and f["paused"], since=since)
    seen = server.wait_for(lambda e, f: e == "site-offline" and f["site"] == "alpha", since=seen)
    assert standing(federation, "paused")["said"].startswith("paused: it has said so")
    capsys.readouterr()
    assert main(["site", "status", file]) == 0
    assert "alpha is paused: `fedlora site pause` was run here" in capsys.readouterr().out
    since = len(site.events)
    assert main(["site", "resume", file]) == 0
    site.wait_for(lambda e, f: e == "site" and f["state"] == "ready", since=since)
    seen = server.wait_for(lambda e, f: e == "site-online" and f["site"] == "alpha", since=seen)
    assert load_state(root / "state")["standing"] == "ready"
    for name, way in (("paused.json", "fedlora site resume"), ("left.json", "delete this file")):
        then = len(site.events)
        (root / "state" / name).write_bytes(b"damaged")
        site.wait_for(lambda e, f, way=way: e == "paused" and f["paused"] and way in f["said"], since=then)
    seen = server.wait_for(lambda e, f: e == "site-offline" and f["site"] == "alpha", since=seen)
    for name in ("paused.json", "left.json"):
        (root / "state" / name).unlink()
    site.wait_for(lambda e, f: e == "site" and f["state"] == "ready", since=then)
    seen = server.wait_for(lambda e, f: e == "site-online" and f["site"] == "alpha", since=seen)
    words = [f["state"] for e, f in site.events[since:] if e == "site"]
    assert "lost" not in words
    assert main(["site", "leave", file, "--yes"]) == 0
    assert site.process.wait(20) == 0
    server.wait_for(lambda e, f: e == "site-offline" and f["site"] == "alpha", since=seen)
    assert "for good" in standing(federation, "left")["why"]
    capsys.readouterr()
    assert main(["site", "up", file, "--json"]) == 5
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["code"] == "sits-out"
    assert main(["site", "status", file]) == 4
    assert "the last one was left" in capsys.readouterr().out

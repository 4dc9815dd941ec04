"""What monitoring is told on loopback, and the page that is written while a run goes on."""

from __future__ import annotations

import html
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import nullcontext
from queue import SimpleQueue
from types import SimpleNamespace
from typing import get_args

import pytest
import yaml
from flower.harness import ROOT, make_home, until
from test_best import overfitted
from test_rounds import interrupted

from fedlora.cli import main
from fedlora.core.deployment.live import MARKS
from fedlora.core.deployment.status import RunState
from fedlora.core.errors import NotInstalled, StoreError
from fedlora.core.events import Event
from fedlora.core.facts import Silent, SiteName, SiteRefused, Start
from fedlora.core.records import RoundRecord
from fedlora.core.sites.standing import STANDINGS
from fedlora.flower import server
from fedlora.flower.coordinator import look as looking
from fedlora.flower.coordinator import pages
from fedlora.flower.coordinator.health import Health
from fedlora.flower.coordinator.live import Live
from fedlora.flower.coordinator.look import look
from fedlora.flower.coordinator.progress import Progress
from fedlora.flower.coordinator.runs import live, running
from fedlora.flower.coordinator.watch import Runs, Sightings, _Watched, load_seen
from fedlora.flower.jobs import Events, Job, new_job
from fedlora.gateway.certificates import make_node_key, node_key_pem
from fedlora.processes.monitor import answering
from fedlora.rounds.store import RunStore

pytestmark = pytest.mark.slow  # to import flwr


@pytest.fixture
def home(tmp_path):
    """A server's directory, without processes: one run of three rounds, three sites."""
    home = tmp_path / "home"
    make_home(home)
    for name in ("alpha", "beta", "gamma"):
        (home / "sites" / f"{name}.pub").write_text("a key\n")
    interrupted(overfitted(tmp_path / "fed"), after=3)
    shutil.copytree(tmp_path / "fed" / "run", home / "runs" / "toy")
    return home


def get(port, path, host=None):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def test_ready_and_healthy_are_two_things_and_each_no_says_why(home):
    now, gateway = [0.0], [True]
    health = Health(home, gateway=lambda: gateway[0], clock=lambda: now[0])
    with answering(health.answer, 0) as port:
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz") == (503, "the relay does not answer\n")
        health.note(relay=True)
        assert get(port, "/readyz") == (200, "ok\n")
        gateway[0] = False
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/readyz") == (503, "the public port does not answer\n")
        now[0] = 31.0  # the loop hangs
        assert get(port, "/healthz") == (503, "server up has not looked at its processes for 31 s\n")
        health.note(relay=True)
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/elsewhere")[0] == 404
        assert get(port, "/metrics", host="evil.example.org")[0] == 403  # a page in a browser that has rebound its name
        assert get(port, "/metrics", host=f"localhost:{port}")[0] == 200


def test_a_damaged_file_of_a_site_is_named_once_and_the_others_go_on(home, monkeypatch):
    lines = {n: make_node_key(home / f"{n}.node.key") for n in ("alpha", "beta", "gamma")}
    for name, line in lines.items():
        (home / "sites" / f"{name}.pub").write_text(f"identity of {name}\n{line}\n")
    control, told = Relay(), []
    health = Health(home, gateway=lambda: True)
    monkeypatch.setattr(server, "_LOOK_S", 0)
    monkeypatch.setattr(server, "opened", lambda home, patience_s: nullcontext(control))
    watch = server.Watch(home, report=lambda e, f: told.append((e, dict(f))), health=health, pages=None, heard=SimpleQueue())

    def look():
        told.clear()
        for _ in range(2):
            stop = threading.Event()
            watch.until(stop, SimpleNamespace(check=lambda now, stop=stop: stop.set()))
        return [f["state"] for e, f in told if e == Event.PROCESS]

    assert (look(), health.readyz()) == ([], "")
    assert control.known == {node_key_pem(line) for line in lines.values()}
    (home / "sites" / "beta.pub").write_text("half\n")
    (home / "sites" / "gamma.pub").unlink()
    (home / "sites" / "delta.pub").write_text(f"identity of delta\n{make_node_key(home / 'delta.node.key')}\n")
    (said,) = look()
    assert f"{home / 'sites' / 'beta.pub'} has no second line" in said == health.readyz()
    assert len(control.known) == 4  # delta is let in, and nobody is expelled for a file that may come back
    assert watch._presence.online == {"alpha", "beta", "delta"}
    (home / "sites" / "beta.pub").write_text(f"identity of beta\n{lines['beta']}\n")
    assert (look(), health.readyz()) == (["whole again"], "")
    assert node_key_pem(lines["beta"]) in control.known
    assert node_key_pem(lines["gamma"]) not in control.known  # it was removed
    monkeypatch.setattr(control, "nodes", raising(StoreError("the list of runs is damaged")))
    assert (look(), health.readyz()) == (["the list of runs is damaged"], "the list of runs is damaged")


class Relay:
    """Stands for the SuperLink: a set of keys."""

    def __init__(self):
        self.known = set()

    def nodes(self):
        return [SimpleNamespace(id=hash(key), key=key, status="online", heard=time.time()) for key in self.known]

    def register(self, key):
        self.known.add(key)
        return hash(key)

    def unregister(self, node_id):
        self.known = {key for key in self.known if hash(key) != node_id}

    def runs(self):
        return {}


def raising(error):
    def call():
        raise error

    return call


def test_the_numbers_are_those_of_the_status_in_prometheus_words(home):
    (home / "sites" / 'od"d\\.pub').write_text("a key\n")
    text = Health(home, gateway=lambda: True).metrics()
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="([^"\\]|\\.)*"(,\w+="([^"\\]|\\.)*")*\})? -?[0-9.e+-]+', line), line
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["fedlora_up"] == "0"
    assert values["fedlora_sites_enrolled"] == "4"
    assert values['fedlora_run_rounds_done{run="toy"}'] == "3"
    assert values['fedlora_run_rounds{run="toy"}'] == "8"
    assert values['fedlora_run_state{run="toy",state="interrupted"}'] == "1"
    assert values['fedlora_run_held_out_nll{run="toy"}'] == "0"  # measured in round 3: after two, the best
    assert values['fedlora_site_standing{site="alpha",standing="enrolled"}'] == "1"
    assert 'site="od\\"d\\\\"' in text


def test_what_server_up_has_seen_of_a_site_outlives_it(home):
    now = [1000.0]
    seen = Sightings(home, clock=lambda: now[0])
    report = seen.through(lambda event, facts: None)
    report(Event.SITE_ONLINE, SiteName(site="alpha"))
    report(Event.SITE_REFUSED, SiteRefused(site="beta", cause="clock", why="its clock is 90000 s behind this server's"))
    now[0] = 2000.0
    seen.tick()  # and it is killed: nothing of its end is written
    assert "last seen 60 s ago" in next(s["said"] for s in look(home, now=2060.0)["sites"] if s["site"] == "alpha")
    now[0] = 2500.0
    Sightings(home, clock=lambda: now[0])  # the next `server up`: nobody is there yet
    found = {s["site"]: s for s in look(home, now=2600.0)["sites"]}
    assert "last seen 10 min ago" in found["alpha"]["said"]
    assert "never called" in found["gamma"]["said"]
    assert all(s["standing"] == "enrolled" and "no server runs" in s["said"] for s in found.values())


def test_a_run_that_was_killed_with_its_server_goes_on_nowhere_and_is_said_once(home):
    """Flower learns of it a minute later; until then screens must not say that sites train."""
    plan = RunStore.open(home / "runs" / "toy").plan
    digest = plan.digest()
    job, waiting = (new_job(home, Job("toy.toml", resume=False, name=name, digest=digest)) for name in ("toy", "waits"))
    Events(home, job)(Event.START, Start(run="ab" * 32, round=3, rounds=8))
    assert next(iter(look(home)["runs"]))["state"] == "interrupted"
    told = []
    Runs(home, report=lambda event, facts: told.append((event, facts["name"], facts["state"], facts["said"])))
    assert [one[:3] for one in told] == [(Event.RUN, "toy", "failed")]
    assert "killed" in told[0][3]
    assert "--resume" in told[0][3]
    assert [*live(home)] == [waiting]
    assert "killed" in next(run for run in look(home)["runs"] if run["name"] == "toy")["said"]
    Runs(home, report=lambda event, facts: told.append(facts))  # the next server
    assert len(told) == 1


def test_a_changed_plan_under_the_name_of_a_run_is_not_told_to_resume_it(home):
    control = SimpleNamespace(runs=dict)
    plan = RunStore.open(home / "runs" / "toy").plan
    with pytest.raises(StoreError, match="already") as e:
        running(home, control, plan, resume=False)
    assert "--resume" in e.value.hint
    other = plan.model_copy(update={"training": plan.training.model_copy(update={"learning_rate": 0.5})})
    for resume in (False, True):
        with pytest.raises(StoreError, match="another plan") as e:
            running(home, control, other, resume=resume)
        assert "--resume" not in e.value.hint
    store = RunStore.open(home / "runs" / "toy")
    store.finish(store.records()[-1])
    with pytest.raises(StoreError, match="that is done") as e:
        running(home, control, plan, resume=False)
    assert "--resume" not in e.value.hint


@pytest.mark.parametrize("sends", [b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /met", b""])
def test_a_caller_that_hangs_up_prints_nothing(sends, tmp_path, capfd):
    class Slow(Health):
        def answer(self, path):
            time.sleep(0.3)
            return 200, "text/plain", "x" * 5_000_000

    with answering(Slow(tmp_path, gateway=lambda: True).answer, 0) as port:
        caller = socket.create_connection(("127.0.0.1", port))
        caller.sendall(sends)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets the connection
        caller.close()
        time.sleep(0.8)
    assert capfd.readouterr() == ("", "")


def test_a_defect_of_ours_in_an_answer_is_printed(tmp_path, capfd):
    class Broken(Health):
        def answer(self, path):
            raise ZeroDivisionError

    with answering(Broken(tmp_path, gateway=lambda: True).answer, 0) as port, pytest.raises(OSError, match="closed connection"):
        get(port, "/metrics")
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_the_rules_for_alerts_name_only_metrics_labels_and_values_that_exist(home):
    """A rule about a metric that nobody has never fires, and nobody notices."""
    text = Health(home, gateway=lambda: True).metrics()
    metrics = {name: set() for name in re.findall(r"^# TYPE (\w+) gauge$", text, re.M)} | {"up": {"job"}}  # Prometheus' own
    for name, inside in re.findall(r"^(\w+)\{(.*)\} ", text, re.M):
        metrics[name] |= set(re.findall(r'(\w+)="', inside))
    values = {"standing": set(STANDINGS), "state": set(get_args(RunState)), "job": {"fedlora"}}
    rules = yaml.safe_load((ROOT / "server" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} >= {"FedLoRAServerDown", "FedLoRASiteLost", "FedLoRARoundLate", "FedLoRARunFailed"}
    for rule in rules:
        assert rule["for"]
        assert set(rule["annotations"]) == {"summary", "action"}
        used = re.findall(r"\b(up|fedlora_\w+)(?:\{([^}]*)\})?", rule["expr"])
        assert used
        for name, inside in used:
            for label, word in re.findall(r'(\w+)=~?"([^"]*)"', inside):
                assert label in metrics[name], (name, label)
                assert set(word.split("|")) <= values[label], (label, word)
                # A change from one word to the other would be another series, whose `for` begins anew.
                assert "|" not in word or rule["for"] == "1m" or f"max without ({label}) (" in rule["expr"], rule["alert"]
        gone = set(re.findall(r"max without \((\w+)\)", rule["expr"]))
        shown = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))) - {"instance"}
        assert shown <= set().union(*(metrics[name] for name, _ in used)) - gone, rule["alert"]
    readme = (ROOT / "server" / "README.md").read_text()
    assert re.search(r"job_name: fedlora\b", readme)
    assert "alerts.yml" in readme


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_prometheus_takes_rules_and_metrics_and_each_alert_begins_when_it_should(home, tmp_path):
    def promtool(*argv, given=""):
        subprocess.run(["promtool", *argv], input=given, text=True, check=True, capture_output=True)

    file, cases = ROOT / "server" / "alerts.yml", (ROOT / "tests" / "fixtures" / "alerts_test.yml").read_text()
    promtool("check", "rules", str(file))
    promtool("check", "metrics", given=Health(home, gateway=lambda: True).metrics())
    rules = yaml.safe_load(file.read_text())
    assert all(
        f"alertname: {rule['alert']}\n        eval_time" in cases for rule in rules["groups"][0]["rules"]
    )  # each begins once
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]  # words, which a test need not repeat
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "cases.yml").write_text(cases.replace("RULES", str(tmp_path / "rules.yml")))
    promtool("test", "rules", str(tmp_path / "cases.yml"))


@pytest.mark.parametrize(
    ("void", "now", "known"), [(None, 1005.0, True), (None, 1029.0, True), (None, 1031.0, False), ("quorum", 1005.0, False)]
)
def test_no_end_is_foreseen_while_a_round_does_not_end(void, now, known):
    record = RoundRecord.model_construct(round=1, kind="train", asked=(), sites={}, missing={}, void=void)
    at = Progress(round=1, rounds=3, now=2, since=1000.0, record=record, took_s=[8.0, 12.0])
    assert (at.eta_s(now) is not None) is known


def test_a_site_that_was_away_before_the_server_began_again_is_away_since_then(home):
    """Or, if that server was killed while the site was there, since it looked last."""
    now = [1000.0]

    def see(*events, begins):
        if begins:
            servers.append(Sightings(home, clock=lambda: now[0]))
        for event in events:
            servers[-1].through(lambda event, facts: None)(event, SiteName(site="away"))
        servers[-1].tick()
        return load_seen(home)["away"].since

    servers = []
    see(Event.SITE_ONLINE, begins=True)
    now[0] = 1100.0
    assert see(Event.SITE_OFFLINE, begins=False) == 1100.0
    now[0] = 1200.0
    assert see(Event.SITE_OFFLINE, begins=True) == 1100.0
    now[0] = 1300.0
    see(Event.SITE_ONLINE, begins=False)
    now[0] = 1400.0
    assert see(Event.SITE_OFFLINE, begins=True) == 1300.0


@pytest.mark.parametrize(
    ("site", "later"), [("asked", False), ("away", False), ("not-drawn", False), ("later", True), ("waited-for", False)]
)
def test_a_site_that_was_enrolled_after_a_run_had_begun_is_said_to_be_asked_when_it_is_started_again(
    home, monkeypatch, capsys, site, later
):
    (home / "sites" / f"{site}.pub").write_text("a key\n")
    Sightings(home, clock=lambda: 1000.0).through(lambda event, facts: None)(Event.SITE_ONLINE, SiteName(site=site))
    missing = {"away": "offline", "not-drawn": "not-drawn"}
    record = RoundRecord.model_construct(round=1, kind="train", asked=("asked",), sites={}, missing=missing)
    at = Progress(round=1, rounds=3, record=record, missing=["waited-for"])
    monkeypatch.setattr(looking, "progress", lambda home, name: at)
    monkeypatch.setattr(looking, "live", lambda home: {"job": Job("toy.toml", resume=False, name="toy")})
    monkeypatch.setattr(looking, "_server", lambda home: (True, "fed:8443", 1, "up"))
    monkeypatch.setattr(looking, "_live_run", lambda *words: {"name": "toy"})
    [found] = [s for s in look(home, now=1005.0)["sites"] if s["site"] == site]
    assert ("it was enrolled after this run had begun, and is asked once" in found["said"]) is later


def test_a_sites_word_is_the_same_at_both_ends_on_screen_in_json_and_in_metrics(home, monkeypatch, capsys):
    """All that a server can know of a site, each by what it has seen; the words are those of the site's own table."""
    now, notes = (
        [1000.0],
        {"a-paused": "paused", "b-left": "left", "c-stopped": "stopped", "e-sends": "sending", "m-orphaned": "orphaned"},
    )
    names = [*notes, "d-lost", "f-trains", "g-answered", "h-failed", "i-refused", "j-new", "k-back", "l-silent"]
    for name in names:
        (home / "sites" / f"{name}.pub").write_text("a key\n")
    seen = Sightings(home, clock=lambda: now[0])
    report = seen.through(lambda event, facts: None)
    for name in [*notes, "d-lost", "f-trains", "g-answered", "h-failed", "k-back", "l-silent"]:
        report(Event.SITE_ONLINE, SiteName(site=name))
    report(Event.SITE_REFUSED, SiteRefused(site="i-refused", cause="clock", why="its clock is behind"))
    for name in ("a-paused", "b-left", "c-stopped", "d-lost", "m-orphaned"):
        report(Event.SITE_OFFLINE, SiteName(site=name))
    report(Event.SITE_SILENT, Silent(site="l-silent", since=984, said=""))
    for name, word in notes.items():
        seen.note(name, word)
    seen.note("a-stranger", "left")
    at = Progress(round=1, rounds=3, now=2, kind="train", since=990.0)
    at.answers = {"e-sends": None, "f-trains": None, "g-answered": "", "h-failed": "policy-min-sites"}
    monkeypatch.setattr(looking, "progress", lambda home, name: at)
    monkeypatch.setattr(looking, "live", lambda home: {"job": Job("toy.toml", resume=False, name="toy")})
    monkeypatch.setattr(looking, "_server", lambda home: (True, "fed:8443", 1, "up"))
    found = {s["site"]: s for s in look(home, now=1005.0)["sites"]}
    expected = {
        "a-paused": "paused", "b-left": "left", "c-stopped": "lost", "d-lost": "lost", "e-sends": "uploading",
        "f-trains": "training", "g-answered": "idle", "h-failed": "degraded", "i-refused": "refused", "j-new": "enrolled",
        "k-back": "connected", "l-silent": "lost", "m-orphaned": "lost",
    }  # fmt: skip
    assert {site: found[site]["standing"] for site in names} == expected
    assert set(expected.values()) <= set(STANDINGS)
    assert all(found[site]["said"].startswith(word) for site, word in expected.items())
    assert "in order" in found["c-stopped"]["why"]
    assert "as when it is killed" in found["m-orphaned"]["why"]
    assert "no sign of life for 21 s" in found["l-silent"]["why"]
    assert "policy.min_sites does not allow the plan's federation.min_sites" in found["h-failed"]["why"]
    assert {s["site"]: s["standing"] for s in look(home, now=1020.0)["sites"]}["e-sends"] == "training"  # it has stopped sending
    text = Health(home, gateway=lambda: True).metrics()
    assert main(["server", "status", str(home)]) == 0
    screen = capsys.readouterr().out
    told = dict(re.findall(r"^  ([a-m]-[a-z]+) +([a-z]+)", screen, re.M))
    for site, word in (expected | {"e-sends": "training"}).items():
        ones = re.findall(rf'fedlora_site_standing\{{site="{site}",standing="([a-z]+)"\}} 1\n', text)
        assert (ones, told[site]) == ([word], word)


def test_a_round_that_waits_for_people_says_so_of_the_run_and_of_each_site(home, monkeypatch):
    names = ["a-ready", "b-refuses"]
    for name in names:
        (home / "sites" / f"{name}.pub").write_text("a key\n")
    seen = Sightings(home, clock=lambda: 1000.0)
    for name in names:
        seen.through(lambda event, facts: None)(Event.SITE_ONLINE, SiteName(site=name))
    record = (
        RunStore.open(home / "runs" / "toy")
        .records()[-1]
        .model_copy(
            update={"round": 2, "asked": tuple(names), "sites": {}, "missing": {"a-ready": "lone-change", "b-refuses": "data"}}
        )
    )
    at = Progress(round=1, rounds=3)
    at.take(990.0, Event.BLOCKED, {"record": record, "sites": {"b-refuses": "data"}})
    at.take(1000.0, Event.ASK, {"round": 2, "kind": "train", "sites": names})
    monkeypatch.setattr(looking, "progress", lambda home, name: at)
    monkeypatch.setattr(looking, "live", lambda home: {"job": Job("toy.toml", resume=False, name="toy")})
    monkeypatch.setattr(looking, "_server", lambda home: (True, "fed:8443", 1, "up"))
    found = look(home, now=1001.0)
    (run,) = [one for one in found["runs"] if one["name"] == "toy"]
    assert (run["state"], run["missing"]) == ("waiting", ["b-refuses"])
    assert "round 2 of 3: waits for people" in run["said"]
    standing = {one["site"]: one for one in found["sites"]}
    assert (standing["a-ready"]["standing"], standing["b-refuses"]["standing"]) == ("idle", "degraded")
    assert "waits for b-refuses" in standing["a-ready"]["said"]
    assert "it runs `fedlora check PLAN --site SITE`" in standing["b-refuses"]["said"]


def test_the_page_says_what_status_says_within_a_round_and_once_more_when_the_run_has_ended(home, monkeypatch):
    """Refreshed without drawing; texts from elsewhere are text."""
    page = home / "runs" / "toy" / "report.html"
    page.write_text(f"<html>before{''.join(MARKS)}after</html>")
    (home / "sites" / "alpha.pub").write_text("a key\n")
    seen = Sightings(home, clock=lambda: 1000.0)
    seen.through(lambda event, facts: None)(Event.SITE_ONLINE, SiteName(site="alpha"))
    at, there = Progress(round=1, rounds=3), {"job": Job("toy.toml", resume=False, name="toy")}
    at.take(990.0, Event.ASK, {"round": 2, "kind": "train", "sites": ["alpha", "<b>"]})
    monkeypatch.setattr(looking, "progress", lambda home, name: at)
    monkeypatch.setattr(looking, "live", lambda home: there)
    monkeypatch.setattr(looking, "_server", lambda home: (True, "fed:8443", 1, "up"))
    shown = Live(home)
    shown.look(1005.0)
    found, text = look(home, now=1005.0), page.read_text()
    run = next(r for r in found["runs"] if r["name"] == "toy")
    assert html.escape(run["said"]) in text
    assert "&lt;b&gt;" in text
    assert all(html.escape(site["said"]) in text for site in found["sites"])
    assert "training: round 2 of 3, training for 15 s" in text
    assert text.startswith("<html>before")
    assert text.endswith("after</html>")
    at.take(1006.0, Event.UPDATE, {"site": "alpha"})
    shown.look(1007.0)
    assert page.read_text() == text  # every five seconds
    shown.look(1011.0)
    assert "idle: it has answered in round 2 of 3" in page.read_text()
    assert page.read_text().count("<h2>Now</h2>") == 1
    with answering(Health(home, gateway=lambda: True).answer, 0) as port:
        assert "<h2>Now</h2>" in get(port, "/")[1]
    there.clear()
    shown.look(1020.0)
    assert "interrupted" in page.read_text()
    assert "Sites now" not in page.read_text()
    page.write_text("done")  # drawn anew, without the part
    shown.look(1030.0)
    assert page.read_text() == "done"


def test_a_page_is_wanted_when_a_run_begins(home, monkeypatch):
    wanted = []
    monkeypatch.setattr("fedlora.flower.coordinator.watch.read_events", lambda home, name, offset: ([(1.0, *BEGUN)], 1))
    runs = Runs(home, report=lambda e, f: None, on_round=wanted.append)
    runs._pass_on("job", _Watched(Job("toy.toml", resume=False, name="toy")))
    assert wanted == ["toy"]


BEGUN = (Event.START, {"run": "ab", "round": 0, "rounds": 3})


def test_a_site_that_signs_off_and_comes_back_is_not_said_to_pause_when_it_is_lost_later(home, monkeypatch):
    monkeypatch.setattr(looking, "_server", lambda home: (True, "fed:8443", 1, "up"))
    seen = Sightings(home)
    report = seen.through(lambda event, facts: None)
    report(Event.SITE_ONLINE, SiteName(site="alpha"))
    seen.note("alpha", "paused")
    report(Event.SITE_OFFLINE, SiteName(site="alpha"))
    assert next(s for s in look(home)["sites"] if s["site"] == "alpha")["standing"] == "lost"


def test_the_page_is_written_by_another_process_and_what_is_missing_is_said_at_the_start(home, monkeypatch):
    told = []
    drawing = pages.Pages(home, lambda event, facts: told.append(facts["state"]))
    drawing.want("toy")
    drawing.want("never-begun")

    def written():
        drawing.look()
        return (home / "runs" / "toy" / "report.html").exists()

    until(written)
    drawing.stop()
    with answering(Health(home, gateway=lambda: True).answer, 0) as port:
        status, page = get(port, "/")
    assert (status, "3 of 8 rounds are done" in page) == (200, True)
    (home / "runs" / "toy" / "rounds.jsonl").write_bytes(b"damaged\n")
    drawing.want("toy")

    def said():
        drawing.look()
        return told

    until(said)
    assert "was not written, status 3; `fedlora report" in told[0]
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotInstalled):
        pages.Pages(home, lambda event, facts: None)

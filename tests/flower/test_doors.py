"""At the server's door: who is let in, and what both ends are told when one is not. A real server, and real sites beside it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flower.harness import PATIENCE_S, Child, descendants, environment, make_home, toys, until, write_site
from flower.toy_parts import blob

from fedlora.core.plan import Plan
from fedlora.core.toml import dump_toml
from fedlora.flower import launch
from fedlora.flower.coordinator.follow import start
from fedlora.flower.coordinator.watch import load_seen
from fedlora.flower.server import Refusals
from fedlora.flower.supernode import CallSigner, said_goodbye, say_goodbye
from fedlora.gateway import doors
from fedlora.gateway.certificates import make_node_key, node_key_pem, node_key_public
from fedlora.gateway.clock import TIME_HEADER, Clock
from fedlora.gateway.doors import (
    GOODBYES,
    KEY_HEADER,
    SIGNATURE_HEADER,
    STAMP_HEADER,
    WHY_HEADER,
    NodeWatch,
    Notice,
    key_name,
    parse_notice,
)
from fedlora.gateway.exposure import free_port
from fedlora.site.site_file import load_site_file

pytestmark = pytest.mark.flower


@dataclass
class Server:
    root: Path
    home: Path
    listen: str
    env: dict[str, str]
    child: Child

    def site(self, name: str) -> Path:
        """The file of a new site that is enrolled."""
        file, line = write_site(self.root / name, name, home=self.home, listen=self.listen)
        self.enrol(name, line)
        return file

    def enrol(self, name: str, line: str) -> None:
        (self.home / "sites" / f"{name}.pub").write_text(f"identity of {name}\n{line}\n")

    def wait(self, event: str, site: str, *, since: int = 0, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        i = self.child.wait_for(lambda e, f: e == event and f["site"] == site, since=since, timeout_s=timeout_s)
        return self.child.events[i - 1][1]

    @contextlib.contextmanager
    def up(self, file: Path, *, ahead_s: float = 0.0, more: Mapping[str, str] = {}) -> Iterator[Child]:
        """`site up` with a toy's answers, as a process whose clock is ahead."""
        env = {**self.env, "FEDLORA_TEST_CLOCK_AHEAD_S": str(ahead_s), **more}
        child = Child("toy_site.py", str(file), env=env)
        try:
            yield child
        finally:
            child.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("doors")
    home, listen = root / "home", f"127.0.0.1:{free_port()}"
    make_home(home)
    _, line = write_site(root / "somebody", "somebody", home=home, listen=listen)
    (home / "sites" / "somebody.pub").write_text(f"identity\n{line}\n")  # an empty folder would expel nobody
    env = environment(root / "audit.txt")
    child = Child("toy_server.py", str(home), listen, env=env)
    try:
        child.wait_for(lambda e, f: e == "listening")
        yield Server(root, home, listen, env, child)
    finally:
        child.end()


def becomes(child: Child, state: str, *, cause: str = "", since: int = 0, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
    """What `site up` says when it gets there."""
    i = child.wait_for(lambda e, f: e == "site" and f["state"] == state and f["cause"] == cause, since=since, timeout_s=timeout_s)
    return child.events[i - 1][1]


def supernode_of(child: Child) -> int:
    (pid,) = [p for p, argv in descendants(child.process.pid).items() if "fedlora.flower.supernode" in argv]
    return pid


# --- E5: the good-bye ---------------------------------------------------------------------------------------------


def gone(home: Path, site: str) -> str:
    """With which word a site has signed off, as the server keeps it; it is there a moment after the site was seen to go."""
    end = time.monotonic() + 20
    while not (word := load_seen(home)[site].gone) and time.monotonic() < end:
        time.sleep(0.1)
    return word


@pytest.mark.fault(
    "E5",
    "kill -9 of `site up`",
    says="its SuperNode signs off: offline within seconds, not as if ended in order, and the next is let in at once",
)
def test_a_site_that_was_killed_is_offline_within_seconds_and_back_at_once(server):
    file = server.site("killed")
    for _ in range(2):
        since = len(server.child.events)
        with server.up(file) as site:
            becomes(site, "ready")
            server.wait("site-online", "killed", since=since)
            since = len(server.child.events)
            site.process.kill()
            server.wait("site-offline", "killed", since=since, timeout_s=45)  # without a good-bye: online for a minute
        assert gone(server.home, "killed") == "orphaned"
    since = len(server.child.events)
    with server.up(file) as site:
        becomes(site, "ready")
        server.wait("site-online", "killed", since=since)
        site.process.terminate()
        assert site.process.wait(30) == 0
    assert gone(server.home, "killed") == "stopped"
    log = (file.parent / "state" / "flower" / "log" / "supernode.log").read_text()
    assert "refused" not in log


@pytest.mark.fault(
    "E5", "the power fails at a site, or the network to it", says="said within half a minute: it counts as gone after a minute"
)
def test_a_site_without_a_good_bye_is_said_to_be_silent_long_before_it_counts_as_gone(server):
    file = server.site("dark")
    with server.up(file, more={"FEDLORA_TEST_MONITOR": "1"}) as site:
        at = site.wait_for(lambda e, f: e == "process" and f["name"] == "monitor")
        url = site.events[at - 1][1]["state"].removeprefix("answers at ")
        becomes(site, "ready")
        with urllib.request.urlopen(f"{url}readyz", timeout=20) as answer:
            assert answer.read() == b"ok\n"
        with urllib.request.urlopen(f"{url}metrics", timeout=20) as answer:
            assert b'fedlora_site_standing{site="dark",standing="ready"} 1\n' in answer.read()
        server.wait("site-online", "dark")
        since = len(server.child.events)
        pids = (site.process.pid, supernode_of(site))
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # as a machine that hangs
        try:
            silent = server.wait("site-silent", "dark", since=since, timeout_s=45)
            assert "no sign of life for 2" in silent["said"]
            since = len(server.child.events)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        server.wait("site-online", "dark", since=since)  # it is heard again


@pytest.mark.fault("E5", "a SuperNode gets its death signal several times", says="the good-bye is not disturbed")
def test_many_signals_are_one_good_bye(server):
    file = server.site("signaled")
    with server.up(file) as site:
        becomes(site, "ready")
        server.wait("site-online", "signaled")
        since, pid = len(server.child.events), supernode_of(site)
        for _ in range(6):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.05)
        server.wait("site-offline", "signaled", since=since, timeout_s=45)


def test_a_supernode_that_is_still_starting_leaves_at_once(server, tmp_path):
    """Before Flower listens to signals: nobody is left behind by a `site up` that was killed early."""
    make_node_key(tmp_path / "key")
    (tmp_path / "secret").write_bytes(b"0" * 32)
    argv = launch.supernode(
        server.listen, port=free_port(), ca=server.home / "tls" / "ca.crt", node_key=tmp_path / "key", secret=tmp_path / "secret"
    )
    process = subprocess.Popen(argv, env=server.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: int(Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0], 16) & (1 << 14) != 0)
    process.terminate()
    assert process.wait(3) == 0


# --- E14: clocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ahead_s",
    [
        pytest.param(
            10.0,
            id="ahead",
            marks=pytest.mark.fault(
                "E14",
                "a site's clock 10 s ahead",
                says="how far, at the site; what is signed is corrected, and the site takes part",
            ),
        ),
        pytest.param(
            -400.0,
            id="behind",
            marks=pytest.mark.fault("E14", "a site's clock 400 s behind", says="the same"),
        ),
        pytest.param(7200.0, id="hours ahead, as with a wrong time zone", marks=pytest.mark.long),
    ],
)
def test_a_clock_that_is_wrong_is_said_and_corrected(server, ahead_s):
    name = f"clock{abs(ahead_s):.0f}"
    since = len(server.child.events)
    with server.up(server.site(name), ahead_s=ahead_s) as site:
        i = site.wait_for(lambda e, f: e == "clock")
        facts = site.events[i - 1][1]
        assert abs(facts["ahead_s"] - ahead_s) < 9  # half of the answer's way is in it
        assert facts["way"] == ("ahead" if ahead_s > 0 else "behind")
        becomes(site, "ready")
        server.wait("site-online", name, since=since)
        if ahead_s == 10.0:
            time.sleep(6)  # long enough for the server to say that this site is refused, if it were
            assert not [f for e, f in server.child.events[since:] if e == "site-refused"]
            return  # the others do a round
        plan = server.root / f"exchange-{name}.toml"
        plan.write_text(dump_toml(Plan(run={"name": f"exchange-{name}"})))
        events: list[tuple[str, Any]] = []
        start(server.home, plan, resume=False, report=lambda e, f: events.append((e, f)))
        sent = hashlib.sha256(blob("broadcast")).hexdigest()
        replies = {f["site"]: (f["error"], f["sha256"]) for f in toys(events, "reply")}
        assert replies[name] == ("", hashlib.sha256(blob(f"{name} {sent}")).hexdigest())
        assert [e for e, _ in site.events].count("clock") == 1
        assert not [f for e, f in server.child.events[since:] if e == "site-refused"]


@pytest.mark.fault("E14", "a site's clock two days off", says="refused with the number of seconds and the cure, at both ends")
def test_a_clock_that_is_more_than_a_day_off_is_refused_with_the_seconds_at_both_ends(server):
    since = len(server.child.events)
    with server.up(server.site("lost-in-time"), ahead_s=-172_800.0) as site:
        facts = becomes(site, "refused", cause="clock")
        (seconds,) = re.findall(r"is (\d+) s behind", facts["why"])
        assert abs(int(seconds) - 172_800) < 5
        assert "timedatectl" in facts["cure"]
        refused = server.wait("site-refused", "lost-in-time", since=since)
        (seconds,) = re.findall(r"its clock is (\d+) s behind", refused["why"])
        assert abs(int(seconds) - 172_800) < 5
        assert "NTP" in refused["why"]
        ends = [f["state"] for e, f in site.events if e == "process" and f["state"].startswith("ended")]
        assert len(ends) <= 1
        assert all("s behind" in end for end in ends)
    assert not any(f.get("state") == "ready" for e, f in site.events)


# --- enrolment ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "E30.24", "a node key that is not enrolled", says="send the .pub file; the site is let in when it is there, without a restart"
)
@pytest.mark.fault("E30.25", "a site's file is removed at the server", says="withdrawn, and that a new key is needed")
def test_a_key_that_is_not_enrolled_and_one_that_was_withdrawn_are_told_apart(server):
    file, line = write_site(server.root / "newcomer", "newcomer", home=server.home, listen=server.listen)
    with server.up(file) as site:
        facts = becomes(site, "refused", cause="not-enrolled")
        assert ".pub file to the coordinator" in facts["said"]
        assert "next try in" in facts["said"]
        server.enrol("newcomer", line)
        becomes(site, "ready")
        server.wait("site-online", "newcomer")
        seen = len(site.events)
        (server.home / "sites" / "newcomer.pub").unlink()
        facts = becomes(site, "refused", cause="withdrawn", since=seen)
        assert "has withdrawn" in facts["said"]
        i = site.wait_for(lambda e, f: e == "process" and f["state"].startswith("ended"), since=seen)
        assert "has withdrawn this site's node key" in site.events[i - 1][1]["state"]
    with server.up(file) as site:  # and the next `site up` still knows
        becomes(site, "refused", cause="withdrawn")
    causes = [f["cause"] for e, f in site.events if e == "site"]
    assert "not-enrolled" not in causes


# --- E16, E17: one key, two processes -----------------------------------------------------------------------------


@pytest.mark.fault(
    "E17",
    "a second machine with the same keys and its own state",
    says="told so, at the site and at the server; the first one works on",
)
def test_a_second_machine_with_the_same_keys_is_told_so_at_both_ends(server):
    file = server.site("twin")
    since = len(server.child.events)
    with server.up(file) as first:
        becomes(first, "ready")
        server.wait("site-online", "twin", since=since)
        other = server.root / "other-machine"
        shutil.copytree(file.parent, other, ignore=shutil.ignore_patterns("state"))
        text = (other / "site.toml").read_text()
        port = load_site_file(file).local_port
        (other / "site.toml").write_text(text.replace(str(port), str(free_port())))
        with server.up(other / "site.toml") as second:
            facts = becomes(second, "refused", cause="in-use")
            assert "another process with this site's node key is connected" in facts["said"]
            refused = server.wait("site-refused", "twin", since=since)
            assert "two machines use the key of twin" in refused["why"]
            assert "127.0.0.1" in refused["why"]
        assert not any(f.get("state") == "ready" for e, f in second.events)
        assert [f["cause"] for e, f in second.events if e == "site"].count("in-use") == 1
        assert first.process.poll() is None
        assert not [f for e, f in server.child.events[since:] if e == "site-offline" and f["site"] == "twin"]


@pytest.mark.fault(
    "E16", "the SuperNode's secret file was replaced, and it restarts", says="a fresh one; the site is let in again"
)
@pytest.mark.fault(
    "E30.26",
    "something goes on replacing the secret",
    says="a wrong secret is said, never ready; mended with a new one when that stops",
)
def test_a_wrong_secret_is_said_and_mended_and_never_ready(server):
    file = server.site("locked-out")
    secret = file.parent / "state" / "flower" / "superexec.secret"
    with server.up(file) as site:
        becomes(site, "ready")
        secret.write_bytes(b"of another site up, an old one")
        seen = len(site.events)
        os.kill(supernode_of(site), signal.SIGTERM)
        becomes(site, "ready", since=seen)
        over = threading.Event()

        def spoil() -> None:
            while not over.is_set():
                secret.write_bytes(os.urandom(32))
                time.sleep(0.001)

        spoiler = threading.Thread(target=spoil)
        spoiler.start()
        try:
            seen = len(site.events)
            os.kill(supernode_of(site), signal.SIGTERM)
            i = site.wait_for(lambda e, f: e == "site" and f["cause"] == "wrong-secret", since=seen)
            facts = site.events[i - 1][1]
            assert str(secret) in facts["said"]
            assert not any(e == "site" and f["state"] == "ready" for e, f in site.events[seen:])
        finally:
            over.set()
            spoiler.join()
        becomes(site, "ready", since=i)


@pytest.mark.fault(
    "E16",
    "a real second `site up` beside a running one",
    says="exit status 3 and the first one's process; the first goes on after its SuperNode restarts",
)
def test_a_second_site_up_does_not_lock_the_first_one_out(server):
    file = server.site("doubled")
    with server.up(file) as first:
        becomes(first, "ready")
        second = Child("toy_site.py", str(file), env=server.env)
        assert second.process.wait(20) != 0
        until(lambda: "Held" in "".join(second.errors))
        assert f"process {first.process.pid}" in "".join(second.errors)
        seen = len(first.events)
        os.kill(supernode_of(first), signal.SIGTERM)
        becomes(first, "ready", since=seen)


@pytest.mark.fault(
    "E30.27",
    "the server goes away while a site is connected",
    says="lost, with the cause and the next try; ready when it is back",
)
def test_a_server_that_goes_away_is_said_with_its_cause_and_comes_back(tmp_path):
    home, listen = tmp_path / "home", f"127.0.0.1:{free_port()}"
    make_home(home)
    file, line = write_site(tmp_path / "alpha", "alpha", home=home, listen=listen)
    (home / "sites" / "alpha.pub").write_text(f"identity\n{line}\n")
    env = environment(tmp_path / "audit")
    relay = Child("toy_server.py", str(home), listen, env=env)
    site = Child("toy_site.py", str(file), env=env)
    try:
        becomes(site, "ready")
        seen = len(site.events)
        relay.process.kill()
        facts = becomes(site, "lost", cause="port-closed", since=seen)
        assert facts["said"].startswith("lost: ")
        relay = Child("toy_server.py", str(home), listen, env=env)
        becomes(site, "ready", since=seen)
    finally:
        site.end()
        relay.end()


# --- the parts, alone ---------------------------------------------------------------------------------------------


class Node:
    """A node key that signs calls as Flower does."""

    def __init__(self, tmp_path: Path, process: bytes = b"0123456789abcdef") -> None:
        path = tmp_path / f"key{os.urandom(4).hex()}"
        self.pem = node_key_pem(make_node_key(path))
        assert node_key_public(path) == self.pem
        self.private = load_ssh_private_key(path.read_bytes(), None)
        self.process = process

    def headers(self, at: float, *, process: bytes | None = None, forged: bool = False) -> list[tuple[bytes, bytes]]:
        stamp = datetime.fromtimestamp(at, UTC).isoformat().encode()
        signature = self.private.sign(b"x" if forged else stamp, ec.ECDSA(hashes.SHA256()))
        return [
            (KEY_HEADER.encode(), b64encode(self.pem)),
            (STAMP_HEADER.encode(), stamp),
            (SIGNATURE_HEADER.encode(), b64encode(signature)),
            (b"x-fedlora-process", process or self.process),
        ]


class Gate:
    """NodeWatch with a clock that the test moves."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.now = 1_800_000_000.0
        self.doors = NodeWatch(self.said.append, clock=lambda: self.now, monotonic=lambda: self.now)

    def why(self, call: str, headers: list[tuple[bytes, bytes]], status: int, peer: str = "10.0.0.5") -> str:
        added = dict(self.doors.answer(f"/v1/fleet/{call}", headers, status, peer=peer))
        assert float(added[TIME_HEADER.encode()]) == self.now
        return added.get(WHY_HEADER.encode(), b"").decode()


def test_a_refused_stamp_is_told_by_how_much_and_reported_only_if_it_is_signed(tmp_path):
    gate, node = Gate(), Node(tmp_path)
    assert gate.why("activate-node", node.headers(gate.now + 10), 401) == "clock +10.0"
    assert gate.said == [f"door {key_name(node.pem)} clock +10.0 10.0.0.5"]
    assert parse_notice(gate.said[0]) == Notice(key_name(node.pem), "clock", 10.0, "10.0.0.5")
    assert gate.why("activate-node", node.headers(gate.now - 400, forged=True), 401) == "clock -400.0"
    assert len(gate.said) == 1
    assert gate.why("pull-messages", node.headers(gate.now), 401) == ""  # a stranger's key: nothing is told of it


def test_a_key_in_use_and_an_unknown_one_are_told_apart_for_as_long_as_flower_does(tmp_path):
    gate, node = Gate(), Node(tmp_path)
    assert gate.why("activate-node", node.headers(gate.now), 412) == "unknown"
    gate.why("activate-node", node.headers(gate.now), 200)
    gate.now += 64
    assert gate.why("activate-node", node.headers(gate.now, process=b"f" * 16), 412, "10.0.0.6") == "in-use"
    gate.now += 2
    assert gate.why("activate-node", node.headers(gate.now), 412) == "unknown"
    gate.why("activate-node", node.headers(gate.now), 200)
    gate.why("deactivate-node", node.headers(gate.now), 200)
    assert gate.why("activate-node", node.headers(gate.now), 412) == "unknown"


def test_a_withdrawn_key_is_said_to_its_own_process_and_a_stranger_cannot_make_it_forgotten(tmp_path):
    gate, node = Gate(), Node(tmp_path)
    gate.why("activate-node", node.headers(gate.now), 200)
    assert gate.why("pull-messages", node.headers(gate.now, process=b"a" * 16), 401) == ""
    assert gate.why("activate-node", node.headers(gate.now), 412) == "in-use"
    assert gate.why("pull-messages", node.headers(gate.now), 401) == "withdrawn"
    assert gate.why("activate-node", node.headers(gate.now), 412) == "unknown"


def test_a_node_says_why_it_signs_off_and_is_seen_to_send_its_answer(tmp_path):
    gate, node = Gate(), Node(tmp_path)

    def said() -> list[str]:
        words = [parse_notice(line).why for line in gate.said]
        gate.said.clear()
        return words

    for word, heard in (
        (b"paused", "paused"),
        (b"left", "left"),
        (b"orphaned", "orphaned"),
        (b"for good", "stopped"),
        (b"", "stopped"),
    ):
        gate.why("activate-node", node.headers(gate.now), 200)
        gate.why("deactivate-node", [*node.headers(gate.now), (b"x-fedlora-goodbye", word)], 200)
        assert said() == [heard]
    gate.why("deactivate-node", [*node.headers(gate.now), (b"x-fedlora-goodbye", b"left")], 200)  # it was not there
    gate.why("deactivate-node", [*node.headers(gate.now), (b"x-fedlora-goodbye", b"left")], 401)  # not its key
    assert said() == []
    gate.why("activate-node", node.headers(gate.now), 200)
    for seconds in (0, 1, 3, 2):
        gate.now += seconds
        gate.why("push-object", node.headers(gate.now), 200)
    assert said() == ["sending", "sending"]  # not a line for each part


@pytest.mark.parametrize(("left", "said"), [(w, w) for w in GOODBYES] + [("", "orphaned"), ("on holiday", "orphaned")])
def test_a_supernode_says_no_other_word_than_those_of_the_set(tmp_path, left, said):
    say_goodbye(tmp_path / "going", left)
    assert said_goodbye(tmp_path / "going") == said
    assert said_goodbye(tmp_path / "none") == "orphaned"  # nobody has asked it to sign off
    say_goodbye(tmp_path / "going" / "x", left)  # a directory in which nothing can be written keeps no site here


@pytest.mark.fault("E17", "two processes take turns with one key, after a cut of the line", says="both are told, and the server")
def test_two_processes_that_take_turns_with_one_key_are_noticed(tmp_path):
    gate, node, a, b = Gate(), Node(tmp_path), b"a" * 16, b"b" * 16

    def calls(process: bytes) -> str:
        gate.now += 3
        return gate.why("pull-messages", node.headers(gate.now, process=process), 200)

    assert [calls(p) for p in (a, a, b, b)] == ["", "", "", ""]  # one that was restarted
    assert [calls(p) for p in (a, b, a)] == ["in-use"] * 3
    assert [parse_notice(line).why for line in gate.said] == ["in-use"]
    gate.now += 66
    assert calls(a) == ""


def test_a_flood_of_refusals_is_a_few_lines_and_few_signatures_are_checked(tmp_path, monkeypatch):
    gate, node, checked, check = Gate(), Node(tmp_path), [], doors._Call.is_signed
    headers = node.headers(gate.now + 60)
    monkeypatch.setattr(doors._Call, "is_signed", lambda call: checked.append(call) or check(call))
    for _ in range(5000):
        gate.why("activate-node", headers, 401)
    assert len(gate.said) == 10
    assert len(checked) == 10
    gate.now += 1
    gate.why("activate-node", headers, 401)
    assert len(gate.said) == 11


@pytest.mark.parametrize(
    "line", ["door x clock +1.0 -", "WARNING door " + "a" * 64 + " clock +1.0 -", "door " + "a" * 64 + " clock +1.0 -\n"]
)
def test_other_lines_of_the_gateway_are_not_taken_for_refusals(line):
    assert parse_notice(line) is None


def test_the_server_says_a_wrong_clock_only_of_a_site_that_stays_away_and_each_thing_once():
    said: list[tuple[str, str]] = []
    refusals = Refusals(lambda e, f: said.append((f["site"], f["cause"])))
    names = {"a" * 64: "alpha", "b" * 64: "beta"}
    for key in ("a" * 64, "b" * 64, "c" * 64):
        refusals.add(Notice(key, "clock", 10.0, "-"), names, 0.0)
    refusals.say({"alpha"}, 1.0)  # it has corrected its stamps
    refusals.say(set(), 6.0)
    assert said == [("beta", "clock")]
    refusals.add(Notice("b" * 64, "clock", 10.0, "-"), names, 20.0)
    refusals.say(set(), 30.0)
    assert said == [("beta", "clock")]
    refusals.add(Notice("b" * 64, "in-use", 0.0, "10.0.0.5"), names, 40.0)
    refusals.say({"beta"}, 40.0)
    assert said[1:] == [("beta", "in-use")]


class Line:
    """A server's end: answers with its time, and refuses stamps that are off."""

    def __init__(self, clock: list[float], ahead_s: float) -> None:
        self.local, self.ahead_s, self.calls = clock, ahead_s, 0
        self.stamps: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls += 1
        assert "stamp" not in request.headers
        request.headers["stamp"] = str(self.local[0] + self.doorman.clock.correction_s())
        server = self.local[0] - self.ahead_s
        age = server - float(request.headers["stamp"])
        self.stamps.append(age)
        return httpx.Response(200 if -5 < age < 305 else 401, headers={TIME_HEADER: f"{server:.3f}"}, request=request)


@pytest.mark.parametrize("ahead_s", [0.0, 4.0, 10.0, -400.0, 86_000.0, -86_000.0])
def test_a_stamp_is_signed_again_once_with_the_servers_time(ahead_s):
    said, clock = [], [1_800_000_000.0]
    line = Line(clock, ahead_s)
    line.doorman = doorman = CallSigner(said.append, process="0" * 16, clock=Clock(lambda: clock[0]))
    for _ in range(3):
        assert doorman.intercept(line, httpx.Request("POST", "https://x/v1/fleet/activate-node")).status_code == 200
    assert line.calls == (3 if -305 < ahead_s < 5 else 4)
    assert said.count("accepted") == 1
    clock[0] += 1000  # its clock was set: the next refusal mends it
    line.ahead_s += 1000
    assert doorman.intercept(line, httpx.Request("POST", "https://x/v1/fleet/pull-messages")).status_code == (
        200 if abs(line.ahead_s) <= 86_400 else 401
    )


def test_a_clock_is_not_corrected_by_more_than_a_day_nor_by_an_answer_that_took_long():
    clock = [1_800_000_000.0]
    found = Clock(lambda: clock[0])
    found.note({TIME_HEADER: str(clock[0] - 90_000)}, sent=clock[0])
    assert (found.ahead_s, found.correction_s()) == (90_000.0, 0.0)
    found.note({TIME_HEADER: str(clock[0])}, sent=clock[0] - 60)
    assert found.ahead_s == 90_000.0
    found.note({TIME_HEADER: str(clock[0])}, sent=clock[0] - 60, late=True)
    assert found.ahead_s == 0.0
    found.note({"date": "Fri, 15 Jan 2027 08:00:00 GMT"}, sent=clock[0])
    assert found.ahead_s == -0.5
    for nonsense in ({}, {TIME_HEADER: "soon"}, {"date": "soon"}, {TIME_HEADER: "nan"}):
        found.note(nonsense, sent=clock[0])
        assert found.ahead_s == -0.5

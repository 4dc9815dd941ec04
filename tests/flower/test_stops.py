"""A server that is stopped, dies, is busy or has no disk left while a run goes on: what whoever follows the run is told."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flower.harness import (
    PATIENCE_S,
    Child,
    Federation,
    descendants,
    environment,
    make_home,
    running,
    stop_run,
    until,
    write_site,
)

from fedlora.core.errors import ConnectionFailed, FedLoRAError
from fedlora.core.events import Event
from fedlora.core.facts import Arm, Other
from fedlora.flower._internals import RunState
from fedlora.flower.coordinator import follow as follow_module
from fedlora.flower.coordinator.follow import attach, start
from fedlora.flower.coordinator.runs import one_start
from fedlora.flower.jobs import Events, Job, Outcome, load_job, load_outcome, new_job, pass_on, save_outcome, save_run_id
from fedlora.flower.server import up
from fedlora.gateway.exposure import free_port

pytestmark = pytest.mark.slow  # to import flwr, that is

flower = pytest.mark.flower


@contextlib.contextmanager
def serving(root: Path, *, sites: bool = False) -> Iterator[Federation]:
    home, audit, listen = root / "home", root / "audit.txt", f"127.0.0.1:{free_port()}"
    if not home.exists():
        make_home(home)
    env = environment(audit)
    file = None
    if sites:
        file, line = write_site(root / "alpha", "alpha", home=home, listen=listen)
        (home / "sites" / "alpha.pub").write_text(f"identity of alpha\n{line}\n")
    with contextlib.ExitStack() as stack:
        server = Child("toy_server.py", str(home), listen, env=env)
        stack.callback(server.end)
        server.wait_for(lambda e, f: e == "listening")
        if file is not None:
            site = Child("toy_site.py", str(file), env=env)
            stack.callback(site.end)
            server.wait_for(lambda e, f: e == "site-online")
        yield Federation(home, listen, audit, env, server)


@dataclass
class Follower:
    """`server start` in a thread: what it reported and how it ended."""

    federation: Federation
    name: str
    resume: bool = False
    events: list = field(default_factory=list)
    error: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            plan = self.federation.plan(self.name)
            start(self.federation.home, plan, resume=self.resume, report=lambda e, f: self.events.append((e, dict(f))))
        except FedLoRAError as e:
            self.error.append(e)

    def said(self, event: str) -> bool:
        return any(e == event for e, _ in self.events)

    def ended(self, timeout_s: float = PATIENCE_S) -> FedLoRAError | None:
        self.thread.join(timeout_s)
        assert not self.thread.is_alive()
        return self.error[0] if self.error else None


@dataclass
class Place:
    """A home whose server comes and goes."""

    root: Path
    stack: contextlib.ExitStack
    federation: Federation = None

    def up(self) -> Federation:
        self.federation = self.stack.enter_context(serving(self.root))
        return self.federation


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    """The next three tests share it, in this order: one leaves the server running, one kills it, one stops the next."""
    with contextlib.ExitStack() as stack:
        yield Place(tmp_path_factory.mktemp("stops"), stack)


@flower
@pytest.mark.fault(
    "E7",
    "`server start` is killed, or a second one is called, while a run goes on",
    says="another run goes on (its name); this one is number 2 in the queue; a second start of the same run follows it",
)
def test_a_second_start_says_at_once_that_another_run_goes_on(place):
    federation = place.up()
    first = Follower(federation, "wait")
    until(lambda: first.said("start"))
    second = Follower(federation, "quick", resume=True)
    until(lambda: second.said("another-run"))
    assert first.thread.is_alive()
    assert second.thread.is_alive()
    assert dict(second.events)["another-run"] == {"name": "wait", "place": 2}
    (run,) = {int(f["name"].split()[1]) for e, f in first.events if e == "process"}
    assert stop_run(federation.home, run)
    assert first.ended().code == "stopped"
    assert second.ended() is None


@flower
@pytest.mark.fault(
    "E6",
    "`server up` is killed, and may come back on another port, while `server start` follows a run",
    says="the server died or was restarted during the run; the resume command",
)
def test_a_server_that_died_leaves_its_follower_with_the_resume_command(place):
    federation = place.federation or place.up()
    follower = Follower(federation, "wait")
    until(lambda: follower.said("start"))
    below = list(descendants(federation.server.process.pid))
    federation.server.process.kill()
    federation.server.process.wait()
    until(lambda: not any(running(p) for p in below))
    error = follower.ended()
    assert isinstance(error, ConnectionFailed)
    assert "during the run" in str(error)
    assert f"fedlora server start {federation.home}" in error.hint
    assert "--resume" in error.hint
    # the way on is one
    follower = Follower(place.up(), "quick", resume=True)
    assert follower.ended() is None


@flower
@pytest.mark.fault(
    "E31",
    "`server up` is stopped in order (SIGTERM, as systemd does) while a run goes on",
    says="`stopped`: the server was stopped during the run; the resume command",
)
def test_a_server_that_is_stopped_says_so_to_who_follows_the_run(place):
    federation = place.federation or place.up()
    follower = Follower(federation, "wait")
    until(lambda: follower.said("start"))
    assert federation.server.end() == 0
    error = follower.ended()
    assert (error.code, error.exit_status) == ("stopped", 1)
    assert "the server was stopped during the run" in str(error)
    assert "fedlora server up" in error.hint
    assert "--resume" in error.hint


@pytest.fixture
def small_disk(tmp_path):
    """HOME/flower on a disk of its own."""
    place = tmp_path / "home" / "flower"
    make_home(tmp_path / "home")
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system of a set size can be mounted here: a disk cannot be filled")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, *, leave: int) -> Path:
    filler = place / "filler"
    disk = os.statvfs(place)
    filler.write_bytes(b"\0" * max(0, disk.f_bavail * disk.f_frsize - leave))
    return filler


@flower
@pytest.mark.fault(
    "E10",
    "the disk of the server's flower/ (relay's database, logs) is full",
    says="`resources`: no space left for HOME/flower, in one sentence; the resume command; log lines are dropped",
)
def test_a_full_disk_at_flower_is_one_sentence(tmp_path, small_disk):
    with serving(tmp_path, sites=True) as federation:
        filler = fill(small_disk, leave=600_000)
        follower = Follower(federation, "full")  # its broadcast of 12 MB has no room
        error = follower.ended()
        assert (error.code, error.exit_status) == ("resources", 7), error
        assert str(error).startswith(f"no space left for {federation.home / 'flower'}")
        assert "--resume" in error.hint
        for line in federation.server.errors:
            assert "Traceback" not in line
            assert "No space left" not in line
        filler.unlink()


def test_the_outcome_of_a_job_is_said_on_a_disk_that_is_full(tmp_path, small_disk):
    home = tmp_path / "home"
    name = new_job(home, Job("/srv/plan.toml", False))
    assert load_outcome(home, name) is None
    events = Events(home, name)
    events(Event.ARM, Arm(name="base", seed=0))
    fill(small_disk, leave=0)
    for number in range(200):
        events(Event.OTHER, Other(name=str(number), facts="x" * 200))  # dropped, and the run goes on
    save_outcome(home, name, Outcome("resources", "no space left " + "x" * 5000, "free some"))
    (small_disk / "filler").unlink()
    events(Event.ARM_DONE, Arm(name="base", seed=0))
    seen = []
    pass_on(home, name, lambda e, f: seen.append(e), offset=0)
    assert (seen[0], seen[-1]) == ("arm", "arm-done")
    assert load_outcome(home, name).code == "resources"


@pytest.mark.parametrize("kind", ["job", "outcome"])
def test_damaged_files_between_the_servers_processes_are_named_or_count_as_missing(tmp_path, kind):
    name = new_job(tmp_path, Job("/srv/plan.toml", True))
    save_outcome(tmp_path, name, Outcome("quorum", "too few", "wait"))
    file = tmp_path / "flower" / "jobs" / f"{name}.{kind}.json"
    whole = file.read_bytes()
    for blob in (b"", whole[:-1], whole.replace(b"plan", b"pl4n").replace(b"quorum", b"quarum"), b"{}", b"\xff" * 40):
        file.write_bytes(blob)
        if kind == "outcome":
            assert load_outcome(tmp_path, name) is None
        else:
            with pytest.raises(FedLoRAError) as error:
                load_job(tmp_path, name)
            assert name in str(error.value)
            assert "start the run again" in error.value.hint


def test_a_damaged_address_is_not_told_as_a_server_that_does_not_run(tmp_path):
    from fedlora.flower.jobs import Address, load_address, save_address

    save_address(tmp_path, Address("127.0.0.1:1", 2))
    file = tmp_path / "flower" / "server.json"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(FedLoRAError, match=r"server\.json is damaged") as error:
        load_address(tmp_path)
    assert "start it again" in error.value.hint


@pytest.mark.parametrize("name", ["tls/ca.crt", "tls/server.crt", "tls/server.key", "superexec.secret", "sites/alpha.pub"])
@pytest.mark.parametrize("how", ["empty", "cut", "bit", "another"])
def test_a_server_with_a_damaged_file_of_the_connection_names_it_and_does_not_start(tmp_path, name, how):
    home = tmp_path / "home"
    make_home(home)
    _, line = write_site(tmp_path / "alpha", "alpha", home=home, listen="127.0.0.1:1")
    (home / "sites" / "alpha.pub").write_text(f"identity of alpha\n{line}\n")
    file = home / name
    whole = bytearray(file.read_bytes())
    if how == "bit":
        whole[len(whole) // 2] ^= 1
    if name == "superexec.secret" and how in ("bit", "another"):
        return  # both of its readers read the same
    file.write_bytes(
        {"empty": b"", "cut": bytes(whole[: len(whole) // 2]), "bit": bytes(whole)}.get(how, b"something else\n" * 9)
    )
    with pytest.raises(FedLoRAError) as error:
        up(home, listen=f"127.0.0.1:{free_port()}", body_limit_bytes=1, report=lambda e, f: None)
    assert file.name in str(error.value)
    assert error.value.hint


def test_attach_waits_for_a_start_that_has_no_number_of_its_run_yet(tmp_path, monkeypatch):
    """It said that the server had died or was restarted."""

    class Ended:
        def runs(self) -> dict[int, RunState]:
            return {7: RunState(7, "running", "", "")}

        def run_state(self, run_id: int) -> RunState:
            return RunState(7, "finished", "completed", "")

    found: list[Path | FedLoRAError] = []

    def follow() -> None:
        try:
            found.append(attach(tmp_path, "toy", report=lambda e, facts: None, poll_s=0.01))
        except FedLoRAError as e:
            found.append(e)

    monkeypatch.setattr(follow_module, "opened", lambda home: contextlib.nullcontext(Ended()))
    (tmp_path / "flower" / "jobs").mkdir(parents=True)
    follower = threading.Thread(target=follow, daemon=True)
    with one_start(tmp_path):
        job = new_job(tmp_path, Job("plan.toml", resume=False, name="toy", digest="d" * 64, made=time.time()))
        follower.start()
        follower.join(0.3)
        save_run_id(tmp_path, job, 7)
    follower.join(20)
    assert found == [tmp_path / "runs" / "toy"]

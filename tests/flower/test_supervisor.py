"""Processes are started, restarted and ended; sleepers stand in for Flower's."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flower.harness import Child, descendants, environment, running, until

from fedlora.core.errors import ConnectionFailed
from fedlora.processes.supervisor import Service, Supervisor, signals

pytestmark = pytest.mark.flower
SLEEP = "import time; print('up', flush=True); time.sleep(300)"


def service(name: str, code: str = SLEEP, **more: object) -> Service:
    return Service(name, [sys.executable, "-c", code], dict(os.environ), **{"ready": lambda: True, **more})


@pytest.fixture
def said() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def supervise(tmp_path: Path, said: list[tuple[str, str]]) -> Iterator[object]:
    made: list[Supervisor] = []

    def make(*services: Service, stop_s: float = 5.0) -> Supervisor:
        made.append(
            Supervisor(services, log_directory=tmp_path, report=lambda e, f: said.append((f["name"], f["state"])), stop_s=stop_s)
        )
        return made[-1]

    yield make
    for supervisor in made:
        supervisor.stop()


def test_processes_start_in_order_and_stop_in_reverse(supervise, said):
    supervisor = supervise(service("one"), service("two"))
    supervisor.start()
    pids = supervisor.pids()
    assert list(pids) == ["one", "two"]
    supervisor.stop()
    assert not [p for p in pids.values() if running(p)]
    steps = [("starting", "ready"), ("stopping", "stopped")]
    expected = [(n, s) for n in ("one", "two") for s in steps[0]] + [(n, s) for n in ("two", "one") for s in steps[1]]
    assert said == expected


def test_what_dies_is_started_again_after_its_pause(supervise, said):
    supervisor = supervise(service("node", after_crash_s=65.0, after_exit_s=1.0))
    supervisor.start()
    first = supervisor.pids()["node"]
    os.kill(first, signal.SIGKILL)
    until(lambda: not running(first))
    supervisor.check(1000.0)
    supervisor.check(1064.9)
    assert supervisor.pids() == {}
    supervisor.check(1065.0)
    assert supervisor.pids()["node"] != first
    assert ("node", "ended with status -9, starts again in 65 s") in said


def test_after_a_good_end_the_pause_is_short(supervise, tmp_path):
    ends = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); print('up', flush=True); time.sleep(300)"
    supervisor = supervise(service("node", ends, after_crash_s=65.0, after_exit_s=1.0))
    supervisor.start()
    pid = supervisor.pids()["node"]
    log = tmp_path / "node.log"
    until(lambda: log.exists() and "up" in log.read_text())  # it listens to signals
    os.kill(pid, signal.SIGTERM)
    until(lambda: not running(pid))
    supervisor.check(1000.0)
    supervisor.check(1000.9)
    assert supervisor.pids() == {}
    supervisor.check(1001.0)
    assert list(supervisor.pids()) == ["node"]


@pytest.mark.fault(
    "E14",
    "a process ends at once, again and again, with status 0",
    says="the line of its log that matters, once; longer and longer pauses",
)
def test_what_ends_again_and_again_is_not_silent_and_not_restarted_every_second(supervise, said):
    ends = "print('ERROR :     the clock is wrong'); print('SuperNode terminated gracefully.')"
    supervisor = supervise(service("node", ends, after_exit_s=1.0, ready_s=0))
    supervisor.start()
    now, pauses = 0.0, []
    for _ in range(8):
        until(lambda: not running(supervisor.pids()["node"]))
        supervisor.check(now)
        assert supervisor.pids() == {}
        before = now
        while not supervisor.pids():
            now += 0.5
            supervisor.check(now)
        pauses.append(now - before)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    states = [s for _, s in said]
    assert states.count("starting") == 1
    assert [s for s in states if "the clock is wrong" in s] == ["ended with status 0 (the clock is wrong), starts again in 1 s"]


def test_a_process_that_was_well_for_a_minute_begins_with_the_shortest_pause_again(supervise):
    supervisor = supervise(service("node", after_crash_s=2.0))
    supervisor.start()
    now = time.monotonic()
    for lived, pause in ((0.0, 2.0), (1.0, 4.0), (61.0, 2.0)):
        now += lived
        os.kill(supervisor.pids()["node"], signal.SIGKILL)
        pid = supervisor.pids()["node"]
        until(lambda pid=pid: not running(pid))
        supervisor.check(now)
        supervisor.check(now + pause - 0.1)
        assert supervisor.pids() == {}
        now += pause
        supervisor.check(now)
        assert list(supervisor.pids()) == ["node"]


def test_a_listener_that_fails_does_not_stop_the_process_it_listens_to(supervise, tmp_path):
    chatter = "for i in range(20_000): print(str(i) * 10)\nopen('done', 'w').close()\nimport time; time.sleep(300)"

    def fails(line: str) -> None:
        raise ValueError(line)

    supervise(service("chatter", f"import os; os.chdir({str(tmp_path)!r})\n" + chatter, on_line=fails)).start()
    until((tmp_path / "done").exists)


def test_one_that_does_not_get_ready_stops_the_others(supervise, said):
    supervisor = supervise(service("one"), service("two", ready=lambda: False, ready_s=0.3))
    with pytest.raises(ConnectionFailed, match="two was not ready"):
        supervisor.start()
    assert supervisor.pids() == {}
    assert said[-1] == ("one", "stopped")


def test_one_that_ends_at_once_is_named_with_its_log(supervise):
    with pytest.raises(ConnectionFailed, match="status 3") as error:
        supervise(service("one", "raise SystemExit(3)", ready=lambda: False)).start()
    assert "one.log" in error.value.hint


def test_one_that_will_not_stop_is_killed(supervise, said, tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)"
    log = tmp_path / "deaf.log"
    supervisor = supervise(service("deaf", deaf, ready=lambda: log.exists() and "deaf" in log.read_text()), stop_s=0.3)
    supervisor.start()
    pid = supervisor.pids()["deaf"]
    supervisor.stop()
    assert not running(pid)
    assert ("deaf", "killed: did not stop within 0.3 s") in said


def test_a_log_is_kept_for_its_owner_only(supervise, tmp_path):
    log = tmp_path / "one.log"
    supervise(service("one", ready=lambda: log.exists() and log.read_text() == "up\n")).start()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_log_does_not_grow_for_ever(supervise, tmp_path):
    chatter = "for i in range(400_000): print(str(i) * 10)\nimport time; time.sleep(300)"
    supervise(service("chatter", chatter)).start()
    until(lambda: (tmp_path / "chatter.log.1").exists())
    until(lambda: (tmp_path / "chatter.log").exists())
    assert (tmp_path / "chatter.log.1").stat().st_size <= 8 << 20
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.glob("chatter.log*")} == {0o600}


def test_grandchildren_go_with_their_parent_and_all_with_the_supervisor(tmp_path):
    child = Child("toy_supervised.py", str(tmp_path), env=environment(tmp_path / "audit"))
    child.wait_for(lambda e, f: e == "pids")
    until(lambda: len(descendants(child.process.pid)) == 2)
    pids = list(descendants(child.process.pid))
    supervised = child.events[0][1]["sleeper"]
    os.kill(child.process.pid, signal.SIGKILL)  # no chance to stop anything
    child.process.wait()
    try:
        until(lambda: not running(supervised))
    finally:
        for pid in pids:
            if running(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_signal_sets_what_it_should_and_the_old_handler_comes_back():
    before, stop = signal.getsignal(signal.SIGTERM), threading.Event()
    with signals(stop.set):
        os.kill(os.getpid(), signal.SIGTERM)
        until(stop.is_set)
    assert signal.getsignal(signal.SIGTERM) is before
